"""Recorded steps: a small stack of ops, run anew and run as it was recorded."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import (
    QuantizedWeight,
    ReplacedRows,
    Segment,
    StepInputs,
    quantize_fp4,
    quantize_int4,
    quantize_int8,
)
from onebase_kernels.cpu.execution import NotRecordable, Program
from onebase_kernels.cpu.library import runnable_variants

from .small_model import HIDDEN, MAX_REQUESTS, QKV, SmallModel


def steps(model: SmallModel) -> list[StepInputs]:
    """A prompt of five tokens, its next token beside another prompt, which has an adapter, then a token of each.

    The very last has an embedding of its own.
    """
    own = ReplacedRows(rows=torch.tensor([1]), vectors=torch.ones(1, HIDDEN))
    return [
        model.step([7, 8, 9, 1, 2], [5], [[3, 5]], query_lens=[5]),
        model.step([3, 40, 41, 42], [6, 3], [[3, 5], [1, 0]], [Segment(0, 1, 4)], query_lens=[1, 3]),
        replace(model.step([4, 5], [7, 4], [[3, 5], [1, 0]], [Segment(0, 1, 2)]), replaced=own),
    ]


@pytest.mark.parametrize("has_8_bits", [False, True], ids=["", "adapters in 8 bits"])
def test_a_recorded_step_computes_what_the_ops_compute_one_by_one(backend: str, has_8_bits: bool) -> None:
    model = SmallModel()
    if has_8_bits:
        model.keep_adapters_in_8_bits()
    expected = [model.forward(inputs).clone() for inputs in steps(model)]
    for caches in (model.k_caches, model.v_caches):
        caches.fill_(torch.nan)
    recorded = kernels.record(model.forward, model.largest_step())
    assert isinstance(recorded, Program) == (backend == "cpu")
    for inputs, output in zip(steps(model), expected, strict=True):
        torch.testing.assert_close(recorded(inputs), output, rtol=0, atol=0)


needs_library = pytest.mark.skipif(
    not runnable_variants(), reason="no C++ compiler was there when Onebase was installed"
)


@needs_library
@pytest.mark.parametrize("quantize", [quantize_fp4, partial(quantize_int4, group_size=32), quantize_int8])
def test_every_format_of_weights_can_be_recorded(quantize: Callable[[Tensor], QuantizedWeight]) -> None:
    kernels.use_backend("cpu")
    try:
        model = SmallModel(torch.bfloat16, quantize)
        expected = model.forward(steps(model)[0]).clone()
        program = kernels.record(model.forward, model.largest_step())
        assert isinstance(program, Program)
        torch.testing.assert_close(program(steps(model)[0]), expected, rtol=0, atol=0)
    finally:
        kernels.use_backend("reference")


@needs_library
def test_results_that_are_used_up_give_their_memory_to_later_ones() -> None:
    kernels.use_backend("cpu")
    try:
        model = SmallModel()
        program = kernels.record(model.forward, model.largest_step())
        assert isinstance(program, Program)
        widest = 6 * 4 * (HIDDEN * 2 + QKV + 2 * 64)  # a layer needs no more at once, and the second none besides
        assert program.nbytes <= widest + 64 * 8
    finally:
        kernels.use_backend("reference")


@needs_library
def test_a_step_beyond_what_was_recorded_is_refused() -> None:
    kernels.use_backend("cpu")
    try:
        model = SmallModel()
        program = kernels.record(model.forward, model.largest_step())
        tokens = MAX_REQUESTS + 1
        too_large = model.step([0] * tokens, [tokens], [[3, 5]], query_lens=[tokens])
        with pytest.raises(ValueError, match="A step of 7 tokens; this program carries 6"):
            program(too_large)
    finally:
        kernels.use_backend("reference")


@needs_library
def test_what_computes_besides_the_ops_is_never_recorded() -> None:
    from onebase_kernels.cpu import execution

    kernels.use_backend("cpu")
    try:
        model = SmallModel()

        def forward(inputs: StepInputs) -> Tensor:
            return 2 * model.forward(inputs)

        with pytest.raises(NotRecordable, match=r"aten\.mul"):
            execution.record(forward, max_rows=4)
        assert kernels.record(forward, model.largest_step()) is forward
    finally:
        kernels.use_backend("reference")
