"""The one decoder: tokens of a step in, hidden states and logits out, for every carried family.

It knows no requests, no scheduler and no files: `weights.py` fills it, `engine/runner.py` drives it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import ReplacedRows, StepInputs
from onebase_server.model.config import ModelConfig
from onebase_server.model.decoder_weights import DecoderNorms, DecoderWeights, LayerNorms
from onebase_server.model.kv_cache import KvCache
from onebase_server.model.norm import add_and_normalize_, normalize, normalize_heads
from onebase_server.model.rope import RotaryTable
from onebase_server.model.vocabulary import AdaptedRows, AdapterVocabulary, adapt_logits, mask_missing_


class Decoder:
    """A transformer with rope, grouped-query attention and gated MLPs (arXiv 2302.13971, 2305.13245).

    Where its norms are, what rotates and what is scaled or capped is what `config` says.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, max_model_len: int) -> None:
        self.config = config
        self.weights = weights
        self.norms = weights.norms
        self.max_model_len = max_model_len
        tables = {
            rope: RotaryTable.build(rope, config.head_dim, max_model_len, self.device)
            for rope in set(config.ropes)
            if rope is not None
        }
        self.rotaries = tuple(None if rope is None else tables[rope] for rope in config.ropes)
        """Of each layer; None does not rotate."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, and so the dtype of the KV cache and of the adapters' arena."""
        return self.weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weights.embedding.device

    @property
    def is_recordable(self) -> bool:
        """Whether `kernels.record` may be given `forward`: which experts compute is only known in the step."""
        return self.config.experts is None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; `weights.report()` says more."""
        return self.weights.report().total_bytes

    @torch.inference_mode()
    def forward(
        self,
        inputs: StepInputs,
        kv_cache: KvCache,
        *,
        embedding: Tensor | None = None,
        norms: DecoderNorms | None = None,
    ) -> Tensor:
        """Hidden states [T, hidden] after the last norm, of the step's tokens [T]; their KV is written.

        Positions must be below `max_model_len`; tokens of a request must be consecutive. Nothing but ops computes here,
        so that a back end can record the whole (`onebase_kernels.record`).

        `embedding` [rows, hidden] is what token ids index instead of the vocabulary: vectors that are no token's.
        `norms` are those of this step, where adapters replace the base's for some rows (`mix_norms`).
        """
        scales, layers, norms = self.config.scales, self.weights.layers, norms or self.norms
        if embedding is None:
            hidden = kernels.embed(inputs.token_ids, self.weights.embedding, scales.embedding)
            kernels.replace_rows_(hidden, inputs.replaced)
        else:
            hidden = kernels.embed(inputs.token_ids, embedding, scales.virtual_embedding)
        normed = normalize(hidden, norms.layers[0].before_attention)
        for index, layer in enumerate(layers):
            of_layer = norms.layers[index]
            attended = normalize(self._attend(normed, index, inputs, kv_cache, of_layer), of_layer.after_attention)
            if self.config.is_parallel:
                kernels.add_(hidden, attended, scales.residual)
            else:
                normed = add_and_normalize_(hidden, attended, scales.residual, of_layer.before_mlp)
            projected = normalize(layer.mlp(normed, inputs.lora), of_layer.after_mlp)
            next_norm = norms.layers[index + 1].before_attention if index + 1 < len(layers) else norms.last
            normed = add_and_normalize_(hidden, projected, scales.residual, next_norm)
        return normed

    @torch.inference_mode()
    def embeddings_of(self, vocabulary: AdapterVocabulary, token_ids: Tensor) -> ReplacedRows | None:
        """Those of tokens [T], on the host, that are not the base's in an adapter's vocabulary."""
        return vocabulary.embed(token_ids, self.weights.embedding, self.config.scales.embedding)

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor, adapted: Sequence[AdaptedRows] = ()) -> Tensor:
        """Logits fp32 [R, vocab] of hidden states [R, hidden].

        Where `adapted` has rows of a larger vocabulary the logits are as wide as the largest, and every row has -inf
        for tokens that are not in its own.
        """
        logits = kernels.head_logits(hidden, self.weights.head)
        if adapted:
            logits = adapt_logits(logits, hidden, adapted)
        if self.config.scales.logits_softcap is not None:
            kernels.softcap_(logits, self.config.scales.logits_softcap)
        if adapted:
            mask_missing_(logits, self.config.vocab_size, adapted)
        return logits

    @property
    def finds_best_tokens(self) -> bool:
        """Whether `best_tokens` may be asked, and so costs less than the logits."""
        return self.weights.screen is not None

    def best_tokens(self, hidden: Tensor) -> Tensor:
        """The token of the largest logit, int64 [R], of hidden states [R, hidden] with the base's own vocabulary."""
        head = self.weights.head
        assert isinstance(head, Tensor), "only a head that is not quantised has a screen"
        return kernels.best_tokens(hidden, head, self.weights.screen)

    def _attend(self, x: Tensor, index: int, inputs: StepInputs, kv_cache: KvCache, norms: LayerNorms) -> Tensor:
        layer, config, attention = self.weights.layers[index], self.config, inputs.attention
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        scales, rotary = config.scales, self.rotaries[index]
        qkv = layer.qkv(x, inputs.lora).view(x.shape[0], heads + 2 * kv_heads, head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        q, k = normalize_heads(q, norms.q), normalize_heads(k, norms.k)
        if rotary is not None:
            kernels.apply_rope_(q, k, rotary.cos, rotary.sin, inputs.positions)
        k_cache, v_cache = kv_cache.keys[index], kv_cache.values[index]
        kernels.write_kv_(k, v, k_cache, v_cache, attention)
        out = kernels.paged_attention(
            q, k_cache, v_cache, attention, scales.attention, config.windows[index], scales.attention_softcap
        )
        return layer.o(out.view(x.shape[0], heads * head_dim), inputs.lora)
