"""What an adapter brings of a tokenizer: taken, compared with the base's, kept with the version."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from onebase_adapters.adapter import Adapter, TokenMatrix, TokenRows, Vocabulary
from onebase_adapters.archive import unpack
from onebase_adapters.base_layout import BaseLayout
from onebase_adapters.errors import AdapterNotFound, InvalidTokenizer, StoreError, UnsupportedAdapter
from onebase_adapters.peft_tokenizer import read_own_tokenizer
from onebase_adapters.store import AdapterStore
from onebase_adapters.tokenizer_files import read_tokenizer_files, write_tokenizer_files
from onebase_adapters.tokenizer_form import TokenizerForm
from onebase_adapters.tokenizer_json import load_own_tokens, own_tokens, with_model_of

TEMPLATE = "{% for message in messages %}{{ bos_token }}{{ message.content }}{% endfor %}"
OTHER = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}


def build_backend() -> tokenizers.Tokenizer:
    vocabulary = {"<s>": 0, "</s>": 1, "<|end|>": 2, "a": 3, "b": 4, "ab": 5}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = tokenizers.decoders.Fuse()
    return backend


BASE_TOKENIZER: dict[str, Any] = json.loads(build_backend().to_str())
MODEL = BASE_TOKENIZER["model"]
PADDING = {
    "strategy": "BatchLongest",
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "</s>",
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


def tokenizer_json(*added: str, first_id: int = 6, **fields: Any) -> dict[str, Any]:
    """The base's `tokenizer.json` with these tokens added behind the six that it has, and other fields changed."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokens = [{"id": token_id, "content": token, **flags} for token_id, token in enumerate(added, first_id)]
    return BASE_TOKENIZER | {"added_tokens": BASE_TOKENIZER["added_tokens"] + tokens} | fields


def with_vocabulary(**tokens: int) -> dict[str, Any]:
    """The base's model with other ids for some tokens."""
    return {**MODEL, "vocab": {**MODEL["vocab"], **tokens}}


OWN_TOKENS = json.dumps(
    {name: value for name, value in tokenizer_json("<tool>").items() if name not in ("model", "padding", "truncation")},
    sort_keys=True,
)


WriteFiles = Callable[..., Path]


@pytest.fixture
def write_files(write_peft: Callable[..., Path]) -> WriteFiles:
    """Write an adapter with these files beside it, each a text or what JSON makes of it."""

    def write(files: dict[str, Any], **arguments: Any) -> Path:
        directory = write_peft(**arguments)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (directory / name).write_text(text, encoding="utf-8", newline="")
        return directory

    return write


@pytest.fixture
def layout(layout: BaseLayout) -> BaseLayout:
    """Eight rows of embeddings, two more than the base has tokens."""
    return replace(layout, vocab_size=8)


