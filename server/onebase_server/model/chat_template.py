"""Rendering a list of chat messages to the model's prompt with its Jinja template.

What the template may do is `onebase_adapters.template_sandbox`'s business. It knows no tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from onebase_adapters.template_sandbox import InvalidTemplate, compile_template
from onebase_server.errors import BadRequest, ConfigurationError


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str) -> None:
        """Compile `source`.

        Raises:
            ConfigurationError: The template is not valid Jinja.
        """
        try:
            self._template = compile_template(source)
        except InvalidTemplate as error:
            raise ConfigurationError(f"The model's chat template is not valid: {error}.") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for `messages`, ending where the assistant's answer begins if `add_generation_prompt`.

        Raises:
            BadRequest: The template refuses the messages, for instance two of the user in a row.
        """
        context = {"tools": None, "documents": None, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **context)
        except TemplateError as error:
            raise BadRequest(f"The model's chat template refuses these messages: {error}", param="messages") from error
        except Exception as error:
            # A template is a program that came with a model or an adapter: it may add a string to a content that is a
            # list, divide by zero or call itself for ever, and nothing of that is the server's failure.
            reason = str(error) or type(error).__name__  # a MemoryError has no text
            raise BadRequest(
                f"The model's chat template cannot render these messages: {reason}", param="messages"
            ) from error
