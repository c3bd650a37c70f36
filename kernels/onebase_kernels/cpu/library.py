"""Loads the C++ ops: the fastest variant that this machine can run, and their C interface for Python."""

import ctypes
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from onebase_kernels.cpu.build import VARIANTS, library_path

_CPU_FLAGS: Mapping[str, frozenset[str]] = {
    "amx": frozenset({"amx_tile", "amx_bf16", "avx512_bf16", "avx512bw", "avx512vl", "avx512dq"}),
    "avx512_bf16": frozenset({"avx512_bf16", "avx512bw", "avx512vl", "avx512dq"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}),
    "avx2": frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c"}),
    "portable": frozenset(),
}
"""What /proc/cpuinfo must list for each variant."""

FLOAT32, BFLOAT16 = 0, 1
"""Element types in the C interface; simd.h has the same numbers."""
DTYPES: Mapping[torch.dtype, int] = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}

Pointer = ctypes.c_void_p
Int = ctypes.c_int64
Code = ctypes.c_int32
Float = ctypes.c_float


class CNf4Slice(ctypes.Structure):
    """nf4_linear.cpp: one weight of a group."""

    _fields_ = (("nested_absmax", Pointer), ("offset", Float), ("num_outputs", Int))


class CNf4Group(ctypes.Structure):
    """nf4_linear.cpp: the weights of a projection group, packed."""

    _fields_ = (
        ("codes", Pointer),
        ("scales", Pointer),
        ("quant_map", Pointer),
        ("slices", Pointer),
        ("num_outputs", Int),
        ("num_inputs", Int),
    )


class CAttention(ctypes.Structure):
    """attention.cpp: everything of one call."""

    _fields_ = (
        ("q", Pointer),
        ("out", Pointer),
        ("k_cache", Pointer),
        ("v_cache", Pointer),
        ("q_stride", Int),
        ("query_starts", Pointer),
        ("context_lens", Pointer),
        ("block_tables", Pointer),
        ("num_requests", Int),
        ("table_width", Int),
        ("block_size", Int),
        ("heads", Int),
        ("kv_heads", Int),
        ("head_size", Int),
        ("window", Int),
        ("scale", Float),
    )


_SIGNATURES: Mapping[str, tuple[object, ...]] = {
    "onebase_nf4_linear": (Pointer, Pointer, Int, Pointer, Code),
    "onebase_add_lora": (*[Pointer] * 5, Int, Int, Int, Pointer, Int, Code),
    "onebase_attention": (Pointer, Code),
    "onebase_rms_norm": (Pointer, Pointer, Pointer, Int, Int, Float, Code),
    "onebase_rope": (Pointer, Int, Int, Int, Int, Pointer, Pointer, Code),
    "onebase_silu_mul": (Pointer, Pointer, Int, Int, Code),
    "onebase_dense_linear": (Pointer, Int, Pointer, Int, Int, Pointer),
    "onebase_set_threads": (Int,),
    "onebase_write_cache": (Pointer, Int, Int, Int, Pointer, Pointer),
}


_TELL_WHETHER_CARRIED = {"onebase_dense_linear", "onebase_attention"}
"""Functions that return false, and do nothing, for shapes that they do not carry."""


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
    for function, arguments in _SIGNATURES.items():
        getattr(library, function).argtypes = arguments
        getattr(library, function).restype = Code if function in _TELL_WHETHER_CARRIED else None
    return library


@cache
def cpu_flags() -> frozenset[str]:
    """The features that the first processor lists; none where the system has no /proc/cpuinfo or is not x86-64."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.is_file():
        return frozenset()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
