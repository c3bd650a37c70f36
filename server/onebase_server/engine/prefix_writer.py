"""Prefixes meet tensors here: their rows become keys and values in blocks of the KV cache.

It decides nothing: which blocks is `prefix_pool`'s choice. All calls but `read` come between two steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_adapters.adapter import PrefixKV
from onebase_adapters.errors import StoreError
from onebase_kernels import AttentionBatch, LoraBatch, StepInputs
from onebase_server.engine.adapter_reading import read_adapter
from onebase_server.engine.request import AdapterRef
from onebase_server.model.arrays import as_tensor
from onebase_server.model.decoder import Decoder
from onebase_server.model.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class HostPrefix:
    """A prefix on the host, in the compute dtype."""

    rows: Tensor
    """As in `onebase_adapters.adapter.Prefix`."""
    is_kv: bool
    """Whether the rows are keys and values; else they are embeddings."""


class PrefixWriter:
    """Writes prefixes for one decoder into one KV cache."""

    def __init__(self, decoder: Decoder, kv_cache: KvCache, max_num_tokens: int) -> None:
        """`max_num_tokens` are the most that the decoder computes at a time."""
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._max_num_tokens = max_num_tokens

    def read(self, adapter: AdapterRef) -> HostPrefix:
        """Read an adapter's blob; raises StoreError."""
        prefix = read_adapter(adapter).prefix
        if prefix is None or prefix.num_tokens != adapter.num_virtual_tokens:
            raise StoreError(f"its blob is not a prefix of {adapter.num_virtual_tokens} virtual tokens.")
        rows = as_tensor(prefix.rows).to(self._decoder.dtype, copy=True)  # here and now, not while steps wait
        return HostPrefix(rows, isinstance(prefix, PrefixKV))

    @torch.inference_mode()
    def write(self, prefix: HostPrefix, blocks: list[int]) -> None:
        """Write the keys and values of all virtual tokens.

        Those of prefix-tuning are what they are. Those of virtual tokens the base computes, once, from their
        embeddings.
        """
        rows = prefix.rows.to(self._decoder.device)
        if prefix.is_kv:
            self._write_kv(rows, self._kv_cache.attention_of_one(blocks, 0, rows.shape[0]))
        else:
            for start in range(0, rows.shape[0], self._max_num_tokens):
                chunk = rows[start : start + self._max_num_tokens]
                attention = self._kv_cache.attention_of_one(blocks, start, start + chunk.shape[0])
                self._prefill(chunk, start, attention)

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        """Copy what a block holds to another."""
        self._kv_cache.copy_block(source, target)

    def _write_kv(self, rows: Tensor, attention: AttentionBatch) -> None:
        """Rows [tokens, layers, 2, kv width] as they are: heads lie one after another in a row."""
        config = self._decoder.config
        k, v = rows.view(*rows.shape[:3], config.num_kv_heads, config.head_dim).unbind(2)
        for layer in range(config.num_layers):
            k_cache, v_cache = self._kv_cache.keys[layer], self._kv_cache.values[layer]
            kernels.write_kv_(k[:, layer].contiguous(), v[:, layer].contiguous(), k_cache, v_cache, attention)

    def _prefill(self, rows: Tensor, start: int, attention: AttentionBatch) -> None:
        """Rows [tokens, hidden] in place of embeddings, from position `start` on, through the base alone."""
        places = torch.arange(rows.shape[0], device=rows.device)
        nobody = LoraBatch.empty(rows.dtype, rows.device)
        self._decoder.forward(StepInputs(places, start + places, attention, nobody), self._kv_cache, embedding=rows)
