"""One HTTP request's sequences: admitted together, run side by side in the engine, their tokens turned into text.

Both endpoints come here with a `Job`; this module knows the engine's messages, but none of OpenAI's objects.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

import msgspec

from onebase_server.api.errors import outcome_of
from onebase_server.api.merging import merge
from onebase_server.api.models import Selection
from onebase_server.api.responses import FinishReason, PromptTokensDetails, Usage
from onebase_server.api.stop_strings import StopStringFilter
from onebase_server.engine.client import EngineClient
from onebase_server.engine.request import Logprob, SamplingParams, TokenOutput
from onebase_server.errors import OnebaseError
from onebase_server.metrics import Metrics, Outcome
from onebase_server.model.tokenizer import Tokenizer, TokenStream


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready for the engine."""

    token_ids: Sequence[int]
    sampling: SamplingParams
    """With `max_tokens` fitted to this prompt."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a request asks for, checked and tokenised."""

    request_id: str
    selection: Selection
    prompts: Sequence[Prompt]
    num_choices: int
    """Sequences per prompt; choice i of each takes the seed plus i."""
    stop: Sequence[str]
    include_stop: bool
    """Keep the stop string or stop token in the text."""
    prompt_only: bool = False
    """Only the prompt's log-probabilities are wanted: the one token that the engine has to generate is dropped."""


class Piece(msgspec.Struct, frozen=True):
    """What one step added to one sequence."""

    index: int
    """`prompt number · num_choices + choice number`, as OpenAI numbers choices."""
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] | None = None
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class TokenCounts:
    """What usage reports and metrics count."""

    prompt: int = 0
    generated: int = 0
    cached: int = 0

    def usage(self) -> Usage:
        """The counts in OpenAI's form."""
        return Usage(self.prompt, self.generated, self.prompt + self.generated, PromptTokensDetails(self.cached))


@dataclass
class Generation:
    """A job on its way. Leaving it, however that happens, counts it and gives back what it holds."""

    job: Job
    engine: EngineClient
    tokenizer: Tokenizer
    metrics: Metrics
    holds: ExitStack
    """What is given back at the end: places in the queue, the adapter's lease."""
    counts: TokenCounts = field(default_factory=TokenCounts)
    _arrival: float = field(default_factory=time.perf_counter)
    _outcome: Outcome = "aborted"
    """Until it is known to be another: a client that goes away just closes the stream."""

    def __enter__(self) -> Self:
        self.counts.prompt = sum(len(prompt.token_ids) for prompt in self.job.prompts)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.holds.close()
        self.metrics.requests.labels(self._outcome).inc()
        self.metrics.request_latency.observe(time.perf_counter() - self._arrival)
        self.metrics.count_request(self.job.selection.names, self.counts.prompt, self.counts.generated)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The sequences' pieces as they come; closing it early aborts what still runs.

        Raises EngineUnavailable if the engine is not there or dies, OnebaseError if it gives up on a sequence.
        """
        job = self.job
        sequences = [
            self._run_sequence(number * job.num_choices + choice, prompt, choice)
            for number, prompt in enumerate(job.prompts)
            for choice in range(job.num_choices)
        ]
        try:
            async with aclosing(merge(sequences)) as pieces:
                async for piece in pieces:
                    yield piece
        except Exception as error:  # counted, whatever it is, and passed on
            self._outcome = outcome_of(error)
            raise
        self._outcome = "completed"

    async def _run_sequence(self, index: int, prompt: Prompt, choice: int) -> AsyncGenerator[Piece, None]:
        text = SequenceText(self.tokenizer.stream(prompt.token_ids), self.job.stop, include_stop=self.job.include_stop)
        sampling = prompt.sampling
        if choice and sampling.seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=sampling.seed + choice)
        outputs = self.engine.generate(
            prompt.token_ids, sampling, self.job.selection.adapter, request_id=f"{self.job.request_id}-{index}"
        )
        latest: float | None = None
        async with aclosing(outputs):
            async for output in outputs:
                if self.job.prompt_only:
                    output = _without_tokens(output)
                latest = self._measure(output, latest)
                if choice == 0:  # usage counts a prompt once, however many choices continue it
                    self.counts.cached += output.num_cached_tokens
                piece = text.assemble(index, output)
                if piece.finish_reason:
                    self.metrics.finished_sequences.labels(piece.finish_reason).inc()
                yield piece
                if piece.finish_reason:  # at a stop string the engine would go on; closing `outputs` aborts it
                    return

    def _measure(self, output: TokenOutput, latest: float | None) -> float | None:
        """Count an output's tokens and times; `latest` is when this sequence's output before it came."""
        if output.queue_seconds is not None:
            self.metrics.queue_time.observe(output.queue_seconds)
        if not output.token_ids:
            return latest
        self.counts.generated += len(output.token_ids)
        now = time.perf_counter()
        if latest is None:
            self.metrics.time_to_first_token.observe(now - self._arrival)
        else:
            self.metrics.inter_token_latency.observe(now - latest)
        return now


class SequenceText:
    """One sequence's tokens to text: whole characters only, and cut at the first stop string."""

    def __init__(self, stream: TokenStream, stop: Sequence[str], *, include_stop: bool) -> None:
        self._stream = stream
        self._filter = StopStringFilter(stop, include_in_output=include_stop)
        self._include_stop = include_stop

    def assemble(self, index: int, output: TokenOutput) -> Piece:
        """The piece for an output; raises OnebaseError if the engine gave up on the sequence."""
        _raise_if_failed(output)
        visible = output.token_ids
        if output.stop_token_id is not None and not self._include_stop:
            visible = visible[:-1]
        text = self._filter.push(self._stream.push(visible))
        reason = output.finish_reason
        if reason is not None:
            text += self._filter.push(self._stream.flush()) + self._filter.flush()
        return Piece(
            index,
            text,
            output.token_ids,
            output.logprobs,
            output.prompt_logprobs,
            "stop" if self._filter.stopped else cast("FinishReason | None", reason),
        )


def _raise_if_failed(output: TokenOutput) -> None:
    if output.error is not None:
        raise OnebaseError(output.error)


def _without_tokens(output: TokenOutput) -> TokenOutput:
    reason = "length" if output.finish_reason == "stop" else output.finish_reason
    return msgspec.structs.replace(output, token_ids=(), logprobs=None, stop_token_id=None, finish_reason=reason)
