"""Greedy rows may be computed without their logits: no text shows it, whoever is beside them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import onebase_kernels as kernels
from onebase_kernels import BackendUnavailable
from onebase_server.engine.core import Engine
from onebase_server.engine.request import SamplingParams, Submit
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

from ..conftest import MakeModel

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
ONE_TOKEN = SamplingParams(max_tokens=20, temperature=1.0, top_k=1, seed=1)
DRAWN = SamplingParams(max_tokens=20, temperature=1.0, seed=1)
PENALISED = SamplingParams(max_tokens=20, temperature=0.0, repetition_penalty=1.5)
REPORTING = SamplingParams(max_tokens=20, temperature=0.0, logprobs=2)

MakeEngine = Callable[[bool], Engine]


@pytest.fixture
def make_engine(make_model: MakeModel, engine_settings: Callable[..., EngineSettings]) -> Iterator[MakeEngine]:
    """Engines on the C++ ops that have a screen, or have none."""
    make_model("llama", vocab_size=96)

    def make(screen_head: bool) -> Engine:
        settings = engine_settings(dtype="bfloat16", screen_head=screen_head)
        return Engine(load_decoder(Path(settings.base), settings), settings)

    try:
        kernels.use_backend("cpu")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    yield make
    kernels.use_backend("reference")


def texts(engine: Engine, requests: Sequence[SamplingParams]) -> list[list[int]]:
    """What the requests are answered, all in one batch."""
    for i, sampling in enumerate(requests):
        engine.handle(Submit(request_id=str(i), prompt_token_ids=tuple(range(3 * i, 3 * i + 7)), sampling=sampling))
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(requests))}
    while engine.has_work:
        for output in engine.step().outputs:
            answers[output.request_id] += output.token_ids
    return list(answers.values())


@pytest.mark.parametrize(
    "requests",
    [
        [GREEDY],
        [GREEDY] * 20,
        [GREEDY, ONE_TOKEN],
        [GREEDY, DRAWN],
        [GREEDY, PENALISED],
        [PENALISED],
        [GREEDY, REPORTING],
    ],
    ids=["alone", "many", "top-k of 1", "beside drawn", "beside penalised", "penalised", "beside reporting"],
)
def test_texts_are_the_same_with_and_without_a_screen(make_engine: MakeEngine, requests: list[SamplingParams]) -> None:
    screened = make_engine(True)
    if not screened.decoder.finds_best_tokens:
        pytest.skip("the C++ ops of this machine have no screen")
    assert texts(screened, requests) == texts(make_engine(False), requests)


def test_only_steps_of_greedy_rows_do_without_logits(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(True)
    if not engine.decoder.finds_best_tokens:
        pytest.skip("the C++ ops of this machine have no screen")
    computed = []
    compute = engine.decoder.compute_logits
    monkeypatch.setattr(engine.decoder, "compute_logits", lambda *args: computed.append(args) or compute(*args))
    texts(engine, [GREEDY, ONE_TOKEN])
    assert not computed
    for request in (DRAWN, PENALISED, REPORTING):
        texts(engine, [GREEDY, request])
        assert computed
        computed.clear()
