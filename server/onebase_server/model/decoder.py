"""The one decoder: tokens of a step in, hidden states and logits out, for every carried family.

It knows no requests, no scheduler and no files: `weights.py` fills it, `engine/runner.py` drives it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import onebase_kernels as kernels
from onebase_kernels import AttentionBatch
from onebase_server.model.config import ModelConfig
from onebase_server.model.decoder_weights import DecoderWeights, LayerWeights
from onebase_server.model.kv_cache import KvCache
from onebase_server.model.linear import LoraBatch
from onebase_server.model.rope import RotaryTable


class Decoder:
    """A pre-norm transformer with rope, grouped-query attention and a gated MLP (arXiv 2302.13971, 2305.13245)."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, max_model_len: int) -> None:
        self.config = config
        self.weights = weights
        self.max_model_len = max_model_len
        self.rotary = RotaryTable.build(config.rope, config.head_dim, max_model_len, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, and so the dtype of the KV cache and of the adapters' arena."""
        return self.weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weights.embedding.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; `weights.report()` says more."""
        return self.weights.report().total_bytes

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_cache: KvCache,
        attention: AttentionBatch,
        lora: LoraBatch | None = None,
    ) -> Tensor:
        """Hidden states [T, hidden] after the last norm, of tokens [T] at `positions` [T]; their KV is written.

        Positions must be below `max_model_len`; tokens of a request must be consecutive and lie in the order of
        `attention`.
        """
        hidden = F.embedding(token_ids, self.weights.embedding)
        rotation = self.rotary.rows(positions)
        eps = self.config.rms_norm_eps
        for index, layer in enumerate(self.weights.layers):
            hidden = hidden + self._attend(
                kernels.rms_norm(hidden, layer.input_norm, eps), index, rotation, kv_cache, attention, lora
            )
            hidden = hidden + self._mlp(kernels.rms_norm(hidden, layer.post_attention_norm, eps), layer, lora)
        return kernels.rms_norm(hidden, self.weights.norm, eps)

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [R, vocab] of hidden states [R, hidden]."""
        return kernels.head_logits(hidden, self.weights.head)

    def _attend(
        self,
        x: Tensor,
        index: int,
        rotation: tuple[Tensor, Tensor],
        kv_cache: KvCache,
        attention: AttentionBatch,
        lora: LoraBatch | None,
    ) -> Tensor:
        layer, config = self.weights.layers[index], self.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = layer.qkv(x, lora).view(x.shape[0], heads + 2 * kv_heads, head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = kernels.rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = kernels.rms_norm(k, layer.k_norm, config.rms_norm_eps)
        kernels.apply_rope_(q, k, *rotation)
        k_cache, v_cache = kv_cache.keys[index], kv_cache.values[index]
        kernels.write_kv_(k, v, k_cache, v_cache, attention.slot_mapping)
        out = kernels.paged_attention(q, k_cache, v_cache, attention, head_dim**-0.5, config.windows[index])
        return layer.o(out.reshape(x.shape[0], heads * head_dim), lora)

    @staticmethod
    def _mlp(x: Tensor, layer: LayerWeights, lora: LoraBatch | None) -> Tensor:
        return layer.down(kernels.silu_mul(layer.gate_up(x, lora)), lora)
