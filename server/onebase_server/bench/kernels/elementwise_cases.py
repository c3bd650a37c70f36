"""Everything that is neither a product nor attention. Each yields a trial for each number of rows.

Their operands were written by the op before, so they lie in a cache in serving too, and nothing takes turns.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import StepInputs
from onebase_server.bench.kernels.contenders import against_reference, regardless_of_step
from onebase_server.bench.kernels.trial import Trial, Work
from onebase_server.bench.kernels.workbench import DTYPE_BYTES, Workbench
from onebase_server.model.rope import RotaryTable

ROTATION_BYTES = 4
"""Of a cosine or sine."""
MOST_STEPS = 64


def embed(bench: Workbench) -> Iterator[Trial]:
    """Rows of the embedding, others in each step."""
    vocab, hidden = bench.config.vocab_size, bench.config.hidden_size
    table = bench.random(vocab, hidden)
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(bench.options.seed)).to(bench.device)
    for rows in bench.options.rows:
        count = max(1, min(vocab // rows, MOST_STEPS))
        token_ids = order.repeat(-(-rows * count // vocab))[: rows * count].view(count, rows)
        yield Trial(
            *("embed", "", rows),
            Work(bytes=2 * rows * hidden * DTYPE_BYTES, flops=0),
            against_reference(bench, [lambda step: kernels.embed(step.token_ids, table)]),
            [bench.step(rows, token_ids=of_step) for of_step in token_ids],
        )


def rms_norm(bench: Workbench) -> Iterator[Trial]:
    """The norm of what the op before has just written, so of what is in a cache."""
    hidden, eps = bench.config.hidden_size, bench.config.rms_norm_eps
    weight = bench.random(hidden)
    for rows in bench.options.rows:
        x = bench.random(rows, hidden)
        calls = [regardless_of_step(kernels.rms_norm, x, weight, eps)]
        work = Work(bytes=2 * x.nbytes + weight.nbytes, flops=4 * x.numel())
        yield Trial("rms_norm", "", rows, work, against_reference(bench, calls), [bench.step(rows)])


def add_rms_norm_(bench: Workbench) -> Iterator[Trial]:
    """The same with the residual added before."""
    hidden, eps = bench.config.hidden_size, bench.config.rms_norm_eps
    weight = bench.random(hidden)
    for rows in bench.options.rows:
        x, delta = bench.random(rows, hidden), bench.random(rows, hidden)
        calls = [regardless_of_step(kernels.add_rms_norm_, x, delta, weight, eps)]
        work = Work(bytes=4 * x.nbytes + weight.nbytes, flops=5 * x.numel())
        yield Trial("add_rms_norm_", "", rows, work, against_reference(bench, calls), [bench.step(rows)])


def apply_rope_(bench: Workbench) -> Iterator[Trial]:
    """Queries and keys as they lie in the output of qkv, at positions all over the context."""
    config, context = bench.config, bench.options.context
    rotary = RotaryTable.build(config.rope, config.head_dim, context, bench.device)
    for rows in bench.options.rows:
        qkv = bench.random(rows, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        q, k, _ = torch.split(qkv, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        positions = torch.arange(rows, device=bench.device) * context // rows
        calls = [partial(_rotate, q, k, rotary)]
        work = Work(
            bytes=2 * (q.numel() + k.numel()) * DTYPE_BYTES + rows * config.head_dim * ROTATION_BYTES,
            flops=3 * (q.numel() + k.numel()),
        )
        steps = [bench.step(rows, positions=positions)]
        yield Trial("apply_rope_", "", rows, work, against_reference(bench, calls), steps)


def silu_mul(bench: Workbench) -> Iterator[Trial]:
    """The gated activation between gate_up and down; its exponential counts as one operation."""
    for rows in bench.options.rows:
        gate_up = bench.random(rows, 2 * bench.config.intermediate_size)
        calls = [regardless_of_step(kernels.silu_mul, gate_up)]
        work = Work(bytes=gate_up.nbytes * 3 // 2, flops=5 * gate_up.numel() // 2)
        yield Trial("silu_mul", "", rows, work, against_reference(bench, calls), [bench.step(rows)])


def _rotate(q: Tensor, k: Tensor, rotary: RotaryTable, step: StepInputs) -> None:
    kernels.apply_rope_(q, k, rotary.cos, rotary.sin, step.positions)
