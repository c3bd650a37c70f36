import hypothesis.strategies as st
import pytest
from hypothesis import given

from onebase_server.api.generation import SequenceText
from onebase_server.engine.request import TokenOutput
from onebase_server.errors import OnebaseError

ALPHABET = "ab é日😀"


def outputs_of(token_ids: list[int], step: int, reason: str) -> list[TokenOutput]:
    """The engine's outputs, `step` tokens in each, the last with the reason."""
    parts = [tuple(token_ids[start : start + step]) for start in range(0, len(token_ids), step)] or [()]
    outputs = [TokenOutput(request_id="r", token_ids=part) for part in parts[:-1]]
    return [*outputs, TokenOutput(request_id="r", token_ids=parts[-1], finish_reason=reason)]


@given(
    text=st.text(ALPHABET, max_size=20),
    stop=st.lists(st.text(ALPHABET, min_size=1, max_size=3), max_size=2),
    step=st.integers(1, 3),
)
def test_the_streamed_text_is_the_whole_text_cut_at_its_stop(byte_tokenizer, text, stop, step):
    sequence = SequenceText(byte_tokenizer.stream(), stop, include_stop=False)
    streamed, reason = "", None
    for output in outputs_of(byte_tokenizer.encode(text), step, "length"):
        piece = sequence.assemble(0, output)
        assert "\ufffd" not in piece.text  # no character is ever split
        streamed, reason = streamed + piece.text, piece.finish_reason
        if reason:
            break
    ends = [(text.index(each) + len(each), text.index(each)) for each in stop if each in text]
    assert streamed == (text[: min(ends)[1]] if ends else text)
    assert reason == ("stop" if ends else "length")


def test_a_character_that_the_end_cuts_off_shows_as_such(byte_tokenizer):
    sequence = SequenceText(byte_tokenizer.stream(), [], include_stop=False)
    pieces = [
        sequence.assemble(0, output).text for output in outputs_of(byte_tokenizer.encode("a日")[:-1], 1, "length")
    ]
    assert "".join(pieces) == "a\ufffd"


@pytest.mark.parametrize("include_stop", [True, False])
def test_the_token_that_ends_a_text_is_left_out_unless_asked_for(byte_tokenizer, include_stop):
    a, b = byte_tokenizer.encode("ab")
    sequence = SequenceText(byte_tokenizer.stream(), [], include_stop=include_stop)
    piece = sequence.assemble(0, TokenOutput(request_id="r", token_ids=(a, b), finish_reason="stop", stop_token_id=b))
    assert piece.text == ("ab" if include_stop else "a")
    assert piece.token_ids == (a, b)  # it is generated, counted and scored all the same


def test_a_sequence_that_the_engine_gave_up_on_is_an_error(byte_tokenizer):
    sequence = SequenceText(byte_tokenizer.stream(), [], include_stop=False)
    with pytest.raises(OnebaseError, match="It broke"):
        sequence.assemble(0, TokenOutput(request_id="r", finish_reason="error", error="It broke."))
