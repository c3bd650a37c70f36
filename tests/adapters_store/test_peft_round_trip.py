"""An adapter that PEFT made, read and written again, answers in PEFT as it did, and reads as it did."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from onebase_adapters.adapter import Adapter, Epilogue, LowRankPair, ModuleKey, TokenMatrix, Vocabulary
from onebase_adapters.errors import UnsupportedAdapter
from onebase_adapters.fused_projections import fuse_projections
from onebase_adapters.peft_format import parse
from onebase_adapters.peft_writer import write_peft

from ..random_numbers import randomize
from .conftest import LAYOUT

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYOUT.num_layers,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
TOKENS = torch.arange(20).unsqueeze(0)
SOME = ["q_proj", "v_proj", "down_proj"]

KINDS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "rslora": lambda: LoraConfig(r=4, use_rslora=True, target_modules=SOME, rank_pattern={"q_proj": 7}),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "dora with biases": lambda: LoraConfig(r=4, use_dora=True, bias="all", target_modules=["q_proj", "o_proj"]),
    "lora_bias": lambda: LoraConfig(r=4, lora_alpha=3, lora_bias=True, target_modules=["q_proj", "o_proj"]),
    "bias of all": lambda: LoraConfig(r=4, bias="all", target_modules=["q_proj", "down_proj"]),
    "bias of targets": lambda: LoraConfig(r=4, bias="lora_only", target_modules=["k_proj", "down_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: VeraConfig(r=8, target_modules=SOME),
    "alora": lambda: LoraConfig(r=4, target_modules="all-linear", alora_invocation_tokens=[7, 8]),
}
FUSED_KINDS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["qkv_proj", "gate_up_proj"]),
    "lora_bias": lambda: LoraConfig(r=4, lora_bias=True, target_modules=["qkv_proj", "down_proj"]),
    "ia3": lambda: IA3Config(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: VeraConfig(r=8, target_modules=["qkv_proj", "gate_up_proj"]),
}


def biased() -> PreTrainedModel:
    """Its q, k and v have biases."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def fused() -> PreTrainedModel:
    """Its q, k and v are one linear, and its gate and up another."""
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SIZES))


def save_random(base: PreTrainedModel, config: PeftConfig, directory: Path) -> Tensor:
    """Save an adapter of random numbers; the logits with it."""
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(base, config).eval()
    randomize(model)
    model.save_pretrained(directory)
    return logits(model)


@torch.inference_mode()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def assert_same(ours: Adapter, expected: Adapter) -> None:
    assert (ours.pairs.keys(), ours.epilogues.keys()) == (expected.pairs.keys(), expected.epilogues.keys())
    assert ours.invocation_tokens == expected.invocation_tokens
    for key, pair in expected.pairs.items():
        assert ours.pairs[key].scale == pytest.approx(pair.scale, rel=1e-15)
        np.testing.assert_array_equal(ours.pairs[key].lora_a, pair.lora_a)
        np.testing.assert_array_equal(ours.pairs[key].lora_b, pair.lora_b)
    for key, epilogue in expected.epilogues.items():
        assert ours.epilogues[key].vectors.keys() == epilogue.vectors.keys()
        for name, vector in epilogue.vectors.items():  # a shift is divided by the scale and multiplied again
            np.testing.assert_allclose(ours.epilogues[key].vectors[name], vector, rtol=1e-6 if name == "shift" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_answers_in_peft_as_before_and_reads_as_before(kind, tmp_path):
    expected = save_random(biased(), KINDS[kind](), tmp_path / "peft")
    adapter = parse(tmp_path / "peft", LAYOUT, max_rank=8)
    write_peft(adapter, tmp_path / "out", base_name="biased")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(biased(), tmp_path / "out").eval()), expected, rtol=1e-4, atol=1e-4
    )
    assert_same(parse(tmp_path / "out", LAYOUT, max_rank=8), adapter)


@pytest.mark.parametrize("kind", FUSED_KINDS)
def test_each_kind_of_fused_linears_does_too(kind, tmp_path):
    expected = save_random(fused(), FUSED_KINDS[kind](), tmp_path / "peft")
    adapter = parse(tmp_path / "peft", LAYOUT, max_rank=8)
    write_peft(fuse_projections(adapter, LAYOUT), tmp_path / "out", base_name="fused")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(fused(), tmp_path / "out").eval()), expected, rtol=1e-4, atol=1e-4
    )
    read = parse(tmp_path / "out", LAYOUT, max_rank=8)
    if kind == "ia3":  # `gate_proj` got ones beside the factors of `up_proj`
        read = replace(read, epilogues={key: read.epilogues[key] for key in adapter.epilogues})
    assert_same(read, adapter)


def pair(projection: str, rank: int, scale: float = 1.0, dtype: type = np.float32) -> LowRankPair:
    rows, columns = LAYOUT.shapes[projection]
    rng = np.random.default_rng(rank)
    lora_a, lora_b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
    return LowRankPair(lora_a.astype(dtype), lora_b.astype(dtype), scale)


def update(pair: LowRankPair) -> np.ndarray:
    return pair.scale * pair.lora_b.astype(np.float32) @ pair.lora_a.astype(np.float32)


