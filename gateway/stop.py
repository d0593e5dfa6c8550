"""Finds stop strings in a stream of text, whatever way the text is cut into pieces.

One Knuth-Morris-Pratt automaton for each string (D. E. Knuth, J. H. Morris, V. R. Pratt, "Fast pattern matching in
strings", 1977). Its state is how much of the string the text so far ends with, so the largest state is exactly the
text that must be held back, and one character costs amortised constant time.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Text that may go out, and the stop string that ended it, if one did."""

    text: str
    stop_string: str | None


class _Automaton:
    """Where one stop string stands in the text."""

    __slots__ = ("_borders", "pattern", "state")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.state = 0  # length of the longest prefix of the pattern that the text ends with
        self._borders = _borders(pattern)

    def advance(self, character: str) -> bool:
        """Reads one character; whether the pattern ends with it. A match that does not count holds no text back."""
        state = self.state
        while state and self.pattern[state] != character:
            state = self._borders[state]
        state += self.pattern[state] == character
        matched = state == len(self.pattern)
        self.state = self._borders[state] if matched else state
        return matched


def _borders(pattern: str) -> list[int]:
    """For each prefix length, the length of its longest proper border (a prefix that is also a suffix)."""
    borders = [0] * (len(pattern) + 1)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length]
        length += pattern[index] == pattern[length]
        borders[index + 1] = length
    return borders


class StopStringMatcher:
    """Owner of one sequence's held-back text. The string that is complete first wins; of several, the longest."""

    def __init__(self, stop_strings: tuple[str, ...], include_in_output: bool) -> None:
        self._automata = [_Automaton(pattern) for pattern in sorted(set(stop_strings), key=len, reverse=True)]
        self._include = include_in_output
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> StopMatch:
        """Reads new text; `may_stop` says whether a string that ends in it counts (min_tokens)."""
        known = self._held + text
        for index in range(len(self._held), len(known)):
            found = self._read(known[index])
            if found and may_stop:
                return self._end(known[: index + 1], found)
        num_held = max(automaton.state for automaton in self._automata)
        cut = len(known) - num_held
        self._held = known[cut:]
        return StopMatch(known[:cut], None)

    def finish(self) -> str:
        """The held-back text, when the sequence ended otherwise."""
        held, self._held = self._held, ""
        return held

    def _read(self, character: str) -> str | None:
        found = None
        for automaton in self._automata:
            if automaton.advance(character):
                found = found or automaton.pattern
        return found

    def _end(self, text: str, stop_string: str) -> StopMatch:
        self._held = ""
        return StopMatch(text if self._include else text[: -len(stop_string)], stop_string)
