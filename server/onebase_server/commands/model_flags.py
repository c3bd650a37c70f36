"""Fields of pydantic models as command-line flags: each is written once, with its type, its default and its help."""

import inspect
from collections.abc import Callable, Container
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ByteSize, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from onebase_server.errors import ConfigurationError

Command = Callable[..., None]
Model = TypeVar("Model", bound=BaseModel)


def with_flags(*models: type[BaseModel], only: Container[str] | None = None) -> Callable[[Command], Command]:
    """Give a command that takes `**flags` one optional flag per field; a flag that is not given is None.

    `only` names the fields, if not all get one. Keys (`SecretStr`) get none: what stands on a command line is seen by
    everyone on the machine.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        flags = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, field))
            for model in models
            for name, field in model.model_fields.items()
            if _plain_type(field) is not SecretStr and (only is None or name in only)
        ]
        command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined] # where typer looks
        return command

    return decorate


def read_flags(model: type[Model], flags: dict[str, Any]) -> Model:
    """A model from those of its flags that were given.

    Raises:
        ConfigurationError: one of them is wrong; the text has a line for each.
    """
    given = {name: flags[name] for name in model.model_fields if flags.get(name) is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_sentence(problem) for problem in error.errors())) from error


def flag_of(name: str) -> str:
    """`max_model_len` → `--max-model-len`."""
    return "--" + name.replace("_", "-")


def message_of(problem: Any) -> str:
    """What pydantic says of one problem, without its own preface."""
    return str(problem["msg"]).removeprefix("Value error, ")


def _sentence(problem: Any) -> str:
    if not problem["loc"]:
        return message_of(problem)
    return f"{flag_of(str(problem['loc'][0]))} is wrong: {message_of(problem)}."


def _annotation(name: str, field: FieldInfo) -> Any:
    kind = _plain_type(field)
    flag = flag_of(name)
    declaration = f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag
    default = field.get_default()
    is_text = kind is ByteSize or get_origin(kind) is tuple  # 256MiB and 8,16,32 stay a text until the model reads it
    option = typer.Option(
        declaration,
        help=field.description,
        show_default=False if field.is_required() or default in (None, "", ()) else _shown(default),
        metavar="SIZE" if kind is ByteSize else "LIST" if is_text else None,
    )
    return Annotated[(str if is_text else kind) | None, option]


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
        case tuple():
            return ",".join(map(str, default))
        case _:
            return str(default)
