"""Training examples: a JSONL file in, token ids with a loss mask out. It knows no torch.

A line is a conversation, `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`, or
plain text, `{"prompt": "…", "completion": "…"}`. The server's own tokenizer and chat template make the token ids, so
that an adapter sees in training exactly what it will see when it serves.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from onebase_server.errors import BadRequest, ConfigurationError
from onebase_server.model.tokenizer import Tokenizer

_MAX_FAULTS_SHOWN = 20

Text = Annotated[str, StringConstraints(min_length=1)]


@dataclass(frozen=True, slots=True)
class Example:
    """One text to learn from."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True where the token is the model's to say; the same length as `token_ids`."""


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Message(_Line):
    role: Literal["system", "user", "assistant"]
    content: Text


class _Conversation(_Line):
    messages: list[_Message]


class _Completion(_Line):
    prompt: str
    completion: Text


class _Fault(Exception):
    """What is wrong with one line."""


def read_examples(file: Path, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Every line of `file` as an `Example` of at most `max_length` tokens; blank lines are skipped.

    Raises:
        ConfigurationError: The file cannot be read or is empty, or lines of it are wrong: each is named by its number.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigurationError(f"The examples in {file} cannot be read: {error.strerror}.") from error
    examples: list[Example] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(_encode_line(line, tokenizer, max_length))
        except _Fault as fault:
            faults.append(f"line {number}: {fault}")
    if faults:
        raise ConfigurationError(_describe(file, faults))
    if not examples:
        raise ConfigurationError(f"{file} holds no examples.")
    return examples


def _describe(file: Path, faults: list[str]) -> str:
    shown = faults[:_MAX_FAULTS_SHOWN]
    if more := len(faults) - len(shown):
        shown.append(f"and {more} more")
    return "\n  ".join([f"Nothing was trained: {len(faults)} line(s) of {file} are wrong.", *shown])


def _encode_line(line: bytes, tokenizer: Tokenizer, max_length: int) -> Example:
    match _parse(line):
        case _Conversation(messages=messages):
            example = _encode_conversation([message.model_dump() for message in messages], tokenizer)
        case completion:
            example = _encode_completion(completion, tokenizer)
    if len(example.token_ids) > max_length:
        raise _Fault(f"{len(example.token_ids)} tokens are more than --max-length {max_length}.")
    return example


def _parse(line: bytes) -> _Conversation | _Completion:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise _Fault(f"not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise _Fault("not a JSON object.")
    shape = _Conversation if "messages" in fields else _Completion
    try:
        return shape.model_validate(fields)
    except ValidationError as error:
        raise _Fault("; ".join(_complaint(entry) for entry in error.errors()) + ".") from error


def _complaint(entry: Any) -> str:
    return f"{'.'.join(str(part) for part in entry['loc'])}: {entry['msg']}"


def _encode_conversation(messages: list[dict[str, str]], tokenizer: Tokenizer) -> Example:
    """Loss on what each assistant message adds to the rendered prompt that calls for it, up to the end-of-turn token.

    The pieces are tokenised apart: generation, too, starts on a token boundary right after the prompt.
    """
    token_ids: list[int] = []
    loss_mask: list[bool] = []
    rendered = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt = tokenizer.render_chat(messages[:index])
            whole = tokenizer.render_chat(messages[: index + 1], add_generation_prompt=False)
        except BadRequest as error:
            raise _Fault(error.message) from error
        if not (prompt.startswith(rendered) and whole.startswith(prompt)):
            raise _Fault("the chat template rewrites earlier turns; give each answer a line of its own.")
        asked = tokenizer.encode(prompt[len(rendered) :], add_special_tokens=False)
        answered = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
        token_ids += asked + answered
        loss_mask += [False] * len(asked) + _up_to_end_of_turn(answered, tokenizer.eos_token_ids)
        rendered = whole
    if not token_ids:
        raise _Fault("there is no assistant message to learn from.")
    return Example(tuple(token_ids), tuple(loss_mask))


def _up_to_end_of_turn(token_ids: list[int], eos_token_ids: tuple[int, ...]) -> list[bool]:
    """True through the last end-of-turn token: what the template writes after it, the model never says."""
    ends = [index for index, token_id in enumerate(token_ids) if token_id in eos_token_ids]
    length = ends[-1] + 1 if ends else len(token_ids)
    return [index < length for index in range(len(token_ids))]


def _encode_completion(line: _Completion, tokenizer: Tokenizer) -> Example:
    """Loss on the completion and the token that ends it."""
    prompt = tokenizer.encode(line.prompt)
    completion = [*tokenizer.encode(line.completion, add_special_tokens=False), *tokenizer.eos_token_ids[:1]]
    return Example(tuple(prompt + completion), (False,) * len(prompt) + (True,) * len(completion))
