"""Every op test runs on every back end."""

from collections.abc import Iterator

import pytest

import onebase_kernels as kernels


@pytest.fixture(params=["reference", "bitsandbytes"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The back end that computes during the test."""
    yield kernels.use_backend(request.param)
    kernels.use_backend("reference")
