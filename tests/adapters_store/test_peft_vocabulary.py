"""Of embeddings and heads that PEFT saved whole, what differs from the base is kept."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from onebase_adapters.adapter import Array
from onebase_adapters.base_vectors import BaseVectors
from onebase_adapters.errors import InvalidTensors
from onebase_adapters.peft_format import parse
from onebase_adapters.store import AdapterStore

EMBEDDING = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"


@pytest.fixture(params=["one file", "shards"])
def base(request, tmp_path) -> Path:
    """A base's checkpoint, of which only embedding and head are there."""
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal((20, 32)).astype(np.float32)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    directory = tmp_path / "base"
    directory.mkdir()
    if request.param == "one file":
        save_file(tensors, directory / "model.safetensors")
    else:
        files = dict(zip(tensors, ("model-1.safetensors", "model-2.safetensors"), strict=True))
        for name, file in files.items():
            save_file({name: tensors[name]}, directory / file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory


def vectors(name: str, base: Path) -> Array:
    return next(tensors[name] for file in base.glob("*.safetensors") if name in (tensors := load_file(file)))


def test_rows_that_are_the_bases_are_not_kept(base, layout, tensors, write_peft, tmp_path):
    embedding, head = vectors("model.embed_tokens.weight", base), vectors("lm_head.weight", base)
    embedding[[4, 9]] += 1
    tensors |= {f"{EMBEDDING}.weight": embedding, f"{HEAD}.weight": head}
    with_base = AdapterStore.open(tmp_path / "store", layout, base_name="tiny", base_directory=base)
    directory = write_peft(tensors, modules_to_save=["embed_tokens"])
    version = with_base.publish("pirate", directory)
    with_base.close()
    without_base = parse(directory, layout, max_rank=64)
    assert version.targets == ("embed_tokens", "q_proj", "v_proj")
    assert version.num_parameters == without_base.num_parameters - (18 + 20) * 32
    assert without_base.targets == ("embed_tokens", "lm_head", "q_proj", "v_proj")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_vector_that_is_the_bases_once_rounded_is_the_bases(base, layout, tensors, write_peft, tmp_path, dtype):
    head = vectors("lm_head.weight", base).astype(dtype)
    head[7, 3] += 1
    tensors |= {f"{HEAD}.base_layer.weight": head}
    store = AdapterStore.open(tmp_path / "store", layout, base_name="tiny", base_directory=base)
    version = store.publish("pirate", write_peft(tensors))
    assert version.num_parameters == parse(write_peft(), layout, max_rank=64).num_parameters + 32
    store.close()


def test_added_tokens_and_single_ones_are_kept_in_order(base, layout, tensors, write_peft, tmp_path):
    embedding = np.concatenate([vectors("model.embed_tokens.weight", base), np.full((2, 32), 5, np.float32)])
    tensors |= {
        f"{EMBEDDING}.token_adapter.base_layer.weight": embedding,
        f"{EMBEDDING}.token_adapter.trainable_tokens_delta": np.stack([np.full(32, 7), np.full(32, 8)]).astype("f4"),
    }
    store = AdapterStore.open(tmp_path / "store", layout, base_name="tiny", base_directory=base)
    version = store.publish("pirate", write_peft(tensors, trainable_token_indices=[20, 3]))
    assert version.vocab_size == 22
    adapter = parse(
        write_peft(tensors, trainable_token_indices=[20, 3]), layout, max_rank=64, base=BaseVectors(base, is_tied=False)
    )
    rows = adapter.vocabulary.embedding.rows
    assert rows.tokens.tolist() == [3, 20, 21]
    assert rows.vectors[:, 0].tolist() == [8, 7, 5]
    store.close()


def test_an_upload_of_the_bases_own_vectors_changes_nothing(base, layout, write_peft):
    head = {f"{HEAD}.weight": vectors("lm_head.weight", base)}
    with pytest.raises(InvalidTensors, match="would change nothing"):
        parse(write_peft(head), layout, max_rank=64, base=BaseVectors(base, is_tied=False))


def test_a_base_whose_vectors_cannot_be_read_leaves_all_of_them(layout, tensors, write_peft, tmp_path):
    (tmp_path / "base").mkdir()
    store = AdapterStore.open(tmp_path / "store", layout, base_name="tiny", base_directory=tmp_path / "base")
    tensors |= {f"{HEAD}.weight": np.ones((20, 32), np.float32)}
    assert "lm_head" in store.publish("pirate", write_peft(tensors)).targets
    store.close()
