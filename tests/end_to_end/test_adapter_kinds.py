"""Every kind of adapter is what PEFT makes of it, alone and in one batch with all the others.

One adapter per kind, made and saved by PEFT on the same NF4 base, whose attention has biases; log-probabilities within
1e-4 relative over the whole vocabulary, in fp32.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file
from transformers import Phi3Config, Phi3ForCausalLM

from onebase_adapters.peft_writer import write_peft
from onebase_adapters.store import AdapterStore
from onebase_kernels import BackendName, use_backend
from onebase_server.engine.adapter_reading import read_adapter
from onebase_server.engine.core import Engine
from onebase_server.engine.request import AdapterRef
from onebase_server.model.config import ModelConfig
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

from ..random_numbers import randomize
from .conftest import SMALL, Oracle, load_nf4, publish
from .test_mixed_batch import ANSWER, assert_like_oracle, first_logprobs, prompt_of, run, submit

ATTENTION_AND_DOWN = ["q_proj", "k_proj", "o_proj", "down_proj"]
GROUP_SIZE = 16

KINDS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "rslora": lambda: LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    "some layers": lambda: LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers"
    ),
    "exclusions": lambda: LoraConfig(
        r=4, target_modules=r".*\.(q|k|v|o)_proj", exclude_modules=["layers.0.self_attn.q_proj"], fan_in_fan_out=True
    ),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "dora of other ranks": lambda: LoraConfig(
        r=4,
        use_dora=True,
        use_rslora=True,
        target_modules=ATTENTION_AND_DOWN,
        rank_pattern={"q_proj": 12},
        alpha_pattern={"down_proj": 3},
    ),
    "dora with biases": lambda: LoraConfig(r=4, use_dora=True, bias="all", target_modules=["q_proj", "o_proj"]),
    "lora_bias": lambda: LoraConfig(r=4, lora_alpha=3, lora_bias=True, target_modules=ATTENTION_AND_DOWN),
    "bias of all": lambda: LoraConfig(r=4, bias="all", target_modules=["q_proj"]),
    "bias of targets": lambda: LoraConfig(r=4, bias="lora_only", target_modules=["k_proj", "down_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3 on all": lambda: IA3Config(target_modules="all-linear", feedforward_modules=["down_proj"]),
    "vera": lambda: VeraConfig(r=8, target_modules=ATTENTION_AND_DOWN, projection_prng_key=7),
    "alora": lambda: LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules="all-linear", alora_invocation_tokens=prompt_of("alora")[5:8]
    ),
    "qalora": lambda: LoraConfig(
        r=4, use_qalora=True, qalora_group_size=GROUP_SIZE, target_modules=["q_proj", "down_proj"]
    ),
}

QALORA_SUM = "qalora as in the paper"

FUSED_KINDS: dict[str, Callable[[], PeftConfig]] = {
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "ia3": lambda: IA3Config(target_modules=["qkv_proj", "gate_up_proj", "down_proj"], feedforward_modules="down_proj"),
    "vera": lambda: VeraConfig(r=8, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
}
"""For a base whose checkpoint has q, k and v in one linear, and gate and up."""

BESIDE_LINEARS: dict[str, Callable[[], PeftConfig]] = {
    "embedding and head": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "single tokens": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=list(range(20, 200, 3))
    ),
    "saved head and norms": lambda: LoraConfig(
        r=4, target_modules=["v_proj"], modules_to_save=["lm_head", "input_layernorm", "model.norm"]
    ),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=5),
    "virtual tokens": lambda: PromptTuningConfig(num_virtual_tokens=9),
}
"""What `test_vocabularies` and `test_mixed_batch` look at more closely, in one batch with those that change linears."""

ALL_KINDS = {**KINDS, **BESIDE_LINEARS}


@pytest.fixture(scope="module")
def kinds_oracle(biased_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Every kind, its numbers random, saved by PEFT."""
    directory = tmp_path_factory.mktemp("peft-kinds")
    models = save_kinds(ALL_KINDS, biased_base, directory)
    _write_as_in_the_paper(directory / "qalora", directory / QALORA_SUM)
    return Oracle(models, directory)


def save_kinds(kinds: dict[str, Callable[[], PeftConfig]], base: Path, directory: Path) -> dict[str, PeftModel]:
    """A model with each kind, its numbers random, saved under its name."""
    models: dict[str, PeftModel] = {}
    for name, make_config in kinds.items():
        config = make_config()
        config.task_type = "CAUSAL_LM"
        model = get_peft_model(load_nf4(base), config, adapter_name=name)  # PEFT mixes no kinds in one model
        if getattr(config, "use_qalora", False):
            _make_qalora(model, name, config)
        randomize(model)
        model.save_pretrained(directory)
        models[name] = model.eval()
    return models


def _make_qalora(model: PeftModel, name: str, config: LoraConfig) -> None:
    """Let PEFT's QA-LoRA compute, which it chooses by itself on GPTQ bases alone."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_variant[name] = QALoraLinearVariant()
            QALoraLinearVariant.init(module, name, config)


def _write_as_in_the_paper(source: Path, target: Path) -> None:
    """The same adapter with A for the sums of groups, where PEFT's is for means times the number of groups."""
    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensors[name] = tensor * (tensor.shape[1] / GROUP_SIZE)
    save_file(tensors, target / "adapter_model.safetensors")
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"qalora_pooling": "sum"}))


@pytest.fixture(scope="module")
def kinds(
    kinds_oracle: Oracle, biased_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, AdapterRef]]:
    """Every kind, published."""
    layout = ModelConfig.from_directory(biased_base).adapter_layout()
    store = AdapterStore.open(tmp_path_factory.mktemp("kinds-store"), layout, base_name="biased")
    yield {
        name: publish(store, name.replace(" ", "-"), kinds_oracle.directory / name) for name in (*ALL_KINDS, QALORA_SUM)
    }
    store.close()


