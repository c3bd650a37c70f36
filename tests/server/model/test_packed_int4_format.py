"""GPTQ's and AWQ's 4-bit checkpoints, packed here as their formats are described, are read as what they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from onebase_server.errors import ConfigurationError
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

MakeModel = Callable[..., PreTrainedModel]
MakeSettings = Callable[..., EngineSettings]
Quantise = Callable[..., dict[str, Tensor]]

TOKENS = list(range(20))
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "lm_head": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
CONFIGS = {"gptq": GPTQ, "gptq_v2": GPTQ | {"checkpoint_format": "gptq_v2"}, "awq": AWQ}
ORDERS = {"gptq": range(8), "gptq_v2": range(8), "awq": (0, 2, 4, 6, 1, 3, 5, 7)}
ONE_EACH = np.uint32(0x11111111)


def pack(numbers: np.ndarray, order: Any) -> np.ndarray:
    """Eight numbers of a row to each word; number `order[i]` of the eight goes to its i-th nibble."""
    eights = numbers.astype(np.uint32).reshape(len(numbers), -1, 8)
    words = np.zeros(eights.shape[:2], np.uint32)
    for nibble, place in enumerate(order):
        words |= eights[:, :, place] << np.uint32(4 * nibble)
    return words


def quantised(module: str, weight: Tensor, layout: str, group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a linear rounded to that layout, and the weight [out, in] that they stand for."""
    out_features, in_features = weight.shape
    groups = weight.view(out_features, -1, group_size)
    least = groups.amin(2).clamp(max=0)
    scales = ((groups.amax(2) - least) / 15).half()
    zeros = (-least / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float().unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, 15)
    exact = (scales.float().unsqueeze(2) * (codes - zeros.unsqueeze(2))).view(weight.shape)
    code_rows = codes.view(weight.shape).numpy()
    order = ORDERS[layout]
    qweight = pack(code_rows.T, order) if layout == "awq" else pack(code_rows, order).T
    qzeros = pack(zeros.T.numpy(), order) - (ONE_EACH if layout == "gptq" else np.uint32(0))
    tensors = {
        f"{module}.qweight": torch.from_numpy(np.ascontiguousarray(qweight).view(np.int32)),
        f"{module}.qzeros": torch.from_numpy(qzeros.view(np.int32)),
        f"{module}.scales": scales.T.contiguous(),
    }
    if layout != "awq":
        tensors[f"{module}.g_idx"] = torch.arange(in_features, dtype=torch.int32) // group_size
    return tensors, exact


@pytest.fixture
def quantise(tmp_path: Path) -> Quantise:
    """Rewrite `tmp_path/model` with its linears in a layout; the weights that they stand for, by module."""

    def rewrite(layout: str, group_size: int | None = 32, **changes: Any) -> dict[str, Tensor]:
        directory = tmp_path / "model"
        tensors = load_file(directory / "model.safetensors")
        weights = {}
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            module = name.removesuffix(".weight")
            weight = tensors.pop(name)
            parts, weights[module] = quantised(module, weight, layout, group_size or weight.shape[1])
            tensors |= parts
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        described = CONFIGS[layout] | {"group_size": group_size or -1} | changes
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
        return weights

    return rewrite


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_it_computes_what_transformers_computes_with_the_weights_that_it_stands_for(
    family: str,
    layout: str,
    make_model: MakeModel,
    quantise: Quantise,
    engine_settings: MakeSettings,
    logits_of: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    model = make_model(family)
    for module, weight in quantise(layout).items():
        model.get_submodule(module).weight.data = weight
    decoder = load_decoder(tmp_path / "model", engine_settings())
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits_of(decoder, TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", CONFIGS)
@pytest.mark.parametrize("group_size", [32, 64, None], ids=["32", "64", "the whole row"])
def test_every_weight_is_exact(
    group_size: int | None,
    layout: str,
    make_model: MakeModel,
    quantise: Quantise,
    engine_settings: MakeSettings,
    tmp_path: Path,
) -> None:
    make_model("llama", intermediate_size=256)
    weights = quantise(layout, group_size)
    decoder = load_decoder(tmp_path / "model", engine_settings())
    for index, layer in enumerate(decoder.weights.layers):
        for place, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            assert torch.equal(layer.qkv.weight(place), weights[f"model.layers.{index}.self_attn.{projection}"])
        assert torch.equal(layer.mlp.down.weight(0), weights[f"model.layers.{index}.mlp.down_proj"])


def test_inputs_that_are_not_in_the_order_of_their_groups_are_refused(
    make_model: MakeModel, quantise: Quantise, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    quantise("gptq", desc_act=True)  # the order is what counts, not what the configuration says of it
    load_decoder(tmp_path / "model", engine_settings())
    name = "model.layers.1.mlp.up_proj.g_idx"
    change_tensors(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name].flip(0).contiguous()}))
    with pytest.raises(ConfigurationError, match=rf"{name}: the inputs of a group are not neighbours \(desc_act"):
        load_decoder(tmp_path / "model", engine_settings())


