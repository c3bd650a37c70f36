"""What is done with logits, between two recorded steps. Each case yields a trial for each number of rows.

The head has just written the logits, so they lie in a cache in serving too, and nothing takes turns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import SamplingBatch
from onebase_server.bench.kernels.contenders import contenders, regardless_of_step
from onebase_server.bench.kernels.trial import Call, Trial, Work
from onebase_server.bench.kernels.workbench import Workbench

LOGIT_BYTES = 4
TEMPERATURE, TOP_P = 0.8, 0.95
CAP = 30.0
LOGIT_DEVIATION = 4.0
"""Standard deviation of the logits: as with a language model, few tokens have nearly all of the mass."""


def softcap_(bench: Workbench) -> Iterator[Trial]:
    """The bound that some families set; its tanh counts as one operation."""
    for rows in bench.options.rows:
        logits = _logits(bench, rows)
        work = Work(bytes=2 * logits.nbytes, flops=3 * logits.numel())
        yield _trial(bench, "softcap_", "", rows, work, regardless_of_step(kernels.softcap_, logits, CAP))


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
        logits = _logits(bench, rows)
        sampling = SamplingBatch(
            temperature=torch.full((rows,), temperature, device=bench.device),
            top_k=torch.zeros(rows, dtype=torch.int64, device=bench.device),
            top_p=torch.full((rows,), top_p, device=bench.device),
            min_p=torch.zeros(rows, device=bench.device),
            uniform=torch.linspace(0, 0.99, rows, dtype=torch.float64, device=bench.device),
        )
        work = Work(bytes=logits.nbytes, flops=flops_per_logit * logits.numel())
        call = regardless_of_step(kernels.choose_tokens, logits, sampling)
        yield _trial(bench, "choose_tokens", variant, rows, work, call)


def _logits(bench: Workbench, rows: int) -> Tensor:
    return LOGIT_DEVIATION * bench.random(rows, bench.config.vocab_size).float()


def _trial(bench: Workbench, op: str, variant: str, rows: int, work: Work, call: Call) -> Trial:
    backends = bench.rivals("reference")
    rivals = contenders({backend: [call] for backend in backends}, unrecorded=backends)
    return Trial(op, variant, rows, work, rivals, [bench.step(rows)])
