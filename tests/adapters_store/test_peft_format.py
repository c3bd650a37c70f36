from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onebase_adapters.adapter import Adapter, ModuleKey
from onebase_adapters.base_layout import BaseLayout
from onebase_adapters.errors import InvalidConfig, InvalidTensors
from onebase_adapters.peft_config import load_config
from onebase_adapters.peft_format import parse


def load(directory: Path, layout: BaseLayout) -> Adapter:
    return parse(directory, layout, max_rank=64)


def test_a_plain_lora_keeps_its_numbers_and_scale(write_peft, layout, tensors):
    adapter = load(write_peft(tensors), layout)
    assert set(adapter.pairs) == {ModuleKey(i, p) for i in range(3) for p in ("q_proj", "v_proj")}
    pair = adapter.pairs[ModuleKey(1, "v_proj")]
    np.testing.assert_array_equal(
        pair.lora_a, tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
    )
    np.testing.assert_array_equal(
        pair.lora_b, tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    )
    assert pair.scale == 2.0
    assert (adapter.rank, adapter.targets) == (4, ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".weight", ".default.weight"),
        ("base_model.model.", ""),
        ("base_model.model.model.", ""),
        ("model.layers", "language_model.model.layers"),
        ("model.layers", "model.language_model.layers"),
    ],
)
def test_names_are_understood_in_every_form_that_tools_write(write_peft, layout, tensors, old, new):
    renamed = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    assert renamed.keys().isdisjoint(tensors)
    expected, adapter = load(write_peft(tensors), layout), load(write_peft(renamed, name="renamed"), layout)
    assert adapter.pairs.keys() == expected.pairs.keys()


@pytest.mark.parametrize(
    ("fused", "block", "parts"),
    [("qkv_proj", "self_attn", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", "mlp", ("gate_proj", "up_proj"))],
)
def test_a_fused_module_shares_a_and_divides_the_rows_of_b(write_peft, layout, fused, block, parts):
    rng = np.random.default_rng(0)
    rows = sum(layout.shapes[part][0] for part in parts)
    lora_a = rng.standard_normal((4, 32)).astype(np.float32)
    lora_b = rng.standard_normal((rows, 4)).astype(np.float32)
    module = f"base_model.model.model.layers.2.{block}.{fused}"
    source = write_peft({f"{module}.lora_A.weight": lora_a, f"{module}.lora_B.weight": lora_b}, target_modules=[fused])
    adapter = load(source, layout)
    assert set(adapter.pairs) == {ModuleKey(2, part) for part in parts}
    x = rng.standard_normal(32).astype(np.float32)
    divided = [adapter.pairs[ModuleKey(2, part)] for part in parts]
    np.testing.assert_allclose(
        np.concatenate([pair.lora_b @ (pair.lora_a @ x) for pair in divided]), lora_b @ (lora_a @ x), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_each_dtype_is_kept_bit_for_bit(write_peft, layout, tensors, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    pair = load(write_peft(tensors), layout).pairs[ModuleKey(0, "q_proj")]
    expected = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert pair.lora_a.dtype == dtype
    assert pair.lora_a.tobytes() == expected.tobytes()


def test_options_without_effect_on_answers_pass(write_peft, layout):
    source = write_peft(
        base_model_name_or_path="somewhere/else",
        revision="main",
        auto_mapping={"base_model_class": "LlamaForCausalLM"},
        task_type="SEQ_2_SEQ_LM",
        lora_dropout=0.1,
        init_lora_weights="gaussian",
        loftq_config={},
        megatron_core="megatron.core",
        modules_to_save=[],
        layers_to_transform=[0, 1, 2],
        qalora_group_size=16,
        an_option_of_tomorrow=False,
    )
    assert load(source, layout).rank == 4


@pytest.fixture(scope="module")
def llama():
    """Makes tiny random Llamas with the shapes of `layout`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return lambda: transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
        {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 8, "init_lora_weights": "orthogonal", "target_modules": r".*\.(1|2)\.mlp\.(up|gate)_proj"},
        {"r": 4, "target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            # a plain name, a path, an expression, one that matches nothing ("proj" is not a whole part), overlaps
            "rank_pattern": {"k_proj": 2, "model.layers.1.self_attn.q_proj": 16, r"layers\.[02]\.mlp\.up_proj": 3},
            "alpha_pattern": {"proj": 99, "q_proj": 5, r".*\.1\..*": 11, "^model.layers.2.mlp.up_proj": 1},
        },
    ],
    ids=["plain", "rslora", "regex", "layers", "patterns"],
)
def test_every_pair_has_the_matrices_and_the_scale_of_peft(llama, options, tmp_path, layout):
    import peft
    import torch

    peft.get_peft_model(llama(), peft.LoraConfig(**options)).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)

    adapter = load(tmp_path, layout)
    expected = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            layer, projection = int(name.split(".")[2]), name.split(".")[-1]
            expected[ModuleKey(layer, projection)] = module
    assert set(adapter.pairs) == set(expected)
    for key, module in expected.items():
        pair = adapter.pairs[key]
        np.testing.assert_array_equal(pair.lora_a, module.lora_A["default"].weight.detach().numpy())
        np.testing.assert_array_equal(pair.lora_b, module.lora_B["default"].weight.detach().numpy())
        assert pair.scale == module.scaling["default"], key


def test_a_pattern_made_to_run_for_ever_is_refused_at_once(write_peft, layout):
    with pytest.raises(InvalidConfig, match="takes too long"):
        load(write_peft(rank_pattern={"(.|..|...)+[0-9]": 8}), layout)


def test_a_config_nested_beyond_reason_is_refused(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text('{"r": ' + "[" * 100_000)
    with pytest.raises(InvalidConfig, match="not valid JSON"):
        load_config(path)


def test_a_linear_given_both_fused_and_by_itself_is_refused(write_peft, layout, tensors):
    module = "base_model.model.model.layers.0.self_attn.qkv_proj"
    tensors[f"{module}.lora_A.weight"] = np.ones((4, 32), np.float32)
    tensors[f"{module}.lora_B.weight"] = np.ones((64, 4), np.float32)
    with pytest.raises(InvalidTensors, match=r"layers\.0\.q_proj has two pairs"):
        load(write_peft(tensors, target_modules=["q_proj", "v_proj", "qkv_proj"]), layout)
