"""The MLPs of a layer: a gated one, or a mixture of such, of which each token takes a few."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import onebase_kernels as kernels
from onebase_kernels import LoraBatch
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

    def __call__(self, x: Tensor, lora: LoraBatch) -> Tensor:
        """Of x [T, hidden]."""
        return self.down(_GATES[self.activation](self.gate_up(x, lora)), lora)


@dataclass(frozen=True)
class ExpertMlp:
    """The weighted sum of each token's likeliest experts (arXiv 2101.03961, with more than one as in arXiv 2401.04088).

    Which experts compute depends on the numbers, so torch routes here, and a step with it is not recorded.
    """

    router: Tensor
    """[experts, hidden]."""
    experts: tuple[GatedMlp, ...]
    per_token: int
    is_normalized: bool
    """Whether a token's weights sum to one; else they are the router's probabilities."""

    @property
    def groups(self) -> Iterator[LinearGroup]:
        """Its experts' linears."""
        for expert in self.experts:
            yield from expert.groups

    def __call__(self, x: Tensor, lora: LoraBatch) -> Tensor:
        """Of x [T, hidden]."""
        probabilities = F.linear(x, self.router).float().softmax(dim=-1)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        if self.is_normalized:
            weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        y = torch.zeros_like(x)
        for index in sorted(set(chosen.flatten().tolist())):
            rows, ranks = torch.where(chosen == index)
            y.index_add_(0, rows, self.experts[index](x[rows], lora) * weights[rows, ranks, None])
        return y


Mlp = GatedMlp | ExpertMlp
