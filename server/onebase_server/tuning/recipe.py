"""How an adapter is trained: the numbers that `onebase tune` can be told. It knows no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Hyper-parameters of one training run; with the data and the base they decide the outcome."""

    rank: int = 16
    alpha: int = 32
    rslora: bool = False
    """Scale by alpha / √rank instead of alpha / rank (arXiv 2312.03732)."""
    targets: tuple[str, ...] | None = None
    """Names of the linears to adapt, such as `q_proj`; None is every linear but the head."""
    dropout: float = 0.05
    epochs: int = 3
    batch_size: int = 8
    learning_rate: float = 2e-4
    """The peak, reached after the warm-up; a cosine brings it to 0 at the end."""
    warmup: float = 0.05
    """Share of all steps."""
    weight_decay: float = 0.0
    max_length: int = 1024
    """Most tokens of an example."""
    eval_share: float = 0.0
    """Share of the examples that is held out and only measured."""
    seed: int = 0
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """What the base computes in; the adapter's own weights are trained in float32."""
