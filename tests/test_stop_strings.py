"""Stop strings against their definition, applied to the whole text by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.stop_strings import StopStrings


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the shortest prefix ending in a stop string, less the longest stop string that ends it."""
    for end in range(1, len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


def possible_start(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that could begin a stop string."""
    return max((k for stop in stops for k in range(len(stop)) if text.endswith(stop[:k])), default=0)


pieces_and_stops = st.tuples(
    st.lists(st.text("abé", max_size=7), max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=6), max_size=4),
)


@given(pieces_and_stops)
def test_any_split_gives_what_the_definition_gives(case: tuple[list[str], list[str]]) -> None:
    pieces, stops = case
    matcher = StopStrings(stops)
    emitted, seen = "", ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        emitted, seen = emitted + text, seen + piece
        assert (emitted, True) == cut_at_first_stop(seen, stops) if stopped else not cut_at_first_stop(seen, stops)[1]
        if not stopped:  # holds back what could begin a stop string and nothing more
            assert emitted == seen[: len(seen) - possible_start(seen, stops)]
    assert emitted + matcher.flush() == cut_at_first_stop("".join(pieces), stops)[0]


def test_a_stop_across_three_pieces_is_never_emitted() -> None:
    matcher = StopStrings(["</end>"])
    pieces = [matcher.push(piece) for piece in ("text <", "/en", "d> more")]
    assert pieces == [("text ", False), ("", False), ("", True)]
    assert matcher.push("later") == ("", True)
    assert matcher.flush() == ""


def test_a_false_start_is_released_and_flush_returns_the_rest() -> None:
    matcher = StopStrings(["\n\n", "END"])
    assert matcher.push("a\n") == ("a", False)
    assert matcher.push("b EN") == ("\nb ", False)
    assert matcher.flush() == "EN"


def test_first_completed_wins_and_the_longest_of_equals() -> None:
    assert StopStrings(["abcd", "bc"]).push("xabcd") == ("xa", True)
    assert StopStrings(["bc", "abc"]).push("xabcd") == ("x", True)


def test_long_stop_strings_cost_linear_time() -> None:
    matcher = StopStrings(["a" * 20_000 + "b"])  # quadratic matching would take minutes here
    emitted = "".join(matcher.push("a" * 100)[0] for _ in range(1000))
    assert len(emitted) == 80_000
    assert matcher.push("b") == ("", True)


def test_no_stops_pass_everything_through_and_empty_ones_are_refused() -> None:
    assert StopStrings([]).push("text") == ("text", False)
    with pytest.raises(RequestError, match="empty"):
        StopStrings(["a", ""])
