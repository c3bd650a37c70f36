"""The products: NF4 and dense linears, the side path, the output head. Each yields a trial for each number of rows.

All weights are read, so their copies take turns; inputs and outputs are what the op before has just written.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

import onebase_kernels as kernels
from onebase_kernels import (
    BackendName,
    BlockwiseWeight,
    LoraBatch,
    PackedWeights,
    Segment,
    StepInputs,
    int8_matrices,
)
from onebase_server.bench.kernels.contenders import against_reference, contenders, regardless_of_step
from onebase_server.bench.kernels.trial import Call, Contender, Trial, Work
from onebase_server.bench.kernels.workbench import DTYPE, DTYPE_BYTES, Workbench
from onebase_server.model.config import ProjectionGroup

DENSE = "dense bf16"
"""The contender that is torch's product with the weights in bf16."""
WITHOUT_ADAPTERS = "without adapters"
"""The contender that is the product alone, by the back end in question."""
LOGIT_BYTES = 4


def quantized_linear(group: ProjectionGroup, bench: Workbench) -> Iterator[Trial]:
    """The products of a projection group with its weights in NF4."""
    backends = bench.rivals("reference", "bitsandbytes")
    weights = nf4_copies(bench, backends, group.widths, group.in_features)
    for rows in bench.options.rows:
        x = bench.random(rows, group.in_features)
        yield Trial(
            *("quantized_linear", group.name, rows),
            _product(weights.nbytes, rows, group.in_features, sum(group.widths)),
            (
                *contenders(
                    {name: _each(kernels.quantized_linear, x, packed) for name, packed in weights.packed.items()},
                ),
                Contender(DENSE, _each(F.linear, x, weights.dense)),
            ),
            [bench.step(rows)],
        )


def dense_linear(group: ProjectionGroup, bench: Workbench) -> Iterator[Trial]:
    """The products of a projection group whose weights are not quantised; the reference is torch's."""
    weight = bench.random(sum(group.widths), group.in_features)
    weights = _copies(weight, bench.num_copies(weight.nbytes, per_step=bench.config.num_layers))
    for rows in bench.options.rows:
        x = bench.random(rows, group.in_features)
        yield Trial(
            *("dense_linear", group.name, rows),
            _product(weight.nbytes, rows, group.in_features, sum(group.widths)),
            against_reference(bench, _each(kernels.dense_linear, x, weights)),
            [bench.step(rows)],
        )


def add_lora_(group: ProjectionGroup, bench: Workbench) -> Iterator[Trial]:
    """The side path of a projection group by itself: rows shared out evenly among the adapters, or one adapter each."""
    side = SidePaths(group, bench)
    for rows in bench.options.rows:
        x, y = bench.random(rows, group.in_features), bench.random(rows, sum(group.widths))
        calls = [partial(_add_lora, y, x, place, group.widths) for place in range(side.places)]
        work = side.work(rows)
        yield Trial(
            *("add_lora_", group.name, rows),
            Work(bytes=work.bytes + x.nbytes + 2 * y.nbytes, flops=work.flops),
            # Torch's versions read the ranks on the host.
            contenders(dict.fromkeys(bench.rivals("reference", "bitsandbytes"), calls), unrecorded=("bitsandbytes",)),
            side.steps(rows),
        )


def adapted_linear(group: ProjectionGroup, bench: Workbench) -> Iterator[Trial]:
    """A projection group as a decoder computes it: the product with NF4 weights together with the side path."""
    backends = bench.rivals("reference")
    weights = nf4_copies(bench, backends, group.widths, group.in_features)
    side = SidePaths(group, bench)
    for rows in bench.options.rows:
        x = bench.random(rows, group.in_features)
        calls = {
            name: [
                partial(_adapted_linear, x, packed[i % len(packed)], i % side.places, group.widths)
                for i in range(max(len(packed), side.places))
            ]
            for name, packed in weights.packed.items()
        }
        product = _product(weights.nbytes, rows, group.in_features, sum(group.widths))
        work = side.work(rows)
        alone = _each(kernels.quantized_linear, x, weights.packed[bench.backend])
        yield Trial(
            *("adapted_linear", group.name, rows),
            Work(bytes=product.bytes + work.bytes, flops=product.flops + work.flops),
            (*contenders(calls), Contender(WITHOUT_ADAPTERS, alone, bench.backend, bench.backend != "reference")),
            side.steps(rows),
        )


