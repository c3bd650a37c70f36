"""Merged adapters are those that PEFT's `add_weighted_adapter` makes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from onebase_adapters.adapter import (
    Adapter,
    Epilogue,
    LowRankPair,
    ModuleKey,
    NormVectors,
    TokenMatrix,
    VirtualTokens,
    Vocabulary,
)
from onebase_adapters.adapter_merging import MergeRecipe, WeightedAdapter, merge_adapters
from onebase_adapters.errors import InvalidMerge
from onebase_adapters.peft_format import parse
from onebase_adapters.peft_writer import write_peft

from .conftest import LAYOUT

ALIKE: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]},
    "c": {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}
"""Of one rank; a linear has two or three of them."""
UNLIKE = ALIKE | {"b": ALIKE["b"] | {"r": 6}}
WEIGHTS = (0.7, -0.3, 0.5)


def peft_model(configs: dict[str, dict[str, Any]]) -> PeftModel:
    """A tiny Llama of LAYOUT's shapes with random adapters."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYOUT.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    first, *rest = configs
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **configs[first]), adapter_name=first)
    for name in rest:
        model.add_adapter(name, LoraConfig(init_lora_weights=False, **configs[name]))
    assert isinstance(model, PeftModel)
    return model


def saved(model: PeftModel, name: str, directory: Path) -> Adapter:
    """One of the model's adapters as the store reads it."""
    model.save_pretrained(directory, selected_adapters=[name])
    return parse(directory / name, LAYOUT, max_rank=64)


def merged_by_both(
    directory: Path, configs: dict[str, dict[str, Any]], recipe: MergeRecipe, weights: Sequence[float] = WEIGHTS
) -> tuple[Adapter, Adapter]:
    """Our merge and PEFT's."""
    model = peft_model(configs)
    sources = [WeightedAdapter(saved(model, n, directory), w) for n, w in zip(configs, weights, strict=True)]
    model.add_weighted_adapter(
        list(configs),
        list(weights),
        "merged",
        combination_type=recipe.method,
        svd_rank=recipe.rank,
        density=recipe.density,
        majority_sign_method=recipe.sign_election,
    )
    return merge_adapters(sources, recipe), saved(model, "merged", directory)


def update(pair: LowRankPair) -> np.ndarray:
    return pair.scale * pair.lora_b @ pair.lora_a


