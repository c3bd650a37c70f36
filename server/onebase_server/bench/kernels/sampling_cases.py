"""Choosing the next tokens. Each case yields a trial for each number of rows.

The head has just written the logits, so they lie in a cache in serving too, and nothing takes turns.
"""

from collections.abc import Iterator

import torch

import onebase_kernels as kernels
from onebase_kernels import SamplingBatch
from onebase_server.bench.kernels.contenders import contenders, regardless_of_step
from onebase_server.bench.kernels.trial import Trial, Work
from onebase_server.bench.kernels.workbench import Workbench

LOGIT_BYTES = 4
TEMPERATURE, TOP_P = 0.8, 0.95
LOGIT_DEVIATION = 4.0
"""Standard deviation of the logits: as with a language model, few tokens have nearly all of the mass."""


def greedy(bench: Workbench) -> Iterator[Trial]:
    """The best token of each row."""
    return _trials(bench, "greedy", temperature=0.0, top_p=1.0, flops_per_logit=0)


def top_p(bench: Workbench) -> Iterator[Trial]:
    """One of the likeliest tokens; a logit is scaled, raised and summed up, its exponential counts as one operation."""
    return _trials(bench, "top-p", temperature=TEMPERATURE, top_p=TOP_P, flops_per_logit=3)


def _trials(
    bench: Workbench, variant: str, *, temperature: float, top_p: float, flops_per_logit: int
) -> Iterator[Trial]:
    for rows in bench.options.rows:
        logits = LOGIT_DEVIATION * bench.random(rows, bench.config.vocab_size).float()
        sampling = SamplingBatch(
            temperature=torch.full((rows,), temperature, device=bench.device),
            top_k=torch.zeros(rows, dtype=torch.int64, device=bench.device),
            top_p=torch.full((rows,), top_p, device=bench.device),
            min_p=torch.zeros(rows, device=bench.device),
            uniform=torch.linspace(0, 0.99, rows, dtype=torch.float64, device=bench.device),
        )
        calls = [regardless_of_step(kernels.choose_tokens, logits, sampling)]
        backends = bench.rivals("reference")
        yield Trial(
            *("choose_tokens", variant, rows),
            Work(bytes=logits.nbytes, flops=flops_per_logit * logits.numel()),
            # No part of a recorded step: it is called between two of them.
            contenders(dict.fromkeys(backends, calls), unrecorded=backends),
            [bench.step(rows)],
        )
