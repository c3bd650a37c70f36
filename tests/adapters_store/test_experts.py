"""Experts' tensors as PEFT names and stacks them, to the canonical form; and what of them is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onebase_adapters import peft_writer
from onebase_adapters.adapter import Adapter, Array, Epilogue, LowRankPair, ModuleKey
from onebase_adapters.base_layout import BaseLayout, ExpertLayout
from onebase_adapters.blobs import read_blob, write_blob
from onebase_adapters.errors import AdapterError, InvalidConfig, InvalidTensors, RankTooLarge, UnsupportedAdapter
from onebase_adapters.peft_format import parse
from onebase_adapters.peft_stacks import stack_experts

from .conftest import WritePeft

EXPERTS = ExpertLayout(3, {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)})
LAYOUT = BaseLayout(num_layers=2, shapes={"q_proj": (8, 8)}, experts=EXPERTS)
LAYER = "base_model.model.model.layers.0"
BOTH_STACKS = ["experts.gate_up_proj", "experts.down_proj"]

Tensors = dict[str, Array]


def pair(module: str, rows: int, columns: int, rank: int = 2, rank_b: int | None = None) -> Tensors:
    """Random tensors of a module in layer 0."""
    rng = np.random.default_rng(len(module))
    return {
        f"{LAYER}.{module}.lora_A.weight": rng.standard_normal((rank, columns), "f4"),
        f"{LAYER}.{module}.lora_B.weight": rng.standard_normal((rows, rank_b or rank), "f4"),
    }


def load(directory: Path) -> Adapter:
    return parse(directory, LAYOUT, max_rank=8)


@pytest.mark.parametrize("name", ["mlp.experts.2.up_proj", "block_sparse_moe.experts.2.w3"])
def test_an_experts_linear_goes_by_the_names_of_either_family(name: str, write_peft: WritePeft) -> None:
    adapter = load(write_peft(pair(name, 6, 8), r=2, target_modules=[name.rpartition(".")[2]]))
    assert (list(adapter.pairs), adapter.targets) == ([ModuleKey(0, "up_proj", 2)], ("up_proj",))


def test_a_stack_is_divided_among_the_experts_as_peft_does(write_peft: WritePeft) -> None:
    """Of peft.tuners.lora.layer.ParamWrapper.get_delta_weight: einsum("o r e, e r i -> e o i")."""
    tensors = pair("mlp.experts.base_layer", 12, 8, 3 * 2) | pair("mlp.experts", 8, 6, 3 * 4)
    options = {"rank_pattern": {"experts.down_proj": 4}, "alpha_pattern": {"mlp.experts.gate_up_proj": 5}}
    adapter = load(write_peft(tensors, r=2, target_modules=[], target_parameters=BOTH_STACKS, **options))
    assert len(adapter.pairs) == 3 * 3
    for module, projections, rank, scale in (
        ("mlp.experts.base_layer", ("gate_proj", "up_proj"), 2, 5 / 2),
        ("mlp.experts", ("down_proj",), 4, 8 / 4),
    ):
        a = tensors[f"{LAYER}.{module}.lora_A.weight"].reshape(3, rank, -1)
        b = tensors[f"{LAYER}.{module}.lora_B.weight"]
        updates = scale * np.einsum("ore,eri->eoi", b.reshape(len(b), rank, 3), a)
        for expert, expected in enumerate(updates):
            pairs = [adapter.pairs[ModuleKey(0, projection, expert)] for projection in projections]
            found = np.concatenate([pair.scale * pair.lora_b @ pair.lora_a for pair in pairs])
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_one_stack_alone_is_the_one_that_is_named(write_peft: WritePeft) -> None:
    tensors = pair("mlp.experts", 8, 6, 3 * 2)
    adapter = load(write_peft(tensors, r=2, target_modules=[], target_parameters=["down_proj"]))
    assert list(adapter.pairs) == [ModuleKey(0, "down_proj", expert) for expert in range(3)]


@pytest.mark.parametrize(
    "named", [{"target_modules": ["gate"]}, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}]
)
def test_the_router_is_a_module_or_a_parameter(named: dict[str, list[str]], write_peft: WritePeft) -> None:
    adapter = load(write_peft(pair("mlp.gate", 3, 8), r=2, **named))
    assert (list(adapter.pairs), adapter.targets) == ([ModuleKey(0, "gate")], ("gate",))


def test_experts_survive_their_blob(write_peft: WritePeft, tmp_path: Path) -> None:
    tensors = pair("mlp.experts", 8, 6, 3 * 2) | pair("mlp.gate", 3, 8)
    adapter = load(write_peft(tensors, r=2, target_modules=["gate"], target_parameters=["down_proj"]))
    write_blob(adapter, tmp_path / "blob")
    read = read_blob(tmp_path / "blob")
    assert read.pairs.keys() == adapter.pairs.keys()
    for key, expected in adapter.pairs.items():
        np.testing.assert_array_equal(read.pairs[key].lora_b, expected.lora_b)


STACK = pair("mlp.experts", 8, 6, 3 * 2)
REFUSALS: dict[str, tuple[Tensors, dict[str, Any], type[AdapterError], str]] = {
    "an expert that is not there": (
        pair("mlp.experts.3.up_proj", 6, 8),
        {"target_modules": ["up_proj"]},
        InvalidTensors,
        "mlp.experts.3.up_proj.lora_A.weight belongs to no linear of this base that adapters may touch; those are "
        "q_proj, gate, and gate_proj, up_proj, down_proj of experts 0 to 2, of layers 0 to 1.",
    ),
    "a linear that only experts have": (
        pair("mlp.up_proj", 6, 8),
        {"target_modules": ["up_proj"]},
        InvalidTensors,
        "belongs to no linear",
    ),
    "an expert that is not named": (
        pair("mlp.experts.1.up_proj", 6, 8),
        {"target_modules": ["q_proj"]},
        InvalidTensors,
        "mlp.experts.1.up_proj, but target_modules does not name it",
    ),
    "a stack that is not named": (
        STACK,
        {"target_modules": ["q_proj"]},
        InvalidTensors,
        "layers.0.mlp.experts, but target_parameters names no parameter of model.layers.0.mlp.experts",
    ),
    "a second stack that is not named": (
        STACK | pair("mlp.experts.base_layer", 12, 8, 6),
        {"target_parameters": ["experts.down_proj"]},
        InvalidTensors,
        "mlp.experts.base_layer, but target_parameters names down_proj of",
    ),
    "a stack of another number of experts": (
        pair("mlp.experts", 8, 6, 8),
        {"target_parameters": ["experts.down_proj"]},
        InvalidTensors,
        "mlp.experts.lora_A.weight has shape [8, 6], which 3 experts cannot share",
    ),
    "a stack of another rank": (
        pair("mlp.experts", 8, 6, 9),
        {"target_parameters": ["experts.down_proj"]},
        InvalidTensors,
        "(expert 0) has shape [3, 6], but this base and adapter_config.json make it [2, 6]",
    ),
    "a stack of too high a rank": (
        pair("mlp.experts", 8, 6, 27),
        {"target_parameters": ["experts.down_proj"], "r": 9},
        RankTooLarge,
        "model.layers.0.mlp.experts.down_proj has rank 9, but this server allows at most 8",
    ),
    "a stack and one of its experts": (
        STACK | pair("mlp.experts.1.down_proj", 8, 6),
        {"target_modules": ["down_proj"], "target_parameters": ["experts.down_proj"]},
        InvalidTensors,
        "layers.0.experts.1.down_proj has two pairs of tensors",
    ),
    "a magnitude of a stack": (
        STACK | {f"{LAYER}.mlp.experts.lora_magnitude_vector": np.ones(8, "f4")},
        {"target_parameters": ["experts.down_proj"]},
        InvalidTensors,
        "the parameters of experts have lora_A and lora_B alone",
    ),
    "dora of parameters": (
        STACK,
        {"target_parameters": ["experts.down_proj"], "use_dora": True},
        UnsupportedAdapter,
        "both target_parameters and use_dora",
    ),
    "parameters by a pattern": (STACK, {"target_parameters": "experts.*"}, InvalidConfig, "target_parameters should"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_names_what_is_wrong(case: str, write_peft: WritePeft) -> None:
    tensors, options, error, message = REFUSALS[case]
    with pytest.raises(error, match=re.escape(message)):
        load(write_peft(tensors, **({"r": 2, "target_modules": []} | options)))


def updates(adapter: Adapter) -> dict[ModuleKey, Array]:
    return {key: pair.scale * pair.lora_b @ pair.lora_a for key, pair in adapter.pairs.items()}


PER_EXPERT = {
    name: tensor
    for expert, rank in ((0, 1), (2, 3))
    for projection, rows, columns in (("gate_proj", 6, 8), ("up_proj", 6, 8), ("down_proj", 8, 6))
    for name, tensor in pair(f"mlp.experts.{expert}.{projection}", rows, columns, rank).items()
}


@pytest.mark.parametrize(
    ("tensors", "options", "rank"),
    [
        (STACK, {"target_parameters": ["down_proj"]}, 2),
        (
            pair("mlp.experts.base_layer", 12, 8, 6) | STACK | pair("mlp.gate", 3, 8),
            {"target_parameters": [*BOTH_STACKS, "gate.weight"]},
            2,
        ),
        (
            PER_EXPERT | pair("self_attn.q_proj", 8, 8),
            {
                "target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"],
                "rank_pattern": {"experts.0.*": 1, "experts.2.*": 3},
                "alpha_pattern": {"experts.2.down_proj": 7},
            },
            6,
        ),
    ],
    ids=["one stack", "both and the router", "modules of some experts, of other ranks and scales"],
)
def test_what_is_written_is_stacked_and_read_as_the_same_updates(
    tensors: Tensors, options: dict[str, Any], rank: int, write_peft: WritePeft, tmp_path: Path
) -> None:
    adapter = load(write_peft(tensors, **({"r": 2, "target_modules": []} | options)))
    peft_writer.write_peft(stack_experts(adapter, LAYOUT), tmp_path / "out", base_name="tiny")
    read = load(tmp_path / "out")
    expected = updates(adapter)
    assert (read.rank, read.pairs.keys() >= adapter.pairs.keys()) == (rank, True)
    for key, update in updates(read).items():
        np.testing.assert_allclose(update, expected.get(key, np.zeros_like(update)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (
            Adapter({}, {ModuleKey(0, "up_proj", 1): Epilogue(factor=np.ones(6, "f4"))}),
            "more to layers.0.experts.1.up_proj than to add a low-rank update",
        ),
        (
            Adapter(
                {
                    ModuleKey(0, "gate"): LowRankPair(np.ones((2, 8), "f4"), np.ones((3, 2), "f4"), 1.0),
                    ModuleKey(0, "q_proj"): LowRankPair(np.ones((2, 8), "f4"), np.ones((8, 2), "f4"), 1.0),
                },
                invocation_tokens=(1,),
            ),
            "changes layers.0.gate, a parameter to PEFT",
        ),
    ],
    ids=["(IA)³ of an expert", "aLoRA beside a router"],
)
def test_what_peft_has_no_form_for_is_not_written(adapter: Adapter, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match=re.escape(reason)):
        peft_writer.write_peft(stack_experts(adapter, LAYOUT), tmp_path / "out", base_name="tiny")
    assert not (tmp_path / "out").exists()
