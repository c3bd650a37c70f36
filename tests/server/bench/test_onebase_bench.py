"""`onebase bench` against a real server of a tiny base."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import Result

from onebase_server.bench.own_server import OwnServer, kv_cache_bytes
from onebase_server.bench.random_adapters import num_parameters
from onebase_server.model.config import ModelConfig

Bench = Callable[..., Result]

PNG = b"\x89PNG"


def results(directory: Path, kind: str) -> dict[str, Any]:
    (file,) = (directory / "results").glob(f"*-{kind}.json")
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def servers_of(base: Path) -> set[int]:
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if str(base) in child.cmdline()}


def test_it_starts_a_server_measures_it_and_stops_it(
    onebase_bench: Bench, word_base: Path, serve_flags: str, tmp_path: Path
) -> None:
    before = servers_of(word_base)
    result = onebase_bench("--base", word_base, "--serve-flags", serve_flags, "--adapters", 3, "--ranks", "2,4")
    assert result.exit_code == 0, result.output
    written = results(tmp_path, "load")
    assert written["median"]["output_tokens"] == 4 * 6
    assert written["median"]["prompt_tokens"] == 4 * 8
    assert written["median"]["failures"] == 0
    assert written["memory"]["rss"] > 50 << 20
    assert sum(written["memory"]["parts"].values()) == pytest.approx(written["memory"]["rss"], rel=0.05)
    assert "Memory by part" in result.output
    assert (written["load"]["adapters"], written["load"]["seed"]) == (3, 0)
    assert written["random_adapters"] == {"ranks": [2, 4], "targets": []}
    assert {"python", "torch", "onebase"} <= set(written["versions"])
    (plot,) = (tmp_path / "results").glob("*-load.png")
    assert plot.read_bytes().startswith(PNG)
    assert "output tokens/s" in result.output
    assert "client cpu seconds" in result.output
    assert servers_of(word_base) == before


def test_it_measures_a_running_server_and_its_adapters(
    onebase_bench: Bench, own_server: OwnServer, word_base: Path, tmp_path: Path
) -> None:
    own_server.adapters.names(2, [2, 4])
    options = ("--prompt-form", "text", "--tokenizer", word_base, "--popularity", "zipf", "--adapters", 2)
    result = onebase_bench("--url", f"{own_server.url}/v1", "--server-pid", own_server.pid, *options)
    assert result.exit_code == 0, result.output
    written = results(tmp_path, "load")
    assert written["random_adapters"] is None
    assert written["server"] == {"url": own_server.url, "model": own_server.base_name, "command": None}
    assert written["median"]["prompt_tokens"] == 4 * 8
    assert own_server.pid in [process["pid"] for process in written["memory"]["processes"]]
    assert written["median"]["failures"] == 0


def test_more_adapters_than_the_server_has_are_refused(onebase_bench: Bench, own_server: OwnServer) -> None:
    result = onebase_bench("--url", own_server.url, "--adapters", 99)
    assert result.exit_code == 1
    assert "the load asks for 99" in result.output


def test_what_the_server_refuses_is_told(onebase_bench: Bench, own_server: OwnServer) -> None:
    result = onebase_bench("--url", own_server.url, "--popularity", "none", "--vocab-size", 30000)
    assert result.exit_code == 1
    assert "Not one request was answered. The first failure: HTTP 400" in result.output


def test_scale_measures_each_number_of_adapters_and_each_rank(
    onebase_bench: Bench, word_base: Path, serve_flags: str, tmp_path: Path
) -> None:
    options = ("--counts", "3,1", "--adapters", 2, "--ranks", "2,4", "--base", word_base, "--serve-flags", serve_flags)
    result = onebase_bench(*options, subcommand=["scale"])
    assert result.exit_code == 0, result.output
    by_count, by_rank = results(tmp_path, "scale")["series"]
    assert (by_count["varied"], [point["value"] for point in by_count["points"]]) == ("adapters", [1, 3])
    assert (by_rank["varied"], [point["value"] for point in by_rank["points"]]) == ("rank", [2, 4])
    assert [point["load"]["adapters"] for point in by_count["points"] + by_rank["points"]] == [1, 3, 2, 2]
    assert by_count["points"][0]["load"]["popularity"] == "zipf"
    plots = sorted(path.name.split("-scale-")[1] for path in (tmp_path / "results").glob("*.png"))
    assert plots == ["adapters.png", "rank.png"]


def test_scale_refuses_what_there_cannot_be_before_it_measures(
    onebase_bench: Bench, own_server: OwnServer, tmp_path: Path
) -> None:
    own_server.adapters.names(1, [2])
    result = onebase_bench("--counts", "1,99", "--url", own_server.url, subcommand=["scale"])
    assert result.exit_code == 1
    assert "the load asks for 99" in result.output
    assert not list((tmp_path / "results").glob("*.json"))


def test_the_kv_cache_has_room_for_all_requests_of_a_load(word_base: Path) -> None:
    config = ModelConfig.from_directory(word_base)
    token = kv_cache_bytes(config, 1, 1) // 17
    assert kv_cache_bytes(config, 3, 100) == 3 * (100 + 16) * token
    assert kv_cache_bytes(config, 1000, 100) == 64 * (100 + 16) * token, "no more of them run at once"


def test_random_adapters_are_the_same_for_the_same_seed_and_have_the_rank_asked_for(own_server: OwnServer) -> None:
    store, source = own_server.adapters.store, own_server.adapters
    names = source.names(3, [2, 4])
    assert source.names(3, [2, 4]) == names
    assert [store.resolve(name).rank for name in names] == [2, 4, 2]
    assert all(len(store.versions(name)) == 1 for name in names)
    assert len({store.resolve(name).digest for name in names}) == 3
    assert set(store.resolve(names[0]).targets) == set(own_server.config.adapter_layout().shapes)
    assert num_parameters(own_server.config, 4) == 2 * num_parameters(own_server.config, 2)


def test_random_adapters_change_the_named_linears_alone(own_server: OwnServer) -> None:
    store, config = own_server.adapters.store, own_server.config
    (name,) = replace(own_server.adapters, seed=7, targets=("q_proj", "v_proj"), _published=set()).names(1, [6])
    version = store.resolve(name)
    assert set(version.targets) == {"q_proj", "v_proj"}
    assert version.num_parameters == num_parameters(config, 6, ["q_proj", "v_proj"]) < num_parameters(config, 6)


def test_a_linear_that_the_base_has_not_is_refused(onebase_bench: Bench, word_base: Path) -> None:
    result = onebase_bench("--base", word_base, "--targets", "q_proj,key")
    assert result.exit_code == 1
    assert "The base has no key to adapt; it has q_proj" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--url of a running one, or --demo or --base"),
        (["--demo", "--url", "http://127.0.0.1:9"], "--url of a running one, or --demo or --base"),
        (["--url", "127.0.0.1:9"], "--url is wrong: it has to begin with http://"),
        (["--url", "http://127.0.0.1:9"], "does not say what it serves"),
        (["--base", "/not/there"], "--base /not/there is not a directory"),
        (["--demo", "--rate", "1"], "give one"),
        (["--demo", "--ranks", "8,x"], "--ranks is wrong"),
    ],
)
def test_what_is_wrong_with_a_flag_is_one_sentence(onebase_bench: Bench, options: list[str], message: str) -> None:
    result = onebase_bench(*options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_server_that_does_not_start_tells_why(onebase_bench: Bench, word_base: Path) -> None:
    result = onebase_bench("--base", word_base, "--serve-flags", "--kv-cache-memory lots")
    assert result.exit_code == 1
    assert "The server did not start." in result.output
    assert "--kv-cache-memory (or ONEBASE_KV_CACHE_MEMORY) is wrong" in result.output


def test_flags_before_the_subcommand_are_refused_rather_than_lost(onebase_bench: Bench) -> None:
    result = onebase_bench("scale")
    assert result.exit_code == 1
    assert "--requests" in result.output
    assert "must stand behind the subcommand" in result.output


def test_without_the_extra_it_says_what_to_install(onebase_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what `import matplotlib` finds when it is not installed
    result = onebase_bench("--demo")
    assert result.exit_code == 1
    assert "(matplotlib): pip install 'onebase[bench]'" in result.output
