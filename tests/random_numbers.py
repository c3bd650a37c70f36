"""Adapters as if they had been trained."""

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Move everything that is trained by random numbers, always the same: a fresh adapter of PEFT changes nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
