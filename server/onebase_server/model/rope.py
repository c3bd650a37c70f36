"""Rotary position embedding: the angle of every position, with every scaling that the carried families know.

Scalings that depend on the length (dynamic, longrope) are fixed here once, by the served context, so that a token's
rotation depends on its position alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase_server.model.rope_config import RopeConfig


@dataclass(frozen=True)
class RotaryTable:
    """Cosine and sine of every position's angles, fp32 [max_model_len, pairs]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, rope: RopeConfig, head_dim: int, max_model_len: int, device: torch.device) -> "RotaryTable":
        """The table for positions 0 … max_model_len - 1."""
        frequencies, attention_factor = inverse_frequencies(rope, head_dim, max_model_len)
        angles = torch.arange(max_model_len, dtype=torch.float32).unsqueeze(1) * frequencies
        return cls((angles.cos() * attention_factor).to(device), (angles.sin() * attention_factor).to(device))


def inverse_frequencies(rope: RopeConfig, head_dim: int, served_context: int) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, fp32 [pairs], and the factor that cos and sin are scaled by."""
    dims = rope.rotated_dim(head_dim)
    match rope.rope_type:
        case "default":
            return _plain(rope.theta, dims), 1.0
        case "linear":
            return _plain(rope.theta, dims) / rope.factor, 1.0
        case "dynamic":
            return _dynamic(rope, dims, served_context), 1.0
        case "llama3":
            return _llama3(rope, dims), 1.0
        case "yarn":
            return _yarn(rope, dims), _yarn_attention_factor(rope)
        case "longrope":
            return _longrope(rope, dims, served_context), _longrope_attention_factor(rope)


def _exponents(dims: int) -> Tensor:
    return torch.arange(0, dims, 2, dtype=torch.float32) / dims


def _plain(theta: float, dims: int) -> Tensor:
    """`theta^(-2i / d)` (arXiv 2104.09864, section 3.2.2)."""
    return 1.0 / (theta ** _exponents(dims))


def _dynamic(rope: RopeConfig, dims: int, served_context: int) -> Tensor:
    """NTK-aware scaling: theta grows with the context beyond the trained one, so that only slow pairs stretch."""
    trained = rope.trained_context
    stretch = rope.factor * max(served_context, trained) / trained - (rope.factor - 1)
    return _plain(rope.theta * stretch ** (dims / (dims - 2)), dims)


def _llama3(rope: RopeConfig, dims: int) -> Tensor:
    """Llama 3.1: slow pairs are divided by the factor, fast ones left alone, those between blended."""
    trained = rope.trained_context
    frequencies = _plain(rope.theta, dims)
    rotations = trained * frequencies / (2 * math.pi)  # within the trained context
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn(rope: RopeConfig, dims: int) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): the blend goes linearly over pairs instead of rotations."""

    def pair_with_rotations(rotations: float) -> float:
        wavelength = rope.trained_context / (rotations * 2 * math.pi)
        return dims * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = pair_with_rotations(rope.beta_fast), pair_with_rotations(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    width = (last - first) or 0.001  # a jump instead of a division by zero
    stretched = ((torch.arange(dims // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    wavelengths = rope.theta ** _exponents(dims)
    return (1.0 / (rope.factor * wavelengths)) * stretched + (1.0 / wavelengths) * (1 - stretched)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """The paper's `0.1 ln(s) + 1`, or the ratio of two such terms where the model names both."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope(rope: RopeConfig, dims: int, served_context: int) -> Tensor:
    """LongRoPE (arXiv 2402.13753): each pair has a searched factor, one set for short and one for long contexts."""
    long = served_context > rope.trained_context
    factors = torch.tensor(rope.long_factor if long else rope.short_factor, dtype=torch.float32)
    return 1.0 / (factors * rope.theta ** _exponents(dims))


def _longrope_attention_factor(rope: RopeConfig) -> float:
    """The paper's `√(1 + ln(s) / ln(trained context))`."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.trained_context))
