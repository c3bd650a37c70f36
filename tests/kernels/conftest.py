"""Every op test runs on every back end, the C++ one in each variant that this machine can run.

Triton's kernels run on a GPU if there is one, else in its interpreter.
"""

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import onebase_kernels as kernels
from onebase_kernels.cpu.library import load_library, runnable_variants

BACKENDS = ["reference", "bitsandbytes", *(f"cpu:{variant}" for variant in runnable_variants())]
if find_spec("triton"):
    BACKENDS.append("triton")
if not runnable_variants():
    collect_ignore = ["test_record.py"]  # programs are the C++ ops' own


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The back end that computes during the test."""
    name, _, variant = request.param.partition(":")
    if name == "triton":
        request.getfixturevalue("triton_device")
    chosen = kernels.use_backend(name, torch.get_default_device().type)
    if variant:
        monkeypatch.setattr("onebase_kernels.cpu.execution.library", load_library(variant))
    yield chosen
    kernels.use_backend("reference")


@pytest.fixture
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors lie where Triton's kernels run, unless a test says otherwise."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    else:
        request.getfixturevalue("triton_interpreter")
        # The interpreter's time goes by programs, and larger tiles make fewer of them.
        monkeypatch.setattr("onebase_kernels.triton.attention._PREFILL_ROWS", 512)
    yield
    torch.set_default_device(None)


@pytest.fixture(scope="session")
def triton_interpreter() -> Iterator[None]:
    """Triton's interpreter as it should be.

    That of 3.6 and 3.7 takes the bits of bfloat16 for whole numbers in products, cuts off where the GPU rounds to it,
    and under NumPy 2.4 has no loops up to a bound that a kernel has computed.
    """
    import ml_dtypes  # which a machine with a GPU may lack

    tl, interpreter = pytest.importorskip("triton.language"), pytest.importorskip("triton.runtime.interpreter")
    builder, patch_tensor = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    cast, dot = builder.cast_impl, builder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(handle.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)

    def cast_with_rounding(self, source, target):
        if target.scalar != tl.bfloat16:
            return cast(self, widened(source), target)
        rounded = widened(source).data.astype(ml_dtypes.bfloat16)
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    def patch_tensor_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))
        for name in ("cast_impl", "create_fp_ext", "create_fp_trunc"):
            patch.setattr(builder, name, cast_with_rounding)
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_with_index)
        yield
