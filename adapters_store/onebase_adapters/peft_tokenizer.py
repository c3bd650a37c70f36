"""The tokenizer files beside an adapter, checked, and what is left of them once the base's are taken away.

Trainers save the tokenizer with each adapter, mostly the base's unchanged; of that nothing is left.
"""

from collections.abc import Mapping
from pathlib import Path

from .adapter import InvalidTokenizer
from .template_sandbox import InvalidTemplate, compile_template
from .tokenizer_files import read_tokenizer_files
from .tokenizer_form import TokenizerForm


def read_own_tokenizer(directory: Path, base: TokenizerForm) -> TokenizerForm | None:
    """What the adapter in `directory` brings of its own; None if all is the base's.

    Raises:
        InvalidTokenizer: a file, which the text names, is not what it should be.
    """
    brought = read_tokenizer_files(directory)
    own = TokenizerForm(
        special_tokens=None if _are_alike(brought.special_tokens, base.special_tokens) else brought.special_tokens,
        chat_template=None if _are_same_template(brought.chat_template, base.chat_template) else brought.chat_template,
    )
    if own.chat_template is not None:
        _check_template(own.chat_template)
    return own if own.parts else None


def _are_alike(brought: Mapping[str, str] | None, base: Mapping[str, str] | None) -> bool:
    """Whether two maps of special tokens say the same of prompts and answers, in which there is no padding."""
    return _without_padding(brought) == _without_padding(base)


def _without_padding(tokens: Mapping[str, str] | None) -> dict[str, str]:
    return {name: text for name, text in (tokens or {}).items() if name != "pad_token"}


def _are_same_template(brought: str | None, base: str | None) -> bool:
    return brought is not None and base is not None and _as_jinja_reads(brought) == _as_jinja_reads(base)


def _as_jinja_reads(template: str) -> str:
    return template.replace("\r\n", "\n").removesuffix("\n")


def _check_template(source: str) -> None:
    try:
        compile_template(source)
    except InvalidTemplate as error:
        raise InvalidTokenizer(f"The chat template is not valid: {error}.") from error
