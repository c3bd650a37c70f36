"""Which modules a configuration names, and with which rank and scale: PEFT's own functions are the oracle."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase_adapters.errors import InvalidTensors
from onebase_adapters.peft_lora import read_options
from onebase_adapters.peft_targets import Targets

MODULES = [
    f"{prefix}layers.{layer}.{block}"
    for prefix in ("model.", "model.language_model.")
    for layer in (0, 1, 11)
    for block in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
PATTERNS = [
    "q_proj",
    "proj",
    "down_proj",
    "mlp.up_proj",
    "layers.1.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    r".*\.(q|v)_proj",
    r"layers\.[01]\..*",
    r".*self_attn.*",
    r"^model\.layers\.\d\.mlp\.up_proj",
]

names = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=4)
layers = st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3)
layers_patterns = st.none() | st.sampled_from(["layers", "h", ["blocks", "layers"], []])


@settings(deadline=None)
@given(st.data())
def test_the_modules_that_a_configuration_names_are_those_that_peft_would_load(data: st.DataObject) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    targets = data.draw(names | st.sampled_from(PATTERNS), label="target_modules")
    options = {"target_modules": targets, "exclude_modules": data.draw(st.none() | names | st.sampled_from(PATTERNS))}
    if isinstance(targets, list):  # PEFT does not take the others beside a pattern
        options["layers_to_transform"] = data.draw(layers, label="layers_to_transform")
        if options["layers_to_transform"] is not None:
            options["layers_pattern"] = data.draw(layers_patterns, label="layers_pattern")
    config, ours = peft.LoraConfig(**options), Targets.read(options)
    for module in MODULES:
        found = check_target_module_exists(config, module)
        expected = bool(found) and not isinstance(found, _ExcludedModule)
        assert _is_named(ours, module) == expected, module


def _is_named(targets: Targets, module: str) -> bool:
    try:
        targets.require(module)
    except InvalidTensors:
        return False
    return True


@settings(deadline=None)
@given(
    r=st.integers(1, 64),
    lora_alpha=st.integers(1, 64),
    use_rslora=st.booleans(),
    rank_pattern=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 64)),
    alpha_pattern=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 64)),
)
def test_each_module_has_the_rank_and_scale_that_peft_gives_it(r, lora_alpha, use_rslora, rank_pattern, alpha_pattern):
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    ours = read_options(
        {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora}
        | {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    )
    for module in MODULES:
        rank = rank_pattern.get(get_pattern_key(rank_pattern.keys(), module), r)
        alpha = alpha_pattern.get(get_pattern_key(alpha_pattern.keys(), module), lora_alpha)
        assert ours.rank(module) == rank
        assert ours.scale(module) == pytest.approx(alpha / (rank**0.5 if use_rslora else rank), rel=1e-15)
