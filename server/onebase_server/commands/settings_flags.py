"""Every field of `Settings` as a command-line flag: each setting is written once, with its type and its help."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import ByteSize, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import SettingsError

from onebase_server.errors import ConfigurationError
from onebase_server.settings import Settings


def with_settings_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**flags` one optional flag per setting; a flag that is not given is None.

    Keys have no flag: what stands on a command line is seen by everyone on the machine.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, field))
        for name, field in Settings.model_fields.items()
        if _plain_type(field) is not SecretStr
    ]
    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined] # where typer looks
    return command


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


def _annotation(name: str, field: FieldInfo) -> Any:
    kind = _plain_type(field)
    flag = "--" + name.replace("_", "-")
    declaration = f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag
    default = field.get_default()
    option = typer.Option(
        declaration,
        help=field.description,
        show_default=False if field.is_required() or default is None else _shown(default),
        metavar="SIZE" if kind is ByteSize else None,
    )
    # a size such as 256MiB stays a text until Settings reads it
    return Annotated[(str if kind is ByteSize else kind) | None, option]


def _plain_type(field: FieldInfo) -> Any:
    """The field's type without `| None`."""
    kind = field.annotation
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    return kind


def _shown(default: object) -> str:
    match default:
        case ByteSize():
            return default.human_readable(separator="")
        case bool():
            return "on" if default else "off"
        case Path():
            return str(default).replace(str(Path.home()), "~")
        case _:
            return str(default)


def _sentence(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return str(message)
    name = str(problem["loc"][0])
    flag = f"--{name.replace('_', '-')} (or ONEBASE_{name.upper()})"
    if problem["type"] == "missing":
        return f"{flag} is needed."
    if problem["type"] == "extra_forbidden":
        return f"There is no setting {name}; it stands in onebase.toml."
    return f"{flag} is wrong: {message}."
