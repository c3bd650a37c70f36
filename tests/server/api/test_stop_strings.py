import hypothesis.strategies as st
from hypothesis import given

from onebase_server.api.stop_strings import StopStringFilter

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def cut_at_first_stop(text: str, stops: list[str], *, include: bool) -> str:
    """The definition, one character at a time."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[:end] if include else text[: end - len(stop)]
    return text


@given(pieces=st.lists(TEXT, max_size=8), stops=STOPS, include=st.booleans())
def test_streamed_text_is_the_whole_text_cut_at_the_stop_however_it_was_tokenised(pieces, stops, include):
    stop_filter = StopStringFilter(stops, include_in_output=include)
    streamed = "".join(stop_filter.push(piece) for piece in pieces) + stop_filter.flush()
    assert streamed == cut_at_first_stop("".join(pieces), stops, include=include)


@given(pieces=st.lists(TEXT, max_size=8), stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(pieces, stops):
    stop_filter = StopStringFilter(stops)
    seen = streamed = ""
    for piece in pieces:
        seen += piece
        streamed += stop_filter.push(piece)
        if stop_filter.stopped:
            break
        held = seen[len(streamed) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_without_stop_strings_nothing_is_held_back():
    stop_filter = StopStringFilter([])
    assert stop_filter.push("any") == "any"
    assert stop_filter.flush() == ""


def test_nothing_follows_a_stop():
    stop_filter = StopStringFilter(["."])
    assert stop_filter.push("One. Two.") == "One"
    assert stop_filter.stopped
    assert stop_filter.push(" Three") == ""
