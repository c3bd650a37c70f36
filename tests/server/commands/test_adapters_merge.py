"""`onebase adapters merge`; the methods themselves are tested in tests/adapters_store/test_adapter_merging.py."""

import numpy as np
import pytest

from onebase_adapters.blobs import read_blob


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
