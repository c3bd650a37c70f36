"""Every way to quantise a base: logits, cached forms, checkpoints of others, bits, and what is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import onebase_kernels as kernels
from onebase_kernels import dequantize
from onebase_server.errors import ConfigurationError
from onebase_server.model.checkpoint import Checkpoint
from onebase_server.model.decoder import Decoder
from onebase_server.model.weight_formats import Quantization
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

MakeModel = Callable[..., PreTrainedModel]
MakeSettings = Callable[..., EngineSettings]

TOKENS = list(range(20))
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4"},
    "fp4": {"quantization": "fp4"},
    "fp4, scales in fp32": {"quantization": "fp4", "double_quant": False},
    "int4, groups of 32": {"quantization": "int4", "group_size": 32},
    "int4, groups of 64": {"quantization": "int4", "group_size": 64},
    "int8": {"quantization": "int8"},
}
every_quantization = pytest.mark.parametrize("options", QUANTIZATIONS.values(), ids=QUANTIZATIONS)


@pytest.fixture(autouse=True, scope="module")
def served_backend() -> Iterator[None]:
    """The ops that a server computes with by default."""
    kernels.use_backend("auto")
    yield
    kernels.use_backend("reference")


def cached_checkpoint(tmp_path: Path) -> Path:
    (directory,) = (path for path in (tmp_path / "cache").glob("*/*") if path.is_dir())
    return directory


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def logits_with_rounded_linears(model: PreTrainedModel, quantization: Quantization) -> Tensor:
    """Of Transformers, each linear of the layers replaced by what its quantised form stands for."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = dequantize(quantization.quantize(name, module.weight.data), torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([TOKENS])).logits[0]


@every_quantization
def test_logits_are_those_of_transformers_with_the_rounded_weights(
    options: dict[str, Any],
    make_model: MakeModel,
    engine_settings: MakeSettings,
    logits_of: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    model, settings = make_model("llama"), engine_settings(**options)
    quantization = Quantization.of(settings)
    assert quantization is not None
    expected = logits_with_rounded_linears(model, quantization)
    decoder = load_decoder(tmp_path / "model", settings)
    for chunks in ([20], [7, 1, 12], [18, 1, 1]):
        assert relative_error(logits_of(decoder, TOKENS, chunks), expected) < 1e-4


@every_quantization
def test_the_cached_form_is_a_checkpoint_that_is_used_as_it_is(
    options: dict[str, Any],
    make_model: MakeModel,
    engine_settings: MakeSettings,
    logits_of: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    make_model("llama")
    ours = load_decoder(tmp_path / "model", engine_settings(**options))
    again = load_decoder(cached_checkpoint(tmp_path), engine_settings(cache_dir=tmp_path / "unused"))
    assert again.config.quantization == options["quantization"]
    assert torch.equal(logits_of(again, TOKENS), logits_of(ours, TOKENS))
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"quantization": "nf4"}, 4.127),
        ({"quantization": "fp4", "double_quant": False}, 4.5),
        ({"quantization": "int4", "group_size": 32}, 5.5),
        ({"quantization": "int4"}, 4.75),
        ({"quantization": "int4", "group_size": 128}, 4.375),
        ({"quantization": "int8"}, 8.1),
        ({"quantization": "none"}, 32),
    ],
    ids=str,
)
def test_the_report_has_the_bits_of_a_parameter(
    options: dict[str, Any], bits: float, make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama", hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=1)
    decoder = load_decoder(tmp_path / "model", engine_settings(**options))
    assert decoder.weights.report().bits_per_parameter == pytest.approx(bits, abs=0.1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
        ("fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("int8", {"load_in_8bit": True}),
    ],
)
def test_what_bitsandbytes_has_quantised_and_saved_is_what_we_quantise(
    kind: str,
    options: dict[str, Any],
    make_model: MakeModel,
    engine_settings: MakeSettings,
    logits_of: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    make_model("llama", dtype=torch.float16)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs", engine_settings(cache_dir=tmp_path / "unused"))
    double_quant = "bnb_4bit_use_double_quant" in options
    ours = load_decoder(tmp_path / "model", engine_settings(quantization=kind, double_quant=double_quant))
    assert decoder.config.quantization == kind
    assert torch.equal(logits_of(decoder, TOKENS), logits_of(ours, TOKENS))
    assert not (tmp_path / "unused").exists()


def test_a_linear_whose_inputs_make_no_whole_groups_is_named(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    with pytest.raises(ConfigurationError) as error:
        load_decoder(tmp_path / "model", engine_settings(quantization="int4", group_size=128))
    assert error.value.message == (
        "model.layers.0.self_attn.q_proj cannot be quantised to int4: 64 inputs are no multiple of the group size 128. "
        "Choose a smaller --group-size or another --quantization."
    )
    assert not list((tmp_path / "cache").glob("*/*/"))


def test_groups_of_other_sizes_are_refused(engine_settings: MakeSettings) -> None:
    with pytest.raises(ValueError, match="groups have 32, 64 or 128 inputs, not 48"):
        engine_settings(group_size=48)


WEIGHT = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("quantization", "changes", "said"),
    [
        ("int4", {f"{WEIGHT}.scales": torch.ones(64, 3).half()}, "is not an int4 weight with groups of 32, 64, 128"),
        ("int4", {f"{WEIGHT}.scales": torch.ones(64, 1)}, r"codes, scales and minimums are .* float32 \[64, 1\]"),
        ("int4", {WEIGHT: torch.ones(32, 32).byte()}, r"minimums are uint8 \[32, 32\]"),
        ("int4", {f"{WEIGHT}.scales": None}, rf"lacks tensors of the model: {WEIGHT}\.scales"),
        ("int8", {WEIGHT: torch.ones(64, 64)}, "is not int8 by rows"),
        ("int8", {WEIGHT: torch.ones(63, 64).char()}, "63 rows with 64 scales"),
        ("int8", {WEIGHT.replace("weight", "weight_format"): torch.tensor(1)}, "is not int8 by rows"),
        ("fp4", {f"{WEIGHT}.quant_state.bitsandbytes__fp4": None}, "is not a complete bitsandbytes 4-bit weight"),
    ],
)
def test_quantised_weights_that_are_no_whole_ones_are_named(
    quantization: str,
    changes: dict[str, Tensor | None],
    said: str,
    make_model: MakeModel,
    engine_settings: MakeSettings,
    tmp_path: Path,
) -> None:
    make_model("llama")
    load_decoder(tmp_path / "model", engine_settings(quantization=quantization))
    tensors: dict[str, Tensor | None] = {}
    for file in Checkpoint(cached_checkpoint(tmp_path)).files:
        tensors |= load_file(file)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((cached_checkpoint(tmp_path) / "config.json").read_text())
    kept = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file(kept, damaged / "model.safetensors")
    with pytest.raises(ConfigurationError, match=said):
        load_decoder(damaged, engine_settings())


def test_transformers_reads_the_cached_int8_form(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    decoder: Decoder = load_decoder(tmp_path / "model", engine_settings(quantization="int8"))
    assert json.loads((cached_checkpoint(tmp_path) / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    theirs = AutoModelForCausalLM.from_pretrained(cached_checkpoint(tmp_path), device_map="cpu")
    weight = theirs.model.layers[1].mlp.down_proj.weight
    expected = weight.CB * weight.SCB.unsqueeze(1) / 127
    torch.testing.assert_close(decoder.weights.layers[1].mlp.down.weight(0), expected)
