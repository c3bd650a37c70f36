"""The error of quantisation: measured when the cached form is made, kept beside it, unknown for what came quantised."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from transformers import PreTrainedModel

from onebase_server.model.weight_report import ERRORS_FILE, LinearError, QuantizationError
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

MakeModel = Callable[..., PreTrainedModel]
MakeSettings = Callable[..., EngineSettings]


def test_it_is_that_of_the_weights_that_bitsandbytes_would_compute_with(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    model = make_model("llama")
    error = load_decoder(tmp_path / "model", engine_settings()).weights.report().error
    assert error is not None
    norms, relative = torch.zeros(2), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes, state = bnb.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            lost = (bnb.dequantize_4bit(codes, state) - module.weight.data).norm()
            norms += torch.tensor([lost**2, module.weight.data.norm() ** 2])
            relative[name] = float(lost / module.weight.data.norm())
    assert error.relative == pytest.approx(float((norms[0] / norms[1]).sqrt()), rel=1e-4)
    worst = sorted(relative, key=relative.__getitem__, reverse=True)[: len(error.worst)]
    assert [linear.name for linear in error.worst] == worst
    assert [linear.relative for linear in error.worst] == pytest.approx([relative[name] for name in worst], rel=1e-4)


def test_a_later_start_tells_the_same_without_measuring(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    first, second = (load_decoder(tmp_path / "model", engine_settings()).weights.report() for _ in range(2))
    assert first == second


def test_of_a_checkpoint_that_came_quantised_it_is_unknown(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    load_decoder(tmp_path / "model", engine_settings())
    (quantised,) = (path for path in (tmp_path / "cache" / "nf4").iterdir() if path.is_dir())
    (quantised / ERRORS_FILE).unlink()
    report = load_decoder(quantised, engine_settings()).weights.report()
    assert report.is_quantized
    assert report.error is None


def test_an_unquantised_base_has_none(make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path) -> None:
    make_model("llama")
    report = load_decoder(tmp_path / "model", engine_settings(quantization="none")).weights.report()
    assert not report.is_quantized
    assert report.error is None


def test_linears_count_by_the_size_of_their_weights() -> None:
    large, small, zero = LinearError("large", 3.0, 30.0), LinearError("small", 4.0, 8.0), LinearError("zero", 0.0, 0.0)
    error = QuantizationError.of([large, small, zero])
    assert error.relative == pytest.approx(5 / (30**2 + 8**2) ** 0.5)
    assert error.worst == (small, large, zero)
