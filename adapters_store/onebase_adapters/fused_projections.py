"""An adapter of single projections as one of the linears in which a base's checkpoint has several of them.

PEFT names an adapter's modules as the checkpoint does, so this is what it can load on such a base (Phi-3's `qkv_proj`
and `gate_up_proj`). It knows nothing of files.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .adapter import Adapter, Array, Epilogue, LowRankPair, ModuleKey
from .base_layout import BaseLayout
from .errors import UnsupportedAdapter

_NEUTRAL = {"factor": 1.0, "shift": 0.0}
"""The vectors that leave a projection alone; of the other kinds they depend on the base's weights."""


def fuse_projections(adapter: Adapter, layout: BaseLayout) -> Adapter:
    """The same adapter by the names of `layout.fused`: exactly, at the sum of the ranks of parts that do not share A.

    Raises:
        UnsupportedAdapter: only some parts of a fused linear have a magnitude (DoRA) or a bias.
    """
    pairs, epilogues = dict(adapter.pairs), dict(adapter.epilogues)
    for layer in range(layout.num_layers):
        for name, projections in layout.fused.items():
            widths = {ModuleKey(layer, part): layout.shapes[part][0] for part in projections if part in layout.shapes}
            if parts := {key: pairs.pop(key) for key in widths if key in pairs}:
                pairs[ModuleKey(layer, name)] = fuse_pairs(parts, widths)
            if vectors := {key: epilogues.pop(key) for key in widths if key in epilogues}:
                epilogues[ModuleKey(layer, name)] = _fuse_epilogues(vectors, widths)
    return replace(adapter, pairs=pairs, epilogues=epilogues)


def fuse_pairs(parts: Mapping[ModuleKey, LowRankPair], widths: Mapping[ModuleKey, int]) -> LowRankPair:
    """The different A below each other, and a B that multiplies each part's rows by its own A alone."""
    parts = of_one_scale(parts)
    matrices: list[Array] = []
    for part in parts.values():
        if not any(np.array_equal(part.lora_a, matrix) for matrix in matrices):
            matrices.append(part.lora_a)
    rows = [[_columns(parts.get(key), matrix, width) for matrix in matrices] for key, width in widths.items()]
    return LowRankPair(np.concatenate(matrices), np.block(rows), scale=next(iter(parts.values())).scale)


def _columns(part: LowRankPair | None, matrix: Array, width: int) -> Array:
    """What a part's rows have for one of the A: its B if it is its own, else zeros."""
    if part is not None and np.array_equal(part.lora_a, matrix):
        return part.lora_b
    return np.zeros((width, len(matrix)), matrix.dtype)


def of_one_scale(pairs: Mapping[ModuleKey, LowRankPair]) -> Mapping[ModuleKey, LowRankPair]:
    """The same updates with one scale and in one dtype; what differs is multiplied into B, in float32."""
    if len({(pair.scale, pair.lora_a.dtype) for pair in pairs.values()}) == 1:
        return pairs
    return {
        key: LowRankPair(
            pair.lora_a.astype(np.float32), pair.lora_b.astype(np.float32) * np.float32(pair.scale), scale=1.0
        )
        for key, pair in pairs.items()
    }


def _fuse_epilogues(parts: Mapping[ModuleKey, Epilogue], widths: Mapping[ModuleKey, int]) -> Epilogue:
    vectors: dict[str, Array] = {}
    for name in sorted({name for part in parts.values() for name in part.vectors}):
        pieces = {key: part.vectors[name] for key, part in parts.items() if name in part.vectors}
        lacking = [key for key in widths if key not in pieces]
        if lacking and name not in _NEUTRAL:
            raise UnsupportedAdapter(
                f"The adapter has a {name} for {next(iter(pieces))} but none for {lacking[0]}, which this base's "
                "checkpoint has in the same linear: what leaves that part alone depends on the base's weights."
            )
        pieces |= {key: np.full(widths[key], _NEUTRAL[name]) for key in lacking}
        vectors[name] = np.concatenate([pieces[key].astype(np.float32) for key in widths])
    return Epilogue(**vectors)
