"""Which back end of the kernels computes: what a setting asks for, or a sentence why it cannot be."""

import torch

import onebase_kernels as kernels
from onebase_kernels import BackendName
from onebase_server.errors import ConfigurationError
from onebase_server.settings import KernelsName


def use_kernels(name: KernelsName, device: torch.device) -> BackendName:
    """Let that back end compute from now on; returns the name that `auto` stands for.

    Raises:
        ConfigurationError: it cannot compute on that device here.
    """
    try:
        return kernels.use_backend(name, device.type)
    except kernels.BackendUnavailable as error:
        raise ConfigurationError(f"{error} `--kernels auto` takes the fastest that can.") from error
