"""A tokenizer that an adapter brought, made of the base's and what differs, against Transformers on its files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onebase_adapters.adapter import Adapter, TokenMatrix, TokenRows, Vocabulary
from onebase_adapters.base_layout import BaseLayout
from onebase_adapters.peft_tokenizer import read_own_tokenizer
from onebase_adapters.tokenizer_files import read_tokenizer_files, write_tokenizer_files
from onebase_adapters.tokenizer_form import TokenizerForm
from onebase_server.model.tokenizer import Tokenizer
from onebase_server.process_memory import resident_bytes

TEMPLATE = (
    "{% for message in messages %}<turn>{{ message.role }}: {{ message.content }}</turn>{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)
TEXTS = [
    "<turn>user: Call <tool>search(naïve 😀)</tool> </turn>",
    " <tool> spaces  around </tool> 日本",
    "<|im_start|>old tokens<|im_end|> and <tool>new ones</tool>",
    "",
]
MESSAGES = [{"role": "user", "content": "Use <tool>, please: 1+1? 你好"}]


@pytest.fixture(scope="module")
def base(demo_base: Path) -> Tokenizer:
    return Tokenizer.from_directory(demo_base)


@pytest.fixture(scope="module")
def adapter_files(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Transformers writes of the demo base's tokenizer with tokens, an end and a template of its own."""
    tokenizer = AutoTokenizer.from_pretrained(demo_base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "</turn>"], "eos_token": "<stop>"})
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer(["a", "bcd"], padding=True)  # as trainers do, whose padding is saved too
    directory = tmp_path_factory.mktemp("adapter")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def expected(adapter_files: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(adapter_files)


@pytest.fixture(scope="module")
def own_form(demo_base: Path, adapter_files: Path) -> TokenizerForm:
    form = subtract(adapter_files, demo_base)
    assert form is not None
    return form


@pytest.fixture(scope="module")
def own(base: Tokenizer, own_form: TokenizerForm) -> Tokenizer:
    return base.with_own(own_form)


def subtract(directory: Path, base: Path) -> TokenizerForm | None:
    """What is left of a directory's files, for an adapter that has embeddings for five tokens more than the base."""
    rows = TokenRows(np.arange(49152, 49157), np.zeros((5, 576), np.float32))
    adapter = Adapter({}, vocabulary=Vocabulary(embedding=TokenMatrix(rows=rows), size=49157))
    layout = BaseLayout(30, {"q_proj": (576, 576)}, vocab_size=49152)
    return read_own_tokenizer(directory, adapter, layout, read_tokenizer_files(base))


def test_what_is_kept_is_small_and_without_the_bases_vocabulary(own_form: TokenizerForm) -> None:
    assert own_form.parts == ("tokens", "special_tokens", "chat_template")
    assert len(own_form.to_bytes()) < 10_000


def test_nothing_is_kept_of_what_transformers_writes_of_the_bases_tokenizer(demo_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_base)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=8)
    tokenizer.save_pretrained(tmp_path)
    assert subtract(tmp_path, demo_base) is None


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_encoded_and_decoded_as_transformers_does(
    own: Tokenizer, expected: PreTrainedTokenizerFast, text: str
) -> None:
    ids = own.encode(text)
    assert ids == expected.encode(text)
    assert own.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    assert "".join(map(own.id_to_token_text, own.encode("<turn> <tool>x"))) == "<turn> <tool>x"


def test_chats_are_rendered_and_end_as_in_transformers(own: Tokenizer, expected: PreTrainedTokenizerFast) -> None:
    assert own.render_chat(MESSAGES) == expected.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert own.encode_chat(MESSAGES) == expected.apply_chat_template(
        MESSAGES, return_dict=False, add_generation_prompt=True
    )
    assert expected.eos_token_id in own.eos_token_ids


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_of_added_tokens_is_the_text_that_transformers_decodes(
    own: Tokenizer, expected: PreTrainedTokenizerFast, text: str
) -> None:
    ids = expected.encode(text)
    stream = own.stream()
    pieces = [stream.push([token_id]) for token_id in ids]
    assert "".join(pieces) + stream.flush() == expected.decode(ids, skip_special_tokens=True)
    tool = expected.convert_tokens_to_ids("<tool>")
    assert all("<tool>" in piece for piece, token_id in zip(pieces, ids, strict=True) if token_id == tool)


def test_what_is_exported_is_a_directory_that_transformers_loads(
    own_form: TokenizerForm, demo_base: Path, expected: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_tokenizer_files(own_form.over(read_tokenizer_files(demo_base)), tmp_path)
    exported: Any = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert exported.encode(text) == expected.encode(text)
    assert exported.apply_chat_template(MESSAGES, tokenize=False) == expected.apply_chat_template(
        MESSAGES, tokenize=False
    )
    assert subtract(tmp_path, demo_base) == own_form


def test_many_adapters_tokenizers_share_the_memory_of_the_bases(base: Tokenizer, own_form: TokenizerForm) -> None:
    tokens = json.loads(own_form.tokens or "")
    tokens["added_tokens"][-1]["content"] = "<another>"
    forms = [own_form, TokenizerForm(tokens=json.dumps(tokens))]
    base.with_own(own_form)
    before = resident_bytes()
    made = [base.with_own(forms[number % 2]) for number in range(300)]
    assert resident_bytes() - before < 30 << 20  # one copy of the vocabulary takes 12 MiB
    assert made[0].encode("<tool>") != made[1].encode("</tool>")
