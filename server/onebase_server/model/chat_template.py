"""Rendering a list of chat messages to the model's prompt with its Jinja template.

The environment is the one Hugging Face documents for chat templates
(https://huggingface.co/docs/transformers/chat_templating_writing), sandboxed because templates come with the model.
It knows no tokens.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from onebase_server.errors import BadRequest, ConfigurationError


class ChatTemplate:
    """A compiled template and the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`; `special_tokens` maps `bos_token`, `eos_token`, … to their text.

        Raises:
            ConfigurationError: The template is not valid Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigurationError(f"The model's chat template is not valid: {error}.") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for `messages`, ending where the assistant's answer begins if `add_generation_prompt`.

        Raises:
            BadRequest: The template refuses the messages, for instance two of the user in a row.
        """
        context = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **context)
        except TemplateError as error:
            raise BadRequest(f"The model's chat template refuses these messages: {error}", param="messages") from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            # A template reads fields without checking their types, e.g. it adds a string to a content that is a list.
            raise BadRequest(
                f"The model's chat template cannot render these messages: {error}", param="messages"
            ) from error


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
