"""A mixed batch on each quantised base is what Transformers + PEFT give with the weights that the base stands for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from onebase_adapters.store import AdapterStore
from onebase_kernels import dequantize
from onebase_server.model.weight_formats import Quantization

from ..random_numbers import randomize
from .conftest import MakeEngine, Oracle, publish
from .test_mixed_batch import assert_like_oracle, run, submit

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "fp4": {"quantization": "fp4"},
    "int4": {"quantization": "int4", "group_size": 32},
    "int8": {"quantization": "int8"},
}
ADAPTERS: dict[str, LoraConfig] = {
    "plain": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
}


def quantised_model(directory: Path, quantization: Quantization) -> PreTrainedModel:
    """Transformers' model with the linears of the layers rounded to the format."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = dequantize(quantization.quantize(name, module.weight.data), torch.float32)
    return model


def make_oracle(base: Path, quantization: Quantization, directory: Path) -> Oracle:
    """Every adapter, its numbers random, saved by PEFT."""
    models: dict[str, PeftModel] = {}
    for name, config in ADAPTERS.items():
        model = get_peft_model(quantised_model(base, quantization), config, adapter_name=name)
        randomize(model)
        model.save_pretrained(directory)
        models[name] = model.eval()
    return Oracle(models, directory)


@pytest.mark.parametrize("options", QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_each_row_of_a_mixed_batch_is_what_it_is_alone(
    options: dict[str, Any], small_base: Path, make_engine: MakeEngine, store: AdapterStore, tmp_path: Path
) -> None:
    kind, settings = options["quantization"], {key: value for key, value in options.items() if key != "quantization"}
    oracle = make_oracle(small_base, Quantization(kind, **settings), tmp_path / "peft")
    engine = make_engine(**options)
    for name in (None, *ADAPTERS):
        submit(engine, str(name), publish(store, name, tmp_path / "peft" / name) if name else None)
    outputs = run(engine)
    for name in (None, *ADAPTERS):
        assert_like_oracle(outputs[str(name)], str(name), name, oracle)
