"""`onebase bench kernels --tune`; in Triton's interpreter the times mean nothing, but the file does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import onebase_kernels as kernels
from onebase_server.bench.kernels import timing
from onebase_server.cli import app

plans = pytest.importorskip("onebase_kernels.triton.plans", reason="Triton has no wheels for this platform")
tuning = pytest.importorskip("onebase_server.bench.kernels.tuning", reason="Triton has no wheels for this platform")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "MEASUREMENT_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("onebase_server.bench.kernels.measure.last_level_cache_bytes", lambda _: 1 << 10)
    yield
    kernels.use_backend("reference")


def tune(*options: object):
    arguments = ("bench", "kernels", "--tune", "--repeats", 1, "--rows", "3,20", *options)
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, list(map(str, arguments)))


def test_the_file_is_a_plan_file_with_a_plan_for_each_shape_and_tile(word_base: Path, tmp_path: Path) -> None:
    result = tune("--base", word_base, "--kernels", "triton", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("*-plans.json")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    measured = plans.read_plans(file, gpu, plans.triton.__version__)
    # Of word_base's groups qkv has 32 outputs for k and v, which are no tiles.
    assert set(measured) == {(n, k, rows) for n, k in ((64, 64), (256, 64), (64, 128)) for rows in (16, 32)}


def test_a_cut_that_cannot_be_launched_is_left_out(
    word_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory = plans.triton.OutOfResources(300_000, 232_448, "shared memory")
    raise_on(monkeypatch, lambda n, plan: plan.block_n == 128, out_of_memory)
    result = tune("--base", word_base, "--kernels", "triton", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert {entry["block_n"] for entry in written_plans(tmp_path) if entry["n"] == 256} == {64}


def test_a_product_that_cannot_be_launched_at_all_is_one_sentence_after_what_was_tuned(
    word_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_on(monkeypatch, lambda n, plan: n == 256, RuntimeError("CUDA error: invalid argument"))
    result = tune("--base", word_base, "--kernels", "triton", "--output", tmp_path)
    assert result.exit_code == 1
    assert "No cut of the product of 16 rows and weights [256, 64] can be launched here." in result.output
    assert [(entry["n"], entry["block_m"]) for entry in written_plans(tmp_path)] == [(64, 16), (64, 32)]


def test_only_the_fastest_are_measured_as_often_as_was_asked_for(
    word_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, int]] = []
    time_interleaved = timing.time_interleaved

    def noting(contenders, steps, repeats, *how):
        measured.append((len(contenders), repeats))
        return time_interleaved(contenders, steps, repeats, *how)

    monkeypatch.setattr(timing, "time_interleaved", noting)
    monkeypatch.setattr(tuning, "processors_of", lambda device: 1)
    monkeypatch.setattr(tuning, "FINALISTS", 1)
    tune("--base", word_base, "--kernels", "triton", "--output", tmp_path, "--repeats", 4)
    sieved, finals = measured[::2], measured[1::2]
    assert {repeats for _, repeats in sieved} == {tuning.SIEVE_REPEATS}
    assert max(number for number, _ in sieved) > 2
    assert set(finals) <= {(1, 4), (2, 4)}  # the fastest, and what would have been taken


def raise_on(monkeypatch: pytest.MonkeyPatch, is_refused: Callable[..., bool], error: Exception) -> None:
    """Have the launch of such a plan, of a product of n outputs, raise an error."""
    launch = tuning.fused_linear

    def fused_linear(x, packed, bias, plan):
        if is_refused(packed.out_features, plan):
            raise error
        return launch(x, packed, bias, plan)

    monkeypatch.setattr(tuning, "fused_linear", fused_linear)


def written_plans(directory: Path) -> list[dict[str, int]]:
    (file,) = directory.iterdir()
    return json.loads(file.read_text())["plans"]


def test_only_the_triton_kernels_have_plans(word_base: Path, tmp_path: Path) -> None:
    result = tune("--base", word_base, "--kernels", "reference", "--output", tmp_path)
    assert result.exit_code == 1
    assert "--tune is for the kernels `triton`, and `reference` would compute." in result.output
    assert not list(tmp_path.iterdir())
