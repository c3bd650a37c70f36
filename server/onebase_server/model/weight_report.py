"""What a base's weights take in memory, and how far they are from those that they were quantised from.

Plain numbers: it computes no weights and needs no torch.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import hypot
from pathlib import Path

ERRORS_FILE = "quantization_error.json"
"""Lies beside a checkpoint that was quantised here: a list of `LinearError`."""
WORST = 3
"""How many linears a `QuantizationError` names."""


@dataclass(frozen=True)
class LinearError:
    """How far a linear's quantised weight Ŵ is from its weight W; Frobenius norms."""

    name: str
    """The linear's module, `model.layers.0.self_attn.q_proj`."""
    error: float
    """‖W - Ŵ‖."""
    norm: float
    """‖W‖."""

    @property
    def relative(self) -> float:
        """The error as a share of the weight."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class QuantizationError:
    """The error of all linears together, and of the worst."""

    relative: float
    """‖W - Ŵ‖ / ‖W‖ over all linears as if they were one matrix."""
    worst: tuple[LinearError, ...]
    """By their relative errors, the largest first."""

    @classmethod
    def of(cls, linears: Sequence[LinearError]) -> "QuantizationError":
        """Sum up."""
        together = LinearError("all", hypot(*(e.error for e in linears)), hypot(*(e.norm for e in linears)))
        return cls(together.relative, tuple(sorted(linears, key=lambda e: -e.relative)[:WORST]))


@dataclass(frozen=True)
class WeightReport:
    """Bytes by part, what the linears cost per parameter, and what quantising them has lost."""

    linear_parameters: int
    linear_bytes: int
    embedding_bytes: int
    """Embedding and head; once where they are tied."""
    screen_bytes: int
    """Of the head, for greedy tokens."""
    other_bytes: int
    """Norms and biases."""
    is_quantized: bool
    """Whether any linear is."""
    error: QuantizationError | None
    """None where nothing is quantised, or it came so and nobody knows what from."""

    @property
    def bits_per_parameter(self) -> float:
        """Of the linears, scales included."""
        return 8 * self.linear_bytes / self.linear_parameters

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return self.linear_bytes + self.embedding_bytes + self.screen_bytes + self.other_bytes


def write_errors(directory: Path, linears: Sequence[LinearError]) -> None:
    """Keep the errors of a quantised checkpoint beside it."""
    content = json.dumps([asdict(linear) for linear in linears], indent=1)
    (directory / ERRORS_FILE).write_text(content + "\n", encoding="utf-8")


def read_error(directory: Path) -> QuantizationError | None:
    """What was kept beside a checkpoint; None where nothing was."""
    file = directory / ERRORS_FILE
    if not file.is_file():
        return None
    return QuantizationError.of([LinearError(**linear) for linear in json.loads(file.read_text(encoding="utf-8"))])
