"""Compiling chat templates: Jinja as Hugging Face documents it for them, in a sandbox, because they come with models.

The dialect is https://huggingface.co/docs/transformers/chat_templating_writing. Compiling a template computes nothing
of what is in it, however constant: that is left to whoever renders it. It knows neither messages nor tokens.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

KEPT_TEMPLATES = 64
"""How many compiled templates are remembered: adapters of one family often bring the same."""


class InvalidTemplate(Exception):
    """A chat template is not valid; the text says where."""


@lru_cache(maxsize=KEPT_TEMPLATES)
def compile_template(source: str) -> Template:
    """The template of `source`; raises InvalidTemplate."""
    try:
        tree = _environment().parse(source)
        if tree.find(nodes.ScopedEvalContextModifier):  # its condition is computed while compiling
            raise InvalidTemplate("it has an autoescape block, which is for HTML")
        return _environment().from_string(tree)
    except TemplateError as error:
        raise InvalidTemplate(str(error)) from error
    except (SyntaxError, RecursionError, MemoryError) as error:  # what Python says of code nested too deeply
        raise InvalidTemplate(f"it is nested too deeply ({error})") from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, loopcontrols],
        optimized=False,
        finalize=_as_it_is,
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


@pass_context
def _as_it_is(_: Context, value: object) -> object:
    """What is written for a value: itself. Without a function that needs a context, Jinja computes constants early."""
    return value


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's words for training; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance's set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Put the block's body in its place."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter of this name escapes for HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may pass it by this name
    return datetime.now().strftime(format)
