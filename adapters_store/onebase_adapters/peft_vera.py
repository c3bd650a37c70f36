"""A PEFT VeRA adapter to the canonical form (arXiv 2310.11454): LoRA whose matrices all modules share.

A module's own are two vectors, `y += λ_b ⊙ B (λ_d ⊙ A x)`. Multiplied into A and B these are plain LoRA's, in the
size that LoRA of that rank has.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adapter import Adapter, Array, LowRankPair, ModuleKey
from .base_layout import BaseLayout
from .errors import InvalidTensors, RankTooLarge
from .peft_config import PROVENANCE, positive_integer, refuse_options_beyond
from .peft_targets import TARGET_OPTIONS, Targets
from .peft_tensors import ADAPTER_NAME, ModuleTensors, checked, group_by_module

KNOWN_OPTIONS = (
    PROVENANCE
    | TARGET_OPTIONS
    | {"d_initial", "fan_in_fan_out", "init_weights", "peft_type", "r", "vera_dropout"}
    | {"projection_prng_key", "save_projection"}  # without saved projections the tensors lack
)

TENSORS = {"vera_lambda_b": rf"vera_lambda_b{ADAPTER_NAME}", "vera_lambda_d": rf"vera_lambda_d{ADAPTER_NAME}"}
Matrix = NDArray[np.float32]

SHARED = ("base_model.vera_A", "base_model.vera_B")


def read_vera(config: dict[str, Any], tensors: Mapping[str, Array], layout: BaseLayout, *, max_rank: int) -> Adapter:
    """Check an adapter of `peft_type` VERA against the base.

    Raises:
        InvalidConfig, UnsupportedAdapter: a field of `adapter_config.json`, which the text names.
        InvalidTensors: a tensor, which the text names, is missing or does not fit.
        RankTooLarge: `r` is over `max_rank`.
    """
    refuse_options_beyond(KNOWN_OPTIONS, config)
    rank, targets = positive_integer(config.get("r"), "r"), Targets.read(config)
    if rank > max_rank:
        raise RankTooLarge(f"r is {rank}, but this server allows at most {max_rank}.")
    if not set(SHARED) <= set(tensors):
        raise InvalidTensors(
            f"There are no {' and '.join(SHARED)}; random projections are not drawn anew from projection_prng_key. "
            "Save the adapter with save_projection=True."
        )
    modules = group_by_module({name: t for name, t in tensors.items() if name not in SHARED}, TENSORS, layout)
    most_inputs = max(module.in_features for module in modules)
    most_outputs = max(module.out_features for module in modules)
    shared_a, shared_b = tensors[SHARED[0]], tensors[SHARED[1]]
    # PEFT makes them as large as the largest module that was targeted, tensors or not
    shared_a = checked(SHARED[0], shared_a, (rank, max(most_inputs, *shared_a.shape[1:2])))
    shared_b = checked(SHARED[1], shared_b, (max(most_outputs, *shared_b.shape[:1]), rank))
    pairs: dict[ModuleKey, LowRankPair] = {}
    for module in modules:
        targets.require(module.name)
        pairs |= _pairs(module, shared_a.astype(np.float32), shared_b.astype(np.float32))
    return Adapter(pairs)


def _pairs(module: ModuleTensors, shared_a: Matrix, shared_b: Matrix) -> dict[ModuleKey, LowRankPair]:
    lambda_b = module.take("vera_lambda_b", module.out_features).astype(np.float32)
    lambda_d = module.take("vera_lambda_d", len(shared_a)).astype(np.float32)
    lora_a = lambda_d[:, None] * shared_a[:, : module.in_features]
    lora_b = lambda_b[:, None] * shared_b[: module.out_features]
    return {key: LowRankPair(lora_a, rows, 1.0) for key, rows in module.divide(lora_b)}