def head_logits(bench: Workbench) -> Iterator[Trial]:
    """Logits of the rows that get a next token."""
    vocab, hidden = bench.config.vocab_size, bench.config.hidden_size
    head = bench.random(vocab, hidden)
    heads = _copies(head, bench.num_copies(head.nbytes, per_step=1))
    for rows in bench.options.rows:
        x = bench.random(rows, hidden)
        yield Trial(
            *("head_logits", "bf16", rows),
            _product(head.nbytes, rows, hidden, vocab, output_bytes=LOGIT_BYTES),
            (
                *against_reference(bench, _each(kernels.head_logits, x, heads)),
                Contender(DENSE, _each(F.linear, x, heads)),
            ),
            [bench.step(rows)],
        )


def nf4_head_logits(bench: Workbench) -> Iterator[Trial]:
    """The same with the head in NF4."""
    vocab, hidden = bench.config.vocab_size, bench.config.hidden_size
    weights = nf4_copies(bench, bench.rivals("reference"), [vocab], hidden, per_step=1)
    for rows in bench.options.rows:
        x = bench.random(rows, hidden)
        yield Trial(
            *("head_logits", "nf4", rows),
            _product(weights.nbytes, rows, hidden, vocab, output_bytes=LOGIT_BYTES),
            (
                *contenders({name: _each(kernels.head_logits, x, packed) for name, packed in weights.packed.items()}),
                Contender(DENSE, _each(F.linear, x, weights.dense)),
            ),
            [bench.step(rows)],
        )


def best_tokens(bench: Workbench) -> Iterator[Trial]:
    """The head without its logits, by a screen where the back end has one; not recorded, for only some steps do so."""
    vocab, hidden = bench.config.vocab_size, bench.config.hidden_size
    head = bench.random(vocab, hidden)
    heads = _copies(head, bench.num_copies(head.nbytes, per_step=1, held=2 * head.nbytes))
    kernels.use_backend(bench.backend, bench.device.type)
    screens = [kernels.pack_screen(head) for head in heads]
    read = head.nbytes if screens[0] is None else screens[0].nbytes
    for rows in bench.options.rows:
        x = bench.random(rows, hidden)
        calls = [regardless_of_step(kernels.best_tokens, x, *pair) for pair in zip(heads, screens, strict=True)]
        yield Trial(
            *("best_tokens", "bf16", rows),
            _product(read, rows, hidden, vocab, output_bytes=0),
            contenders(dict.fromkeys(bench.rivals("reference"), calls), unrecorded=[bench.backend]),
            [bench.step(rows)],
        )


