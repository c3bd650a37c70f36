"""Recorded steps: a small stack of ops, run anew and run as it was recorded."""

import pytest
import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import AttentionBatch, LoraBatch, Segment, StepInputs
from onebase_kernels.cpu.execution import NotRecordable, Program
from onebase_kernels.cpu.library import runnable_variants

HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 2, 16, 50
HIDDEN, QKV = HEADS * HEAD_DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM


class Model:
    """Two layers that use every op of a step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.table = torch.randn(VOCAB, HIDDEN)
        self.norm, self.head_norm = torch.randn(HIDDEN), torch.randn(HEAD_DIM)
        self.qkv = [self.packed(QKV, HIDDEN) for _ in range(2)]
        self.o = [self.packed(HIDDEN, HIDDEN) for _ in range(2)]
        self.gate_up = [self.packed(2 * 64, HIDDEN) for _ in range(2)]
        self.down = [self.packed(HIDDEN, 64) for _ in range(2)]
        self.bias = torch.randn(QKV)
        angles = torch.rand(64, HEAD_DIM // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.k_caches, self.v_caches = torch.full((2, 2, 8, 4, KV_HEADS, HEAD_DIM), torch.nan)

    @staticmethod
    def packed(outputs: int, inputs: int) -> kernels.PackedNf4:
        return kernels.pack_nf4([kernels.quantize_nf4(torch.randn(outputs, inputs) / 8)])

    def forward(self, inputs: StepInputs) -> Tensor:
        rows = inputs.token_ids.shape[0]
        hidden = kernels.embed(inputs.token_ids, self.table)
        normed = kernels.rms_norm(hidden, self.norm, 1e-5)
        for layer in range(2):
            qkv = kernels.nf4_linear(normed, self.qkv[layer], self.bias)
            kernels.add_lora_(qkv, normed, inputs.lora, layer, (HIDDEN, 32, 32))
            q, k, v = torch.split(qkv.view(rows, -1, HEAD_DIM), [HEADS, KV_HEADS, KV_HEADS], dim=1)
            q = kernels.rms_norm(q, self.head_norm, 1e-5)
            kernels.apply_rope_(q, k, self.cos, self.sin, inputs.positions)
            k_cache, v_cache = self.k_caches[layer], self.v_caches[layer]
            kernels.write_kv_(k, v, k_cache, v_cache, inputs.attention)
            attended = kernels.paged_attention(q, k_cache, v_cache, inputs.attention, 0.25)
            delta = kernels.nf4_linear(attended.view(rows, HIDDEN), self.o[layer])
            normed = kernels.add_rms_norm_(hidden, delta, self.norm, 1e-5)
            activated = kernels.silu_mul(kernels.nf4_linear(normed, self.gate_up[layer]))
            normed = kernels.add_rms_norm_(hidden, kernels.nf4_linear(activated, self.down[layer]), self.norm, 1e-5)
        return normed


def steps() -> list[StepInputs]:
    """A prompt of five tokens, then its next token beside another prompt, which has an adapter."""
    table = torch.tensor([[[0, 2, 0, 1, 0b010]], [[500, 0, 1, 0, 0]]])
    arena = torch.randn(2000, generator=torch.Generator().manual_seed(1))

    def step(
        tokens: list[int], positions: list[int], starts: tuple[int, ...], blocks: list[list[int]], slots: list[int]
    ) -> StepInputs:
        ends = tuple(positions[start - 1] + 1 for start in starts[1:])
        attention = AttentionBatch(starts, ends, torch.tensor(blocks, dtype=torch.int32), torch.tensor(slots))
        lora = LoraBatch(arena, table, () if len(starts) == 2 else (Segment(0, 1, 4),))
        return StepInputs(torch.tensor(tokens), torch.tensor(positions), attention, lora)

    return [
        step([7, 8, 9, 1, 2], [0, 1, 2, 3, 4], (0, 5), [[3, 5]], [12, 13, 14, 15, 20]),
        step([3, 40, 41, 42], [5, 0, 1, 2], (0, 1, 4), [[3, 5], [1, 0]], [21, 4, 5, 6]),
    ]


def test_a_recorded_step_computes_what_the_ops_compute_one_by_one(backend: str) -> None:
    model = Model()
    expected = [model.forward(inputs).clone() for inputs in steps()]
    for caches in (model.k_caches, model.v_caches):
        caches.fill_(torch.nan)
    recorded = kernels.record(model.forward, max_tokens=6)
    assert isinstance(recorded, Program) == (backend == "cpu")
    for inputs, output in zip(steps(), expected, strict=True):
        torch.testing.assert_close(recorded(inputs), output, rtol=0, atol=0)


needs_library = pytest.mark.skipif(
    not runnable_variants(), reason="no C++ compiler was there when Onebase was installed"
)


@needs_library
def test_results_that_are_used_up_give_their_memory_to_later_ones() -> None:
    kernels.use_backend("cpu")
    try:
        model = Model()
        program = kernels.record(model.forward, max_tokens=6)
        assert isinstance(program, Program)
        widest = 6 * 4 * (HIDDEN * 2 + QKV + 2 * 64)  # a layer needs no more at once, and the second none besides
        assert program.nbytes <= widest + 64 * 8
    finally:
        kernels.use_backend("reference")


@needs_library
def test_a_step_beyond_what_was_recorded_is_refused() -> None:
    kernels.use_backend("cpu")
    try:
        program = kernels.record(Model().forward, max_tokens=4)
        with pytest.raises(ValueError, match="A step of 5 tokens; this program carries 4"):
            program(steps()[0])
    finally:
        kernels.use_backend("reference")


@needs_library
def test_what_computes_besides_the_ops_is_never_recorded() -> None:
    from onebase_kernels.cpu import execution

    kernels.use_backend("cpu")
    try:
        model = Model()

        def forward(inputs: StepInputs) -> Tensor:
            return 2 * model.forward(inputs)

        with pytest.raises(NotRecordable, match=r"aten\.mul"):
            execution.record(forward, max_rows=4)
        assert kernels.record(forward, max_tokens=4) is forward
    finally:
        kernels.use_backend("reference")
