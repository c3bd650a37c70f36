"""A PEFT directory, as `save_pretrained` writes it, to the canonical form; all of it checked against the base.

What the options mean is `peft_config`'s; here are the names and shapes of the tensors. Pickle is never opened.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
import regex

from .adapter import (
    Adapter,
    Array,
    BaseLayout,
    InvalidConfig,
    InvalidTensors,
    LowRankPair,
    ModuleKey,
    RankTooLarge,
)
from .peft_config import CONFIG_FILE, LoraOptions, load_config, read_lora_options
from .peft_prefix import read_prefix
from .tensor_file import map_tensors

WEIGHTS_FILE = "adapter_model.safetensors"

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})

TENSOR_NAME = regex.compile(
    r"(?:base_model\.model\.)?"  # PeftModel's own two levels
    r"(?P<module>.+)"
    r"\.lora_(?P<side>[AB])"
    r"(?:\.(?P<adapter>[^.]+))?"  # the adapter's name in training, where a tool left it in
    r"\.weight"
)
MODULE_NAME = regex.compile(
    r"(?:model\.)?(?:language_model\.)?(?:model\.)?"
    r"layers\.(?P<layer>0|[1-9][0-9]{0,5})\."
    r"(?:self_attn\.(?P<projection>(?:qkv|q|k|v|o)_proj)|mlp\.(?P<projection>(?:gate_up|gate|up|down)_proj))"
)


@dataclass
class _Module:
    """The two tensors of one module of the checkpoint, which may be a fused one."""

    name: str
    layer: int
    projection: str
    sides: dict[str, tuple[str, Array]] = field(default_factory=dict)
    """`A` and `B` to the tensor's full name and its value."""


def parse(directory: Path, layout: BaseLayout, *, max_rank: int) -> Adapter:
    """Read an adapter; its arrays are views of the mapped file.

    Raises:
        InvalidConfig, UnsupportedAdapter: see `load_config` and `read_lora_options`.
        InvalidTensors: no safetensors file, or a tensor of it, which the text names, does not fit this base.
        RankTooLarge: a module's rank is over `max_rank`.
    """
    check_directory(directory)
    config, tensors = load_config(directory / CONFIG_FILE), map_tensors(directory / WEIGHTS_FILE).tensors
    if config["peft_type"] != "LORA":
        return Adapter({}, read_prefix(config, tensors, layout))
    options = read_lora_options(config)
    modules = _group_by_module(tensors, layout)
    pairs: dict[ModuleKey, LowRankPair] = {}
    for module in modules:
        if not options.targets(module.name):
            raise InvalidTensors(f"There are tensors for {module.name}, but target_modules does not name it.")
        for key, pair in _pairs(module, options, layout, max_rank):
            if key in pairs:
                raise InvalidTensors(f"{key} has two pairs of tensors, one of its own and one in a fused module.")
            pairs[key] = pair
    if not pairs:
        raise InvalidTensors(f"{WEIGHTS_FILE} holds no tensor, so the adapter would change nothing.")
    return Adapter(pairs)


def check_directory(directory: Path) -> None:
    """Refuse a directory that does not hold the two files of an adapter."""
    if not directory.is_dir():
        raise InvalidConfig(f"{directory} is not a directory, so it cannot hold an adapter as PEFT writes it.")
    require_files([path.name for path in directory.iterdir() if path.is_file()])


def require_files(names: Collection[str]) -> None:
    """Refuse a list of file names in which the two files of an adapter are not."""
    if CONFIG_FILE not in names:
        raise InvalidConfig(
            f"There is no {CONFIG_FILE}, so this is not an adapter as PEFT's save_pretrained writes it."
        )
    if WEIGHTS_FILE not in names:
        pickles = sorted(name for name in names if PurePath(name).suffix in PICKLE_SUFFIXES)
        reason = f"{pickles[0]} may hold a pickle, which can run code and is never opened; " if pickles else ""
        raise InvalidTensors(f"There is no {WEIGHTS_FILE}: {reason}save the adapter with safe_serialization=True.")


def _group_by_module(tensors: dict[str, Array], layout: BaseLayout) -> list[_Module]:
    modules: dict[tuple[int, str], _Module] = {}
    for name, tensor in tensors.items():
        module_name, layer, projection, side = _parse_name(name, layout)
        module = modules.setdefault((layer, projection), _Module(module_name, layer, projection))
        if side in module.sides:
            raise InvalidTensors(f"Tensors {module.sides[side][0]} and {name} are for the same matrix.")
        module.sides[side] = (name, tensor)
    return list(modules.values())


def _parse_name(name: str, layout: BaseLayout) -> tuple[str, int, str, str]:
    """Split a tensor's name into module name, layer, projection and side."""
    tensor_match = TENSOR_NAME.fullmatch(name)
    module_match = MODULE_NAME.fullmatch(tensor_match["module"]) if tensor_match else None
    if tensor_match and module_match:
        layer, projection = int(module_match["layer"]), module_match["projection"]
        if layer < layout.num_layers and all(part in layout.shapes for part in _parts(projection, layout)):
            return tensor_match["module"], layer, projection, tensor_match["side"]
    raise InvalidTensors(
        f"Tensor {name} belongs to no linear of this base that adapters may touch; those are "
        f"{', '.join(layout.projections)} of layers 0 to {layout.num_layers - 1}."
    )


def _parts(projection: str, layout: BaseLayout) -> tuple[str, ...]:
    """The projections that a module of the checkpoint holds, in the order of their output rows."""
    return layout.fused.get(projection, (projection,))


def _pairs(
    module: _Module, options: LoraOptions, layout: BaseLayout, max_rank: int
) -> Iterator[tuple[ModuleKey, LowRankPair]]:
    """The module's pair; for a fused one the pair of each part, which share A and divide B's rows."""
    parts = _parts(module.projection, layout)
    widths = [layout.shapes[part][0] for part in parts]
    rank = options.rank(module.name)
    if rank > max_rank:
        raise RankTooLarge(f"{module.name} has rank {rank}, but this server allows at most {max_rank}.")
    lora_a = _side(module, "A", (rank, layout.shapes[parts[0]][1]))
    lora_b = _side(module, "B", (sum(widths), rank))
    if lora_a.dtype != lora_b.dtype:
        raise InvalidTensors(f"{module.name} has lora_A in {lora_a.dtype} but lora_B in {lora_b.dtype}.")
    ends = np.cumsum(widths)
    for part, rows in zip(parts, np.split(lora_b, ends[:-1]), strict=True):
        yield ModuleKey(module.layer, part), LowRankPair(lora_a, rows, options.scale(module.name))


def _side(module: _Module, side: str, shape: tuple[int, int]) -> Array:
    if side not in module.sides:
        present = next(iter(module.sides.values()))[0]
        raise InvalidTensors(f"There is {present}, but no lora_{side} for {module.name}.")
    name, tensor = module.sides[side]
    if tensor.shape != shape:
        raise InvalidTensors(
            f"Tensor {name} has shape {list(tensor.shape)}, but this base and {CONFIG_FILE} make it {list(shape)}."
        )
    if not np.isfinite(tensor).all():
        raise InvalidTensors(f"Tensor {name} holds NaN or infinite numbers.")
    return tensor
