"""`POST /v1/completions`: text in, its continuation out."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from onebase_server.api.answering import EventStream, GenerationRoute, respond_whole
from onebase_server.api.auth import require_api_key
from onebase_server.api.context import ContextDependency
from onebase_server.api.generation import Generation, Piece
from onebase_server.api.logprobs import CompletionLogprobsFormatter, join_logprobs
from onebase_server.api.preparation import encode, pin, prepare
from onebase_server.api.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from onebase_server.api.schemas import CompletionRequest, Prompt
from onebase_server.model.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

router = APIRouter(tags=["generation"], dependencies=[Depends(require_api_key)], route_class=GenerationRoute)


@router.post("/v1/completions", response_model=Completion)
async def create_completion(request: Request, body: CompletionRequest, context: ContextDependency) -> Response:
    """Continue one or more prompts."""
    async with pin(context, body) as pinned:
        prompts = await _tokenize(pinned.tokenizer, body.prompt, body.add_special_tokens)
        generation = prepare(
            context,
            pinned,
            body,
            f"cmpl-{uuid.uuid4().hex}",
            [prompt.token_ids for prompt in prompts],
            param="prompt",
            max_tokens=body.max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            prompt_only=body.max_tokens == 0,
        )
    answer = _Answer(generation, body, prompts)
    if body.stream:
        return EventStream(generation, answer.chunks())
    return await respond_whole(request, generation, answer.whole)


@dataclass(frozen=True, slots=True)
class _TokenizedPrompt:
    text: str
    """What `echo` repeats."""
    token_ids: list[int]


async def _tokenize(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], add_special_tokens: bool
) -> list[_TokenizedPrompt]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await encode(tokenizer, texts, add_special_tokens=add_special_tokens))
    return [
        _TokenizedPrompt(prompt, next(encoded)) if isinstance(prompt, str) else _TokenizedPrompt("", prompt)
        for prompt in prompts
    ]


class _Answer:
    """Pieces to OpenAI's objects."""

    def __init__(self, generation: Generation, body: CompletionRequest, prompts: list[_TokenizedPrompt]) -> None:
        self._generation = generation
        self._body = body
        self._created = int(time.time())
        self._choices = [
            _ChoiceFormatter(index, prompts[index // body.n], body, generation.tokenizer)
            for index in range(len(prompts) * body.n)
        ]

    async def chunks(self) -> AsyncGenerator[Completion, None]:
        """The stream's events."""
        async for piece in self._generation.pieces():
            choice = self._choices[piece.index].format(piece)
            if choice.text or choice.logprobs or choice.finish_reason:
                yield self._completion([choice])
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield self._completion([], self._generation.counts.usage())

    def whole(self, pieces: list[Piece]) -> Completion:
        """The one answer."""
        parts: list[list[CompletionChoice]] = [[] for _ in self._choices]
        for piece in pieces:
            parts[piece.index].append(self._choices[piece.index].format(piece))
        return self._completion([_join(choice) for choice in parts], self._generation.counts.usage())

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        job = self._generation.job
        return Completion(job.request_id, self._created, self._body.model, job.selection.label, choices, usage)


class _ChoiceFormatter:
    """One choice's pieces to parts of a `CompletionChoice`; with `echo` the first of them begins with the prompt."""

    def __init__(self, index: int, prompt: _TokenizedPrompt, body: CompletionRequest, tokenizer: Tokenizer) -> None:
        self._index = index
        self._prompt_token_ids = prompt.token_ids
        self._wants_logprobs = body.logprobs is not None
        self._pending_echo = (prompt.text or tokenizer.decode(prompt.token_ids)) if body.echo else ""
        self._logprobs = CompletionLogprobsFormatter(tokenizer)

    def format(self, piece: Piece) -> CompletionChoice:
        """The next part."""
        text, self._pending_echo = self._pending_echo + piece.text, ""
        return CompletionChoice(self._index, text, self._format_logprobs(piece), piece.finish_reason)

    def _format_logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        if not self._wants_logprobs:
            return None
        parts = []
        if piece.prompt_logprobs is not None:
            parts.append(self._logprobs.format(self._prompt_token_ids, piece.prompt_logprobs))
        if piece.logprobs is not None:
            parts.append(self._logprobs.format(piece.token_ids, piece.logprobs))
        return join_logprobs(parts) if parts else None


def _join(parts: list[CompletionChoice]) -> CompletionChoice:
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionChoice(
        index=parts[0].index,
        text="".join(part.text for part in parts),
        logprobs=join_logprobs(logprobs) if logprobs else None,
        finish_reason=parts[-1].finish_reason,
    )
