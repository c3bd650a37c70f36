import numpy as np
import pytest

from onebase_server.bench.prompts import FIRST_ORDINARY_ID, TextPrompts, TokenIdPrompts
from onebase_server.model.tokenizer import Tokenizer


def generators() -> tuple[np.random.Generator, np.random.Generator]:
    return np.random.default_rng(1), np.random.default_rng(2)


def test_ids_are_ordinary_ones_of_the_vocabulary() -> None:
    ids = TokenIdPrompts.of_vocabulary(1000).draw(*generators(), 0, 5000)
    assert min(ids) >= FIRST_ORDINARY_ID
    assert max(ids) < 1000


def test_a_tiny_vocabulary_is_used_whole() -> None:
    assert set(TokenIdPrompts.of_vocabulary(10).draw(*generators(), 0, 500)) == set(range(10))


@pytest.mark.parametrize("length", [1, 7, 64])
def test_a_text_is_as_many_tokens_as_asked_for(word_tokenizer: Tokenizer, length: int) -> None:
    text = TextPrompts(word_tokenizer).draw(*generators(), 0, length)
    assert len(word_tokenizer.encode(text)) == length


def test_texts_share_their_prefix(word_tokenizer: Tokenizer) -> None:
    prompts = TextPrompts(word_tokenizer)
    first, second = (prompts.draw(np.random.default_rng(1), np.random.default_rng(k), 3, 9).split() for k in (2, 3))
    assert first[:3] == second[:3]
    assert first[3:] != second[3:]
