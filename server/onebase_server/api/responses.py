"""What clients get: OpenAI's objects, as its clients parse them.

Plain data, encoded by msgspec: a stream sends one object per token, so nothing is validated or copied on the way out.
Dataclasses are documented at /docs too; the chunks of a stream are structs, which can leave absent fields out.
"""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class PromptTokensDetails:
    """How the prompt's tokens were come by."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole request, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a position."""

    token: str
    logprob: float
    bytes: list[int]


@dataclass(frozen=True, slots=True)
class ChatTokenLogprob:
    """The chosen token at a position, and the likeliest ones."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


@dataclass(frozen=True, slots=True)
class ChatLogprobs:
    """Log-probabilities of a chat choice, one entry per generated token."""

    content: list[ChatTokenLogprob]


@dataclass(frozen=True, slots=True)
class CompletionLogprobs:
    """Log-probabilities of a completion choice; four lists with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer of `/v1/completions`, and each chunk of its stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    """What answered: the base's name, or `adapter@version`; `model` is what was asked for."""
    choices: list[CompletionChoice]
    usage: Usage | None
    object: Literal["text_completion"] = "text_completion"


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """The answer's turn in the conversation."""

    content: str
    role: Literal["assistant"] = "assistant"


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """The answer of `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    """What answered: the base's name, or `adapter@version`; `model` is what was asked for."""
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a message: the role comes first, then the text."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a `/v1/chat/completions` stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    """What answered: the base's name, or `adapter@version`; `model` is what was asked for."""
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """An entry of `/v1/models`: the base, or an adapter of it."""

    id: str
    created: int
    max_model_len: int | None
    root: str
    parent: str | None = None
    own_tokenizer: list[str] = field(default_factory=list)
    """What an adapter brings of a tokenizer: `tokens`, `special_tokens`, `chat_template`."""
    owned_by: str = "onebase"
    object: Literal["model"] = "model"


@dataclass(frozen=True, slots=True)
class ModelList:
    """The answer of `GET /v1/models`."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """One published version of an adapter."""

    name: str
    version: int
    digest: str
    """sha256 of the adapter as it is kept: the same adapter always has the same, however it was sent."""
    source_sha256: str
    """sha256 of what was sent."""
    rank: int
    """The largest of any linear; 0 for a prefix."""
    targets: list[str]
    bytes: int
    num_parameters: int
    num_virtual_tokens: int
    """How many tokens of the context a prefix takes."""
    vocab_size: int | None
    """How many tokens the adapter has, if not as many as the base."""
    own_tokenizer: list[str]
    """What it brings of a tokenizer: `tokens`, `special_tokens`, `chat_template`; the rest is the base's."""
    created: int
    is_live: bool
    object: Literal["adapter"] = "adapter"


@dataclass(frozen=True, slots=True)
class AdapterList:
    """The answer of `GET /v1/adapters` and `GET /v1/adapters/{name}/versions`."""

    data: list[AdapterCard]
    object: Literal["list"] = "list"


@dataclass(frozen=True, slots=True)
class AdapterRemoved:
    """The answer of `DELETE /v1/adapters/{name}`."""

    name: str
    deleted: bool = True
    object: Literal["adapter"] = "adapter"
