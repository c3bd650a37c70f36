"""Our decoder's logits against Transformers', family by family, however prefill is cut."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import onebase_kernels as kernels
from onebase_adapters import peft_format
from onebase_server.engine.matrix_format import MatrixFormat
from onebase_server.engine.packing import pack_adapter
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

TOKENS = torch.randint(0, 97, (41,), generator=torch.Generator().manual_seed(0)).tolist()
CHUNKINGS = {
    "whole": [41],
    "chunked": [7, 16, 1, 17],
    "token by token": [1] * 41,
    "prefill, then decode": [30] + [1] * 11,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 16,
}

QWEN3_MOE_OPTIONS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 128}
GEMMA_OPTIONS = {"sliding_window": 9, "query_pre_attn_scalar": 20}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    "llama, yarn rope": ("llama", {"rope_parameters": YARN | {"rope_theta": 1e4}}),
    "llama, longrope": ("llama", {"rope_parameters": LONGROPE | {"rope_theta": 1e4}}),
    "mistral, window shorter than the prompt": ("mistral", {"sliding_window": 9}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows in the last layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3, heads wider than the hidden size, biases, tied": (
        "qwen3",
        {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE_OPTIONS),
    "qwen3_moe, weights that sum to one": ("qwen3_moe", QWEN3_MOE_OPTIONS | {"norm_topk_prob": True}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", GEMMA_OPTIONS | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", GEMMA_OPTIONS | {"sliding_window_pattern": 3}),
    "gemma3, stretched rope": (
        "gemma3_text",
        GEMMA_OPTIONS
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3, window, partial rope": ("phi3", {"sliding_window": 9, "partial_rotary_factor": 0.75}),
    "phi3, partial longrope": (
        "phi3",
        {
            "rope_parameters": LONGROPE
            | {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            "original_max_position_embeddings": 16,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3, windows without rope": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 2.5,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
    ),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {}),
    "stablelm, biases, a larger share of rope": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
}


MIXTURES = ("mixtral", "qwen3_moe")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""What adapters may touch beside experts."""


@pytest.fixture(autouse=True, scope="module")
def served_backend() -> Iterator[None]:
    """The ops that a server computes with by default."""
    kernels.use_backend("auto")
    yield
    kernels.use_backend("reference")


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def transformers_logits(model: PreTrainedModel | PeftModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([TOKENS])).logits[0]


def rounded_to_nf4(weight: Tensor) -> Tensor:
    """What bitsandbytes would compute with."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))


def round_linears_to_nf4(model: PreTrainedModel) -> None:
    """Round every linear of the layers; Transformers holds those of all experts in one tensor, gate and up as one."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = rounded_to_nf4(module.weight.data)
        if name.endswith(".experts"):
            for weights, parts in ((module.gate_up_proj, 2), (module.down_proj, 1)):
                matrices = [matrix for weight in weights.data for matrix in weight.chunk(parts)]
                weights.data = torch.cat([rounded_to_nf4(matrix.contiguous()) for matrix in matrices]).view_as(weights)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(
    variant: str,
    quantization: str,
    make_model: Callable[..., PreTrainedModel],
    engine_settings: Callable[..., EngineSettings],
    logits_of: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    model_type, options = VARIANTS[variant]
    model = make_model(model_type, **options)
    if quantization == "nf4":
        round_linears_to_nf4(model)
    expected = transformers_logits(model)
    decoder = load_decoder(tmp_path / "model", engine_settings(quantization=quantization))
    for name, chunks in CHUNKINGS.items():
        assert relative_error(logits_of(decoder, TOKENS, chunks), expected) < 1e-4, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_an_adapter_of_pefts_are_those_of_transformers(
    variant: str,
    make_model: Callable[..., PreTrainedModel],
    engine_settings: Callable[..., EngineSettings],
    logits_of: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    model_type, options = VARIANTS[variant]
    targets = ATTENTION if model_type in MIXTURES else "all-linear"
    peft_model = get_peft_model(make_model(model_type, **options), LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    peft_model.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(tmp_path / "model", engine_settings(quantization="none"))
    adapter = peft_format.parse(tmp_path / "adapter", decoder.config.adapter_layout(), max_rank=4)
    packed = pack_adapter(adapter, decoder.config, MatrixFormat(torch.float32), tuple(decoder.weights.groups))
    expected = transformers_logits(peft_model)
    for name in ("chunked", "prefill, then decode"):
        assert relative_error(logits_of(decoder, TOKENS, CHUNKINGS[name], packed), expected) < 1e-4, name
    assert relative_error(logits_of(decoder, TOKENS), expected) > 1e-2, "the adapter changes the logits"


def test_dynamic_rope_is_fixed_by_the_served_context(
    make_model: Callable[..., PreTrainedModel],
    engine_settings: Callable[..., EngineSettings],
    logits_of: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    """Transformers stretches with each sequence's length; serving 41 tokens makes that length ours."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = make_model("llama", rope_parameters=rope, max_position_embeddings=16)
    decoder = load_decoder(tmp_path / "model", engine_settings(quantization="none", max_model_len=len(TOKENS)))
    expected = transformers_logits(model)
    for chunks in CHUNKINGS.values():
        assert relative_error(logits_of(decoder, TOKENS, chunks), expected) < 1e-4


def test_bfloat16_stays_near_float32(
    make_model: Callable[..., PreTrainedModel],
    engine_settings: Callable[..., EngineSettings],
    logits_of: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    model = make_model("llama", initializer_range=0.05)
    round_linears_to_nf4(model)
    decoder = load_decoder(tmp_path / "model", engine_settings(dtype="bfloat16"))
    logits = logits_of(decoder, TOKENS, CHUNKINGS["chunked"])
    assert logits.dtype == torch.float32
    assert relative_error(logits, transformers_logits(model)) < 2e-2
