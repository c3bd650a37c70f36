"""`onebase adapters merge`; the methods themselves are tested in tests/adapters_store/test_adapter_merging.py."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from onebase_adapters.blobs import read_blob
from onebase_server.model.config import ModelConfig
from onebase_server.model.names import all_shapes


@pytest.fixture
def published(onebase, base, adapter):
    """The store with pirate, whose update of layer 0's o_proj is 8 everywhere."""
    onebase("publish", "pirate", adapter, "--base", base)


def blob_of(onebase, tmp_path, name):
    """The adapter of that name, by the digest that `show` prints."""
    digest = next(word for word in onebase("show", name).stdout.split() if len(word) == 12 and word.isalnum())
    return read_blob(next((tmp_path / "store" / "blobs").glob(f"{digest}*")))


@pytest.mark.usefixtures("published")
def test_a_merge_is_published_as_the_next_version_of_its_name(onebase, tmp_path):
    assert " 8 " in onebase("merge", "mixed", "pirate=0.5", "pirate@1=0.25").stdout
    assert " 2 " in onebase("merge", "mixed", "pirate", "pirate=-0.5", "--method", "linear").stdout
    (pair,) = blob_of(onebase, tmp_path, "mixed").pairs.values()
    assert pair.rank == 8
    np.testing.assert_allclose(pair.scale * pair.lora_b @ pair.lora_a, np.full((32, 32), 0.75 * 8))


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("pirate", "parrot"), "no adapter parrot"),
        (("pirate", "pirate@7"), "no version 7"),
        (("pirate", "pirate@"), "not a number"),
        (("pirate", "pirate=much"), "like pirate=0.7"),
        (("pirate", "pirate", "--method", "ties"), "needs a density"),
        (("pirate", "pirate", "--server", "http://127.0.0.1:9"), "cannot be reached"),
    ],
)
def test_a_merge_that_cannot_be_is_one_sentence_and_publishes_nothing(onebase, arguments, reason, tmp_path):
    assert reason in onebase("merge", "mixed", *arguments, exit_code=1).stderr
    assert "no adapter mixed" in onebase("show", "mixed", exit_code=1).stderr
    assert not list((tmp_path / "store" / "staging").iterdir())


@pytest.fixture
def weighty_base(base):
    """The base with random weights, whose inputs make whole groups of 32."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    rng = np.random.default_rng(0)
    shapes = all_shapes(ModelConfig.from_directory(base))
    save_file(
        {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}, base / "model.safetensors"
    )
    return base


def minimums_of(directory):
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".minimums")}


def test_qalora_is_folded_into_an_int4_base(onebase, weighty_base, adapter, tmp_path):
    """With A and B of ones, rank 4, scale 2 and one group of 32, PEFT's QA-LoRA adds 2 * 4 / 32 to each weight."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True, "qalora_group_size": 32}))
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name: np.ones((4, 1), np.float32) if "lora_A" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    onebase("publish", "pirate", adapter, "--base", weighty_base)
    folding = ("--into-base", weighty_base, "--group-size", "32")
    onebase("merge", tmp_path / "nothing", "pirate=0", *folding)
    assert "Wrote" in onebase("merge", tmp_path / "half", "pirate=0.5", *folding).stdout
    before, after = minimums_of(tmp_path / "nothing"), minimums_of(tmp_path / "half")
    touched = "model.layers.0.self_attn.o_proj.weight.minimums"
    np.testing.assert_allclose(after.pop(touched) - before.pop(touched), 4 / 32, rtol=1e-4)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_base_that_cannot_be_folded_into_is_one_sentence(onebase, weighty_base, adapter, tmp_path):
    onebase("publish", "pirate", adapter, "--base", weighty_base)
    refused = onebase("merge", tmp_path / "out", "pirate", "--into-base", weighty_base, exit_code=1)
    assert "is not in int4" in refused.stderr
    assert "--group-size" in refused.stderr
    config = json.loads((weighty_base / "config.json").read_text())
    (weighty_base / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    refused = onebase("merge", tmp_path / "out", "pirate", "--into-base", weighty_base, exit_code=1)
    assert "another model" in refused.stderr
    assert not (tmp_path / "out").exists()
