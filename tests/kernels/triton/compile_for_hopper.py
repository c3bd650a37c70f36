"""Compiles what the ops launch for a Hopper GPU (sm_90), on a machine without any, and prints the machine code.

A program of its own, for the tests' process interprets kernels instead of compiling them. It prints one JSON object,
`{case: {kernel: machine code}}`.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from onebase_kernels import TABLE_COLUMNS, AttentionBatch, LoraBatch, Segment
from onebase_kernels.triton import attention, elementwise, lora, nf4_linear
from onebase_kernels.triton.nf4_packing import FragmentNf4
from onebase_kernels.triton.plans import default_plan

NVDISASM = Path(triton.__path__[0]) / "backends/nvidia/bin/nvdisasm"
BLOCK_SIZE, KV_HEADS, PLACES = 16, 8, 2


class NoDevice:
    """What the JIT asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def nf4_weights(n: int, k: int) -> FragmentNf4:
    codes = torch.zeros(n // 64, k // 64, 512, dtype=torch.int32)
    scales = torch.zeros(n // 64, k // 64, 64, dtype=torch.uint8)
    return FragmentNf4(codes, scales, torch.zeros(n * k // 64 // 256), torch.zeros(n // 64), torch.zeros(256), (n,), k)


def fused_product(rows: int) -> None:
    plan = default_plan(rows, 4096, 4096, processors=132)
    nf4_linear.fused_linear(zeros(rows, 4096), nf4_weights(4096, 4096), None, plan)


def side_path(segments: tuple[Segment, ...], *, is_int8: bool = False) -> None:
    rows, widths = segments[-1].stop, (4096, 1024, 1024)
    table = torch.zeros(PLACES, 4, TABLE_COLUMNS, dtype=torch.int64)
    batch = LoraBatch(zeros(64), table, segments, max_rank=48, alignment=32 if is_int8 else 16, is_int8=is_int8)
    lora.add_lora_(zeros(rows, sum(widths)), zeros(rows, 4096), batch, 1, widths)


def attend(query_lens: list[int], context_len: int, group: int, head_dim: int, softcap: float | None = None) -> None:
    starts = torch.tensor([0, *query_lens]).cumsum(0).tolist()
    tables = torch.zeros(len(query_lens), 4, dtype=torch.int32)
    batch = AttentionBatch(tuple(starts), (context_len,) * len(query_lens), tables, torch.zeros(starts[-1]))
    cache = zeros(1, BLOCK_SIZE, KV_HEADS, head_dim)
    attention.paged_attention(zeros(starts[-1], group * KV_HEADS, head_dim), cache, cache, batch, 0.1, softcap=softcap)


def write_kv() -> None:
    batch = AttentionBatch((0, 2), (2,), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64))
    k, cache = zeros(2, KV_HEADS, 128), zeros(1, BLOCK_SIZE, KV_HEADS, 128)
    elementwise.write_kv_(k, k, cache, cache, batch)


CASES: dict[str, Callable[[], Any]] = {
    "nf4, 1 row": lambda: fused_product(1),
    "nf4, 32 rows": lambda: fused_product(32),
    "nf4, 64 rows": lambda: fused_product(64),
    "nf4, 256 rows": lambda: fused_product(256),
    "nf4, dequantized": lambda: nf4_linear.dequantize(nf4_weights(64, 4096), 0, 1, torch.bfloat16),
    "side path, decode": lambda: side_path((Segment(0, 0, 1), Segment(1, 1, 3))),
    "side path, prefill": lambda: side_path((Segment(0, 0, 100),)),
    "side path, 8 bits, decode": lambda: side_path((Segment(0, 0, 1), Segment(1, 1, 3)), is_int8=True),
    "side path, 8 bits, prefill": lambda: side_path((Segment(0, 0, 100),), is_int8=True),
    "attention, decode": lambda: attend([1, 1], 1000, 4, 128),
    "attention, decode, short": lambda: attend([1, 1], 100, 4, 128),
    "attention, decode, heads of 256": lambda: attend([1, 1], 1000, 2, 256),
    "attention, prefill": lambda: attend([100], 100, 4, 128),
    "attention, prefill, late chunk": lambda: attend([100], 5000, 4, 128),
    "attention, prefill, odd group": lambda: attend([100], 100, 7, 64),
    "attention, prefill, heads of 256": lambda: attend([100], 100, 2, 256),
    "attention, decode, softcap": lambda: attend([1, 1], 1000, 2, 256, softcap=50.0),
    "rms_norm": lambda: elementwise.rms_norm(zeros(2, 4096), zeros(4096), 1e-5),
    "rms_norm of heads": lambda: elementwise.rms_norm(zeros(2, 8, 128), zeros(128), 1e-5),
    "add_rms_norm_": lambda: elementwise.add_rms_norm_(zeros(2, 4096), zeros(2, 4096), zeros(4096), 1e-5),
    "apply_rope_": lambda: elementwise.apply_rope_(
        zeros(2, 32, 128), zeros(2, 8, 128), torch.zeros(9, 64), torch.zeros(9, 64), torch.zeros(2, dtype=torch.int64)
    ),
    "write_kv_": write_kv,
    "silu_mul": lambda: elementwise.silu_mul(zeros(2, 28672)),
    "gelu_mul": lambda: elementwise.gelu_mul(zeros(2, 28672)),
}


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    driver.set_active(NoDevice())
    compile_and_run = JITFunction.run
    compiled: dict[str, Any] = {}

    def only_compile(kernel: JITFunction, *args: Any, **options: Any) -> None:
        compiled[kernel.__name__] = compile_and_run(kernel, *args, **options | {"warmup": True})

    JITFunction.run = only_compile
    results: dict[str, dict[str, str]] = {}
    for case, op in CASES.items():
        compiled.clear()
        op()
        results[case] = {name: disassemble(kernel.asm["cubin"]) for name, kernel in compiled.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
