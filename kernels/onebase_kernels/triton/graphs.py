"""Decode steps as CUDA graphs, one for each number of tokens in `BUCKETS`: a step is a few copies and one launch.

A graph repeats its launches on the same addresses, with the same grids. So a step's inputs are copied to buffers that
stay, and whatever differs between two steps of a bucket (contexts, blocks, adapters) is read on the device. A step is
filled up to its bucket with rows that touch nothing: their slot is -1, no tile is theirs. Steps in which a request
has several tokens (prefill) are computed op by op.

Without a GPU, in Triton's interpreter, the same buffers and fillings are used, and only the capture is left out.
"""

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from onebase_kernels.batch import AttentionBatch, LoraBatch, Segment, StepInputs
from onebase_kernels.cuda_graph import CapturedGraph
from onebase_kernels.triton.attention import DecodeBatch
from onebase_kernels.triton.lora import DECODE_TOKENS, DecodeLoraBatch, cut

BUCKETS = (1, 2, 4, 8, *range(16, 257, 8))
"""Tokens of a step; a step of more is computed op by op. None straddles two tile sizes of the NF4 product."""
MAX_RANK = 1024
"""Of an adapter at one place, all slices together; a step with more is computed op by op."""

_PREFILL_TOKENS = (16, 32, 64, 128, 256, 512)  # in each, some kernel is another than in the one before
_ALIGNMENT = 16  # bytes: kernels are compiled anew for pointers of less
_NOWHERE = -1  # the slot of a row that only fills up: of the KV cache, or of the adapters


class NotCapturable(Exception):
    """A step cannot become a graph: an op asks the host for what only the device knows, or the capture fails."""


def check_known_on_host(batch: AttentionBatch | LoraBatch) -> None:
    """Raise NotCapturable if torch's version of an op, which asks the host, cannot compute for this batch."""
    if isinstance(batch, DecodeBatch | DecodeLoraBatch):
        raise NotCapturable(f"{type(batch).__name__} says on the device alone who is in the step.")


def buckets_for(tokens: int) -> tuple[int, ...]:
    """The buckets of all steps of up to so many tokens."""
    return BUCKETS[: bisect_left(BUCKETS, tokens) + 1]


@dataclass(frozen=True, eq=False)
class StepTensors:
    """What differs between the steps of a bucket, T tokens, in one piece of memory; block tables lie elsewhere."""

    memory: Tensor
    """uint8: all of what follows."""
    token_ids: Tensor
    """int64 [T]."""
    positions: Tensor
    """int64 [T]."""
    slot_mapping: Tensor
    """int64 [T]: where the token is written in the KV cache; -1 for nowhere."""
    adapter_slots: Tensor
    """int64 [T]: the adapters of the step, by their slots in the pool's table."""
    attention_tiles: Tensor
    """int32 [T, 4], as `attention.Tiles.table`."""
    lora_tiles: Tensor
    """int32 [T, 3], as `lora.Tiles.table`; their slots count `adapter_slots`."""

    @classmethod
    def allocate(cls, tokens: int, device: torch.device) -> "StepTensors":
        """A step of rows that all only fill up."""
        numbers, tiles = (torch.int64, (tokens,)), [(torch.int32, (tokens, columns)) for columns in (4, 3)]
        layout = [numbers, numbers, numbers, numbers, *tiles]
        sizes = [prod(shape) * dtype.itemsize for dtype, shape in layout]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        memory = torch.zeros(sum(padded), dtype=torch.uint8, device=device)
        tensors = [
            part[:size].view(dtype).view(shape)
            for part, size, (dtype, shape) in zip(memory.split(padded), sizes, layout, strict=True)
        ]
        step = cls(memory, *tensors)
        step.fill_up(0, 0)
        return step

    def fill_up(self, tokens: int, lora_tiles: int) -> None:
        """Make rows and tiles from these numbers on such that they touch nothing."""
        self.slot_mapping[tokens:] = _NOWHERE
        self.attention_tiles[tokens:] = 0
        self.lora_tiles[lora_tiles:, 0] = _NOWHERE

    def write(self, step: StepInputs) -> None:
        """Take over a step in which all requests decode."""
        attention, segments = step.attention, step.lora.segments
        tokens = len(step.token_ids)
        self.token_ids[:tokens] = step.token_ids
        self.positions[:tokens] = step.positions
        self.slot_mapping[:tokens] = attention.slot_mapping
        _put(self.attention_tiles, [(row, row, 1, length - 1) for row, length in enumerate(attention.context_lens)])
        _put(self.adapter_slots, [segment.slot for segment in segments])
        lora_tiles = cut([segment._replace(slot=index) for index, segment in enumerate(segments)], DECODE_TOKENS)
        _put(self.lora_tiles, lora_tiles)
        self.fill_up(tokens, len(lora_tiles))


