"""A PEFT directory's `adapter_config.json`: which options are carried, and which rank and scale each module gets.

Every option that would change an answer is either honoured here or refused by name; an option that this server has
never heard of is refused too, because PEFT gains some with every release. It knows nothing of tensors.
"""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import regex

from .adapter import InvalidConfig, UnsupportedAdapter

CONFIG_FILE = "adapter_config.json"

PEFT_TYPES = ("LORA", "PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING", "P_TUNING")
"""The kinds that are carried; all but the first are `peft_prefix`'s."""

MAX_CONFIG_BYTES = 256 << 10
"""A pattern for each linear of the largest models takes less than half of this."""

PATTERN_SECONDS = 0.05
"""How long one match of a pattern may take; a module's name is short, so only a malicious pattern takes longer."""

HONOURED = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"})

WITHOUT_EFFECT = frozenset(
    {
        # where the adapter comes from, and what it was trained for
        "auto_mapping",
        "base_model_name_or_path",
        "peft_version",
        "revision",
        "task_type",
        # how it was trained
        "corda_config",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "runtime_config",
        "velora_config",
        # which modules got tensors: the tensors tell
        "ensure_weight_tying",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        # the group size of an option that is refused when it is on
        "qalora_group_size",
    }
)
"""Options that leave the answers of a finished adapter alone."""

PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base alone; the others subtract the first s·BA from its weights."""


Number = TypeVar("Number", int, float)
Patterns = tuple[tuple["regex.Pattern[str]", Number], ...]
"""Patterns of module names and what they map to, in the file's order: the first that matches counts."""


@dataclass(frozen=True)
class LoraOptions:
    """What `adapter_config.json` says that matters to answers."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    target_modules: "tuple[str, ...] | regex.Pattern[str] | None"
    """Names, one pattern, or None where everything is named."""

    def rank(self, module: str) -> int:
        """The rank of a module, named as in the base model: `model.layers.3.self_attn.q_proj`."""
        return _look_up(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """alpha / rank, or alpha / √rank for rsLoRA (arXiv 2312.03732)."""
        rank, alpha = self.rank(module), _look_up(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether `target_modules` names this module: PEFT would not load tensors of one that it does not name."""
        if self.target_modules is None:
            return True
        if isinstance(self.target_modules, tuple):
            return any(module == target or module.endswith(f".{target}") for target in self.target_modules)
        return _matches(self.target_modules, module)


def read_lora_options(config: dict[str, Any]) -> LoraOptions:
    """Check what `load_config` read of a LoRA adapter.

    Raises:
        InvalidConfig: a field of it makes no sense.
        UnsupportedAdapter: it asks for an option that is not carried; the text names it.
    """
    _refuse_other_bases(config)
    refuse_options_beyond(HONOURED | WITHOUT_EFFECT, config)
    return LoraOptions(
        r=positive_integer(config.get("r"), "r"),
        lora_alpha=_number(config.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(config, "use_rslora"),
        rank_pattern=_patterns(config, "rank_pattern", positive_integer),
        alpha_pattern=_patterns(config, "alpha_pattern", _number),
        target_modules=_target_modules(config.get("target_modules")),
    )


def load_config(path: Path) -> dict[str, Any]:
    """Read `adapter_config.json`, whatever the adapter's kind; its `peft_type` is one that is carried.

    Raises:
        InvalidConfig: it is missing, too large, not JSON, or says no `peft_type`.
        UnsupportedAdapter: the `peft_type` is not carried; the text names it.
    """
    if not path.is_file():
        raise InvalidConfig(
            f"There is no {CONFIG_FILE}, so this is not an adapter as PEFT's save_pretrained writes it."
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise InvalidConfig(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes; PEFT writes a few thousand.")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of absurd length
        raise InvalidConfig(f"{CONFIG_FILE} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InvalidConfig(f"{CONFIG_FILE} should hold a JSON object, not a {type(config).__name__}.")
    if "peft_type" not in config:
        raise InvalidConfig(f"{CONFIG_FILE} does not say its peft_type.")
    if config["peft_type"] not in PEFT_TYPES:
        raise UnsupportedAdapter(
            f"peft_type {config['peft_type']!r} is not supported; this server serves {', '.join(PEFT_TYPES)}."
        )
    return config


def refuse_options_beyond(known: Collection[str], config: dict[str, Any]) -> None:
    """Raise UnsupportedAdapter for an option that is on and not among the known ones."""
    for name, value in sorted(config.items()):
        if name not in known and not _is_off(name, value):
            raise UnsupportedAdapter(f"{CONFIG_FILE} asks for {name} = {value!r}, which this server does not support.")


def _refuse_other_bases(config: dict[str, Any]) -> None:
    initialisation = config.get("init_lora_weights")
    if initialisation not in PLAIN_INITIALISATIONS:
        raise UnsupportedAdapter(
            f"init_lora_weights {initialisation!r} changes the base's weights, so this adapter does not fit the "
            "original base. Save it with path_initial_model_for_weight_conversion, which turns it into a plain LoRA."
        )


def _is_off(name: str, value: object) -> bool:
    # 0 is a number that may mean something, so it is not off
    return value is None or value is False or value in ("", [], {}) or (name == "bias" and value == "none")


def _patterns(config: dict[str, Any], name: str, check: Callable[[object, str], Number]) -> Patterns[Number]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise InvalidConfig(f"{CONFIG_FILE}: {name} should map module patterns to numbers, not be {patterns!r}.")
    return tuple(
        # PEFT's own expression: the pattern has to match the whole name, or the whole last parts of it
        (_compile(rf"(.*\.)?({pattern})$", name), check(value, f"{name}[{pattern!r}]"))
        for pattern, value in patterns.items()
    )


def _target_modules(value: object) -> "tuple[str, ...] | regex.Pattern[str] | None":
    if value is None or (isinstance(value, str) and value.lower() == "all-linear"):
        return None
    if isinstance(value, str):
        return _compile(rf"(?:{value})\Z", "target_modules")
    if isinstance(value, list) and all(isinstance(target, str) for target in value):
        return tuple(value)
    raise InvalidConfig(f"{CONFIG_FILE}: target_modules should be a list of names or one pattern, not {value!r}.")


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise InvalidConfig(f"{CONFIG_FILE}: {name} should be true or false, not {value!r}.")
    return value


def positive_integer(value: object, where: str) -> int:
    """The value of the field `where`, if it is one; raises InvalidConfig."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidConfig(f"{CONFIG_FILE}: {where} should be a positive integer, not {value!r}.")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        raise InvalidConfig(f"{CONFIG_FILE}: {where} should be a finite number, not {value!r}.")
    return value


def _compile(pattern: str, where: str) -> "regex.Pattern[str]":
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise InvalidConfig(f"{CONFIG_FILE}: {where} has the invalid pattern {pattern!r}: {error}.") from error


def _look_up(patterns: Patterns[Number], module: str, default: Number) -> Number:
    return next((value for pattern, value in patterns if _matches(pattern, module)), default)


def _matches(pattern: "regex.Pattern[str]", module: str) -> bool:
    try:
        return pattern.match(module, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise InvalidConfig(
            f"{CONFIG_FILE}: the pattern {pattern.pattern!r} takes too long to match {module!r}."
        ) from None
