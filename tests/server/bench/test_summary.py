from dataclasses import replace

import pytest

from onebase_server.bench.driver import RunRecord
from onebase_server.bench.load import Load
from onebase_server.bench.measure import notes_on
from onebase_server.bench.stream_client import Answer
from onebase_server.bench.summary import Percentiles, RunSummary, median_of, percentiles, summarise
from onebase_server.errors import ConfigurationError


def answer(*chunk_times: float, sent_at: float = 0.0, output_tokens: int | None = None) -> Answer:
    return Answer(sent_at, chunk_times[-1], list(chunk_times), prompt_tokens=10, output_tokens=output_tokens)


def summary(*answers: Answer, wall_seconds: float = 2.0) -> RunSummary:
    return summarise(RunRecord(list(answers), wall_seconds, client_cpu_seconds=0.1, worst_delay_seconds=0.0))


FAILED = Answer(0.0, 1.0, error="HTTP 503: busy")


def test_percentiles_interpolate() -> None:
    assert percentiles([0.0, 1.0]) == Percentiles(0.5, pytest.approx(0.9), pytest.approx(0.99))
    assert percentiles([]) is None


def test_throughput_counts_the_server_s_own_tokens_over_the_wall_time() -> None:
    run = summary(answer(0.5, 1.0, output_tokens=6), answer(0.5, 1.0, output_tokens=4))
    assert run.output_tokens_per_second == 5
    assert run.total_tokens_per_second == 15
    assert run.requests_per_second == 1
    assert run.tokens_per_chunk == 2.5


def test_latencies_are_taken_where_they_are_defined() -> None:
    run = summary(answer(1.5, 1.6, 1.9, sent_at=1.0, output_tokens=5))
    assert run.time_to_first_token == Percentiles(0.5, 0.5, 0.5)
    assert run.inter_token_latency is not None
    assert run.inter_token_latency.p50 == pytest.approx(0.2)  # of the gaps 0.1 and 0.3
    assert run.time_per_output_token is not None
    assert run.time_per_output_token.p50 == pytest.approx(0.1)  # 0.4 s for four tokens after the first
    assert run.latency.p50 == pytest.approx(0.9)


def test_an_answer_of_one_token_has_no_inter_token_latency() -> None:
    assert summary(answer(0.5, output_tokens=1)).inter_token_latency is None


def test_failures_are_counted_and_nothing_else_of_them() -> None:
    run = summary(answer(0.5, 1.0, output_tokens=2), FAILED)
    assert (run.answered, run.failures, run.output_tokens) == (1, 1, 2)


def test_a_run_without_an_answer_is_an_error_that_tells_the_first_failure() -> None:
    with pytest.raises(ConfigurationError, match="HTTP 503: busy"):
        summary(FAILED)


def test_medians_are_of_each_figure_by_itself() -> None:
    one = summary(answer(0.5, 1.0, output_tokens=2))
    runs = [
        replace(one, output_tokens_per_second=throughput, latency=Percentiles(p50, 1, 1), inter_token_latency=None)
        for throughput, p50 in ((1.0, 3.0), (5.0, 1.0), (2.0, 2.0))
    ]
    median = median_of(runs)
    assert (median.output_tokens_per_second, median.latency.p50, median.inter_token_latency) == (2, 2, None)


@pytest.mark.parametrize(
    ("answers", "note"),
    [
        ([answer(0.5, 1.0, output_tokens=4), FAILED], "1 of 2 requests failed; the first: HTTP 503: busy"),
        ([answer(0.5, 1.0, output_tokens=4)], "2.00 tokens on average"),
        ([answer(0.5, 1.0, 1.1, 1.2)], "reports no usage"),
        ([answer(0.5, 1.0, output_tokens=2)], "1 of 1 answers are shorter than 4 tokens"),
        ([replace(answer(0.5, output_tokens=4), prompt_tokens=11)], "other prompt lengths than 10: [11]"),
    ],
)
def test_what_a_reader_must_know_is_said(answers: list[Answer], note: str) -> None:
    load = Load(prompt_tokens=10, output_tokens=4)
    assert any(note in said for said in notes_on(load, [summary(*answers)], answers))


def test_there_is_nothing_to_say_of_a_clean_run() -> None:
    answers = [answer(0.1, 0.2, 0.3, 0.4, output_tokens=4)] * 3
    assert list(notes_on(Load(prompt_tokens=10, output_tokens=4), [summary(*answers)], answers)) == []
