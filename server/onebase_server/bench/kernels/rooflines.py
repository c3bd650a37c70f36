"""What the machine can do, measured in the same run as the ops: bytes moved and products per second.

An op cannot take less than `max(bytes / bandwidth, FLOPs / peak)` (Williams, Waterman and Patterson, "Roofline", CACM
52(4), 2009). Every rate is the best that was measured, for what disturbs a machine only makes it slower.
"""

import torch
from torch.nn import functional as F

from onebase_server.bench.kernels.timing import Clock, Run, choose_times
from onebase_server.bench.kernels.trial import Work

MEASUREMENTS = 5
FEWEST_STREAMED_BYTES = 1 << 20
"""Less is read faster than a call of torch begins."""
MEMORY_BYTES = 1 << 30
"""What is streamed to measure memory, if the cache is not larger."""
CACHES_STREAMED = 4
"""How many times the cache is streamed to measure the memory behind it."""
GEMM_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Square products, the best of which is the peak."""
GEMM_DTYPES = (torch.bfloat16, torch.float32)


class Rooflines:
    """Bandwidths and peaks of one device; measured when needed, and better known after each `measure`."""

    def __init__(self, device: torch.device, cache_bytes: int, free_bytes: int, clock: Clock) -> None:
        """At most a quarter of the free memory is used."""
        self.gemm: dict[str, float] = {}
        """FLOPs per second of torch's product, by dtype."""
        self.bandwidths: dict[int, float] = {}
        """Bytes per second through a buffer of so many bytes, again and again."""
        self._device = device
        self._clock = clock
        self._most_bytes = free_bytes // 4
        self._memory_bytes = _rounded_up(max(MEMORY_BYTES, CACHES_STREAMED * cache_bytes))
        self.bandwidths[self._memory_bytes] = 0.0

    @property
    def memory_bandwidth(self) -> float:
        """Bytes per second through a buffer much larger than any cache."""
        return self.bandwidths[self._memory_bytes]

    @property
    def peak(self) -> float:
        """FLOPs per second of the fastest product (on a CPU: AMX or AVX, whichever torch uses)."""
        return max(self.gemm.values())

    def measure(self) -> None:
        """Measure the products, the memory and every working set that was met so far; the best rates are kept."""
        for dtype in GEMM_DTYPES:
            name = str(dtype).removeprefix("torch.")
            rates = (self._gemm_rate(dtype, size) for size in GEMM_SIZES[self._device.type])
            self.gemm[name] = max(self.gemm.get(name, 0.0), *rates)
        for size in self.bandwidths:
            self.bandwidths[size] = max(self.bandwidths[size], self._bandwidth(size))

    def meet(self, working_set: int) -> None:
        """Measure the bandwidth through so many bytes, rounded up to a power of two, unless it is known."""
        size = _rounded_up(working_set)
        if size not in self.bandwidths:
            self.bandwidths[size] = self._bandwidth(size)

    def seconds(self, work: Work) -> float:
        """The least time of a call whose operands come from memory."""
        return max(work.bytes / self.memory_bandwidth, work.flops / self.peak)

    def cached_seconds(self, work: Work, working_set: int) -> float:
        """The least time of a call whose operands come from wherever that many bytes, used again and again, stay.

        `meet` must have seen the working set.
        """
        # what was measured slower through less was disturbed
        bandwidth = max(rate for size, rate in self.bandwidths.items() if size >= _rounded_up(working_set))
        return max(work.bytes / bandwidth, work.flops / self.peak)

    def _bandwidth(self, size: int) -> float:
        size = min(size, self._most_bytes)
        return size * _best_rate(_stream(self._device, size), self._clock)

    def _gemm_rate(self, dtype: torch.dtype, size: int) -> float:
        left, right = (torch.randn(size, size, device=self._device).to(dtype) for _ in range(2))
        return 2 * size**3 * _best_rate(lambda: F.linear(left, right), self._clock)


def _rounded_up(size: int) -> int:
    return 1 << (max(size, FEWEST_STREAMED_BYTES) - 1).bit_length()


def _stream(device: torch.device, size: int) -> Run:
    """Moves `size` bytes: a CPU reads them, for weights are read; a GPU's copy reads one half and writes the other."""
    if device.type == "cpu":
        return torch.ones(size // 4, dtype=torch.float32).sum
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _best_rate(run: Run, clock: Clock) -> float:
    """Runs per second."""
    times = choose_times(run, clock)
    return times / min(clock(run, times) for _ in range(MEASUREMENTS))
