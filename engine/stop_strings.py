"""Find stop strings in text that arrives in pieces, without ever emitting one.

The rule, independent of where the pieces are cut: the text ends at the first character that completes any stop
string, and what comes before that stop string is the answer. Of several completed by the same character the longest
counts, since it begins leftmost. So generation ends as early as it can: with stops "abcd" and "bc" the text "abc"
stops at "bc", without waiting for a "d".

Each stop string is a Knuth-Morris-Pratt automaton, whose state is how many of its characters the text's end
matches: the largest state is exactly the text that must be held back, and a character costs O(1) however long the
answer and the stop strings are.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.errors import RequestError


class StopStrings:
    """Filter one answer's text for `stops`, non-empty strings. Raises RequestError for an empty one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [_Automaton(stop) for stop in dict.fromkeys(stops)]
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Text that can now be shown, and whether a stop string was found; after one, further text is dropped."""
        if self._stopped:
            return "", True
        seen, text = len(self._held), self._held + text
        for end in range(seen + 1, len(text) + 1):
            complete = [len(stop.text) for stop in self._stops if stop.advance(text[end - 1])]
            if complete:
                self._stopped, self._held = True, ""
                return text[: end - max(complete)], True
        ready = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._held = text[ready:]
        return text[:ready], False

    def flush(self) -> str:
        """The text held back, once no more will come."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """Knuth-Morris-Pratt: `matched` is the length of the longest prefix of `text` that ends the characters seen."""

    def __init__(self, text: str) -> None:
        if not text:
            raise RequestError("a stop string must not be empty")
        self.text = text
        self.matched = 0
        self._borders = [0]  # [i]: length of the longest proper prefix of text[: i + 1] that is also its suffix
        for character in text[1:]:
            self._borders.append(self._next(self._borders[-1], character))

    def advance(self, character: str) -> bool:
        """Take one character; True when it completes the stop string, after which no more may come."""
        self.matched = self._next(self.matched, character)
        return self.matched == len(self.text)

    def _next(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == character)