def test_biases_of_zeros_that_the_model_does_not_have_are_left_out(
    make_model: MakeModel, quantise: Quantise, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    quantise("gptq")
    name = "model.layers.0.self_attn.o_proj.bias"
    change_tensors(tmp_path / "model", lambda tensors: tensors.update({name: torch.zeros(64)}))
    assert load_decoder(tmp_path / "model", engine_settings()).weights.layers[0].o.bias is None
    change_tensors(tmp_path / "model", lambda tensors: tensors[name].fill_(1))
    with pytest.raises(ConfigurationError, match=f"does not have: {name}"):
        load_decoder(tmp_path / "model", engine_settings())


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("gptq", {"bits": 8}, "bits = 8 is not carried"),
        ("awq", {"bits": 3}, "bits = 3 is not carried"),
        ("gptq", {"lm_head": True}, "lm_head = True is not carried"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin' is not carried"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format = True"),
        ("awq", {"version": "gemv"}, "version = 'gemv'"),
        ("awq", {"backend": "llm-awq"}, "backend = 'llm-awq'"),
        ("awq", {"zero_point": False}, "zero_point = False"),
    ],
)
def test_other_versions_are_refused_by_name(
    layout: str,
    changes: dict[str, Any],
    message: str,
    make_model: MakeModel,
    quantise: Quantise,
    engine_settings: MakeSettings,
    tmp_path: Path,
) -> None:
    make_model("llama")
    quantise(layout, **changes)
    with pytest.raises(ConfigurationError, match=message):
        load_decoder(tmp_path / "model", engine_settings())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qzeros", lambda tensor: tensor[:, :-1], "no 4-bit weight in the layout"),
        ("scales", lambda tensor: tensor[:-1], "no 4-bit weight in the layout"),
        ("qweight", lambda tensor: tensor.float(), "no 4-bit weight in the layout"),
        ("scales", lambda tensor: tensor.flatten(), "no 4-bit weight in the layout"),
        ("scales", lambda tensor: tensor.float() * 1e9, "float16 cannot hold"),
        ("qzeros", lambda tensor: None, "qzeros is missing"),
    ],
)
def test_parts_that_do_not_belong_together_are_named(
    part: str,
    change: Callable[[Tensor], Tensor | None],
    message: str,
    make_model: MakeModel,
    quantise: Quantise,
    engine_settings: MakeSettings,
    tmp_path: Path,
) -> None:
    make_model("llama")
    quantise("gptq")
    name = f"model.layers.2.mlp.down_proj.{part}"

    def damage(tensors: dict[str, Tensor]) -> None:
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()

    change_tensors(tmp_path / "model", damage)
    with pytest.raises(ConfigurationError, match=message):
        load_decoder(tmp_path / "model", engine_settings())


@pytest.mark.parametrize("layout", CONFIGS)
def test_groups_of_a_size_that_int4_does_not_have_are_refused(
    layout: str, make_model: MakeModel, quantise: Quantise, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    quantise(layout, 16)
    with pytest.raises(ConfigurationError, match="16 inputs share a scale; multiples of 32 are carried"):
        load_decoder(tmp_path / "model", engine_settings())


def test_a_configuration_that_says_nothing_of_the_packing_is_an_error(
    make_model: MakeModel, quantise: Quantise, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    quantise("awq")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"has quantised tensors, but its config\.json no quantization_config"):
        load_decoder(tmp_path / "model", engine_settings())
