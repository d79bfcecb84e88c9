"""Streaming text: stop strings wherever token borders fall, and nothing shown that could still be taken back."""

from __future__ import annotations

from hypothesis import given, strategies as st

from tinyllm.engine.text import TextStream


class Pieces:
    """A decoder whose token i is pieces[i]; the last piece comes only with flush."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.pieces[-1]


def test_a_stop_string_over_several_tokens_is_cut_and_never_shown() -> None:
    stream = TextStream(Pieces(["ab", "c<", "en", "d>x", ""]), ("<end>",), include_stop=False)
    shown = []
    for token in range(4):
        stopped = stream.push(token)
        shown.append(stream.take())
        assert stopped == (token == 3)
    assert shown == ["ab", "c", "", ""]
    assert (stream.text, stream.stopped_by) == ("abc", "<end>")


def test_what_was_held_back_comes_when_it_is_no_stop_string() -> None:
    stream = TextStream(Pieces(["a<e", "nx", ""]), ("<end>",), include_stop=False)
    stream.push(0)
    assert stream.take() == "a"
    stream.push(1)
    assert stream.take() == "<enx"


def test_the_stop_string_stays_if_asked_and_the_earliest_wins() -> None:
    stream = TextStream(Pieces(["one two three", ""]), ("three", "two"), include_stop=True)
    assert stream.push(0)
    assert (stream.text, stream.stopped_by) == ("one two", "two")


def test_no_stop_before_min_tokens_but_text_goes_on() -> None:
    stream = TextStream(Pieces(["aX", "bX", ""]), ("X",), include_stop=False)
    assert not stream.push(0, may_stop=False)
    assert stream.push(1)
    assert stream.text == "aXb"


def test_finish_adds_what_the_decoder_held_and_take_final_shows_all() -> None:
    stream = TextStream(Pieces(["a<", "\N{REPLACEMENT CHARACTER}"]), ("<end>",), include_stop=False)
    stream.push(0)
    assert stream.take() == "a"
    stream.finish()
    assert stream.take(final=True) == "<\N{REPLACEMENT CHARACTER}"


def test_without_a_decoder_there_is_no_text() -> None:
    stream = TextStream(None, (), include_stop=False)
    assert not stream.push(3)
    stream.finish()
    assert stream.text == stream.take(final=True) == ""


@given(
    pieces=st.lists(st.text("ab<>", max_size=4), min_size=1, max_size=12),
    stop=st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_any_pieces_give_the_text_up_to_the_first_stop_string(
    pieces: list[str], stop: list[str], include: bool
) -> None:
    stream = TextStream(Pieces([*pieces, ""]), stop, include_stop=include)
    shown = ""
    for token in range(len(pieces)):
        stopped = stream.push(token)
        shown += stream.take()
        seen = "".join(pieces[: token + 1])
        ends = [(seen.find(s), s) for s in stop if s in seen]
        assert stopped == bool(ends)
        assert stream.text.startswith(shown)
        if stopped:
            at, first = min(ends, key=lambda end: (end[0], -len(end[1])))
            assert stream.text == seen[: at + len(first) if include else at]
            break
    stream.finish()
    assert shown + stream.take(final=True) == stream.text
