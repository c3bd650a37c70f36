import json
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onebase_server.errors import BadRequest, ConfigurationError
from onebase_server.model.gguf_metadata import GgufMetadata, open_gguf
from onebase_server.model.gguf_tokenizer import build_tokenizer
from onebase_server.model.tokenizer import Tokenizer

from .tiny_gguf import write_gguf

DATA = Path(__file__).parent / "data"
BPE_FIXTURE: dict[str, Any] = json.loads((DATA / "llamacpp_bpe_ids.json").read_text())
SPM_FIXTURE: dict[str, Any] = json.loads((DATA / "llamacpp_spm_ids.json").read_text())

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello,\n  what's 1+1? <b>é</b> 你好"}
ASSISTANT = {"role": "assistant", "content": "2\n"}
CONVERSATIONS = {
    "one question": [USER],
    "system prompt": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ASSISTANT, USER],
    "ends with the assistant": [USER, ASSISTANT],
    "empty content": [{"role": "user", "content": ""}],
}
ELABORATE_TEMPLATE = """{%- set ns = namespace(count=0) -%}
{{ bos_token }}{% for message in messages %}
    {% if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message['role']) }}
    {% endif %}
    {% if message.content == '' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}{{ message['role'] | upper }}: {{ message | tojson(indent=2) }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{{ ns.count }} {{ strftime_now('%') }} {{ mood | default('calm') }}
{% if add_generation_prompt %}ASSISTANT:{% endif %}
"""


@pytest.fixture(scope="module")
def tokenizer(demo_base: Path) -> Tokenizer:
    return Tokenizer.from_directory(demo_base)


@pytest.fixture(scope="module")
def transformers_tokenizer(demo_base: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo_base)


@pytest.fixture(scope="module")
def demo_vocabulary(demo_base: Path) -> dict[str, Any]:
    """The demo base's vocabulary in the words of GGUF."""
    model = json.loads((demo_base / "tokenizer.json").read_text())
    control = {token["content"] for token in model["added_tokens"]}
    tokens = sorted(model["model"]["vocab"], key=model["model"]["vocab"].get)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["model"]["merges"]],
    }


@pytest.fixture
def spm_tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(build_spm(tmp_path), eos_token_ids=[2], chat_template=None)


def build_spm(tmp_path: Path, **metadata: Any) -> tokenizers.Tokenizer:
    file = write_gguf(tmp_path / "spm.gguf", tokenizer="llama", metadata=metadata)
    return build_tokenizer(GgufMetadata.from_reader(file, open_gguf(file)))


def write_directory(directory: Path, demo_base: Path, **config: Any) -> Path:
    """A directory with the demo base's vocabulary and a tokenizer configuration of its own."""
    (directory / "tokenizer.json").symlink_to(demo_base / "tokenizer.json")
    tokens = {"bos_token": "<|im_start|>", "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps({**tokens, **config}))
    return directory


def different_texts(fixture: dict[str, Any], key: str, backend: tokenizers.Tokenizer, **options: Any) -> list[str]:
    pairs = zip(fixture["texts"], fixture["ids"][key], strict=True)
    return [text for text, ids in pairs if backend.encode(text, **options).ids != ids]


def test_demo_base_gives_llama_cpps_ids(tokenizer: Tokenizer) -> None:
    pairs = zip(BPE_FIXTURE["texts"], BPE_FIXTURE["ids"]["smollm"], strict=True)
    assert [text for text, ids in pairs if tokenizer.encode(text) != ids] == []


@pytest.mark.parametrize("pre", BPE_FIXTURE["ids"])
def test_every_way_to_cut_words_gives_llama_cpps_ids(demo_vocabulary: dict[str, Any], pre: str) -> None:
    metadata = GgufMetadata(Path("vocabulary.gguf"), {**demo_vocabulary, "tokenizer.ggml.pre": pre})
    assert different_texts(BPE_FIXTURE, pre, build_tokenizer(metadata), add_special_tokens=False) == []


@pytest.mark.parametrize(("name", "prefix"), [("with a space before", True), ("without a space before", False)])
def test_sentencepiece_vocabulary_gives_llama_cpps_ids(tmp_path: Path, name: str, prefix: bool) -> None:
    backend = build_spm(tmp_path, **{"tokenizer.ggml.add_space_prefix": prefix})
    assert different_texts(SPM_FIXTURE, name, backend) == []


@pytest.mark.parametrize("text", ["hello there", " two  spaces ", "é你 😀", "tab\tand\nnewline", ""])
def test_decode_undoes_encode(tokenizer: Tokenizer, spm_tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert spm_tokenizer.decode(spm_tokenizer.encode(text)) == text


def test_texts_encoded_together_are_encoded_as_each_alone(tokenizer: Tokenizer) -> None:
    texts = ["Once upon a time", "", "日本 😀"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    work = Thread(target=tokenizer.encode_batch, args=(["The quick brown fox jumps over the lazy dog. " * 20_000],))
    work.start()
    ticks = 0
    while work.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 10


def test_special_tokens_are_left_out_of_text_but_shown_one_by_one(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>Hi<|im_end|>")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "Hi"
    assert [tokenizer.id_to_token_text(token_id) for token_id in ids] == ["<|im_start|>", "Hi", "<|im_end|>"]


def test_bytes_of_tokens_joined_are_the_text(tokenizer: Tokenizer, spm_tokenizer: Tokenizer) -> None:
    text = "naïve 😀 ᚠᚢᚦ\t x"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.id_to_token_text(token_id) for token_id in ids)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    spm_ids = spm_tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(spm_tokenizer.token_bytes, spm_ids)).decode() == " " + text


def test_token_outside_the_vocabulary_has_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.decode([tokenizer.vocab_size]) == ""
    assert tokenizer.stream().push([tokenizer.vocab_size]) == ""


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_are_rendered_and_encoded_as_transformers_does(
    tokenizer: Tokenizer,
    transformers_tokenizer: PreTrainedTokenizerFast,
    conversation: str,
    add_generation_prompt: bool,
) -> None:
    messages, options = CONVERSATIONS[conversation], {"add_generation_prompt": add_generation_prompt}
    expected = transformers_tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert tokenizer.render_chat(messages, **options) == expected
    expected_ids = transformers_tokenizer.apply_chat_template(messages, return_dict=False, **options)
    assert tokenizer.encode_chat(messages, **options) == expected_ids


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("source", ["configuration", "one of several", "file"])
def test_elaborate_templates_are_rendered_as_transformers_does(
    demo_base: Path, tmp_path: Path, conversation: str, source: str
) -> None:
    templates = [{"name": "default", "template": ELABORATE_TEMPLATE}, {"name": "rag", "template": "rag"}]
    in_configuration = {"configuration": ELABORATE_TEMPLATE, "one of several": templates, "file": "another"}[source]
    directory = write_directory(tmp_path, demo_base, chat_template=in_configuration)
    if source == "file":
        (directory / "chat_template.jinja").write_text(ELABORATE_TEMPLATE)
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        CONVERSATIONS[conversation], tokenize=False, add_generation_prompt=True, mood="cheerful"
    )
    rendered = Tokenizer.from_directory(directory).render_chat(CONVERSATIONS[conversation], mood="cheerful")
    assert rendered == expected


def test_messages_that_the_template_refuses_are_a_bad_request(demo_base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, demo_base, chat_template=ELABORATE_TEMPLATE))
    with pytest.raises(BadRequest, match="unknown role wizard") as caught:
        tokenizer.render_chat([{"role": "wizard", "content": "Hi"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("message", [{"role": "user", "content": ["a"]}, {"role": "user", "content": None}, {}])
def test_messages_that_the_template_cannot_handle_are_a_bad_request(
    tokenizer: Tokenizer, message: dict[str, Any]
) -> None:
    with pytest.raises(BadRequest, match="chat template"):
        tokenizer.render_chat([message])


def test_templates_cannot_leave_their_sandbox(demo_base: Path, tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__base__.__subclasses__() }}"
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, demo_base, chat_template=escape))
    with pytest.raises(BadRequest, match="unsafe"):
        tokenizer.render_chat([USER])


