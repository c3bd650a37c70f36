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
from typing import get_args

import torch
from torch import Tensor

from onebase_kernels import Int4Weight
from onebase_kernels.int4 import GROUP_SIZES
from onebase_server.errors import ConfigurationError
from onebase_server.model.quantization_config import PackedInt4

_PER_WORD = 8
_IN_ORDER = range(_PER_WORD)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ONE_EACH = 0x11111111
"""1 for each of a word's numbers; added as a word, for so the tools took it away."""


def tensor_names(weight_name: str, names: Collection[str]) -> list[str]:
    """The tensors that the weight consists of; none where it is in another format."""
    module = weight_name.removesuffix(".weight")
    parts = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
    return [name for name in parts if name in names] if parts[0] in names else []


def from_tensors(weight_name: str, tensors: Mapping[str, Tensor], layout: str | None) -> Int4Weight:
    """The weight that those tensors describe in that `PackedInt4`.

    Raises:
        ConfigurationError: the layout is none of these, a part is missing, has another dtype or shape, or groups are of
            a size or an order that int4 does not have.
    """
    module = weight_name.removesuffix(".weight")
    if layout is None or layout not in get_args(PackedInt4):
        raise ConfigurationError(
            f"{module} is packed as GPTQ and AWQ do, but the quantization_config in config.json does not say so."
        )
    try:
        qweight, qzeros, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    except KeyError as error:
        raise ConfigurationError(f"{module} is not complete: {error.args[0]} is missing.") from None
    in_features = qweight.shape[0] * (1 if layout == "awq" else _PER_WORD)
    _check_parts(module, layout, qweight, qzeros, scales)
    _refuse_other_order(module, tensors.get(f"{module}.g_idx"), in_features // scales.shape[0])
    if layout == "gptq":
        qzeros = qzeros + _ONE_EACH
    order = _AWQ_ORDER if layout == "awq" else _IN_ORDER
    zeros = _unpack(qzeros, order).T
    codes = _unpack(qweight, order).T if layout == "awq" else _unpack(qweight.T, order)
    scales = scales.half().T
    minimums = -(scales.float() * zeros)
    group_size, repeats = _groups(module, in_features // scales.shape[1])
    return Int4Weight(
        codes=((codes[:, ::2] << 4) | codes[:, 1::2]).contiguous(),
        scales=scales.repeat_interleave(repeats, dim=1),
        minimums=minimums.repeat_interleave(repeats, dim=1),
        shape=(codes.shape[0], in_features),
        group_size=group_size,
    )


def _unpack(words: Tensor, order: Sequence[int]) -> Tensor:
    """The numbers of int32 words [rows, columns], as uint8 [rows, 8 · columns]; `order[i]` is the place of nibble i."""
    numbers = torch.empty(*words.shape, _PER_WORD, dtype=torch.uint8)
    for nibble, place in enumerate(order):
        numbers[..., place] = (words >> (4 * nibble)) & 0xF
    return numbers.flatten(1)


def _check_parts(module: str, layout: str, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> None:
    words_of_outputs = qweight.shape[1] if layout == "awq" else qweight.shape[1] // _PER_WORD
    groups = scales.shape[0]
    in_features = qweight.shape[0] * (1 if layout == "awq" else _PER_WORD)
    fits = (
        scales.shape[1] == words_of_outputs * _PER_WORD
        and qzeros.shape == (groups, words_of_outputs)
        and groups > 0
        and in_features % groups == 0
    )
    if not fits or qweight.dtype != torch.int32 or qzeros.dtype != torch.int32:
        found = ", ".join(
            f"{name} {str(part.dtype).removeprefix('torch.')} {list(part.shape)}"
            for name, part in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales))
        )
        raise ConfigurationError(f"{module} is no 4-bit weight in {layout}'s layout: it has {found}.")
    if not scales.half().isfinite().all():
        raise ConfigurationError(f"{module}.scales has numbers that float16 cannot hold.")


def _refuse_other_order(module: str, g_idx: Tensor | None, group_size: int) -> None:
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(len(g_idx)) // group_size):
        raise ConfigurationError(
            f"{module}.g_idx: the inputs of a group are not neighbours (desc_act, GPTQ's activation order), and int4 "
            "has no other groups. Use a checkpoint that was quantised with desc_act = false."
        )


def _groups(module: str, stored: int) -> tuple[int, int]:
    """The size of int4's groups, and how many of them one of the checkpoint's (or a whole row) becomes."""
    for size in sorted(GROUP_SIZES, reverse=True):
        if stored % size == 0:
            return size, stored // size
    raise ConfigurationError(f"{module}: {stored} inputs share a scale; multiples of {min(GROUP_SIZES)} are carried.")
