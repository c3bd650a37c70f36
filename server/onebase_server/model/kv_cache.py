"""The memory of the paged KV cache: allocated here, handed out by the engine, read and written by the ops."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import AttentionBatch
from onebase_server.model.config import ModelConfig


@dataclass(frozen=True)
class KvCache:
    """Keys and values of every layer."""

    whole: Tensor
    """`[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]`, keys before values."""

    @cached_property
    def keys(self) -> tuple[Tensor, ...]:
        """Each layer's, `[num_blocks, block_size, num_kv_heads, head_dim]`."""
        return self.whole[:, 0].unbind()

    @cached_property
    def values(self) -> tuple[Tensor, ...]:
        """Each layer's, as the keys."""
        return self.whole[:, 1].unbind()

    @property
    def num_blocks(self) -> int:
        """How many blocks each layer has."""
        return self.whole.shape[2]

    @property
    def block_size(self) -> int:
        """How many tokens a block holds."""
        return self.whole.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers together."""
        return self.whole.nbytes

    def attention_of_one(self, blocks: Sequence[int], start: int, stop: int) -> AttentionBatch:
        """A step of one sequence, whose KV lies in `blocks` and whose tokens `start … stop - 1` are computed."""
        block_table = torch.tensor(blocks, dtype=torch.int32, device=self.whole.device)
        positions = torch.arange(start, stop, device=self.whole.device)
        return AttentionBatch(
            query_starts=(0, stop - start),
            context_lens=(stop,),
            block_tables=block_table.unsqueeze(0),
            slot_mapping=block_table[positions // self.block_size].long() * self.block_size
            + positions % self.block_size,
        )

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in all layers."""
        self.whole[:, :, target] = self.whole[:, :, source]


def kv_bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes in all layers, keys and values together."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def allocate_kv_cache(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KvCache:
    """Memory for `num_blocks` blocks, not cleared: no op reads what was not written, and such a page costs none."""
    shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
    return KvCache(kernels.allocate_kv(config.num_layers, shape, dtype, device))