def test_model_without_a_template_cannot_chat(demo_base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, demo_base))
    with pytest.raises(BadRequest, match="no chat template"):
        tokenizer.render_chat([USER])


def test_template_that_is_not_jinja_is_a_configuration_error(demo_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="chat template is not valid"):
        Tokenizer.from_directory(write_directory(tmp_path, demo_base, chat_template="{% if %}"))


def test_every_file_may_name_tokens_that_end_a_text(demo_base: Path, tmp_path: Path) -> None:
    directory = write_directory(tmp_path, demo_base)
    assert Tokenizer.from_directory(directory).eos_token_ids == (2,)
    (directory / "config.json").write_text('{"eos_token_id": 0}')
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert Tokenizer.from_directory(directory).eos_token_ids == (0, 2, 7)


@pytest.mark.parametrize("content", [None, "", "{", '{"model": {"type": "Rune"}}'])
def test_missing_or_damaged_tokenizer_is_a_configuration_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_damaged_configuration_is_named(demo_base: Path, tmp_path: Path) -> None:
    directory = write_directory(tmp_path, demo_base)
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"generation_config\.json is not JSON"):
        Tokenizer.from_directory(directory)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streamed_pieces_joined_are_the_whole_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    any_token = st.integers(0, tokenizer.vocab_size - 1)
    special, lone_byte = st.integers(0, 16), st.integers(17, 260)
    ids = data.draw(st.lists(st.one_of(any_token, special, lone_byte), max_size=24))
    prompt = data.draw(st.lists(st.one_of(any_token, lone_byte), max_size=12))
    stream = tokenizer.stream(prompt)
    pieces = [stream.push([token_id]) for token_id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_stream_never_splits_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assume("\ufffd" not in tokenizer.decode(ids))  # this vocabulary lacks the bytes of the planes without characters
    stream = tokenizer.stream(tokenizer.encode("Prompt: "))
    pieces = [stream.push([token_id]) for token_id in ids]
    assert "\ufffd" not in "".join(pieces)
    assert stream.flush() == ""


def test_unfinished_character_comes_with_flush(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok😀")
    stream = tokenizer.stream()
    assert stream.push(ids[:-1]) == "ok"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_stream_of_sentencepiece_tokens_keeps_the_space_after_the_prompt(spm_tokenizer: Tokenizer) -> None:
    prompt, answer = spm_tokenizer.encode("the"), spm_tokenizer.encode("there é😀", add_special_tokens=False)
    stream = spm_tokenizer.stream(prompt)
    assert "".join(stream.push([token_id]) for token_id in answer) == " there é😀"


def test_stream_of_sentencepiece_tokens_survives_bytes_that_are_not_utf8(spm_tokenizer: Tokenizer) -> None:
    def byte_token(byte: int) -> int:
        return 3 + byte

    stream = spm_tokenizer.stream(spm_tokenizer.encode("the"))
    assert stream.push([byte_token(byte) for byte in "µ".encode()]) == "µ"
    assert stream.push([byte_token(0xFF)]) == ""
    assert stream.push(spm_tokenizer.encode(" the", add_special_tokens=False)) == "\ufffd  the"
    assert stream.push([byte_token(byte) for byte in "µ".encode()]) == "µ"
