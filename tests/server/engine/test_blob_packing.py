"""Blobs that one recipe made are packed by one plan, and every adapter gets its own numbers."""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from onebase_adapters.adapter import Adapter, Epilogue, ModuleKey
from onebase_adapters.blobs import read_blob, write_blob
from onebase_adapters.errors import StoreError
from onebase_server.engine import blob_packing
from onebase_server.engine.blob_packing import BlobPacker
from onebase_server.engine.matrix_format import MatrixFormat
from onebase_server.engine.packing import pack_adapter
from onebase_server.engine.request import AdapterRef
from onebase_server.model.config import ModelConfig

from .conftest import BlobWriter, dense_base, random_adapter

RANKS = {"q_proj": 3, "v_proj": 1, "gate_proj": 2, "down_proj": 5}


@pytest.fixture
def packer(tiny_config: ModelConfig) -> BlobPacker:
    return BlobPacker(tiny_config, MatrixFormat(torch.bfloat16), dense_base(tiny_config, has_bias=False))


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the blobs that were read in Python."""
    names: list[str] = []
    parse = blob_packing.parse_blob
    monkeypatch.setattr(blob_packing, "parse_blob", lambda file: names.append(file.path.stem) or parse(file))
    return names


def write(adapter: Adapter, path: Path) -> AdapterRef:
    return AdapterRef.of_version(digest=write_blob(adapter, path), path=str(path), label=path.name)


def assert_packed_alike(packer: BlobPacker, ref: AdapterRef, config: ModelConfig) -> None:
    packed = packer.pack(ref)
    base = dense_base(config, has_bias=False)
    expected = pack_adapter(read_blob(Path(ref.parts[0].path)), config, MatrixFormat(torch.bfloat16), base)
    assert torch.equal(packed.numbers, expected.numbers)
    assert torch.equal(packed.table, expected.table)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_first_of_a_recipe_is_read_and_all_are_packed_as_by_themselves(
    packer: BlobPacker, tiny_config: ModelConfig, tmp_path: Path, parsed: list[str], dtype: type
) -> None:
    for seed in range(3):
        adapter = random_adapter(tiny_config, RANKS, seed=seed, dtype=dtype)
        assert_packed_alike(packer, write(adapter, tmp_path / f"{seed}.blob"), tiny_config)
    assert parsed == ["0"]


def test_adapters_of_other_ranks_targets_scales_or_dtypes_are_other_recipes(
    packer: BlobPacker, tiny_config: ModelConfig, tmp_path: Path, parsed: list[str]
) -> None:
    for number, adapter in enumerate(
        (
            random_adapter(tiny_config, RANKS),
            random_adapter(tiny_config, {**RANKS, "v_proj": 2}),
            random_adapter(tiny_config, {"k_proj" if name == "v_proj" else name: r for name, r in RANKS.items()}),
            random_adapter(tiny_config, RANKS, scale=0.9),
            random_adapter(tiny_config, RANKS, dtype=np.float16),
        )
    ):
        assert_packed_alike(packer, write(adapter, tmp_path / f"{number}.blob"), tiny_config)
    assert parsed == ["0", "1", "2", "3", "4"]


def test_what_is_more_than_matrices_is_worked_out_for_each(
    packer: BlobPacker, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """Epilogues are computed from the blob's vectors, so no other blob's may stand for them."""
    out_features = tiny_config.adapter_layout().shapes["q_proj"][0]
    for seed in range(2):
        factor = np.random.default_rng(seed).standard_normal(out_features, "f4")
        adapter = replace(
            random_adapter(tiny_config, RANKS), epilogues={ModuleKey(1, "q_proj"): Epilogue(factor=factor)}
        )
        assert_packed_alike(packer, write(adapter, tmp_path / f"{seed}.blob"), tiny_config)


def test_the_least_recently_used_recipe_is_forgotten(
    packer: BlobPacker, write_adapter: BlobWriter, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_packing, "MAX_RECIPES", 2)
    refs = {rank: write_adapter(f"rank-{rank}", {"q_proj": rank}) for rank in (1, 2, 3)}
    for rank in (1, 2, 1, 3, 1, 2):
        packer.pack(refs[rank])
    assert parsed == ["rank-1", "rank-2", "rank-3", "rank-2"]


def test_a_blob_cut_short_is_refused_though_its_recipe_is_known(packer: BlobPacker, write_adapter: BlobWriter) -> None:
    packer.pack(write_adapter("whole", RANKS))
    cut = write_adapter("cut", RANKS)
    path = Path(cut.parts[0].path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="damaged"):
        packer.pack(cut)
