from pathlib import Path

import pytest
from typer.testing import CliRunner

from onebase_server.cli import app
from onebase_server.commands.settings_flags import read_settings
from onebase_server.errors import ConfigurationError
from onebase_server.model.hub import resolve_base
from onebase_server.serving import with_local_base
from onebase_server.settings import Settings


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch, tmp_path):
    """No onebase.toml of the working directory, no ONEBASE_* of the caller."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ONEBASE_{name.upper()}", raising=False)


def test_every_setting_but_the_keys_is_a_flag():
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["serve", "--help"]).output
    missing = {name for name in Settings.model_fields if f"--{name.replace('_', '-')}" not in shown}
    assert missing == {"api_key", "admin_key"}


def test_flags_come_before_the_environment_and_that_before_the_file(monkeypatch, tmp_path):
    (tmp_path / "onebase.toml").write_text('base = "file"\nport = 1\nblock_size = 8\n')
    monkeypatch.setenv("ONEBASE_PORT", "2")
    monkeypatch.setenv("ONEBASE_MAX_WAITING", "5")
    settings = read_settings({"port": 3, "base": None})
    assert (settings.port, settings.base, settings.block_size, settings.max_waiting) == (3, "file", 8, 5)


def test_sizes_are_read_as_people_write_them():
    assert read_settings({"base": "x", "kv_cache_memory": "256MiB"}).kv_cache_memory == 256 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--base (or ONEBASE_BASE) is needed."),
        (["--base", "x", "--port", "99999"], "--port (or ONEBASE_PORT) is wrong"),
        (["--base", "x", "--adapter-memory", "lots"], "--adapter-memory (or ONEBASE_ADAPTER_MEMORY) is wrong"),
        (["--base", "x", "--host", "0.0.0.0"], "without ONEBASE_API_KEY and ONEBASE_ADMIN_KEY"),
        (["--base", "/not/there"], "/not/there is neither a directory on this machine nor a hub id"),
    ],
)
def test_what_is_wrong_with_a_setting_is_one_sentence(arguments, message):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_file_that_is_no_toml_is_named(tmp_path):
    (tmp_path / "onebase.toml").write_text("base =")
    with pytest.raises(ConfigurationError, match=r"onebase\.toml"):
        read_settings({})


def test_a_local_directory_is_used_as_it_is(tmp_path):
    settings = with_local_base(Settings(base=str(tmp_path)))
    assert (settings.base, settings.served_name) == (str(tmp_path), tmp_path.name)
    with pytest.raises(ConfigurationError, match="--revision"):
        resolve_base(str(tmp_path), "main", tmp_path)


def test_a_hub_id_that_is_in_the_cache_needs_no_internet(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match="Without internet"):
        resolve_base("org/model", None, tmp_path)
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--org--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    assert resolve_base("org/model", None, tmp_path) == Path(snapshot)
    settings = with_local_base(Settings(base="org/model", cache_dir=tmp_path))
    assert (settings.base, settings.served_name) == (str(snapshot), "org/model")
