"""Resident adapters: which are in device memory, where, and which leave when room is needed.

One flat arena holds them all; an adapter is one contiguous extent of just the numbers it has, so that ranks mix without
padding (the unified pool of S-LoRA, arXiv 2311.03285, without its pages: the arena is compacted instead). Blobs are
read on a thread, while steps go on. It knows adapters by digest only: names and versions are the store's business.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import onebase_kernels as kernels
from onebase_server.engine.blob_loader import BlobLoader
from onebase_server.engine.blob_packing import BlobPacker
from onebase_server.engine.extents import Extents
from onebase_server.engine.matrix_format import MatrixFormat
from onebase_server.engine.norm_packing import PackedNorms
from onebase_server.engine.packing import PackedAdapter
from onebase_server.engine.request import AdapterRef
from onebase_server.engine.scheduler import AdapterMemoryFull, AdapterUnusable
from onebase_server.engine.vocabulary_packing import PackedVocabulary
from onebase_server.model.config import ModelConfig
from onebase_server.model.decoder_weights import DecoderNorms
from onebase_server.model.linear import LinearGroup
from onebase_server.model.vocabulary import AdapterVocabulary

MAX_RETIRED = 4096
"""Retired versions that are remembered, for requests that were admitted before and arrive after."""


@dataclass(slots=True)
class Resident:
    """An adapter in the arena."""

    digest: str
    slot: int
    offset: int
    size: int
    table: torch.Tensor
    """As in `PackedAdapter`; so are the next ones."""
    vocabulary: PackedVocabulary | None
    norms: PackedNorms | None
    versions: frozenset[str]
    """Digests of what it was made of: its own, or those of a combination's parts."""
    num_users: int = 0


