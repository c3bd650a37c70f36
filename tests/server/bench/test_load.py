import pytest
from pydantic import ValidationError

from onebase_server.bench.load import ComparedLoads, Load, LoadTraits, Sweep


def test_without_a_rate_the_loop_is_closed() -> None:
    assert Load().concurrency == 16
    assert Load(rate=2).concurrency is None


def test_the_base_alone_needs_no_adapters() -> None:
    assert Load(popularity="none").num_adapters == 0
    assert Load(popularity="zipf", adapters=7).num_adapters == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 1, "concurrency": 1}, "give one"),
        ({"burstiness": 0.5}, "needs a --rate"),
        ({"rate": 1, "burstiness": 0.5}, "the shape of --arrivals gamma"),
        ({"prompt_tokens": 4, "shared_prefix": 5}, "longer than --prompt-tokens"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Load.model_validate(fields)


def test_numbers_are_read_at_commas() -> None:
    assert Sweep.model_validate({"counts": "1,5, 2000"}).counts == (1, 5, 2000)
    with pytest.raises(ValidationError):
        Sweep.model_validate({"counts": "1,-5"})


def test_compared_loads_differ_in_streams_and_popularity_only() -> None:
    compared = ComparedLoads.model_validate({"loads": "16:distinct, 1:none", "requests_per_stream": 3})
    many, one = compared.with_traits(LoadTraits(prompt_tokens=9, seed=4))
    assert (many.concurrency, many.popularity, many.requests) == (16, "distinct", 48)
    assert (one.concurrency, one.popularity, one.requests) == (1, "none", 3)
    assert (one.prompt_tokens, one.seed) == (many.prompt_tokens, many.seed) == (9, 4)


@pytest.mark.parametrize("loads", ["", "16", "16:all", "none:16", "0:none"])
def test_a_compared_load_is_a_number_and_a_popularity(loads: str) -> None:
    with pytest.raises(ValidationError):
        ComparedLoads.model_validate({"loads": loads})
