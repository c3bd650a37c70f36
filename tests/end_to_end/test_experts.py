"""LoRA on experts and routers: every row of a mixed batch is what PEFT says of its adapter alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from onebase_adapters.peft_stacks import stack_experts
from onebase_adapters.peft_writer import write_peft
from onebase_adapters.store import AdapterStore
from onebase_kernels import BackendName
from onebase_server.engine.adapter_reading import read_adapter
from onebase_server.engine.core import Engine
from onebase_server.engine.request import AdapterRef, Attach, Retire
from onebase_server.model.config import ModelConfig

from .conftest import MakeEngine, Oracle, lora_model, publish
from .test_families import FAMILIES, MIXTURES, TINY, round_linears_to_nf4
from .test_mixed_batch import assert_like_oracle, prompt_of, run, submit

STACKS = ["experts.gate_up_proj", "mlp.experts.down_proj"]
ALIKE: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "attention": {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj"]},
        "dora": {"r": 2, "use_dora": True, "target_modules": ["k_proj"]},
    },
    "both stacks": {
        "two": {"r": 2, "target_modules": [], "target_parameters": STACKS},
        "two-next": {"r": 2, "target_modules": [], "target_parameters": STACKS},
        "attention and two": {
            "r": 3,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj"],
            "target_parameters": STACKS,
            "rank_pattern": {"experts.down_proj": 5, "layers.1.mlp.experts.gate_up_proj": 1},
            "alpha_pattern": {"layers.2.mlp.experts.down_proj": 3},
        },
    },
    "one stack": {"one": {"r": 4, "target_modules": ["o_proj"], "target_parameters": ["experts.down_proj"]}},
    "router": {
        "router": {
            "r": 2,
            "target_modules": ["v_proj"],
            "target_parameters": ["gate.weight", "experts.gate_up_proj", "q_proj.weight"],
            "rank_pattern": {"gate.weight": 3, "q_proj": 7, "q_proj.weight": 5},
        }
    },
}
"""Adapters by models: PEFT wants those of one model to target the same parameters."""
ROWS: tuple[tuple[str, str | None], ...] = (
    ("base-1", None),
    *((f"{name}-1", name) for name in ("attention", "dora", "two", "attention and two", "one", "router")),
    *((f"{name}-2", name) for name in ("two", "router", "attention")),
    ("per-expert-1", "per-expert"),
    ("base-2", None),
)


@pytest.fixture(params=MIXTURES)
def oracle(request: pytest.FixtureRequest, tmp_path: Path) -> Oracle:
    """A tiny random mixture with all adapters, saved in `tmp_path`; its weights are those of NF4."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **(TINY | FAMILIES[request.param]))
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    round_linears_to_nf4(base)
    base.save_pretrained(tmp_path / "base")
    models: dict[str, PeftModel] = {}
    for adapters in ALIKE.values():
        model = lora_model(load(tmp_path / "base"), adapters)
        model.save_pretrained(tmp_path / "adapters")
        model.eval()
        models |= dict.fromkeys(adapters, model)
    write_modules(tmp_path / "adapters" / "per-expert", base)
    models["per-expert"] = PeftModel.from_pretrained(
        load(tmp_path / "base"), tmp_path / "adapters" / "per-expert", adapter_name="per-expert"
    )
    return Oracle(models, tmp_path / "adapters")


def load(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    )
    return model


