"""One measurement: warm-up, runs, memory and what has to be said about them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from onebase_server.bench.dialects import completion_body
from onebase_server.bench.driver import RunRecord, TimedRequest, drive
from onebase_server.bench.load import Load
from onebase_server.bench.memory import MemoryWatch, TreeMemory
from onebase_server.bench.stream_client import Answer, CompletionClient
from onebase_server.bench.summary import RunSummary, median_of, output_tokens, summarise
from onebase_server.bench.target import Target
from onebase_server.bench.traffic import PlannedRequest, plan_run, plan_warm_up

SEVERAL_TOKENS_PER_CHUNK = 1.02
WORTH_SAYING_DELAY_SECONDS = 0.05
WORTH_SAYING_CPU_SHARE = 0.1


@dataclass(frozen=True)
class Measurement:
    """What one load measured on one server."""

    load: Load
    runs: tuple[RunSummary, ...]
    median: RunSummary
    memory: TreeMemory | None
    """At its largest while the runs went on; None where the server's process is not known."""
    notes: tuple[str, ...]
    """What a reader of the figures must know."""
    answers: list[Answer] = field(repr=False)
    """Of all runs, for the plots."""


class LoadRunner:
    """A load on a server, run by run; whoever holds several may let their runs alternate."""

    def __init__(self, target: Target, load: Load, adapters: Sequence[str], on_answer: Callable[[], None]) -> None:
        """Raises ConfigurationError if `target.pid` is no process here; `on_answer` is called for each answer."""
        self._target, self._load, self._adapters, self._on_answer = target, load, adapters, on_answer
        self._client = CompletionClient(target.url, target.api_key)
        self._watch = MemoryWatch(target.pid, target.url) if target.pid else None
        self._records: list[RunRecord] = []

    def warm_up(self) -> None:
        """Send the warm-up's requests; raises ConfigurationError if there are some and not one was answered."""
        if self._load.warm_up:
            summarise(uvloop.run(self._drive(plan_warm_up(self._load, self._target.prompts))))

    def run(self, number: int) -> None:
        """Send the requests of the run of this number, counted from 1; no two runs share a prompt."""
        self._records.append(uvloop.run(self._drive_watched(plan_run(self._load, self._target.prompts, number))))

    def measurement(self) -> Measurement:
        """What the runs so far measured; raises ConfigurationError if in one of them not one request was answered."""
        runs = tuple(map(summarise, self._records))
        answers = [answer for record in self._records for answer in record.answers]
        return Measurement(
            load=self._load,
            runs=runs,
            median=median_of(runs),
            memory=self._watch.peak if self._watch else None,
            notes=tuple(notes_on(self._load, runs, answers)),
            answers=answers,
        )

    async def _drive_watched(self, plan: Sequence[PlannedRequest]) -> RunRecord:
        watching: AbstractAsyncContextManager[None] = self._watch.watching() if self._watch else nullcontext()
        async with watching:
            return await self._drive(plan)

    async def _drive(self, plan: Sequence[PlannedRequest]) -> RunRecord:
        requests = [TimedRequest(planned.at_seconds, self._encode(planned)) for planned in plan]
        return await drive(self._client, requests, concurrency=self._load.concurrency, on_answer=self._on_answer)

    def _encode(self, planned: PlannedRequest) -> bytes:
        return self._client.encode(
            completion_body(
                self._target.dialect,
                self._target.model,
                None if planned.adapter is None else self._adapters[planned.adapter],
                planned.prompt,
                output_tokens=planned.output_tokens,
                ignore_eos=self._load.ignore_eos,
                is_prefix_shared=self._load.shared_prefix > 0,
            )
        )


def measure(target: Target, load: Load, adapters: Sequence[str], on_answer: Callable[[], None]) -> Measurement:
    """Warm up, then run the load `load.runs` times; `on_answer` is called for each answer of either.

    Raises:
        ConfigurationError: not one request of the warm-up or of a run was answered.
    """
    runner = LoadRunner(target, load, adapters, on_answer)
    runner.warm_up()
    for number in range(1, load.runs + 1):
        runner.run(number)
    return runner.measurement()


def notes_on(load: Load, runs: Sequence[RunSummary], answers: Sequence[Answer]) -> Iterator[str]:
    """Sentences on whatever makes the figures less than what they seem."""
    failed = [answer for answer in answers if answer.error is not None]
    good = [answer for answer in answers if answer.error is None]
    if failed:
        yield f"{len(failed)} of {len(answers)} requests failed; the first: {failed[0].error}"
    if any(answer.output_tokens is None for answer in good):
        yield "The server reports no usage: its chunks are counted as tokens, and prompts are not counted."
    short = sum(output_tokens(answer) < load.output_tokens for answer in good)
    if short:
        yield f"{short} of {len(good)} answers are shorter than {load.output_tokens} tokens."
    longer = {answer.prompt_tokens for answer in good} - {None, load.prompt_tokens}
    if longer:
        yield f"The server counts other prompt lengths than {load.prompt_tokens}: {sorted(longer, key=str)[:3]}."
    per_chunk = max(run.tokens_per_chunk for run in runs)
    if per_chunk > SEVERAL_TOKENS_PER_CHUNK:
        yield (
            f"A chunk with text carries {per_chunk:.2f} tokens on average: the inter-token latency is the time between "
            "chunks; the time per output token counts tokens."
        )
    delay = max(run.worst_delay_seconds for run in runs)
    if delay > WORTH_SAYING_DELAY_SECONDS:
        yield f"The load generator sent a request {delay * 1e3:.0f} ms late."
    share = max(run.client_cpu_seconds / run.wall_seconds for run in runs)
    if share > WORTH_SAYING_CPU_SHARE:
        yield f"The load generator itself used {share:.0%} of a core."


@contextmanager
def request_progress(description: str, *loads: Load) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr over the requests of these loads; call what is yielded at each answer."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    # drawn rarely, for drawing takes CPU time from the server
    with Progress(*columns, *times, console=Console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task(description, total=sum(load.warm_up + load.runs * load.requests for load in loads))
        yield lambda: progress.advance(task)
