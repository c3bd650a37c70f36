"""A tokenizer as the store keeps it: of an adapter what differs from the base's, of the base all of it.

Here is the form and its blob, one JSON file; `tokenizer_files` reads Hugging Face's files, `peft_tokenizer` compares an
adapter's with the base's. It knows nothing of names and versions.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .blobs import sync
from .errors import StoreError
from .tokenizer_json import with_model_of

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class TokenizerForm:
    """A tokenizer with its chat template. What an adapter's has not, None, is the base's."""

    tokens: str | None = None
    """`tokenizer.json`; an adapter's without its model where that is the base's."""
    special_tokens: Mapping[str, str] | None = None
    """`bos_token`, `eos_token` and others by these names, as text."""
    chat_template: str | None = None
    """Jinja, as `template_sandbox` compiles it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of those that there are."""
        named = (
            ("tokens", self.tokens),
            ("special_tokens", self.special_tokens),
            ("chat_template", self.chat_template),
        )
        return tuple(name for name, part in named if part is not None)

    def over(self, base: "TokenizerForm") -> "TokenizerForm":
        """All of an adapter's tokenizer: this, and for what it has not the base's."""
        tokens = base.tokens
        if self.tokens is not None and base.tokens is not None:
            tokens = with_model_of(base.tokens, self.tokens)
        return TokenizerForm(
            tokens=tokens,
            special_tokens=base.special_tokens if self.special_tokens is None else self.special_tokens,
            chat_template=base.chat_template if self.chat_template is None else self.chat_template,
        )

    def to_bytes(self) -> bytes:
        """The blob: the same for the same form."""
        description = {"format_version": FORMAT_VERSION} | {name: getattr(self, name) for name in self.parts}
        return json.dumps(description, sort_keys=True, ensure_ascii=False).encode()

    @property
    def digest(self) -> str:
        """The sha256 of its blob, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def write_tokenizer_blob(form: TokenizerForm, path: Path) -> None:
    """Write a form to `path`, through to the disk."""
    path.write_bytes(form.to_bytes())
    sync(path)


def read_tokenizer_blob(path: Path) -> TokenizerForm:
    """Read a form; the digest is not checked.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: it is not a blob of this format.
    """
    try:
        description = json.loads(path.read_bytes())
        if description.pop("format_version") != FORMAT_VERSION:
            raise ValueError("it is of another format version")
        return TokenizerForm(**description)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"Tokenizer {path.name} is damaged: {error}. Run `onebase adapters verify --repair`, then publish again."
        ) from error
