import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from onebase_adapters.store import AdapterStore
from onebase_server.cli import app

Onebase = Callable[..., Result]


@pytest.fixture
def onebase_tune(tiny_base: Path, write_jsonl: Callable[..., Path], tmp_path: Path) -> Onebase:
    """Run `onebase tune` for one short epoch on one example, or on the lines given."""

    def run(*options: object, lines: tuple[object, ...] = ({"prompt": "who?", "completion": "me"},)) -> Result:
        files = ("--base", tiny_base, "--data", write_jsonl(*lines), "--output", tmp_path / "pirate")
        return CliRunner().invoke(app, ["tune", *map(str, (*files, "--epochs", 1, *options))])

    return run


def test_an_adapter_is_published_into_a_store_that_is_made_for_it(onebase_tune: Onebase, tmp_path: Path) -> None:
    result = onebase_tune(
        "--rank", 4, "--targets", "v_proj, q_proj", "--publish", "pirate", "--store", tmp_path / "new"
    )
    assert result.exit_code == 0, result.output
    store = AdapterStore.open(tmp_path / "new")
    published = store.resolve("pirate")
    store.close()
    assert (published.version, published.rank, published.targets) == (1, 4, ("q_proj", "v_proj"))


def test_a_wrong_line_is_an_error_of_one_sentence_and_nothing_is_written(onebase_tune: Onebase, tmp_path: Path) -> None:
    result = onebase_tune("--publish", "pirate", "--store", tmp_path / "new", lines=({"prompt": "who?"},))
    assert result.exit_code == 1
    assert "line 1: completion: Field required." in result.stderr
    assert not (tmp_path / "pirate").exists()
    assert not (tmp_path / "new").exists()


def test_without_the_extra_it_says_what_to_install(onebase_tune: Onebase, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("onebase_server.tuning")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "peft", None)  # what `import peft` finds when it is not installed
    result = onebase_tune()
    assert result.exit_code == 1
    assert "(peft): pip install 'onebase[tune]'" in result.stderr


def test_without_bitsandbytes_it_says_how_to_do_without(onebase_tune: Onebase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = onebase_tune()
    assert result.exit_code == 1
    assert "needs the package bitsandbytes, which is not installed; with `--quantization none`" in result.stderr


def test_a_package_that_a_quantised_base_needs_is_named(
    onebase_tune: Onebase, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tiny_base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    result = onebase_tune()
    assert result.exit_code == 1
    assert "cannot be loaded: Using `bitsandbytes` 4-bit quantization requires bitsandbytes" in result.stderr


def test_a_server_that_is_not_there_leaves_the_adapter_in_its_directory(onebase_tune: Onebase, tmp_path: Path) -> None:
    result = onebase_tune("--publish", "pirate", "--server", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr
    assert (tmp_path / "pirate" / "adapter_model.safetensors").is_file()
