"""What only a real GPU can show. Nothing is installed for these tests: torch, Triton and pytest are enough."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    """Tensors are made on the GPU, without which there is nothing to test."""
    if not torch.cuda.is_available():
        pytest.skip("There is no CUDA device here.")
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
