"""A small stack of ops, and steps for it, to record."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import AttentionBatch, LoraBatch, QuantizedWeight, Segment, StepInputs

HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 2, 16, 50
HIDDEN, QKV = HEADS * HEAD_DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM
LAYERS, BLOCKS, BLOCK_SIZE = 2, 8, 4
MAX_REQUESTS = 6


class SmallModel:
    """Two layers that use every op of a step, with adapters beside the first product of each."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, quantize: Callable[[Tensor], QuantizedWeight] = kernels.quantize_nf4
    ) -> None:
        torch.manual_seed(0)
        self.quantize = quantize
        self.table = torch.randn(VOCAB, HIDDEN).to(dtype)
        self.norm, self.head_norm = torch.randn(HIDDEN).to(dtype), torch.randn(HEAD_DIM).to(dtype)
        self.qkv = [self.packed(QKV, HIDDEN) for _ in range(LAYERS)]
        self.o = [self.packed(HIDDEN, HIDDEN) for _ in range(LAYERS)]
        self.gate_up = [self.packed(2 * 64, HIDDEN) for _ in range(LAYERS)]
        self.down = [self.packed(HIDDEN, 64) for _ in range(LAYERS)]
        self.bias = torch.randn(QKV).to(dtype)
        angles = torch.rand(64, HEAD_DIM // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        cache = torch.full((2, LAYERS, BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM), torch.nan).to(dtype)
        self.k_caches, self.v_caches = cache
        self.arena = torch.randn(2000).to(dtype)
        self.adapters_are_int8 = False
        self.adapters = torch.tensor(
            [[[0, 2, 0, 1, 0b010], [600, 1, 1, 1, 0b101]], [[1150, 0, 1, 0, 0], [1300, 3, 0, 0, 0b001]]]
        )

    def keep_adapters_in_8_bits(self) -> None:
        """Take the arena's numbers, of fp32, for bytes and their scales; these are small then."""
        self.adapters_are_int8 = True
        self.arena *= 1e-3

    def packed(self, outputs: int, inputs: int) -> kernels.PackedWeights:
        return kernels.pack_quantized([self.quantize(torch.randn(outputs, inputs) / 8)])

    def forward(self, inputs: StepInputs) -> Tensor:
        rows = inputs.token_ids.shape[0]
        hidden = kernels.embed(inputs.token_ids, self.table, scale=0.75)
        kernels.replace_rows_(hidden, inputs.replaced)
        normed = kernels.rms_norm(hidden, self.norm, 1e-5)
        for layer in range(LAYERS):
            started = kernels.start_lora(normed, inputs.lora, layer, (HIDDEN, 32, 32))
            qkv = kernels.quantized_linear(normed, self.qkv[layer], self.bias)
            kernels.add_lora_(qkv, normed, inputs.lora, layer, (HIDDEN, 32, 32), started)
            q, k, v = torch.split(qkv.view(rows, -1, HEAD_DIM), [HEADS, KV_HEADS, KV_HEADS], dim=1)
            q = kernels.rms_norm(q, self.head_norm, 1e-5)
            kernels.apply_rope_(q, k, self.cos, self.sin, inputs.positions)
            k_cache, v_cache = self.k_caches[layer], self.v_caches[layer]
            kernels.write_kv_(k, v, k_cache, v_cache, inputs.attention)
            attended = kernels.paged_attention(q, k_cache, v_cache, inputs.attention, 0.25, softcap=2.0)
            delta = kernels.quantized_linear(attended.view(rows, HIDDEN), self.o[layer])
            normed = kernels.add_rms_norm_(hidden, delta, self.norm, 1e-5)
            activation = (kernels.silu_mul, kernels.gelu_mul)[layer]
            activated = activation(kernels.quantized_linear(normed, self.gate_up[layer]))
            normed = kernels.add_rms_norm_(
                hidden, kernels.quantized_linear(activated, self.down[layer]), self.norm, 1e-5
            )
        kernels.add_(hidden, normed, 0.5)
        return kernels.layer_norm(hidden, self.norm, None, 1e-5)

    def step(
        self,
        tokens: Sequence[int],
        context_lens: Sequence[int],
        blocks: Sequence[Sequence[int]],
        segments: Sequence[Segment] = (),
        query_lens: Sequence[int] | None = None,
    ) -> StepInputs:
        """A step of requests that each have some tokens, by default one, at the end of their context."""
        counts = query_lens or [1] * len(context_lens)
        positions = [range(length - count, length) for length, count in zip(context_lens, counts, strict=True)]
        slots = [
            table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for table, of_request in zip(blocks, positions, strict=True)
            for position in of_request
        ]
        attention = AttentionBatch(
            query_starts=tuple(sum(counts[:index]) for index in range(len(counts) + 1)),
            context_lens=tuple(context_lens),
            block_tables=torch.tensor(blocks, dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
        )
        numbers = [position for of_request in positions for position in of_request]
        lora = LoraBatch(self.arena, self.adapters, tuple(segments), max_rank=3, is_int8=self.adapters_are_int8)
        return StepInputs(torch.tensor(tokens), torch.tensor(numbers), attention, lora)

    def largest_step(self) -> StepInputs:
        """What `record` is given: six tokens, of as many requests, that may each have the whole cache."""
        all_blocks = [list(range(BLOCKS))] * MAX_REQUESTS
        return self.step([0] * MAX_REQUESTS, [BLOCKS * BLOCK_SIZE] * MAX_REQUESTS, all_blocks)
