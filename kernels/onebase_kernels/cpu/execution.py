"""How calls of the C++ ops happen: at once, or written down to be run again and again as a program.

A program is what CUDA graphs are on a GPU: the ops of a whole step, recorded once, then run with nothing between them.
It knows calls, buffers and steps, but not what any op computes.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import onebase_kernels.cpu.memory as huge_pages
from onebase_kernels.batch import TABLE_COLUMNS, AttentionBatch, LoraBatch, ReplacedRows, StepInputs
from onebase_kernels.cpu.calls import Call, Op, Pointer, Step
from onebase_kernels.cpu.library import load_library

_ALIGNMENT = 64
_EMPTY = torch.ops.aten.empty.memory_format


class NotRecordable(Exception):
    """Something besides the ops computed while a program was recorded; the text says what."""


library = load_library()
"""The variant that computes."""

_recording: "_Recording | None" = None


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for an op's result; in a program, memory that later ops may share once the result is used up."""
    result = torch.empty(shape, dtype=dtype)
    if _recording is not None:
        _recording.buffers.append(result)
    return result


def run(call: Call, step: Step) -> None:
    """Have an op compute; while recording, write it down instead."""
    if _recording is not None:
        _recording.calls.append(call)
    else:
        getattr(library, call.op)(ctypes.byref(call), ctypes.byref(step))


class _Recording:
    """What is written down."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.buffers: list[Tensor] = []


class Program:
    """The ops of a step of up to `max_rows` tokens. Not to be run by two threads at once: its memory is its own."""

    def __init__(self, calls: Sequence[Call], output: Tensor, memory: Tensor, keep: object) -> None:
        """`memory` is where all results lie, `keep` whatever else the calls point into."""
        self.max_rows = output.shape[0]
        self.nbytes = memory.nbytes
        """Bytes of all results."""
        self._calls = calls
        self._output = output
        self._keep = keep
        self._ops = (Op * len(calls))(
            *(Op(ctypes.cast(getattr(library, call.op), Pointer), ctypes.addressof(call)) for call in calls)
        )

    def __call__(self, inputs: StepInputs) -> Tensor:
        """The last op's result, [T, …]; it lasts until the next step."""
        rows = inputs.token_ids.shape[0]
        if rows > self.max_rows:
            raise ValueError(f"A step of {rows} tokens; this program carries {self.max_rows}.")
        library.onebase_run_program(self._ops, len(self._ops), ctypes.byref(step_of(inputs)))
        return self._output[:rows]


def record(forward: Callable[[StepInputs], Tensor], max_rows: int) -> Program:
    """What `forward` has the ops compute for a step, as a program for any step of up to `max_rows` tokens.

    `forward` is called once, on inputs that stand for every step's: it must neither read them nor compute anything
    but by the ops, and all its results but the last must be made by them. Raises NotRecordable if it does.
    """
    global _recording
    _recording = recording = _Recording()
    try:
        with _only_ops():
            output = forward(_any_inputs(max_rows))
    finally:
        _recording = None
    return Program(recording.calls, *_lay_out(recording, output), keep=forward)


def step_of(inputs: StepInputs) -> Step:
    """The step as C++ gets it; what it points to lives as long as it does."""
    attention, lora = inputs.attention, inputs.lora
    step = attention_step(attention)
    step.rows = inputs.token_ids.shape[0]
    step.token_ids = inputs.token_ids.data_ptr()
    step.positions = inputs.positions.data_ptr()
    add_segments(step, lora)
    add_replaced(step, inputs.replaced)
    return step


def attention_step(batch: AttentionBatch) -> Step:
    """The part of a step that attention and the KV cache need."""
    starts, lengths = _int64s(batch.query_starts), _int64s(batch.context_lens)
    step = Step(
        rows=batch.slot_mapping.shape[0],
        slot_mapping=batch.slot_mapping.data_ptr(),
        num_requests=len(batch.context_lens),
        query_starts=ctypes.addressof(starts),
        context_lens=ctypes.addressof(lengths),
        block_tables=batch.block_tables.data_ptr(),
        table_width=batch.block_tables.shape[1],
    )
    step.kept = (starts, lengths, batch)
    return step


def add_segments(step: Step, lora: LoraBatch) -> None:
    """The part of a step that the side path needs."""
    segments = _int64s([number for segment in lora.segments for number in segment])
    step.num_segments = len(lora.segments)
    step.segments = ctypes.addressof(segments)
    step.arena = lora.arena.data_ptr()
    step.adapter_table = lora.table.data_ptr()
    step.slots = lora.table.shape[1]
    step.adapters_are_int8 = lora.is_int8
    step.kept_segments = (segments, lora)


