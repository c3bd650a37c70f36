"""Any LoRA configuration that PEFT takes for a tiny model of two layers, as a hypothesis strategy; and that model."""

import copy
from functools import cache
from typing import Any

from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODULES = [*LINEARS, "self_attn.q_proj", "layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj"]
"""Names as lists have them: a linear's, or its last parts."""
EXPRESSIONS = [
    r".*\.(q|k|v)_proj",
    r".*layers\.1\..*_proj",
    r".*self_attn\.[qo]_proj",
    r"model\.layers\.\d\.mlp\.\w+_proj",
]
PATTERNS = [*MODULES, "proj", r"layers\.0\..*", r".*\.(q|down)_proj", r"^model\.layers\.1\.mlp\.up_proj"]
"""Keys of `rank_pattern` and `alpha_pattern`; `proj` matches none, for it is no whole part of a name."""


def _patterns(values: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, int]]:
    """In the order in which PEFT saves them, whatever they had in training; the first that matches counts."""
    return st.dictionaries(st.sampled_from(PATTERNS), values, max_size=3).map(lambda drawn: dict(sorted(drawn.items())))


_names = st.lists(st.sampled_from(MODULES), min_size=1, max_size=4, unique=True)
_NOTHING_TO_ADAPT = ("No modules were targeted", "not found in the base model", "No layers types compatible")
_extras: st.SearchStrategy[dict[str, bool]] = st.sampled_from([{}, {}, {"use_dora": True}, {"lora_bias": True}])


@st.composite
def lora_options(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a `LoraConfig`; they may name no module at all."""
    options: dict[str, Any] = {
        "r": draw(st.integers(1, 8)),
        "lora_alpha": draw(st.integers(1, 16)),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(_patterns(st.integers(1, 8))),
        "alpha_pattern": draw(_patterns(st.integers(1, 16))),
        "target_modules": draw(_names | st.sampled_from([*EXPRESSIONS, "all-linear"])),
        "exclude_modules": draw(st.none() | _names | st.sampled_from(EXPRESSIONS)),
        "bias": draw(st.sampled_from(["none", "none", "all", "lora_only"])),
        "fan_in_fan_out": draw(st.booleans()),
        **draw(_extras),
    }
    if isinstance(options["target_modules"], list) and draw(st.booleans()):  # PEFT takes them beside no expression
        options["layers_to_transform"] = draw(st.integers(0, 1) | st.lists(st.integers(0, 1), min_size=1, max_size=2))
        options["layers_pattern"] = draw(st.sampled_from([None, "layers", ["blocks", "layers"]]))
    return options


@cache
def tiny_base() -> PreTrainedModel:
    """A Qwen2 of two layers, whose q, k and v have biases."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=2, **sizes))


def adapted(config: PeftConfig) -> PeftModel | None:
    """A copy of `tiny_base` with a new adapter; None where PEFT finds nothing to adapt."""
    try:
        model = get_peft_model(copy.deepcopy(tiny_base()), config)
    except ValueError as error:
        if any(reason in str(error) for reason in _NOTHING_TO_ADAPT):
            return None
        raise
    assert isinstance(model, PeftModel)
    return model
