"""Random prompts of a known length, as token ids or as text. It knows nothing of requests or servers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from onebase_server.errors import ConfigurationError
from onebase_server.model.tokenizer import Tokenizer

FIRST_ORDINARY_ID = 300
"""Vocabularies begin with their special tokens and single bytes."""
MAX_WORDS = 4096
_ATTEMPTS = 8


@dataclass(frozen=True)
class TokenIdPrompts:
    """Prompts as ids drawn evenly from `token_ids`."""

    token_ids: Sequence[int]

    @classmethod
    def of_vocabulary(cls, vocab_size: int) -> "TokenIdPrompts":
        """All ids of a vocabulary but the first, which may be special; of a tiny one, all."""
        return cls(range(FIRST_ORDINARY_ID if vocab_size > 2 * FIRST_ORDINARY_ID else 0, vocab_size))

    def draw(self, prefix: np.random.Generator, rest: np.random.Generator, shared: int, length: int) -> list[int]:
        """`shared` tokens drawn by `prefix`, then others by `rest` up to `length`."""
        indices = [*prefix.integers(len(self.token_ids), size=shared)]
        indices += [*rest.integers(len(self.token_ids), size=length - shared)]
        return [self.token_ids[int(index)] for index in indices]


class TextPrompts:
    """Prompts as words of the vocabulary, checked to be as many tokens as asked for (begin-of-text counts)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = list(islice(_words(tokenizer), MAX_WORDS))
        if not self._words:
            raise ConfigurationError("This tokenizer has no whole words to make texts from; use --prompt-form ids.")

    def draw(self, prefix: np.random.Generator, rest: np.random.Generator, shared: int, length: int) -> str:
        """A text of `length` tokens, the first `shared` of them drawn by `prefix`, the others by `rest`."""
        words = self._pick(prefix, shared) + self._pick(rest, length - shared)
        for _ in range(_ATTEMPTS):
            text = " ".join(words)
            excess = len(self._tokenizer.encode(text)) - length
            if excess == 0:
                return text
            words = words[:-excess] if excess > 0 else words + self._pick(rest, -excess)
        raise ConfigurationError(f"No text of exactly {length} tokens was found; use --prompt-form ids.")

    def _pick(self, rng: np.random.Generator, count: int) -> list[str]:
        return [self._words[index] for index in rng.integers(len(self._words), size=count)]


Prompts = TokenIdPrompts | TextPrompts


def _words(tokenizer: Tokenizer) -> Iterator[str]:
    """Words that are one token when they follow a space."""
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.id_to_token_text(token_id)
        if text.startswith(" ") and text[1:].isascii() and text[1:].isalpha():
            yield text[1:]
