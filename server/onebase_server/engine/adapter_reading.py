"""What a request is pinned to, from blobs to an adapter in the canonical form."""

from pathlib import Path

from onebase_adapters.adapter import Adapter
from onebase_adapters.adapter_merging import MergeRecipe, WeightedAdapter, merge_adapters
from onebase_adapters.blobs import read_blob
from onebase_server.engine.request import AdapterRef

_EXACT_SUM = MergeRecipe("cat")


def read_adapter(ref: AdapterRef) -> Adapter:
    """A version as it lies on disk; a combination as the one adapter that is the exact sum of its parts.

    So a combination costs a step what an adapter of the sum of the ranks costs: its A lie side by side, as do its B,
    and its rows have one segment.

    Raises:
        StoreError: a blob is missing or damaged.
        InvalidMerge: a part of a combination is not a LoRA.
    """
    if not ref.is_combination:
        return read_blob(Path(ref.parts[0].path))
    parts = [WeightedAdapter(read_blob(Path(part.path)), part.weight) for part in ref.parts]
    return merge_adapters(parts, _EXACT_SUM)
