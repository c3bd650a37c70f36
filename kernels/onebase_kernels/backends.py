"""Which back ends there are, which of them can compute on this machine, and which one `auto` stands for.

It computes nothing and, besides asking, imports none of them.
"""

from importlib.util import find_spec
from typing import Literal, get_args

import torch

from onebase_kernels.cpu.library import LibraryUnavailable, load_library

BackendName = Literal["cpu", "triton", "bitsandbytes", "reference"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)

PREFERENCE: dict[str, tuple[BackendName, ...]] = {
    "cpu": ("cpu", "bitsandbytes", "reference"),
    "cuda": ("triton", "bitsandbytes", "reference"),
}
"""By kind of device: the back ends that compute on it, the fastest first."""

_OLDEST_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 in its tensor cores


class BackendUnavailable(Exception):
    """A back end cannot compute here; the text is a sentence that says why."""


def best_backend(device_type: str) -> BackendName:
    """The fastest back end for a kind of device, `cpu` or `cuda`, that can run here."""
    return next(name for name in PREFERENCE[device_type] if why_not(name, device_type) is None)


def check_backend(name: BackendName, device_type: str) -> None:
    """Raise BackendUnavailable unless that back end can compute on that kind of device here."""
    if reason := why_not(name, device_type):
        raise BackendUnavailable(f"The kernels `{name}` cannot compute on {device_type} here: {reason}.")


def why_not(name: BackendName, device_type: str) -> str | None:
    """Why a back end cannot compute on a kind of device of this machine; None if it can."""
    if name == "triton":
        return _why_not_triton(device_type)
    if name not in PREFERENCE[device_type]:
        return f"they compute on {' and '.join(kind for kind, names in PREFERENCE.items() if name in names)} only"
    if name == "bitsandbytes" and find_spec("bitsandbytes") is None:
        return "the package bitsandbytes is not installed"
    if name == "cpu":
        try:
            load_library()
        except LibraryUnavailable as error:
            return str(error)
    return None


def _why_not_triton(device_type: str) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from onebase_kernels.triton.nf4_decode import is_interpreted  # here, for it imports Triton

    if is_interpreted():
        return None
    if device_type != "cuda":
        return "they compute on cuda only"
    if not torch.cuda.is_available() or torch.version.cuda is None:  # torch calls AMD's GPUs cuda too
        return "torch finds no NVIDIA GPU"
    if torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        return f"they need a GPU of compute capability 8.0 or above, and {torch.cuda.get_device_name()} is older"
    return None
