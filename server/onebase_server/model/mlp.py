"""The MLPs of a layer: a gated one, or a mixture of such, of which each token takes a few."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress
from typing import NamedTuple

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import LoraBatch, Segment
from onebase_server.model.layer_config import Activation
from onebase_server.model.linear import LinearGroup

_GATES = {"silu": kernels.silu_mul, "gelu_tanh": kernels.gelu_mul}


@dataclass(frozen=True)
class GatedMlp:
    """`down(activation(gate x) ⊙ up x)` (arXiv 2002.05202)."""

    gate_up: LinearGroup
    down: LinearGroup
    activation: Activation

    @property
    def groups(self) -> Iterator[LinearGroup]:
        """Its linears."""
        yield from (self.gate_up, self.down)

    def __call__(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """Of x [T, hidden]."""
        return self.down(_GATES[self.activation](self.gate_up(x, lora)), lora)


@dataclass(frozen=True)
class ExpertMlp:
    """The weighted sum of each token's likeliest experts (arXiv 2101.03961, with more than one as in arXiv 2401.04088).

    Which experts compute depends on the numbers, so torch routes here, and a step with it is not recorded.
    """

    router: LinearGroup
    experts: tuple[GatedMlp, ...]
    per_token: int
    is_normalized: bool
    """Whether a token's weights sum to one; else they are the router's probabilities."""

    @property
    def groups(self) -> Iterator[LinearGroup]:
        """The router, then its experts' linears."""
        yield self.router
        for expert in self.experts:
            yield from expert.groups

    def __call__(self, x: Tensor, lora: LoraBatch) -> Tensor:
        """Of x [T, hidden]."""
        probabilities = self.router(x, lora).float().softmax(dim=-1)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        if self.is_normalized:
            weights /= weights.sum(dim=-1, keepdim=True)
        rows, weights, shares = self._share_out(chosen, weights.to(x.dtype), self._touching_experts(lora))
        y = torch.zeros_like(x)
        for expert, (start, stop, segments) in zip(self.experts, shares, strict=True):
            if start < stop:
                mine = rows[start:stop]
                output = expert(x[mine], replace(lora, segments=segments) if segments else None)
                y.index_add_(0, mine, output * weights[start:stop, None])
        return y

    def _touching_experts(self, lora: LoraBatch) -> tuple[Segment, ...]:
        """The segments whose adapters touch any of the experts: those of the others would be cut up for nothing."""
        if not lora.segments:
            return ()
        first, last = self.experts[0].gate_up.place, self.experts[-1].down.place
        slots = torch.tensor([segment.slot for segment in lora.segments], device=lora.table.device)
        touches = lora.table[first : last + 1, slots, 1:].any(dim=2).any(dim=0)
        return tuple(compress(lora.segments, touches.tolist()))

    def _share_out(
        self, chosen: Tensor, weights: Tensor, segments: Sequence[Segment]
    ) -> tuple[Tensor, Tensor, list["_Share"]]:
        """The tokens expert by expert, in each in their order, with their weights; and where each expert's begin.

        chosen and weights are [T, experts per token]. A segment's tokens are one run among each expert's, as they are
        in the step; where the runs end is found for all experts and segments at once.
        """
        num_tokens, per_token = chosen.shape
        experts, order = chosen.flatten().sort(stable=True)
        rows = order // per_token
        edges = torch.tensor([0, num_tokens, *chain.from_iterable(segment[1:] for segment in segments)]).to(rows.device)
        firsts = torch.arange(len(self.experts), device=rows.device) * num_tokens
        found = torch.searchsorted(experts * num_tokens + rows, firsts[:, None] + edges).tolist()
        return rows, weights.flatten()[order], [_Share.of_edges(segments, *places) for places in found]


class _Share(NamedTuple):
    """What one expert computes."""

    start: int
    """Of its rows among those of all experts."""
    stop: int
    segments: tuple[Segment, ...]
    """Counted from its first row."""

    @classmethod
    def of_edges(cls, segments: Sequence[Segment], start: int, stop: int, *edges: int) -> "_Share":
        """`edges` are where the rows of each segment begin and end."""
        runs = zip(segments, edges[::2], edges[1::2], strict=True)
        moved = (Segment(segment.slot, first - start, last - start) for segment, first, last in runs if first < last)
        return cls(start, stop, tuple(moved))


Mlp = GatedMlp | ExpertMlp
