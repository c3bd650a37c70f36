"""What only a real GPU can show. Nothing is installed for these tests: what a machine lacks is skipped."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    """Without one there is nothing to test."""
    if not torch.cuda.is_available():
        pytest.skip("There is no CUDA device here.")


@pytest.fixture
def tensors_on_the_gpu() -> Iterator[None]:
    """Tensors are made on the GPU, unless a test says otherwise; in a server they are not."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