class SidePaths:
    """Adapters of a projection group, at so many places that these, taken in turn, are in no cache but serving's.

    Where rows are fewer than adapters, several steps use those in turn, so that the work of a call is a mean.
    """

    def __init__(self, group: ProjectionGroup, bench: Workbench) -> None:
        self._bench = bench
        self._ranks = [bench.options.ranks[i % len(bench.options.ranks)] for i in range(bench.options.adapters)]
        self._numbers_per_rank = len(group.widths) * group.in_features + sum(group.widths)
        self._is_int8 = bench.options.adapter_quantization == "int8"
        self._sizes = [self._size(rank, len(group.widths)) for rank in self._ranks]
        self.places = bench.num_copies(sum(self._sizes) * DTYPE_BYTES, per_step=bench.config.num_layers)
        self._arena = bench.random(self.places * sum(self._sizes))
        self._table = _adapter_table(self._ranks, self._sizes, len(group.widths), self.places).to(bench.device)
        self._max_rank = max(self._ranks) * len(group.widths)
        self._alignment = _largest_power_of_two_in(gcd(*self._sizes))

    def steps(self, rows: int) -> list[StepInputs]:
        """Each with as many adapters as rows, or all."""
        used = min(rows, len(self._ranks))
        return [
            self._bench.step(
                rows,
                lora=LoraBatch(
                    self._arena,
                    self._table,
                    _share_out(rows, range(first, first + used)),
                    self._max_rank,
                    self._alignment,
                    self._is_int8,
                ),
            )
            for first in self._firsts(used)
        ]

    def work(self, rows: int) -> Work:
        """What the adapters themselves are, and what is computed with them."""
        used = min(rows, len(self._ranks))
        covered = used * len(self._firsts(used))
        numbers = sum(self._ranks[:covered]) / covered * self._numbers_per_rank
        read = sum(self._sizes[:covered]) / covered * used
        return Work(bytes=round(read * DTYPE_BYTES), flops=round(2 * rows * numbers))

    def _size(self, rank: int, slices: int) -> int:
        """How many numbers of the arena an adapter takes: in 8 bits with its scales, and filled up to whole lines."""
        numbers = rank * self._numbers_per_rank
        if not self._is_int8:
            return numbers
        line = int8_matrices.LINE_BYTES // DTYPE_BYTES
        lines = -(-numbers // DTYPE_BYTES // line)
        return int8_matrices.scales_size(slices * rank, DTYPE) + lines * line

    def _firsts(self, used: int) -> range:
        return range(0, len(self._ranks) - used + 1, used)


@dataclass(frozen=True)
class Nf4Copies:
    """A group's weights as each contender wants them, in copies that take turns."""

    nbytes: int
    """Of one copy in NF4."""
    packed: dict[BackendName, list[PackedWeights]]
    dense: list[Tensor]


def nf4_copies(
    bench: Workbench,
    backends: Sequence[BackendName],
    widths: Sequence[int],
    in_features: int,
    *,
    per_step: int | None = None,
) -> Nf4Copies:
    """Random weights [Nᵢ, K], of which a step uses `per_step`, by default one for each layer."""
    weights = [kernels.quantize_nf4(bench.random(width, in_features)) for width in widths]
    dense = bench.random(sum(widths), in_features)
    nbytes = sum(weight.nbytes for weight in weights)
    count = bench.num_copies(
        nbytes, per_step=per_step or bench.config.num_layers, held=len(backends) * nbytes + dense.nbytes
    )
    packed = {backend: _pack_copies(weights, count, backend) for backend in backends}
    return Nf4Copies(nbytes, packed, _copies(dense, count))


def _each(op: Callable[..., object], x: Tensor, weights: Sequence[object]) -> list[Call]:
    """`op(x, weight)` with each weight."""
    return [regardless_of_step(op, x, weight) for weight in weights]


def _add_lora(y: Tensor, x: Tensor, place: int, widths: Sequence[int], step: StepInputs) -> None:
    kernels.add_lora_(y, x, step.lora, place, widths)


def _adapted_linear(x: Tensor, packed: PackedWeights, place: int, widths: Sequence[int], step: StepInputs) -> Tensor:
    started = kernels.start_lora(x, step.lora, place, widths)
    y = kernels.quantized_linear(x, packed)
    kernels.add_lora_(y, x, step.lora, place, widths, started)
    return y


def _product(
    weight_bytes: int, rows: int, in_features: int, out_features: int, output_bytes: int = DTYPE_BYTES
) -> Work:
    return Work(
        bytes=weight_bytes + rows * (in_features * DTYPE_BYTES + out_features * output_bytes),
        flops=2 * rows * in_features * out_features,
    )


def _copies(tensor: Tensor, count: int) -> list[Tensor]:
    return [tensor.clone() for _ in range(count)]


def _pack_copies(weights: Sequence[BlockwiseWeight], count: int, backend: BackendName) -> list[PackedWeights]:
    """Each in memory of its own, also where a back end packs nothing."""
    kernels.use_backend(backend, weights[0].codes.device.type)
    return [
        kernels.pack_quantized([BlockwiseWeight(w.codes.clone(), w.absmax.clone(), w.shape, w.nested) for w in weights])
        for _ in range(count)
    ]


def _adapter_table(ranks: Sequence[int], sizes: Sequence[int], slices: int, places: int) -> Tensor:
    """int64 [places, adapters, 5]: all of a place's adapters one after another, every slice with the adapter's rank."""
    numbers = torch.tensor(sizes).repeat(places)
    table = torch.zeros(places, len(ranks), kernels.TABLE_COLUMNS, dtype=torch.int64)
    table[..., 0] = (numbers.cumsum(0) - numbers).view(places, -1)
    table[..., 1 : 1 + slices] = torch.tensor(ranks).unsqueeze(-1)
    return table


def _largest_power_of_two_in(number: int) -> int:
    return number & -number


def _share_out(rows: int, slots: range) -> tuple[Segment, ...]:
    borders = [rows * i // len(slots) for i in range(len(slots) + 1)]
    return tuple(Segment(slot, start, stop) for slot, (start, stop) in zip(slots, pairwise(borders), strict=True))
