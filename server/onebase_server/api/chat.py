"""`POST /v1/chat/completions`: a conversation in, the assistant's next turn out."""

import time
import uuid
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from onebase_server.api.answering import EventStream, GenerationRoute, respond_whole
from onebase_server.api.auth import require_api_key
from onebase_server.api.context import ContextDependency
from onebase_server.api.generation import Generation, Piece
from onebase_server.api.logprobs import chat_logprobs
from onebase_server.api.preparation import encode, pin, prepare, render_chat
from onebase_server.api.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from onebase_server.api.schemas import ChatCompletionRequest

router = APIRouter(tags=["generation"], dependencies=[Depends(require_api_key)], route_class=GenerationRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(request: Request, body: ChatCompletionRequest, context: ContextDependency) -> Response:
    """Answer a conversation."""
    async with pin(context, body) as pinned:
        messages = [message.for_template() for message in body.messages]
        prompt = await render_chat(context, pinned.tokenizer, messages)
        generation = prepare(
            context,
            pinned,
            body,
            f"chatcmpl-{uuid.uuid4().hex}",
            await encode(pinned.tokenizer, [prompt], add_special_tokens=False),  # the template has written them
            param="messages",
            max_tokens=body.max_completion_tokens or body.max_tokens,
            default_max_tokens=None,
            logprobs=body.top_logprobs if body.logprobs else None,
        )
    answer = _Answer(generation, body)
    if body.stream:
        return EventStream(generation, answer.chunks())
    return await respond_whole(request, generation, answer.whole)


class _Answer:
    """Pieces to OpenAI's objects."""

    def __init__(self, generation: Generation, body: ChatCompletionRequest) -> None:
        self._generation = generation
        self._body = body
        self._created = int(time.time())

    async def chunks(self) -> AsyncGenerator[ChatChunk, None]:
        """The stream's events: each choice's role, then its text, then its finish reason."""
        for index in range(self._body.n):
            yield self._chunk([ChatChunkChoice(index, ChatDelta(role="assistant", content=""))])
        async for piece in self._generation.pieces():
            logprobs = self._logprobs([piece])
            if piece.text or logprobs:
                yield self._chunk([ChatChunkChoice(piece.index, ChatDelta(content=piece.text), logprobs)])
            if piece.finish_reason:
                yield self._chunk([ChatChunkChoice(piece.index, ChatDelta(), None, piece.finish_reason)])
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield self._chunk([], self._generation.counts.usage())

    def whole(self, pieces: list[Piece]) -> ChatCompletion:
        """The one answer."""
        by_choice: list[list[Piece]] = [[] for _ in range(self._body.n)]
        for piece in pieces:
            by_choice[piece.index].append(piece)
        choices = [self._choice(index, parts) for index, parts in enumerate(by_choice)]
        job, usage = self._generation.job, self._generation.counts.usage()
        return ChatCompletion(job.request_id, self._created, self._body.model, job.selection.label, choices, usage)

    def _choice(self, index: int, pieces: list[Piece]) -> ChatChoice:
        message = AssistantMessage("".join(piece.text for piece in pieces))
        finish_reason = pieces[-1].finish_reason
        assert finish_reason is not None, "a sequence's last piece says why it ended"
        return ChatChoice(index, message, self._logprobs(pieces), finish_reason)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        job = self._generation.job
        return ChatChunk(job.request_id, self._created, self._body.model, job.selection.label, choices, usage)

    def _logprobs(self, pieces: list[Piece]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(
            self._generation.tokenizer, (logprob for piece in pieces for logprob in piece.logprobs or ())
        )
