"""Every carried family through the engine: rows of the base and of PEFT adapters in one batch, each as it is alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from onebase_adapters.store import AdapterStore
from onebase_kernels import dequantize, quantize_nf4, use_backend

from .conftest import VOCAB, MakeEngine, Oracle, lora_model, publish
from .test_mixed_batch import assert_like_oracle, run, submit

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": None,
}
WINDOW = {"sliding_window": 9}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64},
    "gemma": {},
    "gemma2": WINDOW | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3_text": WINDOW | {"sliding_window_pattern": 3},
    "phi3": WINDOW | {"partial_rotary_factor": 0.5},
    "smollm3": {},
    "granite": {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "olmo2": {},
    "stablelm": {"use_parallel_residual": True, "use_qkv_bias": True},
}
MIXTURES = ("mixtral", "qwen3_moe")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORAS: dict[str, dict[str, Any]] = {"lora": {"r": 2}, "dora": {"r": 8, "use_dora": True}}
ADAPTERS = (*LORAS, "prompt")


def rounded_to_nf4(weight: Tensor) -> Tensor:
    return dequantize(quantize_nf4(weight, double_quant=False), torch.float32)


def round_linears_to_nf4(model: PreTrainedModel) -> None:
    """Rounding once more changes nothing, so that the engine's quantisation finds these very weights."""
    for parameter in model.parameters():
        if parameter.dim() == 3:  # the experts' weights
            parameter.data = torch.stack([rounded_to_nf4(weight) for weight in parameter.data])
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = rounded_to_nf4(module.weight.data)


@pytest.fixture(params=FAMILIES)
def family_oracle(request: pytest.FixtureRequest, tmp_path: Path) -> Oracle:
    """A tiny random model of the family with its adapters, all saved in `tmp_path`; its weights are those of NF4."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **(TINY | FAMILIES[request.param]))
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    round_linears_to_nf4(base)
    base.save_pretrained(tmp_path / "base")
    targets = ATTENTION if base.config.model_type in MIXTURES else "all-linear"
    loras = lora_model(base, {name: {"target_modules": targets, **options} for name, options in LORAS.items()})
    models = dict.fromkeys(LORAS, loras) | {"prompt": prompt_model(tmp_path / "base")}
    for model in dict.fromkeys(models.values()):
        model.save_pretrained(tmp_path / "adapters")
        model.eval()
    return Oracle(models, tmp_path / "adapters")


def prompt_model(directory: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), adapter_name="prompt")
    assert isinstance(model, PeftModel)
    return model


@pytest.mark.parametrize("max_num_batched_tokens", [512, 7], ids=["one batch", "chunked prefill"])
def test_each_row_of_a_familys_mixed_batch_is_what_it_is_alone(
    max_num_batched_tokens: int, family_oracle: Oracle, make_family_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_family_engine(max_num_batched_tokens=max_num_batched_tokens)
    store = AdapterStore.open(tmp_path / "store", engine.decoder.config.adapter_layout(), base_name="base")
    rows = [(row, adapter) for adapter in (None, *ADAPTERS) for row in (f"{adapter}-1", f"{adapter}-2")]
    for row, adapter in rows:
        submit(engine, row, publish(store, adapter, family_oracle.directory / adapter) if adapter else None)
    outputs = run(engine)
    store.close()
    for row, adapter in rows:
        assert_like_oracle(outputs[row], row, adapter, family_oracle)
    if use_backend("auto") == "cpu" and engine.decoder.config.experts is None:
        assert engine.runner.activation_bytes > 0, "the step was not recorded"
