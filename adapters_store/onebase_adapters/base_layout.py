"""What an adapter has to fit: the base, as far as adapters see it. It knows no adapter and no checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from .adapter import ROUTER


@dataclass(frozen=True)
class ExpertLayout:
    """A mixture of experts in every layer, with a router before it."""

    count: int
    shapes: Mapping[str, tuple[int, int]]
    """(out_features, in_features) of each expert's projections, alike in all: `{"gate_proj": (768, 2048), …}`."""


@dataclass(frozen=True)
class BaseLayout:
    """What an adapter has to fit: the linears of the base that adapters may touch, and the heads of a prefix."""

    num_layers: int
    shapes: Mapping[str, tuple[int, int]]
    """(out_features, in_features) of each projection, alike in every layer: `{"q_proj": (576, 576), …}`."""
    experts: ExpertLayout | None = field(default=None, compare=False)
    """None without, and, which is no difference, where a store's catalogue is from before adapters could touch them."""
    num_kv_heads: int | None = field(default=None, compare=False)
    """How many heads K and V have; None, which is no difference, where a store's catalogue is from before it was asked;
    so are the next ones."""
    vocab_size: int | None = field(default=None, compare=False)
    is_tied: bool | None = field(default=None, compare=False)
    """Whether the head is the embedding."""
    is_fused: bool | None = field(default=None, compare=False)
    """Whether the base's checkpoint has the projections of `fused` in one linear, which is what PEFT then adapts."""
    norms: Mapping[str, int] | None = field(default=None, compare=False)
    """How many numbers each norm has, by its module in every layer, `input_layernorm` or `self_attn.q_norm`; and the
    last one, `norm`."""
    norms_have_bias: bool | None = field(default=None, compare=False)
    fused: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: MappingProxyType(
            {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        )
    )
    """Fused checkpoint names and the projections they hold, in the order of their output rows."""

    def shape(self, projection: str, expert: int | None = None) -> tuple[int, int] | None:
        """(out_features, in_features) of a projection, or of an expert's; None where the base has none such."""
        if self.experts is None:
            return self.shapes.get(projection) if expert is None else None
        if expert is not None:
            return self.experts.shapes.get(projection) if expert < self.experts.count else None
        if projection == ROUTER:
            return self.experts.count, next(iter(self.experts.shapes.values()))[1]
        return self.shapes.get(projection)

    def __str__(self) -> str:
        """Its linears, for messages: `q_proj, k_proj of layers 0 to 5`."""
        of_layers = f"of layers 0 to {self.num_layers - 1}"
        if self.experts is None:
            return f"{', '.join(self.shapes)} {of_layers}"
        of_experts = f"{', '.join(self.experts.shapes)} of experts 0 to {self.experts.count - 1}"
        return f"{', '.join(self.shapes)}, {ROUTER}, and {of_experts}, {of_layers}"

    @property
    def hidden_size(self) -> int:
        """Numbers of a token's vector."""
        return self.shapes["q_proj"][1]
