"""Everything that is neither a product nor attention. Each yields a trial for each number of rows.

Their operands were written by the op before, so they lie in a cache in serving too, and nothing takes turns.
"""

from collections.abc import Callable, Iterator
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
    hidden, eps = bench.config.hidden_size, bench.config.norms.eps
    weight = bench.random(hidden)
    for rows in bench.options.rows:
        x = bench.random(rows, hidden)
        calls = [regardless_of_step(kernels.rms_norm, x, weight, eps)]
        work = Work(bytes=2 * x.nbytes + weight.nbytes, flops=4 * x.numel())
        yield Trial("rms_norm", "", rows, work, against_reference(bench, calls), [bench.step(rows)])


def add_rms_norm_(bench: Workbench) -> Iterator[Trial]:
    """The same with the residual added before."""
    hidden, eps = bench.config.hidden_size, bench.config.norms.eps
    weight = bench.random(hidden)
    for rows in bench.options.rows:
        x, delta = bench.random(rows, hidden), bench.random(rows, hidden)
        calls = [regardless_of_step(kernels.add_rms_norm_, x, delta, weight, eps)]
        work = Work(bytes=4 * x.nbytes + weight.nbytes, flops=5 * x.numel())
        yield Trial("add_rms_norm_", "", rows, work, against_reference(bench, calls), [bench.step(rows)])


def layer_norm(bench: Workbench) -> Iterator[Trial]:
    """The norm of families that subtract the mean."""
    hidden, eps = bench.config.hidden_size, bench.config.norms.eps
    weight, bias = bench.random(hidden), bench.random(hidden)
    for rows in bench.options.rows:
        x = bench.random(rows, hidden)
        calls = [regardless_of_step(kernels.layer_norm, x, weight, bias, eps)]
        work = Work(bytes=2 * x.nbytes + 2 * weight.nbytes, flops=7 * x.numel())
        yield Trial("layer_norm", "", rows, work, against_reference(bench, calls), [bench.step(rows)])


def add_(bench: Workbench) -> Iterator[Trial]:
    """The residual of families that scale it, or that add it where no norm follows."""
    for rows in bench.options.rows:
        x, delta = bench.random(rows, bench.config.hidden_size), bench.random(rows, bench.config.hidden_size)
        calls = [regardless_of_step(kernels.add_, x, delta, 0.5)]
        work = Work(bytes=3 * x.nbytes, flops=2 * x.numel())
        yield Trial("add_", "", rows, work, against_reference(bench, calls), [bench.step(rows)])


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
    return _gated_activation(bench, "silu_mul", kernels.silu_mul, flops_per_output=5)


def gelu_mul(bench: Workbench) -> Iterator[Trial]:
    """The same with GELU."""
    return _gated_activation(bench, "gelu_mul", kernels.gelu_mul, flops_per_output=9)


def _gated_activation(
    bench: Workbench, op: str, gate: Callable[[Tensor], Tensor], flops_per_output: int
) -> Iterator[Trial]:
    for rows in bench.options.rows:
        gate_up = bench.random(rows, 2 * bench.config.intermediate_size)
        work = Work(bytes=gate_up.nbytes * 3 // 2, flops=flops_per_output * gate_up.numel() // 2)
        calls = [regardless_of_step(gate, gate_up)]
        yield Trial(op, "", rows, work, against_reference(bench, calls), [bench.step(rows)])


def _rotate(q: Tensor, k: Tensor, rotary: RotaryTable, step: StepInputs) -> None:
    kernels.apply_rope_(q, k, rotary.cos, rotary.sin, step.positions)
