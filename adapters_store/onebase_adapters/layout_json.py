"""A base's layout as JSON, for the catalogue: what a program notes of the base, a later one may add to."""

from collections.abc import Mapping
from typing import Any

from .base_layout import BaseLayout, ExpertLayout

Shapes = Mapping[str, tuple[int, int]]


def describe_layout(layout: BaseLayout) -> dict[str, Any]:
    """For JSON; without the fused names, which are the program's knowledge of checkpoints, not the base's property."""
    later = {
        "num_kv_heads": layout.num_kv_heads,
        "vocab_size": layout.vocab_size,
        "is_tied": layout.is_tied,
        "is_fused": layout.is_fused,
        "norms": None if layout.norms is None else dict(layout.norms),
        "norms_have_bias": layout.norms_have_bias,
    }
    known: dict[str, Any] = {name: value for name, value in later.items() if value is not None}
    if layout.experts is not None:
        known["experts"] = {"count": layout.experts.count, "shapes": _describe_shapes(layout.experts.shapes)}
    return {"num_layers": layout.num_layers, "shapes": _describe_shapes(layout.shapes), **known}


def parse_layout(description: Mapping[str, Any]) -> BaseLayout:
    """What `describe_layout` has made, by this program or an earlier one."""
    experts = description.get("experts")
    return BaseLayout(
        num_layers=description["num_layers"],
        shapes=_parse_shapes(description["shapes"]),
        experts=ExpertLayout(experts["count"], _parse_shapes(experts["shapes"])) if experts else None,
        num_kv_heads=description.get("num_kv_heads"),
        vocab_size=description.get("vocab_size"),
        is_tied=description.get("is_tied"),
        is_fused=description.get("is_fused"),
        norms=description.get("norms"),
        norms_have_bias=description.get("norms_have_bias"),
    )


def _describe_shapes(shapes: Shapes) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items()}


def _parse_shapes(shapes: Mapping[str, list[int]]) -> dict[str, tuple[int, int]]:
    return {name: (rows, columns) for name, (rows, columns) in shapes.items()}
