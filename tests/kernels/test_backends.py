"""The seam behind which back ends are exchanged."""

import importlib
import inspect
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

import onebase_kernels as kernels
from onebase_kernels import backends, bitsandbytes_backend, reference
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


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if they were not installed."""
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name in packages else find_spec(name))


def test_the_back_ends_of_a_device_are_tried_the_fastest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("triton"):  # in its interpreter, if there is no GPU
        assert kernels.best_backend("cuda") == "triton"
    hide(monkeypatch, "triton")
    assert kernels.best_backend("cuda") == "bitsandbytes"
    hide(monkeypatch, "triton", "bitsandbytes")
    assert kernels.best_backend("cuda") == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.skipif(not find_spec("triton"), reason="Triton has no wheels for this platform")
def test_triton_is_refused_without_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase_kernels.triton.nf4_decode.is_interpreted", lambda: False)
    with pytest.raises(kernels.BackendUnavailable, match="`triton` cannot compute on cuda here: torch finds no NVIDIA"):
        kernels.use_backend("triton", "cuda")
    with pytest.raises(kernels.BackendUnavailable, match="they compute on cuda only"):
        kernels.use_backend("triton", "cpu")


def test_what_is_not_installed_or_for_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "triton", "bitsandbytes")
    for name in ("triton", "bitsandbytes"):
        with pytest.raises(kernels.BackendUnavailable, match=f"the package {name} is not installed"):
            kernels.use_backend(name, "cuda")
    with pytest.raises(kernels.BackendUnavailable, match="`cpu` cannot compute on cuda here: they compute on cpu only"):
        kernels.use_backend("cpu", "cuda")


def test_a_refused_back_end_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "bitsandbytes")
    with pytest.raises(kernels.BackendUnavailable):
        kernels.use_backend("bitsandbytes")
    assert kernels.silu_mul(torch.ones(2, 8)).shape == (2, 4)


@pytest.mark.skipif(not find_spec("triton"), reason="Triton has no wheels for this platform")
def test_triton_computes_where_bitsandbytes_is_missing() -> None:
    program = """
import sys
sys.modules["bitsandbytes"] = None  # importing it fails
import torch, onebase_kernels as kernels
kernels.use_backend("triton", "cuda" if torch.cuda.is_available() else "cpu")
assert kernels.pack_quantized([kernels.quantize_nf4(torch.ones(3, 4))]).num_parameters == 12
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_op_keeps_the_definition_of_the_reference() -> None:
    for op in OPS:
        assert getattr(kernels, op).__doc__ == getattr(reference, op).__doc__
