"""Every kind of adapter that is a change of weights and biases is merged into a checkpoint as PEFT merges it.

Held against PEFT's `merge_and_unload` on the unquantised base, in fp32 and to 1e-4.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from onebase_adapters.adapter import Adapter, Epilogue, ModuleKey, TokenMatrix, TokenRows, VirtualTokens, Vocabulary
from onebase_adapters.errors import UnsupportedAdapter
from onebase_adapters.peft_format import parse
from onebase_server.model.config import ModelConfig
from onebase_server.model.merged_checkpoint import ExportForm, all_together, export_merged
from onebase_server.model.weights import load_decoder

from ...random_numbers import randomize

MakeModel = Callable[..., PreTrainedModel]

TOKENS = torch.arange(20).unsqueeze(0)
UNQUANTISED = ExportForm(dtype="float32", base_quantization="none")
SOME = ["q_proj", "v_proj", "down_proj"]

KINDS: dict[str, Callable[[], PeftConfig]] = {
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "dora of other ranks": lambda: LoraConfig(
        r=4, use_dora=True, use_rslora=True, target_modules=SOME, rank_pattern={"q_proj": 7}
    ),
    "dora with biases": lambda: LoraConfig(r=4, use_dora=True, bias="all", target_modules=["q_proj", "o_proj"]),
    "lora_bias": lambda: LoraConfig(r=4, lora_alpha=3, lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "bias of all": lambda: LoraConfig(r=4, bias="all", target_modules=["down_proj"]),
    "bias of targets": lambda: LoraConfig(r=4, bias="lora_only", target_modules=["k_proj", "down_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3 on all": lambda: IA3Config(target_modules="all-linear", feedforward_modules=[]),
    "vera": lambda: VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    "norms": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm", "model.norm"]),
}
FUSED_KINDS: dict[str, Callable[[], PeftConfig]] = {
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["qkv_proj", "gate_up_proj"]),
    "ia3": lambda: IA3Config(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def randomised(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The model with an adapter that has random numbers in everything that is trained."""
    config.task_type = "CAUSAL_LM"
    peft_model = get_peft_model(model, config)
    randomize(peft_model)
    assert isinstance(peft_model, PeftModel)
    return peft_model.eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def read(peft_directory: Path, base: Path) -> Adapter:
    return parse(peft_directory, ModelConfig.from_directory(base).adapter_layout(), max_rank=8)


def assert_merged_is(expected: Tensor, directory: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "make_config"),
    [
        *(pytest.param("qwen2", kind, id=name) for name, kind in KINDS.items()),
        *(pytest.param("phi3", kind, id=f"{name}, fused") for name, kind in FUSED_KINDS.items()),
    ],
)
def test_each_kind_is_what_peft_merges(family, make_config, make_model, tmp_path):
    model = make_model(family)
    base_logits = logits(model)
    peft_model = randomised(model, make_config())
    peft_model.save_pretrained(tmp_path / "peft")
    expected = logits(peft_model.merge_and_unload())
    assert (expected - base_logits).norm() > 0.01 * base_logits.norm()
    export_merged(tmp_path / "model", read(tmp_path / "peft", tmp_path / "model"), tmp_path / "out", UNQUANTISED)
    assert_merged_is(expected, tmp_path / "out")


