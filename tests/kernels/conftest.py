"""Every op test runs on every back end, the C++ one in each variant that this machine can run."""

from collections.abc import Iterator

import pytest

import onebase_kernels as kernels
from onebase_kernels.cpu.library import load_library, runnable_variants

BACKENDS = ["reference", "bitsandbytes", *(f"cpu:{variant}" for variant in runnable_variants())]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The back end that computes during the test."""
    name, _, variant = request.param.partition(":")
    chosen = kernels.use_backend(name)
    if variant:
        monkeypatch.setattr("onebase_kernels.cpu.execution.library", load_library(variant))
    yield chosen
    kernels.use_backend("reference")
