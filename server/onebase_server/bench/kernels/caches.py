"""How large a device's caches are, and how much of its memory is free: what weights must rotate through, and may."""

from pathlib import Path

import psutil
import torch
from pydantic import ByteSize, TypeAdapter

UNKNOWN_CACHE_BYTES = 64 << 20
"""Taken for a CPU that does not tell."""
_LINUX_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache_bytes(device: torch.device) -> int:
    """The largest cache: L2 of a GPU, usually L3 of a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = (path.read_text().strip() for path in _LINUX_CACHES.glob("index*/size"))  # such as 2048K
    return max((TypeAdapter(ByteSize).validate_python(f"{size}iB") for size in sizes), default=UNKNOWN_CACHE_BYTES)


def free_bytes(device: torch.device) -> int:
    """What can be allocated now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available
