"""Runs a plan against a server, in a closed loop or at the planned times."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from onebase_server.bench.stream_client import Answer, CompletionClient


@dataclass(frozen=True)
class RunRecord:
    """All that was seen of one run."""

    answers: list[Answer]
    wall_seconds: float
    """From the start to the last answer's end."""
    client_cpu_seconds: float
    """What this process itself used meanwhile, all its threads."""
    worst_delay_seconds: float
    """How much later than planned a request was sent, at worst: large where the generator itself is the bottleneck."""


@dataclass(frozen=True)
class TimedRequest:
    """A request ready for the wire, and when to send it."""

    at_seconds: float
    content: bytes


async def drive(
    client: CompletionClient,
    requests: Sequence[TimedRequest],
    *,
    concurrency: int | None,
    on_answer: Callable[[], None] = lambda: None,
) -> RunRecord:
    """Send all requests: `concurrency` at a time, or each at its own time if there is no such limit."""
    answers: list[Answer] = []
    cpu_started, started = time.process_time(), time.perf_counter()

    async def post(request: TimedRequest) -> None:
        answers.append(await client.post(request.content))
        on_answer()

    async def post_one_after_another(queue: Iterator[TimedRequest]) -> None:
        for request in queue:
            await post(request)

    worst_delay = 0.0
    async with asyncio.TaskGroup() as tasks:
        if concurrency is not None:
            queue = iter(requests)
            for _ in range(concurrency):
                tasks.create_task(post_one_after_another(queue))
        else:
            for request in requests:
                await asyncio.sleep(started + request.at_seconds - time.perf_counter())
                worst_delay = max(worst_delay, time.perf_counter() - started - request.at_seconds)
                tasks.create_task(post(request))
    return RunRecord(answers, time.perf_counter() - started, time.process_time() - cpu_started, worst_delay)