def add_replaced(step: Step, replaced: ReplacedRows | None) -> None:
    """The part of a step that says which embeddings are not the table's."""
    if replaced is not None:
        step.num_replaced = replaced.rows.shape[0]
        step.replaced_rows = replaced.rows.data_ptr()
        step.replacements = replaced.vectors.data_ptr()
        step.kept_replaced = replaced


def _int64s(values: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(values))(*values)


def _any_inputs(rows: int) -> StepInputs:
    """Inputs that are not there: one request without adapters, whose tensors nobody may read."""
    tokens = torch.empty(rows, dtype=torch.int64)
    table = torch.empty(1, 1, dtype=torch.int32)
    attention = AttentionBatch(query_starts=(0, rows), context_lens=(rows,), block_tables=table, slot_mapping=tokens)
    lora = LoraBatch(arena=torch.empty(0), table=torch.empty(0, 0, TABLE_COLUMNS, dtype=torch.int64), segments=())
    return StepInputs(token_ids=tokens, positions=tokens, attention=attention, lora=lora)


class _OnlyOps(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch types neither this nor its constructor
    """Lets torch make views and empty tensors, and nothing else."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch's way of skipping its compiler is to import it first, which costs 100 MiB and a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func is _EMPTY):
            raise NotRecordable(f"{func} ran beside the ops")
        return func(*args, **(kwargs or {}))


@contextmanager
def _only_ops() -> Iterator[None]:
    with torch.inference_mode(), _OnlyOps():  # type: ignore[no-untyped-call] # see there
        yield


# Memory: results of a step live from the op that makes them to the last one that reads them.


@dataclass
class _Buffer:
    """One result: where it was while recording, and where it will be."""

    tensor: Tensor
    first: int
    last: int
    offset: int = 0

    @property
    def size(self) -> int:
        return -(-self.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

    @property
    def addresses(self) -> range:
        return range(self.tensor.data_ptr(), self.tensor.data_ptr() + self.tensor.nbytes)


def _lay_out(recording: _Recording, output: Tensor) -> tuple[Tensor, Tensor]:
    """Move all results into one piece of memory, where those that do not live at the same time may overlap.

    Returns the output in it, and all of it.
    """
    buffers = _lifetimes(recording, output)
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda buffer: buffer.first):
        buffer.offset = _lowest_gap(buffer, placed)
        placed.append(buffer)
    memory = huge_pages.empty((max(buffer.offset + buffer.size for buffer in buffers),), torch.uint8)
    for call in recording.calls:
        for field, address in _pointers(call):
            if (home := _home(address, buffers)) is not None:
                setattr(call, field, memory.data_ptr() + home.offset + address - home.addresses.start)
    home = _home(output.data_ptr(), buffers)
    if home is None:
        raise NotRecordable("the result was not made by an op")
    return memory[home.offset : home.offset + output.nbytes].view(output.dtype).view(output.shape), memory


def _lifetimes(recording: _Recording, output: Tensor) -> list[_Buffer]:
    buffers = [_Buffer(tensor, first=len(recording.calls), last=-1) for tensor in recording.buffers]
    for index, call in enumerate(recording.calls):
        for _, address in _pointers(call):
            if (home := _home(address, buffers)) is not None:
                home.first, home.last = min(home.first, index), index
    if (home := _home(output.data_ptr(), buffers)) is not None:
        home.last = len(recording.calls)
    return buffers


def _pointers(call: Call) -> Iterator[tuple[str, int]]:
    for name, kind in call._fields_:
        if kind is Pointer and (address := getattr(call, name)) is not None:
            yield name, address


def _home(address: int, buffers: Sequence[_Buffer]) -> _Buffer | None:
    return next((buffer for buffer in buffers if address in buffer.addresses), None)


def _lowest_gap(buffer: _Buffer, placed: Sequence[_Buffer]) -> int:
    """The lowest offset at which no buffer that lives at the same time is in the way."""
    offset = 0
    for other in sorted(placed, key=lambda other: other.offset):
        lives_too = other.last >= buffer.first and other.first <= buffer.last
        if lives_too and other.offset < offset + buffer.size and offset < other.offset + other.size:
            offset = other.offset + other.size
    return offset


def are_plain(*tensors: Tensor) -> bool:
    """Whether memory is what the shape says: no gaps, no transposition."""
    return all(tensor.is_contiguous() for tensor in tensors)
