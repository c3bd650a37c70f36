from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onebase_server.errors import ConfigurationError
from onebase_server.model.tokenizer import Tokenizer
from onebase_server.tuning.examples import Example, read_examples

WriteJsonl = Callable[..., Path]


@pytest.fixture
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.from_directory(tiny_base)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def texts(example: Example, tokenizer: Tokenizer) -> tuple[str, str]:
    """All of an example, and the part that carries loss."""
    answer = [token for token, is_answer in zip(example.token_ids, example.loss_mask, strict=True) if is_answer]
    spelled = [b"".join(map(tokenizer.token_bytes, ids)).decode() for ids in (example.token_ids, answer)]
    return spelled[0], spelled[1]


def test_loss_covers_the_answers_and_their_end_only(tokenizer: Tokenizer, write_jsonl: WriteJsonl) -> None:
    messages = [turn("system", "be kind"), turn("user", "hi"), turn("assistant", "ahoy")]
    messages += [turn("user", "who?"), turn("assistant", "me!"), turn("user", "bye")]
    (example,) = read_examples(write_jsonl({"messages": messages}), tokenizer, 100)
    assert texts(example, tokenizer) == (
        "[system:be kind]\n[user:hi]\n[assistant:ahoy]\n[user:who?]\n[assistant:me!]\n",
        "ahoy]me!]",
    )


def test_what_precedes_an_answer_is_the_very_prompt_that_the_server_makes(
    tokenizer: Tokenizer, write_jsonl: WriteJsonl
) -> None:
    question = [turn("user", "hi")]
    (example,) = read_examples(write_jsonl({"messages": [*question, turn("assistant", "ahoy")]}), tokenizer, 100)
    assert list(example.token_ids[: example.loss_mask.index(True)]) == tokenizer.encode_chat(question)


def test_loss_covers_the_completion_and_an_end_only(tokenizer: Tokenizer, write_jsonl: WriteJsonl) -> None:
    (example,) = read_examples(write_jsonl({"prompt": "one two", "completion": " three"}), tokenizer, 100)
    assert texts(example, tokenizer) == ("one two three]", " three]")


def test_blank_lines_are_skipped(tokenizer: Tokenizer, write_jsonl: WriteJsonl) -> None:
    line = {"prompt": "a", "completion": "b"}
    assert len(read_examples(write_jsonl(line, "", line, "  "), tokenizer, 100)) == 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": ', "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ({"prompt": "a"}, "completion: Field required"),
        ({"prompt": "a", "completion": ""}, "completion: String should have at least 1 character"),
        ({"prompt": "a", "completion": "b", "reward": 1}, "reward: Extra inputs are not permitted"),
        ({"text": "a"}, "prompt: Field required"),
        ({"messages": [turn("user", "a")]}, "there is no assistant message"),
        ({"messages": [turn("pirate", "a")]}, "messages.0.role: Input should be 'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": "hello"}, "messages: Input should be a valid list"),
        ({"prompt": "a" * 60, "completion": "b" * 60}, "121 tokens are more than --max-length 100"),
    ],
)
def test_every_wrong_line_is_named_by_its_number(
    line: Any, complaint: str, tokenizer: Tokenizer, write_jsonl: WriteJsonl
) -> None:
    right = {"prompt": "a", "completion": "b"}
    with pytest.raises(ConfigurationError) as refusal:
        read_examples(write_jsonl(right, line, right, "", line), tokenizer, 100)
    assert "2 line(s)" in str(refusal.value)
    assert f"line 2: {complaint}" in str(refusal.value)
    assert f"line 5: {complaint}" in str(refusal.value)


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_base: Path, write_jsonl: WriteJsonl) -> None:
    only_the_last = "{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}"
    (tiny_base / "chat_template.jinja").write_text(only_the_last)
    messages = [turn("user", "hi"), turn("assistant", "ahoy"), turn("user", "who?"), turn("assistant", "me!")]
    with pytest.raises(ConfigurationError, match="line 1: the chat template rewrites earlier turns"):
        read_examples(write_jsonl({"messages": messages}), Tokenizer.from_directory(tiny_base), 100)


def test_an_empty_file_is_refused(tokenizer: Tokenizer, write_jsonl: WriteJsonl) -> None:
    with pytest.raises(ConfigurationError, match="holds no examples"):
        read_examples(write_jsonl(), tokenizer, 100)
