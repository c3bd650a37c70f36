"""4-bit integers as the tools of GPTQ and of AWQ write them to safetensors, read into int4.

For a linear `p`: `p.qweight`, `p.qzeros` (int32, eight numbers to a word), `p.scales` [in / group, out], and of GPTQ
mostly `p.g_idx` [in], the group of each input. A weight is `scale · (code - zero)`, so its minimum is `-scale · zero`,
which fp32 holds exactly.

| | words of `qweight` | order in a word, from the lowest bits | zeros |
|---|---|---|---|
| `gptq` | eight inputs: [in / 8, out] | 0 1 2 3 4 5 6 7 | stored minus one |
| `gptq_v2` | the same | the same | as they are |
| `awq` (gemm) | eight outputs: [in, out / 8] | 0 2 4 6 1 3 5 7 | as they are |

`qzeros` is [in / group, out / 8] in all, in the order of each. (AutoGPTQ, GPTQModel; AutoAWQ's `WQLinear_GEMM`.)
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onebase_kernels import Int4Weight
from onebase_kernels.int4 import GROUP_SIZES
from onebase_server.errors import ConfigurationError

_PER_WORD = 8


class _Layout(NamedTuple):
    """A row of the table above."""

    packs_inputs: bool
    """Whether a word of `qweight` holds eight inputs of an output; else it holds eight outputs of an input."""
    order: Sequence[int]
    """Which of the eight each nibble is."""
    offset: int = 0
    """What was taken from the words of `qzeros`, as words."""


_LAYOUTS: Mapping[str, _Layout] = {
    "gptq": _Layout(True, range(_PER_WORD), 0x11111111),
    "gptq_v2": _Layout(True, range(_PER_WORD)),
    "awq": _Layout(False, (0, 2, 4, 6, 1, 3, 5, 7)),
}


def tensor_names(weight_name: str, names: Collection[str]) -> list[str]:
    """The tensors that the weight consists of; none where it is in another format."""
    module = weight_name.removesuffix(".weight")
    parts = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
    return [name for name in parts if name in names] if parts[0] in names else []


def from_tensors(weight_name: str, tensors: Mapping[str, Tensor], quantization: str | None) -> Int4Weight:
    """The weight that those tensors describe, in the layout that `ModelConfig.quantization` names.

    Raises:
        ConfigurationError: it names none, a part is missing, has another dtype or shape, or groups are of a size or an
            order that int4 does not have.
    """
    module = weight_name.removesuffix(".weight")
    layout = _LAYOUTS.get(quantization or "")
    if layout is None:
        raise ConfigurationError(
            f"{module} is packed as GPTQ and AWQ do, but the quantization_config in config.json does not say so."
        )
    try:
        qweight, qzeros, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    except KeyError as error:
        raise ConfigurationError(f"{module} is not complete: {error.args[0]} is missing.") from None
    stored_size = _stored_group_size(module, layout, qweight, qzeros, scales)
    _refuse_other_order(module, tensors.get(f"{module}.g_idx"), stored_size)
    codes = _unpack(qweight.T, layout.order) if layout.packs_inputs else _unpack(qweight, layout.order).T
    zeros = _unpack(qzeros + layout.offset, layout.order).T
    scales = scales.half().T
    if not scales.isfinite().all():
        raise ConfigurationError(f"{module}.scales has numbers that float16 cannot hold.")
    minimums = -(scales.float() * zeros)
    group_size = _group_size(module, stored_size)
    repeats = stored_size // group_size
    return Int4Weight(
        codes=((codes[:, ::2] << 4) | codes[:, 1::2]).contiguous(),
        scales=scales.repeat_interleave(repeats, dim=1),
        minimums=minimums.repeat_interleave(repeats, dim=1),
        shape=(codes.shape[0], codes.shape[1]),
        group_size=group_size,
    )


def _unpack(words: Tensor, order: Sequence[int]) -> Tensor:
    """The numbers of int32 words [rows, columns], as uint8 [rows, 8 · columns]; nibble i is number `order[i]`."""
    numbers = torch.empty(*words.shape, _PER_WORD, dtype=torch.uint8)
    for nibble, place in enumerate(order):
        numbers[..., place] = (words >> (4 * nibble)) & 0xF
    return numbers.flatten(1)


def _stored_group_size(module: str, layout: _Layout, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> int:
    """How many inputs share a scale; raises ConfigurationError where the parts do not belong together."""
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    is_matrix = all(part.dim() == 2 and part.numel() for part in parts.values())
    is_packed = qweight.dtype == qzeros.dtype == torch.int32
    if is_matrix and is_packed:
        groups, out_features = scales.shape
        rows, columns = (_PER_WORD, 1) if layout.packs_inputs else (1, _PER_WORD)  # that a word of qweight stands for
        in_features = qweight.shape[0] * rows
        fits = qweight.shape[1] * columns == out_features == qzeros.shape[1] * _PER_WORD
        if fits and qzeros.shape[0] == groups and in_features % groups == 0:
            return in_features // groups
    found = ", ".join(
        f"{name} {str(part.dtype).removeprefix('torch.')} {list(part.shape)}" for name, part in parts.items()
    )
    raise ConfigurationError(f"{module} is no 4-bit weight in the layout that config.json says: it has {found}.")


def _refuse_other_order(module: str, g_idx: Tensor | None, group_size: int) -> None:
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(len(g_idx)) // group_size):
        raise ConfigurationError(
            f"{module}.g_idx: the inputs of a group are not neighbours (desc_act, GPTQ's activation order), and int4 "
            "has no other groups. Use a checkpoint that was quantised with desc_act = false."
        )


def _group_size(module: str, stored_size: int) -> int:
    """The largest size of int4's groups that makes whole ones of the checkpoint's."""
    for size in sorted(GROUP_SIZES, reverse=True):
        if stored_size % size == 0:
            return size
    raise ConfigurationError(
        f"{module}: {stored_size} inputs share a scale; multiples of {min(GROUP_SIZES)} are carried."
    )
