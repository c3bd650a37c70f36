"""Text to token ids and back, and chat messages to a prompt, from a Hugging Face directory.

It needs neither torch nor transformers, so that the API process stays small.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import ByteLevel

from onebase_adapters.errors import InvalidTokenizer
from onebase_adapters.tokenizer_files import read_tokenizer_files
from onebase_adapters.tokenizer_form import TokenizerForm
from onebase_adapters.tokenizer_json import load_own_tokens
from onebase_server.errors import BadRequest, ConfigurationError
from onebase_server.model.chat_template import ChatTemplate

_CONTEXT_TOKENS = 8
"""How many tokens of the prompt a stream needs to see whether its first word begins with a space."""


class Tokenizer:
    """A model's tokenizer with its chat template and the tokens that end a text."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int],
        chat_template: ChatTemplate | None,
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        own_chat_template: str | None = None,
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self.special_tokens = special_tokens
        """What a template can write by name, such as `eos_token`."""
        self.own_chat_template = own_chat_template
        """The source of the template, where it came with an adapter and is not to be trusted as the base's is."""
        self.eos_token_ids: tuple[int, ...] = tuple(sorted(eos_token_ids))
        """Tokens that end an answer, ascending."""

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer's files and what `config.json` and `generation_config.json` add.

        Raises:
            ConfigurationError: `tokenizer.json` is missing or damaged, or another of the files is.
        """
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ConfigurationError(
                f"{path} has no tokenizer.json. Save the tokenizer in its fast form (AutoTokenizer.save_pretrained)."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigurationError(f"{file} cannot be read: {error}.") from error
        backend.no_truncation()
        backend.no_padding()
        form = read_base_tokenizer(path)
        special_tokens = form.special_tokens or {}
        return cls(
            backend,
            eos_token_ids=_eos_token_ids(path) | _ids_of(backend, special_tokens.get("eos_token")),
            chat_template=None if form.chat_template is None else ChatTemplate(form.chat_template),
            special_tokens=special_tokens,
        )

    def with_own(self, own: TokenizerForm) -> "Tokenizer":
        """This tokenizer as an adapter has changed it; what ends an answer of the base ends one of the adapter too.

        The model, nearly all of a tokenizer's memory, is shared, unless the adapter has one of its own.

        Raises:
            ConfigurationError, InvalidTokenizer: The chat template is not valid, or the tokens are not.
        """
        backend = self._backend if own.tokens is None else load_own_tokens(own.tokens, self._backend.model)
        special_tokens = self.special_tokens if own.special_tokens is None else own.special_tokens
        return Tokenizer(
            backend,
            eos_token_ids={*self.eos_token_ids, *_ids_of(backend, special_tokens.get("eos_token"))},
            chat_template=self._chat_template if own.chat_template is None else ChatTemplate(own.chat_template),
            special_tokens=special_tokens,
            own_chat_template=self.own_chat_template if own.chat_template is None else own.chat_template,
        )

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, added ones included; the model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; a special token written out counts as itself. `add_special_tokens` puts BOS before."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """As `encode`, for each of `texts`; other threads run meanwhile, which the library allows here alone."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt that the model's chat template makes of `messages`; `kwargs` are the template's own variables.

        Raises:
            BadRequest: The model has no chat template, or the template refuses the messages.
        """
        if self._chat_template is None:
            raise BadRequest(
                "This model has no chat template, so it cannot chat; use /v1/completions with a prompt instead.",
                param="messages",
            )
        variables = {**self.special_tokens, **kwargs}
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Token ids of `render_chat`; the template itself writes BOS, so none is added."""
        prompt = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **kwargs)
        return self.encode(prompt, add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, perhaps part of a character; empty for an id outside the vocabulary."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_token_ids:
            return token.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF_LETTER[letter] for letter in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()

    def id_to_token_text(self, token_id: int) -> str:
        """`token_bytes` as text, to show a token alone: special tokens as written, parts of characters as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def stream(self, prompt_token_ids: Sequence[int] = ()) -> "TokenStream":
        """An incremental detokenizer for what follows the prompt."""
        return TokenStream(self._backend, prompt_token_ids)

    @cached_property
    def _added_token_ids(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._backend.decoder.__getstate__()) if self._backend.decoder else {}
        return any(step["type"] == "ByteLevel" for step in decoder.get("decoders", [decoder]) if step)


class TokenStream:
    """Turns token ids into text as they come: the pieces, joined, are the whole's text, and none splits a character.

    (Where a SentencePiece model writes bytes that are not UTF-8, `Tokenizer.decode` also loses the good bytes beside
    them, once it sees the bad ones; the stream has sent them by then.)
    """

    def __init__(self, backend: tokenizers.Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._backend = backend
        self._held: list[int] = []
        context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        if backend.decode(context).endswith("\ufffd"):
            context = []  # the prompt ends within a character; the library could not continue from there
        self._decoder = DecodeStream(ids=context, skip_special_tokens=True)

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; empty while a character is unfinished."""
        return "".join(map(self._push_one, token_ids))

    def flush(self) -> str:
        """The text held back, an unfinished character as U+FFFD; for after the last token."""
        held, self._held = self._held, []
        return self._backend.decode(held, skip_special_tokens=True)

    def _push_one(self, token_id: int) -> str:
        self._held.append(token_id)
        try:
            piece = self._decoder.step(self._backend, token_id)
        except Exception:  # the library's only class; bytes that are not UTF-8 changed the meaning of what was sent
            self._decoder = DecodeStream(ids=[token_id], skip_special_tokens=True)
            return self.flush()
        if piece is None:
            return ""
        self._held.clear()
        return piece


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes a byte as a letter: printable ones as themselves, the others in order from U+0100 on."""
    letters = set(ByteLevel.alphabet())
    hidden_bytes = [byte for byte in range(256) if chr(byte) not in letters]
    substitutes = sorted(letter for letter in letters if ord(letter) > 255)
    printable = {chr(byte): byte for byte in range(256) if chr(byte) in letters}
    return printable | dict(zip(substitutes, hidden_bytes, strict=True))


_BYTE_OF_LETTER = _byte_of_letter()


def read_base_tokenizer(path: Path) -> TokenizerForm:
    """The tokenizer's files in a base's directory; raises ConfigurationError if one cannot be read."""
    try:
        return read_tokenizer_files(path)
    except InvalidTokenizer as error:
        raise ConfigurationError(f"The tokenizer in {path} cannot be used: {error}") from error


def _eos_token_ids(path: Path) -> set[int]:
    """Every token that one of the model's two files calls the end."""
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        listed = _read_json(path / name).get("eos_token_id")
        ids.update(listed if isinstance(listed, list) else [] if listed is None else [listed])
    return ids


def _ids_of(backend: tokenizers.Tokenizer, token: str | None) -> set[int]:
    """The token's id, if there is a token and the vocabulary has it."""
    token_id = None if token is None else backend.token_to_id(token)
    return set() if token_id is None else {token_id}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}.") from error
    return content
