"""Runs to figures: throughput and percentiles of one run, medians over several. It knows no servers, only answers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np

from onebase_server.bench.driver import RunRecord
from onebase_server.bench.stream_client import Answer
from onebase_server.errors import ConfigurationError


@dataclass(frozen=True)
class Percentiles:
    """Of durations, in seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class RunSummary:
    """The figures of one run, or their medians. Only answered requests count, but for `failures`."""

    wall_seconds: float
    answered: float
    failures: float
    prompt_tokens: float
    output_tokens: float
    output_tokens_per_second: float
    """Over the whole wall time, prefill, ramp-up and ramp-down included."""
    total_tokens_per_second: float
    """Prompts counted too."""
    requests_per_second: float
    time_to_first_token: Percentiles | None
    """None where no answer has a text."""
    inter_token_latency: Percentiles | None
    """Between chunks with text, of all answers together; None where no answer has two."""
    time_per_output_token: Percentiles | None
    """Per answer: from its first to its last chunk, divided by its tokens less one."""
    latency: Percentiles
    """From sending to the answer's end."""
    tokens_per_chunk: float
    client_cpu_seconds: float
    worst_delay_seconds: float


def summarise(record: RunRecord) -> RunSummary:
    """The figures of one run.

    Raises:
        ConfigurationError: not one request was answered; the text has the first failure.
    """
    answers = [answer for answer in record.answers if answer.error is None]
    if not answers:
        raise ConfigurationError(f"Not one request was answered. The first failure: {record.answers[0].error}")
    output = sum(map(output_tokens, answers))
    prompt = sum(answer.prompt_tokens or 0 for answer in answers)
    chunks = sum(len(answer.chunk_times) for answer in answers)
    return RunSummary(
        wall_seconds=record.wall_seconds,
        answered=len(answers),
        failures=len(record.answers) - len(answers),
        prompt_tokens=prompt,
        output_tokens=output,
        output_tokens_per_second=output / record.wall_seconds,
        total_tokens_per_second=(prompt + output) / record.wall_seconds,
        requests_per_second=len(answers) / record.wall_seconds,
        time_to_first_token=percentiles([a.chunk_times[0] - a.sent_at for a in answers if a.chunk_times]),
        inter_token_latency=percentiles(inter_token_seconds(answers)),
        time_per_output_token=percentiles([_time_per_output_token(a) for a in answers if len(a.chunk_times) > 1]),
        latency=cast("Percentiles", percentiles([a.ended_at - a.sent_at for a in answers])),
        tokens_per_chunk=output / chunks if chunks else 0.0,
        client_cpu_seconds=record.client_cpu_seconds,
        worst_delay_seconds=record.worst_delay_seconds,
    )


def median_of(runs: Sequence[RunSummary]) -> RunSummary:
    """Each figure's median over the runs."""
    return RunSummary(**{field.name: _median([getattr(run, field.name) for run in runs]) for field in fields(runs[0])})


def output_tokens(answer: Answer) -> int:
    """Tokens by the server's own count; its chunks where it counts none."""
    return len(answer.chunk_times) if answer.output_tokens is None else answer.output_tokens


def inter_token_seconds(answers: Sequence[Answer]) -> list[float]:
    """The distances between the chunks of each answer, of all together."""
    return [float(gap) for answer in answers for gap in np.diff(answer.chunk_times)]


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """With linear interpolation; None of nothing."""
    return Percentiles(*np.percentile(seconds, (50, 90, 99)).tolist()) if len(seconds) else None


def _time_per_output_token(answer: Answer) -> float:
    return (answer.chunk_times[-1] - answer.chunk_times[0]) / max(output_tokens(answer) - 1, 1)


def _median(values: Sequence[Any]) -> Any:
    """Of numbers, or of `Percentiles` each by itself; None if no run has the figure."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    if isinstance(present[0], Percentiles):
        return Percentiles(*np.median([(p.p50, p.p90, p.p99) for p in present], axis=0).tolist())
    return float(np.median(present))