class DecodeStep:
    """Steps of a bucket, all with adapters or all without: buffers on the device, and what is computed from them."""

    def __init__(
        self, forward: Callable[[StepInputs], Tensor], tokens: int, largest: StepInputs, *, has_adapters: bool
    ) -> None:
        attention, self._lora = largest.attention, largest.lora
        device, table = self._lora.arena.device, self._lora.table
        self._host = StepTensors.allocate(tokens, torch.device("cpu"))
        self._device = StepTensors.allocate(tokens, device)
        max_blocks = attention.block_tables.shape[1]
        self._block_tables = torch.zeros(tokens, max_blocks, dtype=torch.int32, device=device)
        self._table = torch.zeros(table.shape[0], tokens, table.shape[2], dtype=table.dtype, device=device)
        batch = DecodeBatch(
            query_starts=tuple(range(tokens + 1)),
            context_lens=(max(attention.context_lens),) * tokens,
            block_tables=self._block_tables,
            slot_mapping=self._device.slot_mapping,
            tiles=self._device.attention_tiles,
        )
        lora = self._with_adapters() if has_adapters else LoraBatch(self._lora.arena, self._table, ())
        inputs = StepInputs(self._device.token_ids, self._device.positions, batch, lora)
        self._run: Callable[[], Tensor] = partial(forward, inputs)

    def check_never_waits(self) -> None:
        """Raise NotCapturable if an op waits for the device, which would spoil a capture."""
        self._run()  # what is set up by the first call may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._run()
        except RuntimeError as error:
            raise NotCapturable(str(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def capture(self, pool: object) -> None:
        """Make a CUDA graph of it, in the memory of `pool`; raise NotCapturable if that fails."""
        try:
            self._run = CapturedGraph(self._run, pool)
        except RuntimeError as error:
            torch.cuda.synchronize()  # fails where the device can compute nothing any more, which must not be hidden
            raise NotCapturable(str(error.__context__ or error)) from error  # to end a failed capture fails once more

    def __call__(self, step: StepInputs) -> Tensor:
        """What `forward` makes of a step, [T, …]."""
        self._host.write(step)
        # Of memory that is not pinned, the driver has a copy of its own by the time these return.
        self._device.memory.copy_(self._host.memory, non_blocking=True)
        rows, blocks = step.attention.block_tables.shape
        self._block_tables[:rows, :blocks].copy_(step.attention.block_tables, non_blocking=True)
        if step.lora.segments:
            torch.index_select(step.lora.table, 1, self._device.adapter_slots, out=self._table)
        return self._run()[: len(step.token_ids)]

    def _with_adapters(self) -> DecodeLoraBatch:
        """The adapters of a step, in a table of their own: the pool's may grow, and lie elsewhere then."""
        return DecodeLoraBatch(
            self._lora.arena,
            self._table,
            segments=(),
            max_rank=MAX_RANK,
            alignment=self._lora.alignment,
            is_int8=self._lora.is_int8,
            tiles=self._device.lora_tiles,
        )


class DecodeGraphs:
    """`forward`, for any step: by graphs if all of its requests decode, else op by op."""

    def __init__(self, forward: Callable[[StepInputs], Tensor], largest: StepInputs) -> None:
        """Capture all sizes up to `largest`, which `reference.record` describes, and compile what prefill needs.

        Raises NotCapturable if an op of `forward` asks the host what is in a step or waits for the device, or if a
        capture fails for another reason.
        """
        self._forward = forward
        self._device = largest.lora.arena.device
        self._max_blocks = largest.attention.block_tables.shape[1]
        self._buckets = buckets_for(len(largest.attention.context_lens))
        self._steps = {
            (tokens, has_adapters): DecodeStep(forward, tokens, largest, has_adapters=has_adapters)
            for tokens in reversed(self._buckets)
            for has_adapters in (False, True)
        }
        if self._device.type == "cuda":
            for prefill in prefill_steps(largest):
                forward(prefill)
            self._steps[self._buckets[-1], True].check_never_waits()
            gc.collect()  # what is garbage may hold memory of the device, and captures do not collect it
            pool = torch.cuda.graph_pool_handle()
            for step in self._steps.values():  # the largest first, whose memory the others find free again
                step.capture(pool)

    def __call__(self, step: StepInputs) -> Tensor:
        """What `forward` makes of a step; it lasts until the next."""
        if not self._has_graph(step):
            return self._forward(step.to(self._device))
        bucket = self._buckets[bisect_left(self._buckets, len(step.token_ids))]
        return self._steps[bucket, bool(step.lora.segments)](step)

    def _has_graph(self, step: StepInputs) -> bool:
        tokens, lora = len(step.token_ids), step.lora
        return (
            len(step.attention.context_lens) == tokens <= self._buckets[-1]
            and step.attention.block_tables.shape[1] <= self._max_blocks
            and step.replaced is None
            and (not lora.segments or (lora.max_rank is not None and lora.max_rank <= MAX_RANK))
        )


def prefill_steps(largest: StepInputs) -> Iterator[StepInputs]:
    """Steps that between them use all kernels of prefill, and so have them compiled; they write nothing anywhere.

    Each has a request of one token, and one of all other tokens, under an adapter of rank 0.
    """
    lora, device = largest.lora, largest.lora.arena.device
    longest = max(largest.attention.context_lens)
    max_blocks = largest.attention.block_tables.shape[1]
    nobody = torch.zeros(lora.table.shape[0], 1, lora.table.shape[2], dtype=lora.table.dtype, device=device)
    most = min(len(largest.token_ids), longest)
    for tokens in sorted({most, *(size for size in _PREFILL_TOKENS if size < most)}):
        numbers = torch.zeros(tokens, dtype=torch.int64, device=device)
        segments = (Segment(0, 0, 1), Segment(0, 1, tokens))
        for context_len in sorted({tokens, longest}):
            attention = AttentionBatch(
                query_starts=(0, 1, tokens),
                context_lens=(context_len, context_len),
                block_tables=torch.zeros(2, max_blocks, dtype=torch.int32, device=device),
                slot_mapping=torch.full_like(numbers, _NOWHERE),
            )
            adapters = replace(lora, table=nobody, segments=segments, max_rank=MAX_RANK)
            yield StepInputs(numbers, numbers, attention, adapters)


def _put(target: Tensor, rows: Sequence[object]) -> None:
    """Write rows, of which there may be none, to the first of the target's."""
    if rows:
        target[: len(rows)] = torch.tensor(rows, dtype=target.dtype)
