"""A PEFT directory's `adapter_config.json`: reading it, and its fields one by one.

Every option that would change an answer is either honoured by the module of the adapter's kind or refused by name; an
option that this server has never heard of is refused too, because PEFT gains some with every release.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import regex

from .errors import InvalidConfig, UnsupportedAdapter

CONFIG_FILE = "adapter_config.json"

PEFT_TYPES = ("LORA", "IA3", "VERA", "PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING", "P_TUNING")
"""The kinds that are carried; `peft_format` says whose business each is."""

MAX_CONFIG_BYTES = 256 << 10
"""A pattern for each linear of the largest models takes less than half of this."""

PATTERN_SECONDS = 0.05
"""How long one match of a pattern may take; a module's name is short, so only a malicious pattern takes longer."""

PROVENANCE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
    }
)
"""Options of every kind that say where an adapter comes from and what it was trained for."""


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


def flag(config: dict[str, Any], name: str) -> bool:
    """The value of a field that is true or false, absent meaning false; raises InvalidConfig."""
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise InvalidConfig(f"{CONFIG_FILE}: {name} should be true or false, not {value!r}.")
    return value


def choice(config: dict[str, Any], name: str, choices: Collection[str], default: str) -> str:
    """The value of a field that is one of a few words; raises InvalidConfig."""
    value: object = config.get(name)
    if value is None:
        return default
    if not isinstance(value, str) or value not in choices:
        raise InvalidConfig(f"{CONFIG_FILE}: {name} should be one of {', '.join(choices)}, not {value!r}.")
    return value


def positive_integer(value: object, where: str) -> int:
    """The value of the field `where`, if it is one; raises InvalidConfig."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidConfig(f"{CONFIG_FILE}: {where} should be a positive integer, not {value!r}.")
    return value


def finite_number(value: object, where: str) -> float:
    """The value of the field `where`, if it is one; raises InvalidConfig."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        raise InvalidConfig(f"{CONFIG_FILE}: {where} should be a finite number, not {value!r}.")
    return value


def compile_pattern(pattern: str, where: str) -> "regex.Pattern[str]":
    """A regular expression of the field `where`; raises InvalidConfig."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise InvalidConfig(f"{CONFIG_FILE}: {where} has the invalid pattern {pattern!r}: {error}.") from error


def match_pattern(pattern: "regex.Pattern[str]", module: str) -> "regex.Match[str] | None":
    """Match from a module name's beginning; raises InvalidConfig if it takes too long."""
    try:
        return pattern.match(module, timeout=PATTERN_SECONDS)
    except TimeoutError:
        raise InvalidConfig(
            f"{CONFIG_FILE}: the pattern {pattern.pattern!r} takes too long to match {module!r}."
        ) from None


def _is_off(name: str, value: object) -> bool:
    # 0 is a number that may mean something, so it is not off
    return value is None or value is False or value in ("", [], {}) or (name == "bias" and value == "none")
