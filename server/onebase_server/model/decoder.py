"""The one decoder: tokens of a step in, hidden states and logits out, for every carried family.

It knows no requests, no scheduler and no files: `weights.py` fills it, `engine/runner.py` drives it.
"""

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import LoraBatch, StepInputs
from onebase_server.model.config import ModelConfig
from onebase_server.model.decoder_weights import DecoderWeights, LayerWeights
from onebase_server.model.kv_cache import KvCache
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
    def forward(self, inputs: StepInputs, kv_cache: KvCache, *, embedding: Tensor | None = None) -> Tensor:
        """Hidden states [T, hidden] after the last norm, of the step's tokens [T]; their KV is written.

        Positions must be below `max_model_len`; tokens of a request must be consecutive. Nothing but ops computes here,
        so that a back end can record the whole (`onebase_kernels.record`).

        `embedding` [rows, hidden] is what token ids index instead of the vocabulary: vectors that are no token's.
        """
        eps = self.config.rms_norm_eps
        layers = self.weights.layers
        hidden = kernels.embed(inputs.token_ids, self.weights.embedding if embedding is None else embedding)
        normed = kernels.rms_norm(hidden, layers[0].input_norm, eps)
        for index, layer in enumerate(layers):
            attended = self._attend(normed, index, inputs, kv_cache)
            normed = kernels.add_rms_norm_(hidden, attended, layer.post_attention_norm, eps)
            next_norm = layers[index + 1].input_norm if index + 1 < len(layers) else self.weights.norm
            normed = kernels.add_rms_norm_(hidden, self._mlp(normed, layer, inputs.lora), next_norm, eps)
        return normed

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [R, vocab] of hidden states [R, hidden]."""
        return kernels.head_logits(hidden, self.weights.head)

    def _attend(self, x: Tensor, index: int, inputs: StepInputs, kv_cache: KvCache) -> Tensor:
        layer, config, attention = self.weights.layers[index], self.config, inputs.attention
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = layer.qkv(x, inputs.lora).view(x.shape[0], heads + 2 * kv_heads, head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = kernels.rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = kernels.rms_norm(k, layer.k_norm, config.rms_norm_eps)
        kernels.apply_rope_(q, k, self.rotary.cos, self.rotary.sin, inputs.positions)
        k_cache, v_cache = kv_cache.keys[index], kv_cache.values[index]
        kernels.write_kv_(k, v, k_cache, v_cache, attention)
        out = kernels.paged_attention(q, k_cache, v_cache, attention, head_dim**-0.5, config.windows[index])
        return layer.o(out.view(x.shape[0], heads * head_dim), inputs.lora)

    @staticmethod
    def _mlp(x: Tensor, layer: LayerWeights, lora: LoraBatch) -> Tensor:
        return layer.down(kernels.silu_mul(layer.gate_up(x, lora)), lora)
