"""Every field of `Settings` as a command-line flag, and the settings read from flags, environment and file."""

from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from onebase_server.commands.model_flags import flag_of, message_of, with_flags
from onebase_server.errors import ConfigurationError
from onebase_server.settings import Settings

BASE_FLAGS = (
    *("base", "revision", "cache_dir", "double_quant", "group_size", "quantize_head"),
    *("dtype", "device", "kernels", "threads", "max_model_len"),
)
"""Settings of a base and of how it computes, but not how its linears are kept."""

with_settings_flags = with_flags(Settings)
with_base_flags = with_flags(Settings, only=BASE_FLAGS)


def read_settings(flags: dict[str, Any]) -> Settings:
    """Settings from the flags that were given, the environment and onebase.toml.

    Raises:
        ConfigurationError: one of them is wrong; the text has a line for each.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_sentence(problem) for problem in error.errors())) from error
    except (SettingsError, ValueError) as error:  # onebase.toml is not TOML, or a variable is not what it should be
        raise ConfigurationError(f"onebase.toml or the environment cannot be read: {error}") from error


def _sentence(problem: Any) -> str:
    if not problem["loc"]:
        return message_of(problem)
    name = str(problem["loc"][0])
    flag = f"{flag_of(name)} (or ONEBASE_{name.upper()})"
    if problem["type"] == "missing":
        return f"{flag} is needed."
    if problem["type"] == "extra_forbidden":
        return f"There is no setting {name}; it stands in onebase.toml."
    return f"{flag} is wrong: {message_of(problem)}."
