"""Whatever modules an (IA)³ or VeRA configuration names, the canonical form has what PEFT computes with."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import IA3Config, PeftConfig, PeftModel, VeraConfig
from peft.tuners.ia3 import IA3Layer
from peft.tuners.vera import VeraLayer

from onebase_adapters.adapter import Adapter, ModuleKey
from onebase_adapters.peft_format import parse

from ..lora_configs import EXPRESSIONS, LINEARS, MODULES, adapted
from .test_lora_properties import TWO_LAYERS, as_numpy, linears
from .test_peft_round_trip import update

_names = st.lists(st.sampled_from(MODULES), min_size=1, max_size=4, unique=True)
_targets = _names | st.sampled_from([*EXPRESSIONS, "all-linear"])
_exclusions = st.none() | st.lists(st.sampled_from(LINEARS), min_size=1, max_size=2, unique=True)


def read(config: PeftConfig) -> tuple[PeftModel, Adapter]:
    """PEFT's model of a configuration, its numbers random, and what it saves as the store reads it."""
    model = adapted(config)
    assume(model is not None)
    assert model is not None
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return model, parse(Path(directory), TWO_LAYERS, max_rank=8)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(targets=_targets, exclusions=_exclusions, is_feedforward=st.booleans())
def test_ia3_scales_the_outputs_that_peft_scales(targets: Any, exclusions: Any, is_feedforward: bool) -> None:
    feedforward = ["down_proj"] if is_feedforward and (isinstance(targets, str) or "down_proj" in targets) else []
    model, adapter = read(
        IA3Config(target_modules=targets, exclude_modules=exclusions, feedforward_modules=feedforward)
    )
    expected: dict[ModuleKey, np.ndarray] = {}
    for key, module in linears(model):
        if isinstance(module, IA3Layer):
            scaled = key._replace(projection="up_proj") if module.is_feedforward else key
            expected[scaled] = expected.get(scaled, 1) * as_numpy(module.ia3_l["default"]).reshape(-1)
    assert adapter.epilogues.keys() == expected.keys()
    for key, factor in expected.items():
        np.testing.assert_allclose(adapter.epilogues[key].vectors["factor"], factor, rtol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rank=st.integers(1, 8), targets=_targets, layers=st.none() | st.integers(0, 1))
def test_vera_adds_the_updates_that_peft_adds(rank: int, targets: Any, layers: int | None) -> None:
    options = {} if isinstance(targets, str) else {"layers_to_transform": layers}  # PEFT takes it beside names alone
    model, adapter = read(VeraConfig(r=rank, target_modules=targets, **options))
    expected = {key: module for key, module in linears(model) if isinstance(module, VeraLayer)}
    assert adapter.pairs.keys() == expected.keys()
    for key, module in expected.items():
        np.testing.assert_allclose(
            update(adapter.pairs[key]), as_numpy(module.get_delta_weight("default")), rtol=1e-4, atol=1e-5
        )
