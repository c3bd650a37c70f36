"""From a request's fields to a `Generation`: the model resolved and held, prompts checked against it, a place taken."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from onebase_adapters.errors import AdapterNotFound
from onebase_server.api.context import Context
from onebase_server.api.generation import Generation, Job, Prompt
from onebase_server.api.models import Selection, select_combination, select_model
from onebase_server.api.schemas import GenerationRequest
from onebase_server.engine.request import AdapterRef, Ready, SamplingParams
from onebase_server.errors import BadRequest, ContextTooLong, ModelNotFound
from onebase_server.model.tokenizer import Tokenizer

LONG_TEXT = 8192
"""Characters, in all, from which tokenising is worth a thread, so that other streams do not wait for it."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """What a request runs on, held until `holds` is closed, and the tokenizer that goes with it."""

    selection: Selection
    tokenizer: Tokenizer
    holds: ExitStack


@asynccontextmanager
async def pin(context: Context, request: GenerationRequest) -> AsyncIterator[Pinned]:
    """What `model`, or `adapter` beside it, names now; let go of again at the end, unless `prepare` took it over.

    Raises:
        BadRequest, ModelNotFound, AdapterDoesNotFit, EngineUnavailable.
    """
    with ExitStack() as holds:
        selection = _select(request, context, holds)
        try:
            tokenizer = await context.tokenizers.of(selection.tokenizer_digest)
        except AdapterNotFound as error:  # removed since it was resolved
            raise ModelNotFound(f"The model {selection.label} does not exist. {error}", param="model") from error
        yield Pinned(selection, tokenizer, holds)


async def render_chat(context: Context, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt that the chat template makes of `messages`; one that came with an adapter does so in another process.

    Raises:
        BadRequest: There is no template, or it refuses the messages or takes too much for them.
    """
    if tokenizer.own_chat_template is None:
        return tokenizer.render_chat(messages)
    return await context.templates.render(tokenizer.own_chat_template, messages, tokenizer.special_tokens)


async def encode(tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text."""
    if sum(map(len, texts)) < LONG_TEXT:
        return [tokenizer.encode(text, add_special_tokens) for text in texts]
    return await anyio.to_thread.run_sync(tokenizer.encode_batch, texts, add_special_tokens)


def prepare(
    context: Context,
    pinned: Pinned,
    request: GenerationRequest,
    request_id: str,
    prompts: Sequence[Sequence[int]],
    *,
    param: str,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    prompt_only: bool = False,
) -> Generation:
    """Make a request's job; whoever gets it has to enter it, for it holds what was pinned and places in the queue.

    Args:
        param: The field that the prompts came in, for error messages.
        max_tokens: What was asked for; None takes `default_max_tokens`, but never more than the context leaves.
        default_max_tokens: None is all that the context leaves.

    Raises:
        BadRequest, ContextTooLong, Overloaded, EngineUnavailable.
    """
    info, selection, tokenizer = context.engine_info, pinned.selection, pinned.tokenizer
    vocab_size = (selection.adapter.vocab_size if selection.adapter else None) or info.vocab_size
    if any(token_id >= vocab_size for token_id in request.stop_token_ids):
        raise BadRequest(f"stop_token_ids must be below {vocab_size}, the vocabulary.", param="stop_token_ids")
    room = ContextRoom.behind(selection.adapter, info)
    checked = []
    for token_ids in prompts:
        _check_token_ids(token_ids, vocab_size, param)
        fitted = _fit_max_tokens(len(token_ids), max_tokens, default_max_tokens, room, param)
        sampling = _sampling(request, tokenizer.eos_token_ids, fitted, logprobs, prompt_logprobs)
        checked.append(Prompt(token_ids, sampling))
    pinned.holds.enter_context(context.admission.admit(len(checked) * request.n))
    job = Job(
        request_id=request_id,
        selection=selection,
        prompts=checked,
        num_choices=request.n,
        stop=request.stop,
        include_stop=request.include_stop_str_in_output,
        prompt_only=prompt_only,
    )
    return Generation(job, context.engine, tokenizer, context.metrics, pinned.holds.pop_all())


def _select(request: GenerationRequest, context: Context, holds: ExitStack) -> Selection:
    """What `model`, or `adapter` beside it, names."""
    base_name, store, info = context.settings.served_name, context.store, context.engine_info
    if not request.adapter:
        return select_model(request.model, base_name, store, info, holds)
    if request.model != base_name:
        raise BadRequest(f"Beside adapter, model has to be the base, {base_name}, not {request.model}.", param="model")
    return select_combination(request.adapter, base_name, store, info, holds)


@dataclass(frozen=True, slots=True)
class ContextRoom:
    """How many tokens a prompt and its answer may have together."""

    num_tokens: int
    description: str
    """Of the context, for messages."""

    @classmethod
    def behind(cls, adapter: AdapterRef | None, info: Ready) -> "ContextRoom":
        """The model's context, less the adapter's virtual tokens if it has any."""
        description = f"this model's context of {info.max_model_len} tokens"
        if adapter is None or not adapter.num_virtual_tokens:
            return cls(info.max_model_len, description)
        description += f", {adapter.num_virtual_tokens} of which are the adapter's virtual tokens,"
        return cls(info.max_model_len - adapter.num_virtual_tokens, description)


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    if not token_ids:
        raise BadRequest("The prompt is empty; it needs at least one token.", param=param)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise BadRequest(f"Token ids must be from 0 to {vocab_size - 1}, the vocabulary of this model.", param=param)


def _fit_max_tokens(length: int, wanted: int | None, default: int | None, room: ContextRoom, param: str) -> int:
    """How many tokens to generate at most after a prompt of `length` tokens; raises ContextTooLong."""
    left = room.num_tokens - length
    if left < 1:
        raise ContextTooLong(
            f"The prompt has {length} tokens; {room.description} holds the prompt and at least one generated token. "
            "Shorten the prompt.",
            param=param,
        )
    if wanted is None:
        return left if default is None else min(default, left)
    if wanted > left:
        raise ContextTooLong(
            f"The prompt has {length} tokens and {wanted} more were asked for, but {room.description} holds "
            f"{room.num_tokens} together. Shorten the prompt, or ask for at most {left}.",
            param=param,
        )
    return max(1, wanted)


def _sampling(
    request: GenerationRequest,
    eos_token_ids: Sequence[int],
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_k=max(0, request.top_k),  # vLLM's clients turn it off with -1
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        seed=request.seed,
        stop_token_ids=(*request.stop_token_ids, *(() if request.ignore_eos else eos_token_ids)),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
