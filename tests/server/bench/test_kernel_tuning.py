"""`onebase bench kernels --tune`; in Triton's interpreter the times mean nothing, but the file does."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import onebase_kernels as kernels
from onebase_server.bench.kernels import timing
from onebase_server.cli import app

plans = pytest.importorskip("onebase_kernels.triton.plans", reason="Triton has no wheels for this platform")


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


def test_only_the_triton_kernels_have_plans(word_base: Path, tmp_path: Path) -> None:
    result = tune("--base", word_base, "--kernels", "reference", "--output", tmp_path)
    assert result.exit_code == 1
    assert "--tune is for the kernels `triton`, and `reference` would compute." in result.output
    assert not list(tmp_path.iterdir())
