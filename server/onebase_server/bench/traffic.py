"""The requests of a run: when each is sent, to which adapter, and with which prompt; all of it drawn from the seed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onebase_server.bench.load import Load
from onebase_server.bench.prompts import Prompts

# the streams of random numbers of a run, so that changing one trait of a load leaves the others as they were
_PREFIX, _ARRIVALS, _ADAPTERS, _PROMPTS = range(4)
WARM_UP_RUN = 0
"""The runs that are measured count from 1."""
WARM_UP_OUTPUT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a run."""

    at_seconds: float
    """When to send it, counted from the run's start; 0 if it follows another's answer."""
    adapter: int | None
    """Number of the adapter; None is the base."""
    prompt: list[int] | str
    output_tokens: int


def plan_run(load: Load, prompts: Prompts, run: int) -> list[PlannedRequest]:
    """The requests of one run, in the order of sending. No two runs share a prompt beyond `shared_prefix`."""
    arrivals = arrival_seconds(load, _generator(load, _ARRIVALS, run))
    adapters = adapter_numbers(load, _generator(load, _ADAPTERS, run))
    rest = _generator(load, _PROMPTS, run)
    return [
        PlannedRequest(
            at,
            adapter,
            prompts.draw(_generator(load, _PREFIX), rest, load.shared_prefix, load.prompt_tokens),
            load.output_tokens,
        )
        for at, adapter in zip(arrivals.tolist(), adapters, strict=True)
    ]


def plan_warm_up(load: Load, prompts: Prompts) -> list[PlannedRequest]:
    """`load.warm_up` requests like the load's, with short answers."""
    short = {"requests": load.warm_up, "output_tokens": min(load.output_tokens, WARM_UP_OUTPUT_TOKENS)}
    return plan_run(load.model_copy(update=short), prompts, WARM_UP_RUN)


def arrival_seconds(load: Load, rng: np.random.Generator) -> NDArray[np.float64]:
    """When each request is sent: zeros for a closed loop, otherwise ascending with a mean distance of 1 / rate.

    Distances are gamma distributed with shape `burstiness` (their variation is 1 / √burstiness); shape 1 is Poisson.
    """
    if load.rate is None:
        return np.zeros(load.requests)
    return np.cumsum(rng.gamma(load.burstiness, 1 / (load.rate * load.burstiness), size=load.requests))


def adapter_numbers(load: Load, rng: np.random.Generator) -> list[int | None]:
    """The adapter of each request."""
    match load.popularity:
        case "none":
            return [None] * load.requests
        case "same":
            return [0] * load.requests
        case "distinct":
            return [index % load.adapters for index in range(load.requests)]
        case "zipf":
            weights = np.arange(1, load.adapters + 1, dtype=np.float64) ** -load.zipf_alpha
            return list(rng.choice(load.adapters, size=load.requests, p=weights / weights.sum()).tolist())


def _generator(load: Load, *key: int) -> np.random.Generator:
    return np.random.default_rng([load.seed, *key])
