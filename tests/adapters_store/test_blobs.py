from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from onebase_adapters.adapter import Adapter, LowRankPair, ModuleKey, NormVectors, TokenMatrix, TokenRows, Vocabulary
from onebase_adapters.blobs import file_digest, read_blob, write_blob
from onebase_adapters.errors import StoreError


@pytest.fixture
def adapter() -> Adapter:
    rng = np.random.default_rng(0)
    pairs = {}
    for layer, (dtype, rank) in enumerate([(np.float32, 4), (np.float16, 1), (ml_dtypes.bfloat16, 3)] * 4):
        lora_a, lora_b = rng.standard_normal((rank, 7)).astype(dtype), rng.standard_normal((5, rank)).astype(dtype)
        pairs[ModuleKey(layer, "q_proj")] = LowRankPair(lora_a, lora_b, scale=0.1 + layer / 3)
    return Adapter(pairs)


def test_an_adapter_read_back_is_bit_identical(adapter, tmp_path):
    write_blob(adapter, tmp_path / "blob")
    read = read_blob(tmp_path / "blob")
    assert list(read.pairs) == list(adapter.pairs)
    for key, pair in adapter.pairs.items():
        assert read.pairs[key].scale == pair.scale
        for ours, theirs in ((read.pairs[key].lora_a, pair.lora_a), (read.pairs[key].lora_b, pair.lora_b)):
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


def test_a_vocabulary_read_back_is_the_same_and_tied_rows_lie_in_the_file_once(tmp_path):
    rows = TokenRows(np.array([3, 9]), np.arange(14).reshape(2, 7).astype(ml_dtypes.bfloat16))
    pair = LowRankPair(np.ones((2, 7), np.float32), np.ones((10, 2), np.float32), scale=0.7)
    write_blob(
        Adapter({}, vocabulary=Vocabulary(TokenMatrix(rows=rows), TokenMatrix(rows=rows, pair=pair), size=10)),
        tmp_path / "blob",
    )
    read = read_blob(tmp_path / "blob")
    assert (read.vocab_size, read.rank, read.targets) == (10, 2, ("embed_tokens", "lm_head"))
    assert read.vocabulary.has_tied_rows
    assert read.nbytes == rows.vectors.nbytes + pair.nbytes
    assert read.vocabulary.head.rows.tokens.tolist() == [3, 9]
    np.testing.assert_array_equal(read.vocabulary.head.rows.vectors, rows.vectors)
    np.testing.assert_array_equal(read.vocabulary.head.pair.lora_b, pair.lora_b)
    assert read.vocabulary.head.pair.scale == 0.7


def test_norms_read_back_are_the_same(tmp_path):
    weight, bias = np.arange(7, dtype=np.float16), np.ones(7, np.float32)
    norms = {"norm": NormVectors(weight, bias), "layers.1.self_attn.q_norm": NormVectors(weight)}
    write_blob(Adapter({}, norms=norms), tmp_path / "blob")
    read = read_blob(tmp_path / "blob")
    assert list(read.norms) == ["layers.1.self_attn.q_norm", "norm"]
    assert (read.targets, read.num_parameters, read.nbytes) == (("norm", "q_norm"), 32, 2 * 14 + 28)
    assert read.norms["layers.1.self_attn.q_norm"].bias is None
    np.testing.assert_array_equal(read.norms["norm"].weight, weight)
    np.testing.assert_array_equal(read.norms["norm"].bias, bias)


