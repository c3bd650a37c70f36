"""Hugging Face's tokenizer files in a directory, of a base or beside an adapter, to the canonical form and back.

Which file speaks where two say the same thing is as in Transformers. It compares nothing with any base.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import InvalidTokenizer
from .tokenizer_form import TokenizerForm
from .tokenizer_json import TOKENIZER

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"

MAX_BYTES = {
    TOKENIZER: 64 << 20,
    CONFIG: 8 << 20,  # it may describe each added token
    SPECIAL_TOKENS_MAP: 1 << 20,
    ADDED_TOKENS: 4 << 20,
    CHAT_TEMPLATE: 256 << 10,
}
"""The files that are read, and how large each may be: several times the largest of well-known models."""

TOKENIZER_FILES = tuple(MAX_BYTES)

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_tokenizer_files(directory: Path) -> TokenizerForm:
    """All that the files of a directory say; parts that none of them speaks of are None.

    Raises:
        InvalidTokenizer: a file, which the text names, is too large or not what it should be.
    """
    config = _read_object(directory / CONFIG)
    tokenizer = directory / TOKENIZER
    return TokenizerForm(
        tokens=_read_text(tokenizer) if tokenizer.is_file() else None,
        special_tokens=_special_tokens(config, _read_object(directory / SPECIAL_TOKENS_MAP)),
        chat_template=_chat_template(directory / CHAT_TEMPLATE, config),
    )


def read_declared_ids(directory: Path) -> dict[str, int]:
    """The ids that other files than `tokenizer.json` give to added tokens.

    Raises:
        InvalidTokenizer: as `read_tokenizer_files`.
    """
    described = _read_object(directory / CONFIG).get("added_tokens_decoder") or {}
    try:
        ids = {_token_text(entry): int(token_id) for token_id, entry in described.items()}
        return ids | {token: int(token_id) for token, token_id in _read_object(directory / ADDED_TOKENS).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidTokenizer(f"{CONFIG} or {ADDED_TOKENS} gives a token an id that is no number: {error}.") from error


def write_tokenizer_files(form: TokenizerForm, directory: Path) -> None:
    """Write a whole form as Transformers would; what else the directory's configuration says stays."""
    config = _read_object(directory / CONFIG) or {"tokenizer_class": "PreTrainedTokenizerFast"}
    other = {name: value for name, value in config.items() if name not in (*SPECIAL_TOKENS, "chat_template")}
    content = other | dict(form.special_tokens or {})
    (directory / CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if form.tokens is not None:
        (directory / TOKENIZER).write_text(form.tokens, encoding="utf-8")
    if form.chat_template is not None:
        (directory / CHAT_TEMPLATE).write_text(form.chat_template, encoding="utf-8")


def _special_tokens(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, str] | None:
    """The second file speaks only where the first does not describe the added tokens."""
    source = config if "added_tokens_decoder" in config else {**config, **legacy}
    return dict(_token_texts(source)) or None


def _token_texts(source: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in SPECIAL_TOKENS:
        if (text := _token_text(source.get(name))) is not None:
            yield name, _checked_text(text, f"{CONFIG}: {name}")


def _token_text(entry: Any) -> Any:
    """A token is written as its text, or as an object with its text in `content`."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _chat_template(file: Path, config: Mapping[str, Any]) -> str | None:
    """The file before the configuration's field; of several templates the default."""
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return None if template is None else _checked_text(template, f"{CONFIG}: chat_template")


def _checked_text(text: object, where: str) -> str:
    """A JSON value that should be a text without halves of characters, which JSON can write and UTF-8 cannot."""
    if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidTokenizer(f"{where} should be a text.")
    if len(text) > MAX_BYTES[CHAT_TEMPLATE]:
        raise InvalidTokenizer(f"{where} is longer than {MAX_BYTES[CHAT_TEMPLATE]} characters.")
    return text


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise InvalidTokenizer(f"{path.name} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InvalidTokenizer(f"{path.name} should hold a JSON object, not a {type(content).__name__}.")
    return content


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES[path.name]:
        raise InvalidTokenizer(f"{path.name} is larger than {MAX_BYTES[path.name]} bytes.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeError as error:
        raise InvalidTokenizer(f"{path.name} is not UTF-8 text: {error}.") from error