def write_modules(directory: Path, base: PreTrainedModel) -> None:
    """An adapter as it was written on Transformers 4, where each expert's linears are modules; PEFT converts it."""
    parent, gate, up, down = (
        ("block_sparse_moe", "w1", "w3", "w2")
        if base.config.model_type == "mixtral"
        else ("mlp", "gate_proj", "up_proj", "down_proj")
    )
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for layer in range(base.config.num_hidden_layers):
        experts = base.model.layers[layer].mlp.experts
        num_experts, twice_inner, hidden = experts.gate_up_proj.shape
        inner = twice_inner // 2
        shapes = {"gate": (num_experts, hidden)}
        for expert in range(num_experts):
            shapes |= {f"experts.{expert}.{name}": (inner, hidden) for name in (gate, up)}
            shapes[f"experts.{expert}.{down}"] = (hidden, inner)
        for module, (rows, columns) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{parent}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator) / columns**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * 0.3
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "lora_dropout": 0.0}
    config |= {"bias": "none", "inference_mode": True, "target_modules": [gate, up, down, "gate"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def store(tmp_path: Path, oracle: Oracle) -> Iterator[AdapterStore]:
    """An empty store for the mixture."""
    layout = ModelConfig.from_directory(tmp_path / "base").adapter_layout()
    store = AdapterStore.open(tmp_path / "store", layout, base_name="base")
    yield store
    store.close()


@pytest.fixture
def adapters(oracle: Oracle, store: AdapterStore) -> dict[str, AdapterRef]:
    return {name: publish(store, name.replace(" ", "-"), oracle.directory / name) for name in oracle.models}


def submit_all(engine: Engine, adapters: dict[str, AdapterRef]) -> None:
    for row, adapter in ROWS:
        submit(engine, row, adapters[adapter] if adapter else None)


def assert_rows_like_oracle(engine: Engine, adapters: dict[str, AdapterRef], oracle: Oracle) -> None:
    submit_all(engine, adapters)
    outputs = run(engine)
    for row, adapter in ROWS:
        assert_like_oracle(outputs[row], row, adapter, oracle)


def test_every_adapter_changes_the_answer(oracle: Oracle) -> None:
    prompt = tuple(prompt_of("any"))
    _, base = oracle.answer(prompt, None, 1)
    for name in oracle.models:
        _, changed = oracle.answer(prompt, name, 1)
        assert (changed - base).norm() > 1e-2 * base.norm(), name


@pytest.mark.parametrize("max_num_batched_tokens", [512, 7], ids=["one batch", "chunked prefill"])
def test_each_row_is_what_peft_says_of_its_adapter(
    max_num_batched_tokens: int, make_family_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle
) -> None:
    engine = make_family_engine(max_num_batched_tokens=max_num_batched_tokens)
    assert_rows_like_oracle(engine, adapters, oracle)


@pytest.mark.parametrize("backend", ["reference", "bitsandbytes"])
def test_the_other_back_ends_say_the_same(
    backend: BackendName, make_family_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle
) -> None:
    assert_rows_like_oracle(make_family_engine(backend), adapters, oracle)


def test_what_is_exported_says_the_same_in_peft(
    adapters: dict[str, AdapterRef], oracle: Oracle, tmp_path: Path
) -> None:
    layout = ModelConfig.from_directory(tmp_path / "base").adapter_layout()
    prompt = tuple(prompt_of("any"))
    for name in ("two", "attention and two", "one", "router", "per-expert"):
        adapter = stack_experts(read_adapter(adapters[name]), layout)
        write_peft(adapter, tmp_path / "out" / name, base_name="base")
        again = f"{name} again"
        oracle.models[again] = PeftModel.from_pretrained(
            load(tmp_path / "base"), tmp_path / "out" / name, adapter_name=again
        )
        (_, expected), (_, found) = oracle.answer(prompt, name, 1), oracle.answer(prompt, again, 1)
        assert (found - expected).norm() < 1e-4 * expected.norm(), name


def test_experts_of_a_version_are_swapped_while_others_compute(
    make_family_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle, store: AdapterStore
) -> None:
    engine = make_family_engine()
    submit_all(engine, adapters)

    def swap(step: int) -> None:
        if step == 3:
            following = publish(store, "two", oracle.directory / "two-next")
            engine.handle(Attach(adapter=following))
            engine.handle(Retire(digest=adapters["two"].digest))
            submit(engine, "swapped", following)

    outputs = run(engine, between_steps=swap)
    for row, adapter in (*ROWS, ("swapped", "two-next")):
        assert_like_oracle(outputs[row], row, adapter, oracle)


def test_a_combination_sums_what_its_parts_say_of_each_expert(
    make_family_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle
) -> None:
    """Half of an adapter and half of it again are the adapter, whatever linears it touches."""
    engine = make_family_engine()
    for name in ("two", "router", "per-expert"):
        part = adapters[name].parts[0]
        halves = AdapterRef.combination([replace(part, weight=0.25), replace(part, weight=0.75)])
        submit(engine, name, halves)
    outputs = run(engine)
    for name in outputs:
        assert_like_oracle(outputs[name], name, name, oracle)
