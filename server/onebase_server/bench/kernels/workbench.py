"""What every case needs to set up its trials: a device, random operands, copies beyond the cache, and the back ends."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from onebase_kernels import TABLE_COLUMNS, AttentionBatch, BackendName, LoraBatch, StepInputs
from onebase_kernels.backends import why_not
from onebase_server.bench.kernels.options import KernelOptions
from onebase_server.model.config import ModelConfig

DTYPE = torch.bfloat16
DTYPE_BYTES = 2
_NF4_BITS = 4.127
"""Per weight, with double quantisation."""
_CACHES_TO_EXCEED = 2
_PATTERN_NUMBERS = 1 << 20


@dataclass(frozen=True)
class Workbench:
    """Where trials are set up. Operands are bf16; the same seed makes the same."""

    config: ModelConfig
    options: KernelOptions
    device: torch.device
    backend: BackendName
    """The one that is timed against the others."""
    threads: int
    cache_bytes: int
    """Of the last-level cache."""
    free_bytes: int
    """Of the device's memory, before anything was set up."""

    def random(self, *shape: int) -> Tensor:
        """Normally distributed numbers, which repeat after a million."""
        out = torch.empty(shape, dtype=DTYPE, device=self.device)
        for part in torch.split(out.view(-1), _PATTERN_NUMBERS):
            part.copy_(self._pattern[: part.numel()])
        return out

    def step(
        self,
        rows: int,
        *,
        token_ids: Tensor | None = None,
        positions: Tensor | None = None,
        attention: AttentionBatch | None = None,
        lora: LoraBatch | None = None,
    ) -> StepInputs:
        """A step of so many tokens, of which only what an op looks at is given."""
        nothing = torch.zeros(rows, dtype=torch.int64, device=self.device)
        no_blocks = torch.zeros(rows, 1, dtype=torch.int32, device=self.device)
        no_adapters = torch.zeros(1, 1, TABLE_COLUMNS, dtype=torch.int64, device=self.device)
        return StepInputs(
            token_ids=nothing if token_ids is None else token_ids,
            positions=nothing if positions is None else positions,
            attention=attention or AttentionBatch(tuple(range(rows + 1)), (1,) * rows, no_blocks, nothing),
            lora=lora or LoraBatch(self.random(1), no_adapters, ()),
        )

    def num_copies(self, nbytes: int, *, per_step: int, held: int | None = None) -> int:
        """How many copies of an operand of `nbytes` take turns.

        Before one is used again, as many bytes have passed as in serving: at least all weights of the base, and all of
        the `per_step` that a step uses. Beyond twice the cache more would make no difference. Half of the free memory
        is the limit, of which a copy takes `held` with all contenders (by default `nbytes`).
        """
        passed_in_serving = max(self._weight_bytes, per_step * nbytes)
        wanted = min(passed_in_serving, _CACHES_TO_EXCEED * self.cache_bytes)
        possible = self.free_bytes // 2 // (held or nbytes)
        return max(1, min(-(-wanted // nbytes), possible))

    def rivals(self, *peers: BackendName) -> tuple[BackendName, ...]:
        """The back end that is timed, then those of `peers` (they have a way of their own) that can run here."""
        runnable = (peer for peer in peers if why_not(peer, self.device.type) is None)
        return tuple(dict.fromkeys((self.backend, *runnable)))

    @cached_property
    def _pattern(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.options.seed)
        return torch.randn(_PATTERN_NUMBERS, generator=generator).to(self.device, DTYPE)

    @cached_property
    def _weight_bytes(self) -> int:
        """Of the base's linears in NF4 and its output head, all read in a step."""
        layer = sum(group.in_features * sum(group.widths) for group in self.config.projection_groups)
        head = self.config.vocab_size * self.config.hidden_size * DTYPE_BYTES
        return round(layer * self.config.num_layers * _NF4_BITS / 8) + head
