"""Reads single fields of `config.json`, with errors that name them. It needs no torch and knows no family."""

from collections.abc import Mapping
from typing import Any

from onebase_server.errors import ConfigurationError

HfConfig = Mapping[str, Any]


class ConfigReader:
    """Fields of one JSON object; every method raises ConfigurationError where a field makes no sense."""

    def __init__(self, hf: HfConfig) -> None:
        self.hf = hf

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` stands for an absent or null one."""
        value = self.hf.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"config.json: {key} should be a positive integer, not {value!r}.")
        return value

    def optional_number(self, key: str) -> float | None:
        """A number, or None where it is absent or null."""
        return None if self.hf.get(key) is None else self.number(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A number; `default` stands for an absent or null one."""
        value = self.hf.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"config.json: {key} should be a number, not {value!r}.")
        return float(value)

    def refuse_unless(self, key: str, carried: Any) -> None:
        """Raise unless the field is absent, null or has the one value that is carried."""
        value = self.hf.get(key)
        if value is not None and value != carried:
            raise ConfigurationError(f"config.json: {key} = {value!r} is not carried; only {carried!r} is.")