class AdapterPool:
    """A budget of bytes on the device, shared by adapters of any rank and any subset of the projections."""

    def __init__(
        self,
        config: ModelConfig,
        base: Sequence[LinearGroup],
        base_norms: DecoderNorms,
        budget_bytes: int,
        matrix_format: MatrixFormat,
        device: torch.device,
        *,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """`base` holds the base's groups by place, for adapters that are computed against its weights; `base_norms` its
        norms, for adapters that replace some."""
        self.config = config
        self._base_norms = base_norms
        self.dtype = matrix_format.dtype
        self.is_int8 = matrix_format.is_int8
        self.arena = kernels.allocate((budget_bytes // self.dtype.itemsize,), self.dtype, device)
        self.table = torch.zeros(
            config.num_layers,
            len(config.projection_groups),
            16,
            kernels.TABLE_COLUMNS,
            dtype=torch.int64,
            device=device,
        )
        self.vocabularies: dict[int, AdapterVocabulary] = {}
        """By slot, of the adapters that change the base's."""
        self.norms: dict[int, DecoderNorms] = {}
        """By slot, all norms under an adapter that replaces some."""
        self.max_rank = 1
        """The most ranks that an adapter has had at one place so far, all slices of the group together."""
        self.alignment = matrix_format.alignment(config)
        """Numbers: what every place in the arena begins at a multiple of."""
        self.num_attaches = 0
        self.num_evictions = 0
        self.bytes_touched = 0
        """Bytes of the arena below the highest place that an adapter has had; what is above was never written."""
        self._extents = Extents(self.arena.numel())
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._retired: OrderedDict[str, None] = OrderedDict()  # the longest retired first
        self._free_slots = list(range(self.table.shape[2]))
        self._packer = BlobPacker(config, matrix_format, base)
        self._loader = BlobLoader(self._load, on_loaded)

    def __repr__(self) -> str:
        return f"AdapterPool(resident={len(self._resident)}, loading={len(self._loader)}, {self._extents!r})"

    @property
    def bytes_used(self) -> int:
        """Bytes of the arena that adapters fill."""
        return self._extents.used * self.dtype.itemsize

    @property
    def bytes_total(self) -> int:
        """The budget."""
        return self._extents.total * self.dtype.itemsize

    @property
    def num_resident(self) -> int:
        """Adapters in the arena."""
        return len(self._resident)

    def is_ready(self, adapter: AdapterRef) -> bool:
        """Whether `acquire` need not wait for the adapter's blob, which is read from now on if it was not before."""
        return adapter.digest in self._resident or self._loader.is_ready(adapter)

    def acquire(self, adapter: AdapterRef) -> int:
        """Pin an adapter and return its slot.

        Raises AdapterLoading while its blob is read, AdapterMemoryFull while pinned adapters leave no room for it,
        AdapterUnusable if it can never run here.
        """
        resident = self._resident.get(adapter.digest) or self._admit(adapter)
        resident.num_users += 1
        self._resident.move_to_end(adapter.digest)
        return resident.slot

    def release(self, digest: str) -> None:
        """Undo one `acquire`; an adapter of which a version is retired leaves with its last user."""
        resident = self._resident[digest]
        resident.num_users -= 1
        assert resident.num_users >= 0, f"adapter {digest[:12]} was released too often"
        if resident.num_users == 0 and not self._retired.keys().isdisjoint(resident.versions):
            self._remove(resident)

    def withdraw(self, digest: str) -> None:
        """A sequence that waited for this adapter is gone: do not keep its bytes waiting for room."""
        self._loader.drop(digest)

    def retire(self, digest: str) -> None:
        """An adapter version is no longer live: its memory is free as soon as nobody uses it, alone or combined."""
        self._retired[digest] = None
        if len(self._retired) > MAX_RETIRED:
            self._retired.popitem(last=False)
        self._loader.drop(digest)
        for resident in list(self._resident.values()):
            if digest in resident.versions and resident.num_users == 0:
                self._remove(resident)

    def revive(self, digest: str) -> None:
        """An adapter version is live (again)."""
        self._retired.pop(digest, None)

    def _admit(self, adapter: AdapterRef) -> Resident:
        """Take a blob that has been read into the arena, or have it read."""
        with self._loader.loaded(adapter) as packed:
            offset = self._find_room(packed.numbers.numel())
        return self._place(adapter, packed, offset)

    def _load(self, adapter: AdapterRef) -> PackedAdapter:
        packed = self._packer.pack(adapter)
        return replace(packed, numbers=packed.numbers.pin_memory()) if self.arena.is_cuda else packed

    def _find_room(self, size: int) -> int:
        """An extent for `size` numbers, sending idle adapters away and closing gaps as far as needed."""
        if size > self._extents.total:
            raise AdapterUnusable(
                f"it needs {size * self.dtype.itemsize} bytes and the whole adapter memory has {self.bytes_total}; "
                "raise --adapter-memory."
            )
        idle = [resident for resident in self._resident.values() if resident.num_users == 0]
        if self._extents.free + sum(resident.size for resident in idle) < size:
            raise AdapterMemoryFull
        while self._extents.free < size:
            self._remove(idle.pop(0))
            self.num_evictions += 1
        offset = self._extents.allocate(size)
        if offset is None:
            self._compact()
            offset = self._extents.allocate(size)
        assert offset is not None, "after compaction all free numbers are one extent"
        return offset

    def _place(self, adapter: AdapterRef, packed: PackedAdapter, offset: int) -> Resident:
        if not self._free_slots:
            self._grow_table()
        versions = frozenset(part.digest for part in adapter.parts)
        resident = Resident(
            digest=adapter.digest,
            slot=self._free_slots.pop(),
            offset=offset,
            size=packed.numbers.numel(),
            table=packed.table,
            vocabulary=packed.vocabulary,
            norms=packed.norms,
            versions=versions,
        )
        self.arena[offset : offset + resident.size].copy_(packed.numbers, non_blocking=True)
        self.bytes_touched = max(self.bytes_touched, (offset + resident.size) * self.dtype.itemsize)
        self._point_to(resident)
        self._resident[adapter.digest] = resident
        self.max_rank = max(self.max_rank, packed.max_rank)
        self.num_attaches += 1
        return resident

    def _remove(self, resident: Resident) -> None:
        del self._resident[resident.digest]
        self._extents.release(resident.offset)
        self.vocabularies.pop(resident.slot, None)
        self.norms.pop(resident.slot, None)
        self._free_slots.append(resident.slot)

    def _compact(self) -> None:
        """Close the gaps between extents; nothing computes between two steps, so tables and numbers change together."""
        moved = {move.source: move.target for move in self._extents.compact()}
        for resident in sorted(self._resident.values(), key=lambda r: r.offset):
            target = moved.get(resident.offset)
            if target is not None:
                numbers = self.arena[resident.offset : resident.offset + resident.size].clone()
                self.arena[target : target + resident.size] = numbers
                resident.offset = target
                self._point_to(resident)

    def _point_to(self, resident: Resident) -> None:
        """Let the table, vocabulary and norms point to where the adapter lies."""
        table = resident.table.clone()
        table[..., 0] += resident.offset
        self.table[:, :, resident.slot] = table
        numbers = self.arena[resident.offset : resident.offset + resident.size]
        if resident.vocabulary is not None:
            self.vocabularies[resident.slot] = resident.vocabulary.of(numbers)
        if resident.norms is not None:
            self.norms[resident.slot] = resident.norms.of(numbers, self._base_norms, self.config)

    def _grow_table(self) -> None:
        slots = self.table.shape[2]
        self.table = torch.cat([self.table, torch.zeros_like(self.table)], dim=2)
        self._free_slots = list(range(slots, 2 * slots))

    def check(self) -> None:
        """Raise AssertionError unless residents, extents and slots agree."""
        self._extents.check()
        assert sum(resident.size for resident in self._resident.values()) == self._extents.used, repr(self)
        slots = [resident.slot for resident in self._resident.values()] + self._free_slots
        assert sorted(slots) == list(range(self.table.shape[2])), f"{self!r}: slots {sorted(slots)}"