@pytest.mark.parametrize(
    "recipe",
    [
        MergeRecipe("linear"),
        MergeRecipe("ties", density=0.6),
        MergeRecipe("ties", density=0.6, sign_election="frequency"),
        MergeRecipe("ties", density=1.0),
    ],
    ids=lambda recipe: f"{recipe.method} {recipe.density} {recipe.sign_election}",
)
def test_matrices_merged_one_by_one_are_pefts(recipe, tmp_path):
    ours, pefts = merged_by_both(tmp_path, ALIKE, recipe)
    assert ours.pairs.keys() == pefts.pairs.keys()
    for key, pair in ours.pairs.items():
        np.testing.assert_allclose(pair.lora_a, pefts.pairs[key].lora_a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(pair.lora_b, pefts.pairs[key].lora_b, rtol=1e-5, atol=1e-6)
        assert (pair.scale, pefts.pairs[key].scale) == (1, 1)


@pytest.mark.parametrize("recipe", [MergeRecipe("cat"), MergeRecipe("svd"), MergeRecipe("svd", rank=3)], ids=repr)
def test_updates_of_different_ranks_merged_as_products_are_pefts(recipe, tmp_path):
    ours, pefts = merged_by_both(tmp_path, UNLIKE, recipe)
    assert ours.pairs.keys() == pefts.pairs.keys()
    for key, pair in ours.pairs.items():
        np.testing.assert_allclose(update(pair), update(pefts.pairs[key]), rtol=1e-4, atol=1e-5)


def test_cat_takes_no_more_rank_than_each_linear_needs(tmp_path):
    ours, _ = merged_by_both(tmp_path, UNLIKE, MergeRecipe("cat"))
    assert {key.projection: pair.rank for key, pair in ours.pairs.items()} == {
        "q_proj": 14,
        "v_proj": 8,
        "down_proj": 10,
    }


def test_adapters_with_a_lora_bias_become_one_that_answers_as_all_of_them_at_once(tmp_path):
    configs = {name: options | {"lora_bias": True} for name, options in UNLIKE.items()}
    model = peft_model(configs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    merged = merge_adapters([WeightedAdapter(saved(model, name, tmp_path), 1.0) for name in configs], MergeRecipe())
    write_peft(merged, tmp_path / "merged", base_name="tiny")
    model.base_model.set_adapter(list(configs))
    model.load_adapter(tmp_path / "merged", "merged")
    tokens = torch.arange(16).unsqueeze(0)
    with torch.inference_mode():
        expected = model.eval()(tokens).logits
        model.set_adapter("merged")
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_lora_bias_counts_by_its_adapters_weight():
    key = ModuleKey(1, "k_proj")
    sources = [WeightedAdapter(Adapter({}, {key: Epilogue(shift=np.full(8, 4, np.float16))}), w) for w in (0.5, -2)]
    np.testing.assert_array_equal(merge_adapters(sources, MergeRecipe("svd")).epilogues[key].shift, np.full(8, -6))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_where_the_same_numbers_are_dropped(method, tmp_path, monkeypatch):
    rng = np.random.default_rng(5)

    def drawn_as_ours(density: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(rng.random(tuple(density.shape), dtype=np.float32) < density.numpy()).float()

    monkeypatch.setattr(torch, "bernoulli", drawn_as_ours)
    one_linear = {"r": 4, "target_modules": r"model\.layers\.1\.self_attn\.o_proj"}
    configs = {name: one_linear | {"lora_alpha": alpha} for name, alpha in (("a", 8), ("b", 2), ("c", 4))}
    ours, pefts = merged_by_both(tmp_path, configs, MergeRecipe(method, density=0.6, seed=5))
    (pair,), (expected,) = ours.pairs.values(), pefts.pairs.values()
    np.testing.assert_allclose(pair.lora_a, expected.lora_a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pair.lora_b, expected.lora_b, rtol=1e-5, atol=1e-6)


def ones(size: int = 100) -> Adapter:
    matrix = np.ones((size, size), np.float32)
    return Adapter({ModuleKey(0, "o_proj"): LowRankPair(matrix, matrix, scale=1.0)})


def test_dare_drops_at_random_and_keeps_the_expectation():
    sources = [WeightedAdapter(ones(), 0.5)] * 2
    dropped, again, other = (
        merge_adapters(sources, MergeRecipe("dare_linear", density=0.25, seed=seed)).pairs[ModuleKey(0, "o_proj")]
        for seed in (1, 1, 2)
    )
    expected = 2 * np.sqrt(0.5)
    assert dropped.lora_a.mean() == pytest.approx(expected, rel=0.05)
    assert (dropped.lora_a == 0).mean() == pytest.approx(0.75**2, rel=0.05)
    np.testing.assert_array_equal(dropped.lora_a, again.lora_a)
    assert (dropped.lora_a != other.lora_a).any()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "ties"}, "needs a density"),
        ({"method": "linear", "density": 0.5}, "takes no density"),
        ({"method": "dare_ties", "density": 0.0}, "above 0 and at most 1"),
        ({"method": "cat", "rank": 4}, "for the method svd only"),
        ({"method": "svd", "rank": 0}, "at least 1"),
        ({"method": "slerp"}, "there are cat, linear, svd, ties, dare_linear, dare_ties"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(options, reason):
    with pytest.raises(InvalidMerge, match=reason):
        MergeRecipe(**options)


def test_what_cannot_be_merged_is_refused_with_the_reason():
    small, large = WeightedAdapter(ones(4), 1.0), WeightedAdapter(ones(6), 1.0)
    with pytest.raises(InvalidMerge, match=r"at layers\.0\.o_proj the ranks are \[4, 6\]"):
        merge_adapters([small, large], MergeRecipe("linear"))
    prefix = Adapter({}, prefix=VirtualTokens(np.ones((5, 32), np.float32)))
    with pytest.raises(InvalidMerge, match=r"Virtual tokens .* cannot be merged"):
        merge_adapters([small, WeightedAdapter(prefix, 1.0)], MergeRecipe())
    head = Adapter({}, vocabulary=Vocabulary(head=TokenMatrix(pair=next(iter(ones(4).pairs.values())))))
    with pytest.raises(InvalidMerge, match="makes of lm_head cannot be merged"):
        merge_adapters([small, WeightedAdapter(head, 1.0)], MergeRecipe())
    norm = Adapter({}, norms={"norm": NormVectors(np.ones(32, np.float32))})
    with pytest.raises(InvalidMerge, match="replaces norm cannot be merged"):
        merge_adapters([small, WeightedAdapter(norm, 1.0)], MergeRecipe())
    with pytest.raises(InvalidMerge, match="at least one"):
        merge_adapters([], MergeRecipe())
    with pytest.raises(InvalidMerge, match="finite"):
        merge_adapters([small, WeightedAdapter(ones(4), float("nan"))], MergeRecipe())
    vectors = {"magnitude": "DoRA", "factor": r"\(IA\)³", "bias": "a bias of its own"}
    for vector, kind in vectors.items():
        epilogue = Epilogue(**{vector: np.ones(8, np.float32)})
        with pytest.raises(InvalidMerge, match=rf"What follows the update of layers\.1\.k_proj \({kind}\)"):
            merge_adapters(
                [small, WeightedAdapter(Adapter({}, {ModuleKey(1, "k_proj"): epilogue}), 1.0)], MergeRecipe()
            )
    shifted = WeightedAdapter(Adapter({}, {ModuleKey(1, "k_proj"): Epilogue(shift=np.ones(8, np.float32))}), 1.0)
    with pytest.raises(InvalidMerge, match=r"ties prunes .* layers\.1\.k_proj has a lora_bias"):
        merge_adapters([small, shifted], MergeRecipe("ties", density=0.5))
