"""numpy arrays of an adapter's mapped file as torch's tensors. It knows nothing of adapters."""

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from onebase_adapters.adapter import Array


def as_tensor(array: Array) -> Tensor:
    """The array's own memory as a tensor, not to be written to (torch does not know numpy's bfloat16)."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def float32(array: Array) -> Tensor:
    """The same in fp32: the array's own memory where it is that already."""
    return as_tensor(array).float()
