"""A PEFT directory, as `save_pretrained` writes it, to the canonical form; all of it checked against the base.

Here is what all kinds have alike; each kind has a module of its own. Pickle is never opened.
"""

from collections.abc import Collection
from pathlib import Path, PurePath

from .adapter import Adapter
from .base_layout import BaseLayout
from .base_vectors import BaseVectors
from .errors import InvalidConfig, InvalidTensors
from .peft_config import CONFIG_FILE, load_config
from .peft_ia3 import read_ia3
from .peft_lora import read_lora
from .peft_prefix import read_prefix
from .peft_vera import read_vera
from .tensor_file import map_tensors
from .tokenizer_files import TOKENIZER_FILES

WEIGHTS_FILE = "adapter_model.safetensors"

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES)
"""What is read of a directory; the first two have to be there."""

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})


def parse(directory: Path, layout: BaseLayout, *, max_rank: int, base: BaseVectors | None = None) -> Adapter:
    """Read an adapter of any kind; its arrays are views of the mapped file, where they need not be computed.

    Of embeddings and heads that were saved whole, what is not the `base`'s is kept; all of it where none is given.

    Raises:
        InvalidConfig, UnsupportedAdapter: see `load_config` and the reader of the adapter's kind.
        InvalidTensors: no safetensors file, or a tensor of it, which the text names, does not fit this base.
        RankTooLarge: a module's rank is over `max_rank`.
    """
    check_directory(directory)
    config, tensors = load_config(directory / CONFIG_FILE), map_tensors(directory / WEIGHTS_FILE).tensors
    match config["peft_type"]:
        case "LORA":
            return read_lora(config, tensors, layout, max_rank=max_rank, base=base)
        case "IA3":
            return read_ia3(config, tensors, layout)
        case "VERA":
            return read_vera(config, tensors, layout, max_rank=max_rank)
        case _:
            return Adapter({}, prefix=read_prefix(config, tensors, layout))


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
