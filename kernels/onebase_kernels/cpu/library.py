"""Loads the C++ ops: the fastest variant that this machine can run, and their C interface for Python."""

import ctypes
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from onebase_kernels.cpu.build import VARIANTS, library_path
from onebase_kernels.cpu.calls import CALLS, Code, Int, Pointer

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"})
_CPU_FLAGS: Mapping[str, frozenset[str]] = {
    "amx": frozenset({"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", *_AVX512, "avx512_vnni"}),
    "avx512_bf16": frozenset({"avx512_bf16", *_AVX512, "avx512_vnni"}),
    "avx512": _AVX512,
    "avx2": frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c"}),
    "portable": frozenset(),
}
"""What /proc/cpuinfo must list for each variant."""


class LibraryUnavailable(Exception):
    """No variant can run here; the text says why."""


@cache
def load_library(variant: str | None = None) -> ctypes.CDLL:
    """The ops of a variant, by default the fastest that this machine can run; raises LibraryUnavailable."""
    reasons = {}
    for name in VARIANTS if variant is None else (variant,):
        reason = why_not(name)
        if reason is None:
            return _open(name)
        reasons[name] = reason
    raise LibraryUnavailable("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def runnable_variants() -> list[str]:
    """The variants that can run here, the fastest first."""
    return [name for name in VARIANTS if why_not(name) is None]


@cache
def why_not(variant: str) -> str | None:
    """Why a variant cannot run here; None if it can."""
    if missing := _CPU_FLAGS[variant] - cpu_flags():
        return f"the machine lacks {', '.join(sorted(missing))}"
    if not library_path(variant).is_file():
        return "not built (no C++ compiler, or too old a one, when Onebase was installed)"
    try:
        library = _open(variant)
    except OSError as error:  # built for another C library
        return f"cannot be loaded: {error}"
    return None if library.onebase_start() else "the operating system does not grant its registers"


def _open(variant: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path(variant)))
    for call in CALLS:
        _declare(library, call.op, Pointer, Pointer)
    _declare(library, "onebase_run_program", Pointer, Int, Pointer)
    _declare(library, "onebase_best_tokens", Pointer)
    _declare(library, "onebase_choose_tokens", Pointer)
    _declare(library, "onebase_copy_matrices", Pointer, Int, Int, Pointer, Code)
    _declare(library, "onebase_set_threads", Int)
    library.onebase_start.restype = library.onebase_has_dense_linear.restype = Code
    return library


def _declare(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    getattr(library, function).argtypes = arguments
    getattr(library, function).restype = None


@cache
def cpu_flags() -> frozenset[str]:
    """The features that the first processor lists; none where the system has no /proc/cpuinfo or is not x86-64."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.is_file():
        return frozenset()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