def test_qalora_is_merged_as_peft_computes_it(make_model, tmp_path):
    config = LoraConfig(r=4, use_qalora=True, qalora_group_size=16, target_modules=["q_proj", "down_proj"])
    peft_model = get_peft_model(make_model("llama"), config)
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):  # PEFT itself takes its QA-LoRA on GPTQ bases alone
            module.lora_variant["default"] = QALoraLinearVariant()
            QALoraLinearVariant.init(module, "default", config)
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    peft_model.save_pretrained(tmp_path / "peft")
    export_merged(tmp_path / "model", read(tmp_path / "peft", tmp_path / "model"), tmp_path / "out", UNQUANTISED)
    assert_merged_is(logits(peft_model.eval()), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("llama", ["v_proj"], {"attention_bias"}),
        ("llama", ["o_proj", "up_proj"], {"attention_bias", "mlp_bias"}),
        ("qwen3", ["k_proj"], {"attention_bias"}),
        ("stablelm", ["q_proj"], {"use_qkv_bias"}),
    ],
)
def test_biases_that_the_base_lacks_are_switched_on_in_the_config(
    family, targets, options, make_model, engine_settings, logits_of, tmp_path
):
    peft_model = randomised(make_model(family), LoraConfig(r=4, lora_bias=True, target_modules=targets))
    peft_model.save_pretrained(tmp_path / "peft")
    expected = logits(peft_model)  # PEFT itself merges no bias into a linear that has none
    export_merged(tmp_path / "model", read(tmp_path / "peft", tmp_path / "model"), tmp_path / "out", UNQUANTISED)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name for name in config if name.endswith("_bias") and config[name]} == options
    assert_merged_is(expected, tmp_path / "out")
    ours = load_decoder(tmp_path / "out", engine_settings(quantization="none"))
    torch.testing.assert_close(logits_of(ours, TOKENS[0].tolist()), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "projection"), [("mistral", "o_proj"), ("qwen2", "o_proj"), ("qwen3", "down_proj"), ("phi3", "q_proj")]
)
def test_a_bias_that_the_family_cannot_have_is_refused_by_name(family, projection, make_model, tmp_path):
    make_model(family)
    width, _ = ModelConfig.from_directory(tmp_path / "model").adapter_layout().shapes[projection]
    adapter = Adapter({}, {ModuleKey(1, projection): Epilogue(shift=np.ones(width, np.float32))})
    with pytest.raises(UnsupportedAdapter, match=rf"bias to layers\.1\.{projection}.*no option.*family {family}"):
        export_merged(tmp_path / "model", adapter, tmp_path / "out", UNQUANTISED)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_what_is_no_change_of_weights_is_refused_by_name(make_model, tmp_path):
    make_model("llama")
    prefix = Adapter({}, prefix=VirtualTokens(np.ones((5, 64), np.float32)))
    alora = Adapter({}, {ModuleKey(0, "q_proj"): Epilogue(shift=np.ones(64, np.float32))}, invocation_tokens=(7,))
    replaced = TokenRows(np.array([3]), np.ones((1, 64), np.float32))
    vocabulary = Adapter({}, vocabulary=Vocabulary(embedding=TokenMatrix(rows=replaced)))
    for adapter, reason in ((prefix, "virtual tokens"), (alora, "aLoRA"), (vocabulary, "changes embed_tokens")):
        with pytest.raises(UnsupportedAdapter, match=reason):
            export_merged(tmp_path / "model", adapter, tmp_path / "out", UNQUANTISED)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.fixture
def scaled(make_model: MakeModel, tmp_path: Path) -> Any:
    """A Llama, whose o_proj of layer 1 an (IA)³ adapter triples and whose q_proj it adds 2 to."""
    make_model("llama")
    factor, shift = np.full(64, 3, np.float32), np.full(64, 2, np.float32)
    return Adapter({}, {ModuleKey(1, "o_proj"): Epilogue(factor=factor), ModuleKey(1, "q_proj"): Epilogue(shift=shift)})


def test_the_error_is_told_of_the_weights_that_change(scaled, tmp_path):
    form = ExportForm(base_quantization="none")
    errors = export_merged(tmp_path / "model", scaled, tmp_path / "out", form)
    (error,) = errors
    assert error.name == "model.layers.1.self_attn.o_proj"
    assert error.update == pytest.approx(2 / 3 * error.norm, rel=1e-5)
    assert 0 < error.relative < 4e-3
    assert all_together(errors).relative == pytest.approx(error.relative)
    assert all_together([]).relative == 0


def test_biases_are_rounded_once_and_zeros_where_the_adapter_has_none(scaled, tmp_path):
    export_merged(tmp_path / "model", scaled, tmp_path / "out", ExportForm(quantization="nf4"))
    tensors: dict[str, Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(file)
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith(".bias")}
    assert len(biases) == 3 * 4, "q, k, v and o of each layer"
    changed = biases.pop("model.layers.1.self_attn.q_proj.bias")
    assert changed.dtype == torch.bfloat16
    assert (changed == 2).all()
    assert not any(tensor.any() for tensor in biases.values())