@pytest.fixture
def base_files(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.fixture
def store(tmp_path: Path, layout: BaseLayout, base_files: Path) -> Iterator[AdapterStore]:
    tokenizer = read_tokenizer_files(base_files)
    with closing(
        AdapterStore.open(tmp_path / "store", layout, base_name="tiny", max_rank=64, base_tokenizer=tokenizer)
    ) as opened:
        yield opened


def kept_tokenizers(store: AdapterStore) -> set[str]:
    """Digests of the adapters' tokenizers on the disk."""
    base = store.base_tokenizer
    return {path.stem for path in (store.root / "tokenizers").iterdir()} - {base.digest if base else ""}


class TestKept:
    @pytest.mark.parametrize(
        "files",
        [
            {},
            {"tokenizer_config.json": CONFIG},
            {"tokenizer_config.json": {**CONFIG, "pad_token": "</s>", "model_max_length": 512}},
            {"tokenizer_config.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}},
            {"chat_template.jinja": TEMPLATE + "\n", "tokenizer_config.json": {"chat_template": OTHER}},
            {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}},
            {"tokenizer.json": tokenizer_json(), "added_tokens.json": {"<s>": 0}},
            {"tokenizer.json": json.dumps(tokenizer_json(), indent=2)},
            {"tokenizer.json": tokenizer_json(padding=PADDING, truncation=TRUNCATION)},
            {"tokenizer.json": tokenizer_json(model={**MODEL, "merges": ["a b"], "dropout": None})},
            {"tokenizer.json": tokenizer_json(post_processor=BYTE_LEVEL)},
            {"tokenizer.json": tokenizer_json(post_processor={"type": "Sequence", "processors": [BYTE_LEVEL] * 2})},
        ],
        ids=[
            "nothing",
            "a copy",
            "other padding",
            "tokens as objects",
            "the template as a file",
            "the tokens alone",
            "a copy of the tokens",
            "written in another way",
            "a trainer's padding and truncation",
            "an older library's merges",
            "a post-processor that adds nothing",
            "several of them",
        ],
    )
    def test_of_a_copy_of_the_bases_tokenizer_nothing_is_kept(self, store, write_files, files):
        version = store.publish("pirate", write_files(files))
        assert (version.tokenizer_digest, version.tokenizer_parts) == (None, ())
        assert not kept_tokenizers(store)

    @pytest.mark.parametrize(
        ("files", "own"),
        [
            ({"chat_template.jinja": OTHER}, {"chat_template": OTHER}),
            ({"tokenizer_config.json": {**CONFIG, "chat_template": OTHER}}, {"chat_template": OTHER}),
            (
                {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": OTHER}]}},
                {"chat_template": OTHER},
            ),
            (
                {"tokenizer_config.json": {**CONFIG, "eos_token": "<|end|>", "chat_template": None}},
                {"special_tokens": {"bos_token": "<s>", "eos_token": "<|end|>"}},
            ),
            (
                {"tokenizer_config.json": CONFIG, "special_tokens_map.json": {"eos_token": "<|end|>"}},
                {"special_tokens": {"bos_token": "<s>", "eos_token": "<|end|>"}},
            ),
            (
                {
                    "tokenizer_config.json": {**CONFIG, "added_tokens_decoder": {}},
                    "special_tokens_map.json": {"eos_token": "?"},
                    "chat_template.jinja": OTHER,
                },
                {"chat_template": OTHER},
            ),
            ({"tokenizer.json": tokenizer_json("<tool>")}, {"tokens": OWN_TOKENS}),
            (
                {"tokenizer.json": tokenizer_json("<tool>", model=with_vocabulary(**{"<tool>": 6}))},
                {"tokens": OWN_TOKENS},
            ),
        ],
        ids=[
            "file",
            "field",
            "one of several",
            "special tokens",
            "an old file's tokens",
            "an old file unheard",
            "tokens",
            "tokens in the vocabulary too",
        ],
    )
    def test_what_differs_from_the_base_is_kept_and_nothing_else(self, store, write_files, files, own):
        version = store.publish("pirate", write_files(files))
        assert version.tokenizer_parts == tuple(own)
        assert store.read_tokenizer(version.tokenizer_digest) == TokenizerForm(**own)
        assert kept_tokenizers(store) == {version.tokenizer_digest}
        assert store.resolve("pirate") == version

    def test_an_archive_brings_the_files_too(self, store, write_files, tmp_path):
        archive = shutil.make_archive(str(tmp_path / "upload"), "zip", write_files({"chat_template.jinja": OTHER}))
        with store.staging() as directory:
            unpack(Path(archive), directory, max_bytes=store.max_upload_bytes)
            assert store.publish("pirate", directory).tokenizer_parts == ("chat_template",)

    def test_what_is_written_is_read_again_as_the_same(self, store, write_files, tmp_path):
        files = {"chat_template.jinja": OTHER, "tokenizer.json": tokenizer_json("<tool>")}
        version = store.publish("pirate", write_files(files))
        whole = store.read_tokenizer(version.tokenizer_digest).over(store.base_tokenizer)
        out = tmp_path / "out"
        out.mkdir()
        write_tokenizer_files(whole, out)
        assert read_tokenizer_files(out) == whole
        again = store.publish("again", write_files({path.name: path.read_text() for path in out.iterdir()}))
        assert again.tokenizer_digest == version.tokenizer_digest


class TestVersions:
    def test_each_version_keeps_its_template_also_after_a_rollback(self, store, write_files):
        first = store.publish("pirate", write_files({"chat_template.jinja": OTHER}))
        second = store.publish("pirate", write_files({"chat_template.jinja": "second"}))
        assert first.digest == second.digest  # the same adapter with another template
        assert len(kept_tokenizers(store)) == 2
        assert store.rollback("pirate").tokenizer_digest == first.tokenizer_digest
        assert store.read_tokenizer(store.resolve("pirate", 2).tokenizer_digest).chat_template == "second"

    def test_a_tokenizer_is_kept_once_and_goes_with_the_last_version_that_names_it(self, store, write_files):
        source = write_files({"chat_template.jinja": OTHER})
        version = store.publish("one", source)
        assert store.publish("two", source).tokenizer_digest == version.tokenizer_digest
        assert len(kept_tokenizers(store)) == 1
        store.remove("one")
        assert len(kept_tokenizers(store)) == 1
        store.remove("two")
        assert not kept_tokenizers(store)
        assert store.verify().is_clean
        with pytest.raises(AdapterNotFound, match="has been removed"):
            store.read_tokenizer(version.tokenizer_digest)

    @pytest.mark.parametrize("problem", ["missing", "changed"])
    def test_a_version_without_its_whole_tokenizer_is_dropped_by_a_repair(self, store, write_files, problem):
        store.publish("pirate", write_files({}))
        version = store.publish("pirate", write_files({"chat_template.jinja": OTHER}))
        file = store.root / "tokenizers" / f"{version.tokenizer_digest}.json"
        if problem == "missing":
            file.unlink()
        else:
            file.write_text("{}")
        with pytest.raises(StoreError, match="verify --repair"):
            store.read_tokenizer(version.tokenizer_digest)
        (damaged,) = store.verify().damaged
        assert (damaged.version, damaged.digest, damaged.problem) == (version, version.tokenizer_digest, problem)
        assert store.verify(repair=True).now_live == {"pirate": 1}
        assert store.verify().is_clean

    def test_a_tokenizer_that_no_version_names_is_an_orphan(self, store):
        (store.root / "tokenizers" / "0123.json").write_text("{}")
        assert store.verify(repair=True).orphaned_blobs == ("0123.json",)
        assert store.verify().is_clean


class TestBase:
    def test_a_store_that_was_not_told_the_bases_tokenizer_says_what_it_needs(self, open_store, write_files):
        store = open_store()
        assert store.publish("pirate", write_files({})).version == 1
        with pytest.raises(StoreError, match="give the directory of tiny"):
            store.publish("pirate", write_files({"chat_template.jinja": OTHER}))
        assert [version.version for version in store.versions("pirate")] == [1]

    def test_a_base_whose_tokenizer_changed_is_compared_as_it_is_now(self, store, layout, write_files):
        now = TokenizerForm(chat_template=OTHER, special_tokens={"bos_token": "<s>"})
        reopened = AdapterStore.open(store.root, layout, base_name="tiny", base_tokenizer=now)
        assert reopened.base_tokenizer == store.base_tokenizer == now
        assert reopened.publish("pirate", write_files({"chat_template.jinja": OTHER})).tokenizer_digest is None
        assert reopened.verify().is_clean
        assert len(list((store.root / "tokenizers").iterdir())) == 1
        reopened.close()

    def test_a_store_from_before_there_were_tokenizers_is_brought_up_to_date(self, store, layout, write_files):
        store.publish("pirate", write_files({}))
        store.close()
        shutil.rmtree(store.root / "tokenizers")
        with closing(sqlite3.connect(store.root / "catalogue.sqlite3")) as database:
            for column in ("tokenizer_digest", "tokenizer_parts"):
                database.execute(f"ALTER TABLE versions DROP COLUMN {column}")
            database.execute("UPDATE meta SET value = '4' WHERE key = 'schema_version'")
            database.execute("DELETE FROM meta WHERE key = 'base_tokenizer'")
            database.commit()
        tokenizer = TokenizerForm(chat_template=TEMPLATE)
        with closing(AdapterStore.open(store.root, layout, base_name="tiny", base_tokenizer=tokenizer)) as reopened:
            assert reopened.resolve("pirate").tokenizer_digest is None
            assert reopened.publish("pirate", write_files({"chat_template.jinja": OTHER})).version == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json should hold a JSON object, not a list"),
        ({"tokenizer_config.json": "[" * 100_000}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config.json": {"eos_token": 7}}, "tokenizer_config.json: eos_token should be a text"),
        ({"tokenizer_config.json": {"chat_template": 7}}, "tokenizer_config.json: chat_template should be a text"),
        ({"tokenizer_config.json": {"chat_template": "\ud800"}}, "tokenizer_config.json: chat_template should be"),
        ({"tokenizer_config.json": {"chat_template": "x" * 300_000}}, "chat_template is longer than 262144"),
        ({"special_tokens_map.json": "null"}, "special_tokens_map.json should hold a JSON object"),
        ({"chat_template.jinja": "x" * 300_000}, "chat_template.jinja is larger than 262144 bytes"),
        ({"chat_template.jinja": "{% if %}"}, "The chat template is not valid"),
        ({"chat_template.jinja": "{% autoescape x %}{% endautoescape %}"}, "it has an autoescape block"),
        ({"chat_template.jinja": "{{ x | nothing }}"}, "The chat template is not valid: No filter named 'nothing'"),
        ({"chat_template.jinja": "{% include 'x' %}{% for %}"}, "The chat template is not valid"),
        ({"chat_template.jinja": "{% for a in b %}" * 30 + "{% endfor %}" * 30}, "nested too deeply"),
        ({"chat_template.jinja": "{{ " + "(" * 20_000 + ")" * 20_000 + " }}"}, "The chat template is not valid"),
        ({"tokenizer.json": "{}"}, "tokenizer.json is not what the tokenizers library writes"),
        ({"tokenizer.json": tokenizer_json(decoder={"type": "Rune"})}, "tokenizer.json cannot be loaded"),
        ({"tokenizer.json": tokenizer_json("<tool>", first_id=7)}, "the id 7, but whoever loads it gets 6"),
        ({"tokenizer.json": tokenizer_json(model={**MODEL, "type": "Rune"})}, "tokenizer.json cannot be loaded"),
        ({"tokenizer.json": tokenizer_json("<1>", "<2>", "<3>")}, "'<3>' the id 8, but there are embeddings for 8"),
        ({"tokenizer.json": tokenizer_json(model=with_vocabulary(a=4, b=3))}, "the token 'a' has the id 4"),
        ({"tokenizer.json": tokenizer_json(model={**MODEL, "vocab": {"a": 3}, "merges": []})}, "'<|end|>' has no id"),
        ({"added_tokens.json": {"<tool>": 6}}, "'<tool>' the id 6, which it has not in the base's tokenizer.json"),
        (
            {
                "tokenizer.json": tokenizer_json("<tool>"),
                "tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "<tool>"}}},
            },
            "'<tool>' the id 7, which it has not in tokenizer.json",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": "<tool>"}}}, "an id that is no number"),
        ({"tokenizer_config.json": {"eos_token": "<nothing>"}}, "the eos_token '<nothing>' is not a token"),
    ],
)
def test_a_refusal_names_the_file_and_leaves_nothing_behind(store, write_files, files, message):
    with pytest.raises((InvalidTokenizer, UnsupportedAdapter)) as caught:
        store.publish("pirate", write_files(files))
    assert message in str(caught.value)
    assert not store.list_adapters()
    assert not kept_tokenizers(store)
    assert not list((store.root / "blobs").iterdir())
    assert not list((store.root / "staging").iterdir())


def test_a_file_that_is_not_utf_8_is_refused(store, write_files):
    directory = write_files({})
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidTokenizer, match=r"chat_template.jinja is not UTF-8"):
        store.publish("pirate", directory)


class TestOwnEmbeddings:
    """An id for which an adapter has an embedding of its own may mean what the adapter likes."""

    @pytest.mark.parametrize(
        "model",
        [with_vocabulary(a=4, b=3), {**MODEL, "merges": []}],
        ids=["other ids", "other merges"],
    )
    def test_a_model_of_its_own_is_kept_with_it(self, model):
        brought, base = json.dumps(tokenizer_json(model=model)), json.dumps(BASE_TOKENIZER)
        own = own_tokens(brought, base, own_rows={3, 4})
        loaded = load_own_tokens(own.to_text(), build_backend().model)
        expected = tokenizers.Tokenizer.from_str(brought)
        assert loaded.encode("abba").ids == expected.encode("abba").ids != build_backend().encode("abba").ids
        assert json.loads(with_model_of(base, own.to_text()))["model"] == json.loads(own.to_text())["model"]

    def test_every_id_that_means_another_token_needs_an_embedding_of_its_own(self, store, write_files, layout):
        directory = write_files({"tokenizer.json": tokenizer_json(model=with_vocabulary(a=4, b=3))})

        def read(*token_ids: int) -> TokenizerForm | None:
            rows = TokenRows(np.array(token_ids), np.zeros((len(token_ids), 32), np.float32))
            adapter = Adapter({}, vocabulary=Vocabulary(embedding=TokenMatrix(rows=rows)))
            return read_own_tokenizer(directory, adapter, layout, store.base_tokenizer)

        assert read(3, 4).parts == ("tokens",)
        with pytest.raises(UnsupportedAdapter, match="the token 'b' has the id 3 in it, in the base 4"):
            read(3, 5)
