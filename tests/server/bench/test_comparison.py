"""`onebase bench compare` against a real server of a tiny base, under several names."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from onebase_server.bench.comparison import compare
from onebase_server.bench.dialects import Served
from onebase_server.bench.load import Load
from onebase_server.bench.own_server import OwnServer
from onebase_server.bench.prompts import TokenIdPrompts
from onebase_server.bench.server_choice import ServerChoice
from onebase_server.bench.target import ServedAdapters, Target, running_target
from onebase_server.cli import app

VOCAB_SIZE = 400
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def target(own_server: OwnServer) -> Target:
    """A server with an adapter."""
    own_server.adapters.names(1, [2])
    return running_target(ServerChoice(url=own_server.url, vocab_size=VOCAB_SIZE), Load())


@pytest.fixture
def onebase_compare(tmp_path: Path) -> Callable[..., Result]:
    """Run `onebase bench compare` on short requests; results go to `tmp_path`."""

    def run(*options: object) -> Result:
        short = ("--prompt-tokens", 8, "--output-tokens", 6, "--warm-up", 1, "--runs", 2, "--vocab-size", VOCAB_SIZE)
        arguments = ("compare", *short, "--settle", 0, "--output", tmp_path, *options)
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *map(str, arguments)])

    return run


def short_load(**traits: object) -> Load:
    defaults = {"concurrency": 1, "requests": 1, "prompt_tokens": 8, "output_tokens": 2, "popularity": "none"}
    return Load.model_validate(defaults | {"warm_up": 0, "runs": 2} | traits)


def test_each_load_gives_each_server_a_ratio_to_the_first(
    onebase_compare: Callable[..., Result], own_server: OwnServer, tmp_path: Path
) -> None:
    own_server.adapters.names(2, [2, 4])
    servers = [f"first={own_server.url},pid={own_server.pid}", f"second={own_server.url}", f"third={own_server.url}"]
    options = [option for server in servers for option in ("--server", server)]
    result = onebase_compare(*options, "--adapters", 2, "--loads", "2:none,1:distinct")
    assert result.exit_code == 0, result.output

    (file,) = tmp_path.glob("*-compare.json")
    plain, distinct = json.loads(file.read_text())["comparisons"]
    assert [plain["name"], distinct["name"]] == ["2:none", "1:distinct"]
    speeds = {name: server["median"]["output_tokens_per_second"] for name, server in plain["servers"].items()}
    assert list(speeds) == ["first", "second", "third"]
    assert plain["servers"]["first"]["ratio"] is None
    assert plain["servers"]["third"]["ratio"] == pytest.approx(speeds["first"] / speeds["third"])
    assert plain["best_other"] == max(["second", "third"], key=lambda name: speeds[name])
    assert plain["servers"]["first"]["load"]["requests"] == 4  # two for each stream
    assert plain["servers"]["first"]["memory"]["rss"] > 50 << 20
    assert "first is" in result.output
    assert "best other" in result.output
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_server_with_too_few_adapters_is_left_out_of_the_loads_that_need_them(target: Target) -> None:
    bare = replace(target, adapters=ServedAdapters(Served(target.model, ())))
    loads = [short_load(), short_load(popularity="same", adapters=1)]
    plain, same = compare({"full": target, "bare": bare}, loads, 0)
    assert list(plain.measurements) == ["full", "bare"]
    assert list(same.measurements) == ["full"]
    assert any("1:same, bare: left out. The server has 0 adapters" in note for note in same.notes)


def test_runs_alternate_between_the_servers(target: Target) -> None:
    (comparison,) = compare({"a": target, "b": target}, [short_load()], 0)
    sent = [(answer.sent_at, name) for name, one in comparison.measurements.items() for answer in one.answers]
    assert [name for _, name in sorted(sent)] == ["a", "b", "a", "b"]


@dataclass(frozen=True)
class NotedPrompts(TokenIdPrompts):
    """Keeps what it drew."""

    drawn: list[tuple[int, ...]] = field(default_factory=list)

    def draw(self, prefix: np.random.Generator, rest: np.random.Generator, shared: int, length: int) -> list[int]:
        prompt = super().draw(prefix, rest, shared, length)
        self.drawn.append(tuple(prompt))
        return prompt


def test_the_servers_are_left_alone_before_each_run(target: Target) -> None:
    (comparison,) = compare({"a": target, "b": target}, [short_load(runs=1)], 0.2)
    (first,), (second,) = (one.answers for one in comparison.measurements.values())
    assert second.sent_at - first.ended_at > 0.2


def test_servers_get_the_same_prompts_and_no_two_loads_share_one(target: Target) -> None:
    prompts = {name: NotedPrompts(range(VOCAB_SIZE)) for name in ("a", "b")}
    targets = {name: replace(target, prompts=noted) for name, noted in prompts.items()}
    list(compare(targets, [short_load(), short_load(concurrency=2, requests=2)], 0))
    assert prompts["a"].drawn == prompts["b"].drawn
    assert len(set(prompts["a"].drawn)) == len(prompts["a"].drawn) == 2 * (1 + 2)


@pytest.mark.parametrize("warm_up", [0, 1])
def test_a_server_that_answers_nothing_is_left_out_and_the_others_are_measured(target: Target, warm_up: int) -> None:
    (comparison,) = compare({"dead": replace(target, url=NOBODY), "alive": target}, [short_load(warm_up=warm_up)], 0)
    assert list(comparison.measurements) == ["alive"]
    assert "Not one request was answered" in comparison.left_out["dead"]
    assert (comparison.ratios, comparison.best_other) == ({}, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server", f"a={NOBODY}"], f"{NOBODY} does not say what it serves"),
        (["--server", f"a={NOBODY}", "--loads", "16:all"], "--loads is wrong"),
        (["--server", "a"], "--server a is not NAME=URL"),
    ],
)
def test_what_is_wrong_with_a_flag_is_one_sentence(
    onebase_compare: Callable[..., Result], options: list[str], message: str
) -> None:
    result = onebase_compare(*options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