def test_the_digest_is_that_of_the_file_and_depends_on_the_adapter_alone(adapter, tmp_path):
    shuffled = Adapter(dict(reversed(adapter.pairs.items())))
    digest = write_blob(adapter, tmp_path / "a")
    assert digest == file_digest(tmp_path / "a") == write_blob(shuffled, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    key, pair = next(iter(adapter.pairs.items()))
    other = Adapter({**adapter.pairs, key: LowRankPair(pair.lora_a, pair.lora_b, pair.scale + 1)})
    assert write_blob(other, tmp_path / "c") != digest


def test_reading_maps_the_file_instead_of_copying_it(adapter, tmp_path):
    write_blob(adapter, tmp_path / "blob")
    for pair in read_blob(tmp_path / "blob").pairs.values():
        for array in (pair.lora_a, pair.lora_b):
            assert not array.flags.owndata
            assert array.flags.aligned


def test_what_is_written_to_an_array_never_reaches_the_file(adapter, tmp_path):
    write_blob(adapter, tmp_path / "blob")
    before = (tmp_path / "blob").read_bytes()
    for pair in read_blob(tmp_path / "blob").pairs.values():
        pair.lora_a[...] = 1
    assert (tmp_path / "blob").read_bytes() == before


def test_arrays_outlive_the_deletion_of_their_file(adapter, tmp_path):
    write_blob(adapter, tmp_path / "blob")
    read = read_blob(tmp_path / "blob")
    (tmp_path / "blob").unlink()
    key = ModuleKey(2, "q_proj")
    assert read.pairs[key].lora_a.tobytes() == adapter.pairs[key].lora_a.tobytes()


def test_parts_of_a_larger_matrix_are_written_whole(tmp_path):
    lora_b = np.arange(24, dtype=np.float32).reshape(8, 3)
    pair = LowRankPair(np.ones((3, 4), np.float32).T.copy().T, lora_b[2:6], 1.0)
    write_blob(Adapter({ModuleKey(0, "k_proj"): pair}), tmp_path / "blob")
    read = read_blob(tmp_path / "blob").pairs[ModuleKey(0, "k_proj")]
    np.testing.assert_array_equal(read.lora_b, lora_b[2:6])
    np.testing.assert_array_equal(read.lora_a, np.ones((3, 4)))


A, B = np.ones((2, 4), np.float32), np.ones((4, 2), np.float32)
SCALE = '{"format_version": 1, "scales": {"layers.0.q_proj": 1.0}}'


@pytest.mark.parametrize(
    ("tensors", "description"),
    [
        ({"layers.0.q_proj.lora_a": A, "layers.0.q_proj.lora_b": B}, SCALE.replace("1,", "2,")),
        ({"layers.0.q_proj.lora_a": A, "layers.0.q_proj.lora_b": B}, "{"),
        ({"layers.0.q_proj.lora_a": A, "layers.0.q_proj.lora_b": B}, None),
        ({"layers.0.q_proj.lora_a": A, "layers.0.q_proj.lora_b": B}, SCALE.replace("1.0", "null")),
        ({"layers.0.q_proj.lora_a": A}, SCALE),
        ({"layers.0.q_proj.lora_a": A, "layers.0.q_proj.lora_b": A}, SCALE),
        ({"layers.0.q_proj.lora_a": A, "layers.0.q_proj.lora_b": B.astype(np.float16)}, SCALE),
        ({"q_proj.lora_a": A, "q_proj.lora_b": B}, SCALE.replace("layers.0.", "")),
        ({}, '{"format_version": 1, "scales": {}}'),
    ],
    ids=["version", "json", "metadata", "scale", "missing", "shapes", "dtypes", "names", "empty"],
)
def test_a_file_that_is_no_blob_is_refused(tensors, description, tmp_path):
    save_file(tensors, tmp_path / "blob", metadata={"onebase": description} if description else None)
    with pytest.raises(StoreError, match="blob is damaged"):
        read_blob(tmp_path / "blob")


def test_a_blob_that_is_missing_or_cut_short_is_refused(adapter, tmp_path):
    with pytest.raises(StoreError, match="no blob"):
        read_blob(tmp_path / "blob")
    write_blob(adapter, tmp_path / "blob")
    cut_short(tmp_path / "blob")
    with pytest.raises(StoreError, match="truncated"):
        read_blob(tmp_path / "blob")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", bytes(16)], ids=["empty", "long header", "no header"])
def test_a_file_without_a_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(content)
    with pytest.raises(StoreError, match="truncated or is not a safetensors file"):
        read_blob(tmp_path / "blob")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
