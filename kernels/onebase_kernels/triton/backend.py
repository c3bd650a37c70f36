"""The ops on Triton kernels: what they do not carry (odd shapes, views with gaps) goes to the torch versions."""

import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from onebase_kernels import reference, sdpa_attention
from onebase_kernels.backends import why_not
from onebase_kernels.batch import AttentionBatch, FilePlan, LoraBatch, Matrix, StepInputs
from onebase_kernels.quantized import PackedWeights, QuantizedWeight
from onebase_kernels.triton import attention, elementwise
from onebase_kernels.triton import lora as side_path
from onebase_kernels.triton import nf4_linear as nf4
from onebase_kernels.triton.graphs import DecodeGraphs, NotCapturable, check_known_on_host
from onebase_kernels.triton.nf4_packing import FragmentNf4, can_pack, pack, unpack
from onebase_kernels.triton.plans import measured_plans

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pack_quantized(weights: Sequence[QuantizedWeight]) -> PackedWeights:
    """As `reference.pack_quantized`, in the order in which the tensor cores take their operand."""
    if not can_pack(weights):
        return reference.pack_quantized(weights)
    measured_plans(weights[0].codes.device)  # a file that is wrong is refused at load, not by the first request
    return pack(weights)


def record(forward: Callable[[StepInputs], Tensor], largest: StepInputs) -> Callable[[StepInputs], Tensor]:
    """As `reference.record`: steps in which all requests decode become CUDA graphs, for all sizes here and now.

    Where that cannot be, a warning says why, and all steps are computed op by op.
    """
    try:
        return DecodeGraphs(forward, largest)
    except NotCapturable as error:
        warnings.warn(f"There are no CUDA graphs for this model, and decoding is slower: {error}", stacklevel=2)
        return reference.record(forward, largest)


def unpack_quantized(packed: PackedWeights) -> tuple[QuantizedWeight, ...]:
    """As `reference.unpack_quantized`."""
    return unpack(packed) if isinstance(packed, FragmentNf4) else reference.unpack_quantized(packed)


def quantized_linear(x: Tensor, packed: PackedWeights, bias: Tensor | None = None) -> Tensor:
    """As `reference.quantized_linear`; up to 256 rows fused, beyond that through a few MiB of dequantised weights."""
    if not isinstance(packed, FragmentNf4):
        return reference.quantized_linear(x, packed, bias)
    return nf4.nf4_linear(x, packed, bias)


def head_logits(hidden: Tensor, head: Tensor | PackedWeights) -> Tensor:
    """As `reference.head_logits`."""
    if not isinstance(head, FragmentNf4):
        return reference.head_logits(hidden, head)
    return nf4.nf4_linear(hidden, head).float()


def start_lora(x: Tensor, lora: LoraBatch, place: int, widths: Sequence[int]) -> object:
    """As `reference.start_lora`: in a CUDA graph the shrink runs on a stream of its own."""
    is_carried = _are_alike(x, lora.arena) and _are_plain(x, lora.arena, lora.table)
    return side_path.start(x, lora, place) if is_carried else None


def add_lora_(y: Tensor, x: Tensor, lora: LoraBatch, place: int, widths: Sequence[int], started: object = None) -> None:
    """As `reference.add_lora_`, all segments and slices in two launches."""
    if not _are_alike(y, x, lora.arena) or not _are_plain(y, x, lora.arena, lora.table):
        check_known_on_host(lora)
        reference.add_lora_(y, x, lora, place, widths)
        return
    side_path.add_lora_(y, x, lora, place, widths, started if isinstance(started, Tensor) else None)


def copy_matrices_(target: Tensor, matrices: Sequence[Matrix]) -> None:
    """As `reference.copy_matrices_`."""
    _on_host().copy_matrices_(target, matrices)


def copy_file_matrices_(target: Tensor, file: Tensor, plan: FilePlan) -> None:
    """As `reference.copy_file_matrices_`."""
    _on_host().copy_file_matrices_(target, file, plan)


def _on_host() -> ModuleType:
    """The back end for what is computed on the host: the C++ ops where these are built."""
    if why_not("cpu", "cpu"):
        return reference
    from onebase_kernels.cpu import backend as cpu  # here, for it cannot be imported where they are not built

    return cpu


def write_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """As `reference.write_kv_`; slot -1 is written nowhere."""
    is_plain = _have_plain_tokens(k, v) and _are_plain(k_cache, v_cache, batch.slot_mapping)
    if not is_plain or not _are_alike(k, v, k_cache, v_cache):
        check_known_on_host(batch)
        reference.write_kv_(k, v, k_cache, v_cache, batch)
        return
    elementwise.write_kv_(k, v, k_cache, v_cache, batch)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `reference.paged_attention`, on the cache as it lies: nothing is gathered."""
    is_plain = _have_plain_tokens(q) and _are_plain(k_cache, v_cache, batch.block_tables)
    if not is_plain or not _are_alike(q, k_cache, v_cache):
        check_known_on_host(batch)
        return sdpa_attention.paged_attention(q, k_cache, v_cache, batch, scale, window, softcap)
    return attention.paged_attention(q, k_cache, v_cache, batch, scale, window, softcap)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    is_plain = (x.ndim == 2 and x.stride(1) == 1) or (x.ndim == 3 and _have_plain_tokens(x))
    if not is_plain or not _are_plain(weight) or not _are_alike(x, weight):
        return reference.rms_norm(x, weight, eps)
    return elementwise.rms_norm(x, weight, eps)


def add_rms_norm_(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.add_rms_norm_`, in one launch."""
    if not _are_plain(hidden, delta, weight) or not _are_alike(hidden, delta, weight):
        return reference.add_rms_norm_(hidden, delta, weight, eps)
    return elementwise.add_rms_norm_(hidden, delta, weight, eps)


def apply_rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """As `reference.apply_rope_`, q and k in one launch."""
    if not _have_plain_tokens(q, k) or not _are_plain(cos, sin, positions) or not _are_alike(q, k):
        reference.apply_rope_(q, k, cos, sin, positions)
        return
    elementwise.apply_rope_(q, k, cos, sin, positions)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `reference.silu_mul`."""
    if not _are_plain(gate_up) or not _are_alike(gate_up):
        return reference.silu_mul(gate_up)
    return elementwise.silu_mul(gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """As `reference.gelu_mul`."""
    if not _are_plain(gate_up) or not _are_alike(gate_up):
        return reference.gelu_mul(gate_up)
    return elementwise.gelu_mul(gate_up)


def _are_alike(*tensors: Tensor) -> bool:
    """Whether all are of one dtype that the kernels carry."""
    return tensors[0].dtype in _DTYPES and len({tensor.dtype for tensor in tensors}) == 1


def _are_plain(*tensors: Tensor) -> bool:
    """Whether memory is what the shapes say: no gaps, no transposition."""
    return all(tensor.is_contiguous() for tensor in tensors)


def _have_plain_tokens(*tensors: Tensor) -> bool:
    """Whether each token's heads [H, D] lie without gaps, however far apart the tokens are."""
    return all(heads.stride(2) == 1 and heads.stride(1) == heads.shape[2] for heads in tensors)
