"""The seam behind which back ends are exchanged."""

import importlib
import inspect
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

import onebase_kernels as kernels
from onebase_kernels import bitsandbytes_backend, reference
from onebase_kernels.cpu.library import runnable_variants

OPS = [op.__name__ for op in kernels.OPS]
MODULES = [bitsandbytes_backend]
if runnable_variants():  # else no compiler was there when Onebase was installed
    MODULES.append(importlib.import_module("onebase_kernels.cpu.backend"))
if find_spec("triton"):
    MODULES.append(importlib.import_module("onebase_kernels.triton.backend"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("op", OPS)
def test_a_back_end_has_the_signatures_of_the_reference(op: str, module: ModuleType) -> None:
    if hasattr(module, op):
        assert inspect.signature(getattr(module, op)) == inspect.signature(getattr(reference, op))


def test_auto_stands_for_a_back_end_that_computes() -> None:
    chosen = kernels.use_backend("auto")
    try:
        assert chosen == kernels.best_backend("cpu")
        assert kernels.silu_mul(torch.ones(2, 8)).shape == (2, 4)
    finally:
        kernels.use_backend("reference")


def test_an_op_keeps_the_definition_of_the_reference() -> None:
    for op in OPS:
        assert getattr(kernels, op).__doc__ == getattr(reference, op).__doc__