@pytest.mark.parametrize(
    ("parts", "rank"),
    [
        ({"q_proj": pair("q_proj", 4), "k_proj": pair("k_proj", 4), "v_proj": pair("v_proj", 4)}, 4),
        ({"q_proj": pair("q_proj", 4), "v_proj": pair("v_proj", 4)}, 4),
        ({"q_proj": pair("q_proj", 4), "k_proj": pair("k_proj", 2), "v_proj": pair("v_proj", 3)}, 9),
        ({"q_proj": pair("q_proj", 4, 0.5), "k_proj": pair("k_proj", 4, 2.0), "v_proj": pair("v_proj", 3)}, 7),
        ({"k_proj": pair("k_proj", 5, 0.5)}, 5),
        ({"q_proj": pair("q_proj", 4, 1.0, ml_dtypes.bfloat16), "k_proj": pair("k_proj", 2, 1.0, np.float16)}, 6),
        (
            {
                "q_proj": pair("q_proj", 4, 0.7, ml_dtypes.bfloat16),
                "v_proj": pair("v_proj", 2, 0.7, ml_dtypes.bfloat16),
            },
            6,
        ),
    ],
    ids=[
        "of one A",
        "of one A, one missing",
        "of all ranks",
        "of other scales",
        "alone",
        "of two dtypes",
        "of bfloat16",
    ],
)
def test_single_projections_are_one_fused_linear_whose_update_is_theirs(parts, rank, tmp_path):
    adapter = Adapter({ModuleKey(1, projection): part for projection, part in parts.items()})
    whole = fuse_projections(adapter, LAYOUT)
    (key,) = whole.pairs
    assert (key, whole.pairs[key].rank) == (ModuleKey(1, "qkv_proj"), rank)
    write_peft(whole, tmp_path, base_name="fused")
    model = PeftModel.from_pretrained(fused(), tmp_path)
    module = model.get_submodule("base_model.model.model.layers.1.self_attn.qkv_proj")
    expected = [
        update(parts[projection]) if projection in parts else np.zeros(LAYOUT.shapes[projection], np.float32)
        for projection in ("q_proj", "k_proj", "v_proj")
    ]
    np.testing.assert_allclose(
        module.get_delta_weight("default").detach(), np.concatenate(expected), rtol=1e-5, atol=1e-5
    )


def test_vectors_of_some_parts_leave_the_others_alone_or_are_refused():
    rows, _ = LAYOUT.shapes["q_proj"]
    vector = np.full(rows, 3, np.float32)
    whole = fuse_projections(Adapter({}, {ModuleKey(0, "q_proj"): Epilogue(factor=vector)}), LAYOUT)
    np.testing.assert_array_equal(whole.epilogues[ModuleKey(0, "qkv_proj")].factor, [3] * 32 + [1] * 32)
    pairs = {ModuleKey(0, "q_proj"): pair("q_proj", 4)}
    shifted = fuse_projections(Adapter(pairs, {ModuleKey(0, "q_proj"): Epilogue(shift=vector)}), LAYOUT)
    np.testing.assert_array_equal(shifted.epilogues[ModuleKey(0, "qkv_proj")].shift, [3] * 32 + [0] * 32)
    dora = Adapter(pairs, {ModuleKey(0, "q_proj"): Epilogue(magnitude=vector)})
    with pytest.raises(UnsupportedAdapter, match=r"magnitude for layers\.0\.q_proj but none for layers\.0\.k_proj"):
        fuse_projections(dora, LAYOUT)


Q, K = ModuleKey(0, "q_proj"), ModuleKey(0, "k_proj")
WIDE, NARROW = np.ones(32, np.float32), np.ones(16, np.float32)


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (Adapter({Q: pair("q_proj", 4)}, {K: Epilogue(factor=NARROW)}), r"factor for layers\.0\.k_proj"),
        (Adapter({Q: pair("q_proj", 4)}, {K: Epilogue(shift=NARROW)}), r"shift for layers\.0\.k_proj"),
        (Adapter({Q: pair("q_proj", 4)}, vocabulary=Vocabulary(head=TokenMatrix(pair=pair("q_proj", 4)))), "lm_head"),
        (Adapter({}, {K: Epilogue(bias=NARROW)}), r"bias for layers\.0\.k_proj"),
        (
            Adapter({Q: pair("q_proj", 4), K: pair("k_proj", 4)}, {Q: Epilogue(magnitude=WIDE)}),
            r"nothing but an update for layers\.0\.k_proj",
        ),
        (
            Adapter({Q: pair("q_proj", 4)}, {Q: Epilogue(magnitude=WIDE, shift=WIDE)}),
            r"magnitude and shift for layers\.0\.q_proj",
        ),
    ],
    ids=["factor", "shift", "vocabulary", "bias alone", "some magnitudes", "magnitude and shift"],
)
def test_what_no_kind_of_pefts_has_is_refused_and_nothing_written(adapter, reason, tmp_path):
    with pytest.raises(UnsupportedAdapter, match=reason):
        write_peft(adapter, tmp_path / "out", base_name="tiny")
    assert not (tmp_path / "out").exists()


def test_a_module_without_a_shift_beside_one_that_has_it_gets_zeros(tmp_path):
    adapter = Adapter({Q: pair("q_proj", 4, 0.5), K: pair("k_proj", 4, 0.0)}, {Q: Epilogue(shift=WIDE)})
    write_peft(adapter, tmp_path, base_name="tiny")
    read = parse(tmp_path, LAYOUT, max_rank=8)
    np.testing.assert_array_equal(read.epilogues[Q].shift, WIDE)
    assert not read.epilogues[K].shift.any()
