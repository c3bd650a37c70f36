"""A QA-LoRA adapter folded into an int4 base moves minimums alone, and changes outputs as it does beside the base."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from onebase_adapters.adapter import Adapter, Epilogue, LowRankPair, ModuleKey
from onebase_adapters.errors import UnsupportedAdapter
from onebase_server.engine.matrix_format import MatrixFormat
from onebase_server.engine.packing import pack_adapter
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig
from onebase_server.model.weights import load_decoder
from onebase_server.model.zero_point_merge import merge_into_base
from onebase_server.settings import EngineSettings

MakeModel = Callable[..., PreTrainedModel]
MakeSettings = Callable[..., EngineSettings]

TOKENS = list(range(20))
GROUP_SIZE = 32
RANK = 4


def qalora(config: ModelConfig, group_size: int, *projections: str) -> Adapter:
    """A random update of those projections of all layers, A alike within groups of inputs, as it is once uploaded."""
    rng = np.random.default_rng(0)
    pairs = {}
    for layer in range(config.num_layers):
        for group in config.projection_groups:
            for projection, width in zip(group.projections, group.widths, strict=True):
                if projection in projections:
                    groups = rng.standard_normal((RANK, group.in_features // group_size), np.float32)
                    lora_b = 0.1 * rng.standard_normal((width, RANK), np.float32)
                    pair = LowRankPair(groups.repeat(group_size, axis=1), lora_b, scale=0.25)
                    pairs[ModuleKey(layer, projection, group.expert)] = pair
    return Adapter(pairs)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture
def int4_base(make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path) -> Callable[..., Path]:
    """The int4 form of a random model of a family, as Onebase keeps it."""

    def make(family: str = "llama") -> Path:
        make_model(family)
        load_decoder(tmp_path / "model", engine_settings(quantization="int4", group_size=GROUP_SIZE))
        (cached,) = (path for path in (tmp_path / "cache" / "int4").iterdir() if path.is_dir())
        return cached

    return make


@pytest.mark.parametrize("group_size", [GROUP_SIZE, 2 * GROUP_SIZE])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "mixtral"])
def test_the_folded_base_says_what_base_and_adapter_say(
    family: str,
    group_size: int,
    int4_base: Callable[..., Path],
    engine_settings: MakeSettings,
    logits_of: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    base = int4_base(family)
    decoder = load_decoder(base, engine_settings())
    adapter = qalora(decoder.config, group_size, "q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    merge_into_base(base, adapter, tmp_path / "folded", None)
    packed = pack_adapter(adapter, decoder.config, MatrixFormat(torch.float32), tuple(decoder.weights.groups))
    expected = logits_of(decoder, TOKENS, adapter=packed)
    folded = logits_of(load_decoder(tmp_path / "folded", engine_settings()), TOKENS)
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)
    assert (folded - logits_of(decoder, TOKENS)).abs().max() > 0.1, "the adapter changes the logits"


def test_only_minimums_of_linears_that_the_adapter_touches_move(int4_base: Callable[..., Path], tmp_path: Path) -> None:
    base = int4_base()
    adapter = qalora(ModelConfig.from_directory(base), GROUP_SIZE, "v_proj")
    merge_into_base(base, adapter, tmp_path / "folded")
    before, after = tensors_of(base), tensors_of(tmp_path / "folded")
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{layer}.self_attn.v_proj.weight.minimums" for layer in range(3)}


def test_an_unquantised_base_is_folded_into_as_it_is_served(int4_base: Callable[..., Path], tmp_path: Path) -> None:
    base = int4_base()
    adapter = qalora(ModelConfig.from_directory(base), GROUP_SIZE, "k_proj")
    merge_into_base(base, adapter, tmp_path / "of int4")
    merge_into_base(tmp_path / "model", adapter, tmp_path / "of unquantised", GROUP_SIZE)
    expected, found = tensors_of(tmp_path / "of int4"), tensors_of(tmp_path / "of unquantised")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("of int4", "of unquantised")]
    assert configs[0] == configs[1]


def test_an_adapter_that_differs_within_a_group_is_refused(int4_base: Callable[..., Path], tmp_path: Path) -> None:
    base = int4_base()
    config = ModelConfig.from_directory(base)
    before = set(tmp_path.iterdir())
    for group_size in (1, GROUP_SIZE // 2):  # plain LoRA, and QA-LoRA of smaller groups
        adapter = qalora(config, group_size, "gate_proj")
        with pytest.raises(UnsupportedAdapter, match=r"layers\.0\.gate_proj differs within a group of the base's 32"):
            merge_into_base(base, adapter, tmp_path / "folded")
    assert set(tmp_path.iterdir()) == before


def test_an_adapter_that_is_more_than_updates_is_refused(int4_base: Callable[..., Path], tmp_path: Path) -> None:
    base = int4_base()
    pairs = qalora(ModelConfig.from_directory(base), GROUP_SIZE, "o_proj").pairs
    epilogues = {ModuleKey(0, "o_proj"): Epilogue(shift=np.ones(64, np.float32))}
    for adapter in (
        Adapter(pairs, epilogues),
        Adapter(pairs, invocation_tokens=(1, 2)),
        Adapter({ModuleKey(0, "gate"): pairs[ModuleKey(0, "o_proj")]}),  # a router, which stays unquantised
    ):
        with pytest.raises(UnsupportedAdapter, match="more than low-rank updates of linears"):
            merge_into_base(base, adapter, tmp_path / "folded")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_that_is_not_int4_is_refused(
    quantization: str, make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    make_model("llama")
    base = tmp_path / "model"
    if quantization == "nf4":
        load_decoder(base, engine_settings())
        (base,) = (path for path in (tmp_path / "cache" / "nf4").iterdir() if path.is_dir())
    adapter = qalora(ModelConfig.from_directory(base), GROUP_SIZE, "o_proj")
    with pytest.raises(ConfigurationError, match="is not in int4"):
        merge_into_base(base, adapter, tmp_path / "folded")
    with pytest.raises(
        ConfigurationError, match="no multiple of the group size 128" if quantization == "none" else "not in int4"
    ):
        merge_into_base(base, adapter, tmp_path / "folded", 128)
    assert not (tmp_path / "folded").exists()
