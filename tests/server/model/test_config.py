"""What `config.json` says of a base, family by family."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig
from onebase_server.model.layer_config import ScaleConfig

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
MISTRAL = LLAMA | {"model_type": "mistral"}
QWEN2 = LLAMA | {"model_type": "qwen2"}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 32}
GEMMA2 = LLAMA | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA3 = GEMMA2 | {"model_type": "gemma3_text", "head_dim": 32}
PHI3 = LLAMA | {"model_type": "phi3"}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
}
SMOLLM3 = LLAMA | {"model_type": "smollm3"}
STABLELM = LLAMA | {"model_type": "stablelm"}


def test_a_plain_llama() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 8, 2, 8)
    assert (config.biases, config.norms.heads, config.windows) == (frozenset(), None, (None,) * 4)
    assert config.scales == ScaleConfig(attention=8**-0.5)
    assert config.max_context == 1024
    assert not config.tie_word_embeddings
    assert config.quantization is None


def test_fields_that_are_left_out_take_the_familys_defaults() -> None:
    bare = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert ModelConfig.from_hf(bare).num_kv_heads == 8
    assert ModelConfig.from_hf(bare | {"model_type": "mistral"}).num_kv_heads == 8
    bare_qwen3 = {key: value for key, value in QWEN3.items() if key != "head_dim"}
    assert ModelConfig.from_hf(bare_qwen3).head_dim == 128


@pytest.mark.parametrize(
    ("hf", "biased"),
    [
        (LLAMA | {"attention_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (LLAMA | {"mlp_bias": True}, {"gate_proj", "up_proj", "down_proj"}),
        (MISTRAL, set()),
        (QWEN2, {"q_proj", "k_proj", "v_proj"}),
        (QWEN3, set()),
        (QWEN3 | {"attention_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (STABLELM | {"use_qkv_bias": True}, {"q_proj", "k_proj", "v_proj"}),
    ],
)
def test_which_projections_have_a_bias(hf: dict[str, Any], biased: set[str]) -> None:
    assert ModelConfig.from_hf(hf).biases == biased


@pytest.mark.parametrize(
    ("hf", "windows"),
    [
        (MISTRAL | {"sliding_window": 5}, (5, 5, 5, 5)),
        (MISTRAL | {"sliding_window": None}, (None,) * 4),
        (QWEN2 | {"sliding_window": 5, "use_sliding_window": False}, (None,) * 4),
        (QWEN2 | {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 5)),
        (
            QWEN3
            | {
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (5, None, 5, None),
        ),
        (GEMMA2 | {"sliding_window": 5}, (5, None, 5, None)),
        (GEMMA3 | {"sliding_window": 5}, (5, 5, 5, 5)),
        (GEMMA3 | {"sliding_window": 5, "sliding_window_pattern": 3}, (5, 5, None, 5)),
        (PHI3 | {"sliding_window": 5}, (5, 5, 5, 5)),
        (SMOLLM3 | {"sliding_window": 5, "use_sliding_window": False}, (None,) * 4),
        (SMOLLM3 | {"sliding_window": 5, "use_sliding_window": True}, (None, None, None, 5)),
    ],
)
def test_which_layers_have_a_window(hf: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert ModelConfig.from_hf(hf).windows == windows


def test_rope_is_read_as_both_generations_of_transformers_write_it() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    old = ModelConfig.from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = ModelConfig.from_hf(LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    beside = {"rope_theta": 5e5, "original_max_position_embeddings": 256}
    oldest = ModelConfig.from_hf(LLAMA | beside | {"rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert old.rope == new.rope == oldest.rope
    assert (old.rope.rope_type, old.rope.theta, old.rope.factor, old.rope.trained_context) == ("yarn", 5e5, 4.0, 256)


def test_layers_with_windows_have_their_own_rope_as_both_generations_of_transformers_write_it() -> None:
    windows = {"sliding_window": 5, "sliding_window_pattern": 2}
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = GEMMA3 | windows | {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": scaling}
    nested = {"full_attention": scaling | {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 2e4}}
    for hf in (old, GEMMA3 | windows | {"rope_parameters": nested}):
        config = ModelConfig.from_hf(hf)
        local, whole, *_ = config.ropes
        assert local is not None
        assert (local.rope_type, local.theta) == ("default", 2e4)
        assert whole is not None
        assert (whole.rope_type, whole.theta, whole.factor) == ("linear", 1e6, 8.0)
        assert config.ropes == (local, whole, local, whole)
        assert config.max_context == 1024, "a Gemma states the stretched context"


def test_layers_without_rope_are_those_told_or_every_fourth() -> None:
    def rotated(hf: dict[str, Any]) -> list[bool]:
        return [rope is not None for rope in ModelConfig.from_hf(hf).ropes]

    assert rotated(SMOLLM3) == [True, True, True, False]
    assert rotated(SMOLLM3 | {"no_rope_layer_interval": 2}) == [True, False, True, False]
    assert rotated(SMOLLM3 | {"no_rope_layers": [0, 1, 1, 0]}) == [False, True, True, False]


@pytest.mark.parametrize(
    ("hf", "share"),
    [
        (LLAMA, 1.0),
        (PHI3 | {"partial_rotary_factor": 0.75}, 0.75),
        (STABLELM, 0.25),
        (STABLELM | {"rope_parameters": {"partial_rotary_factor": 0.5}}, 0.5),
    ],
)
def test_how_much_of_a_head_is_rotated(hf: dict[str, Any], share: float) -> None:
    assert ModelConfig.from_hf(hf).rope.rotated_share == share


def test_experts_and_how_many_each_token_takes() -> None:
    mixtral, qwen = ModelConfig.from_hf(MIXTRAL).experts, ModelConfig.from_hf(QWEN3_MOE).experts
    assert mixtral is not None
    assert qwen is not None
    assert (mixtral.num_experts, mixtral.per_token, mixtral.intermediate_size, mixtral.is_normalized) == (
        4,
        2,
        96,
        True,
    )
    assert (qwen.num_experts, qwen.per_token, qwen.intermediate_size, qwen.is_normalized) == (16, 4, 48, False)
    assert ModelConfig.from_hf(QWEN3).experts is None


def test_adapters_may_touch_the_router_and_every_expert() -> None:
    layout = ModelConfig.from_hf(QWEN3_MOE).adapter_layout()
    assert list(layout.shapes) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (layout.shape("gate"), layout.shape("gate", 0), layout.shape("up_proj")) == ((16, 64), None, None)
    assert (layout.shape("up_proj", 15), layout.shape("down_proj", 0)) == ((48, 64), (64, 48))
    assert layout.shape("up_proj", 16) is None
    assert ModelConfig.from_hf(QWEN3).adapter_layout().shape("up_proj", 0) is None


def test_softcaps_that_are_left_out_or_null_are_none() -> None:
    capped = ModelConfig.from_hf(GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": None}).scales
    assert (capped.attention_softcap, capped.logits_softcap) == (50.0, None)
    assert capped.attention == 256**-0.5


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024}, 8192),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}, 1024),
        ({"rope_type": "longrope", "short_factor": [1] * 4, "long_factor": [2] * 4}, 1024),
    ],
)
def test_the_context_counts_rope_scaling_in(scaling: dict[str, Any], context: int) -> None:
    assert ModelConfig.from_hf(LLAMA | {"rope_scaling": scaling}).max_context == context


def test_dtype_is_read_under_both_names() -> None:
    assert ModelConfig.from_hf(LLAMA | {"dtype": "bfloat16"}).dtype == "bfloat16"
    assert ModelConfig.from_hf(LLAMA | {"torch_dtype": "float16"}).dtype == "float16"


def test_one_or_several_end_tokens() -> None:
    assert ModelConfig.from_hf(LLAMA | {"eos_token_id": 7}).eos_token_ids == (7,)
    assert ModelConfig.from_hf(LLAMA | {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert ModelConfig.from_hf(LLAMA).eos_token_ids == ()


def test_adapters_may_touch_every_linear() -> None:
    layout = ModelConfig.from_hf(QWEN3).adapter_layout()
    assert layout.num_layers == 4
    assert layout.shapes == {
        "q_proj": (256, 64),
        "k_proj": (64, 64),
        "v_proj": (64, 64),
        "o_proj": (64, 256),
        "gate_proj": (96, 64),
        "up_proj": (96, 64),
        "down_proj": (64, 96),
    }


@pytest.mark.parametrize(
    ("hf", "said"),
    [
        (
            LLAMA | {"model_type": "gpt2"},
            "'gpt2' is not carried. Carried families: llama, mistral, qwen2, qwen3, mixtral",
        ),
        ({}, "the model family None is not carried"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not carried"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size should be a positive integer, not '64'"),
        (LLAMA | {"vocab_size": None}, "vocab_size should be a positive integer, not None"),
        (LLAMA | {"num_key_value_heads": 3}, "is not a multiple of"),
        (LLAMA | {"head_dim": 7}, "7 of a head's 7 numbers would be rotated"),
        (STABLELM | {"head_dim": 12}, "3 of a head's 12 numbers would be rotated"),
        (STABLELM | {"qk_layernorm": True}, "qk_layernorm = True is not carried"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not carried"),
        (GEMMA3 | {"hidden_activation": "relu"}, "hidden_activation = 'relu' is not carried"),
        (GEMMA3 | {"rope_parameters": {"rope_theta": 1e4}}, "those of full_attention and those of sliding_attention"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, "mlp_only_layers = [0] is not carried"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not carried"),
        (SMOLLM3 | {"no_rope_layers": [1]}, "no_rope_layers has 1 entries"),
        (LLAMA | {"rope_scaling": {"rope_type": "mrope"}}, "the rope type 'mrope' is not carried"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "factor should be a number, not None"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        (
            QWEN2 | {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
            "layer_types should name full_attention or sliding_attention",
        ),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, "short_factor has 1 numbers"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 8}}, "bits = 8 is not carried"),
        (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, "quantised with fp8"),
        (
            LLAMA
            | {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "af4",
                }
            },
            "bitsandbytes 4-bit af4",
        ),
    ],
)
def test_what_is_not_carried_is_refused_by_name(hf: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        ModelConfig.from_hf(hf)
    assert said in error.value.message


def test_a_directory_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no config\.json"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="not valid JSON"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="should hold a JSON object"):
        ModelConfig.from_directory(tmp_path)


def test_reading_a_configuration_needs_no_torch() -> None:
    code = "import sys, onebase_server.model.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
