"""On what was measured: the machine and the versions, for the results' file."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("onebase", "torch", "bitsandbytes", "numpy", "triton")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


@dataclass(frozen=True)
class Machine:
    """What the load generator runs on; a server elsewhere has another machine."""

    cpu: str
    cores: int
    """Those that this process may use."""
    memory_bytes: int
    gpus: tuple[str, ...]
    system: str
    load_average: tuple[float, float, float]
    """Before the load began: over 1, 5 and 15 minutes. Not near zero: others were using the machine."""


def describe_machine() -> Machine:
    """This machine, now."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        gpus=_gpus(),
        system=platform.platform(),
        load_average=psutil.getloadavg(),
    )


def describe_versions() -> dict[str, str]:
    """Python and the packages that decide about speed, as installed here."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> tuple[str, ...]:
    if shutil.which(_NVIDIA_SMI[0]) is None:
        return ()
    listing = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, check=False)
    return tuple(listing.stdout.splitlines()) if listing.returncode == 0 else ()