def start_engine(
    base: Path, tmp_path_factory: pytest.TempPathFactory, backend: BackendName | None = None, **overrides: int | str
) -> Engine:
    """An engine on the base in NF4 and fp32; `overrides` are settings."""
    use_backend(backend or "auto")
    settings = EngineSettings.model_validate(
        {"base": str(base), "cache_dir": tmp_path_factory.getbasetemp() / "cache", "block_size": 4}
        | {"kv_cache_memory": "8MiB", "adapter_memory": "4MiB", "dtype": "float32", "device": "cpu"}
        | overrides
    )
    return Engine(load_decoder(base, settings), settings)


def oracle_of(kind: str) -> str:
    """The oracle's name for a kind: the two forms of QA-LoRA are one adapter."""
    return "qalora" if kind == QALORA_SUM else kind


@pytest.mark.parametrize("backend", [None, "reference"], ids=["fastest", "reference"])
def test_a_mixed_batch_of_all_kinds_says_what_peft_says_of_each(
    biased_base: Path,
    kinds: dict[str, AdapterRef],
    kinds_oracle: Oracle,
    tmp_path_factory: pytest.TempPathFactory,
    backend: BackendName | None,
) -> None:
    engine = start_engine(biased_base, tmp_path_factory, backend)
    rows: dict[str, AdapterRef | None] = {"base-1": None, **kinds, "base-2": None}
    for row, adapter in rows.items():
        submit(engine, row, adapter)
    outputs = run(engine)
    for row, adapter in rows.items():
        assert_like_oracle(outputs[row], row, oracle_of(row) if adapter else None, kinds_oracle)


def test_every_kind_is_near_what_peft_says_with_its_matrices_in_8_bits(
    biased_base: Path, kinds: dict[str, AdapterRef], kinds_oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = start_engine(biased_base, tmp_path_factory, adapter_quantization="int8")
    for kind, adapter in kinds.items():
        submit(engine, kind, adapter)
    outputs = run(engine)
    for kind in kinds:
        _, expected = kinds_oracle.answer(tuple(prompt_of(kind)), oracle_of(kind), ANSWER)
        error = (first_logprobs(outputs[kind]) - expected[0]).norm() / expected[0].norm()
        assert error < 2e-2, f"{kind}: relative error {error:.1e}"


def test_each_kind_says_alone_what_peft_says(
    biased_base: Path, kinds: dict[str, AdapterRef], kinds_oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = start_engine(biased_base, tmp_path_factory)
    for kind, adapter in kinds.items():
        submit(engine, kind, adapter)
        assert_like_oracle(run(engine)[kind], kind, oracle_of(kind), kinds_oracle)


def test_a_combination_with_a_lora_bias_is_in_peft_the_one_adapter_that_is_written_of_it(
    biased_base: Path, kinds: dict[str, AdapterRef], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    weights = {"lora_bias": 0.5, "vera": -2.0}
    combination = AdapterRef.combination([replace(kinds[kind].parts[0], weight=w) for kind, w in weights.items()])
    write_peft(read_adapter(combination), tmp_path / "sum", base_name="biased")
    model = PeftModel.from_pretrained(load_nf4(biased_base), tmp_path / "sum", adapter_name="sum")
    engine = start_engine(biased_base, tmp_path_factory)
    submit(engine, "sum", combination)
    submit(engine, "lora_bias", kinds["lora_bias"])
    assert_like_oracle(run(engine)["sum"], "sum", "sum", Oracle({"sum": model.eval()}, tmp_path))


def test_every_kind_changes_the_answer(kinds_oracle: Oracle) -> None:
    for kind in ALL_KINDS:
        prompt = tuple(prompt_of(kind))
        (_, base), (_, adapted) = (kinds_oracle.answer(prompt, name, 1) for name in (None, kind))
        assert (base - adapted).norm() / base.norm() > 0.01, kind


def test_vectors_of_fused_linears_are_divided_as_their_outputs_are(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0)).save_pretrained(tmp_path / "base")
    oracle = Oracle(save_kinds(FUSED_KINDS, tmp_path / "base", tmp_path), tmp_path)
    engine = start_engine(tmp_path / "base", tmp_path_factory)
    layout = ModelConfig.from_directory(tmp_path / "base").adapter_layout()
    with closing(AdapterStore.open(tmp_path / "store", layout, base_name="fused")) as store:
        for kind in FUSED_KINDS:
            submit(engine, kind, publish(store, kind, tmp_path / kind))
        outputs = run(engine)
    for kind in FUSED_KINDS:
        assert_like_oracle(outputs[kind], kind, kind, oracle)


def test_alora_computes_nothing_before_it_is_called_and_reuses_what_the_base_computed(
    biased_base: Path, kinds: dict[str, AdapterRef], kinds_oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = start_engine(biased_base, tmp_path_factory)
    submit(engine, "alora", None)
    run(engine)
    submit(engine, "alora", kinds["alora"])  # called at its token 5: one block of four tokens is before that
    submit(engine, "not called", kinds["alora"])
    outputs = run(engine)
    assert outputs["alora"][0].num_cached_tokens == 4
    assert_like_oracle(outputs["alora"], "alora", "alora", kinds_oracle)
    assert_like_oracle(outputs["not called"], "not called", None, kinds_oracle)
    submit(engine, "alora", kinds["alora"])
    again = run(engine)["alora"]
    assert again[0].num_cached_tokens >= 8, "the adapter's own blocks are reused too"
    assert_like_oracle(again, "alora", "alora", kinds_oracle)
    submit(engine, "alora", None)
    assert_like_oracle(run(engine)["alora"], "alora", None, kinds_oracle)
