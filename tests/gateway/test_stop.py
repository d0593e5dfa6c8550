"""Stop strings: found wherever the text is cut, against a search of the whole text."""

from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.gateway.stop import StopStringMatcher

letters = st.text("abc", max_size=12)
stops = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


def first_stop(text, stop_strings):
    """The string that is complete first, the longest of several, and where it ends."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if ending:
            return max(ending, key=len), end
    return None, len(text)


def read(matcher, pieces):
    """What goes out piece by piece, and the stop string."""
    out = []
    for piece in pieces:
        match = matcher.push(piece)
        out.append(match.text)
        if match.stop_string is not None:
            return out, match.stop_string
    return [*out, matcher.finish()], None


@settings(deadline=None, derandomize=True)
@given(pieces=st.lists(letters, max_size=6), stop_strings=stops, include=st.booleans())
def test_any_cut_gives_what_a_search_of_the_whole_gives(pieces, stop_strings, include):
    out, found = read(StopStringMatcher(stop_strings, include), pieces)
    expected, end = first_stop("".join(pieces), stop_strings)
    assert found == expected
    kept = end if include or expected is None else end - len(expected)
    assert "".join(out) == "".join(pieces)[:kept]


@settings(deadline=None, derandomize=True)
@given(text=letters, stop_strings=stops)
def test_only_what_may_begin_a_stop_string_is_held_back(text, stop_strings):
    matcher = StopStringMatcher(stop_strings, False)
    sent = ""
    for index, character in enumerate(text):
        match = matcher.push(character)
        if match.stop_string is not None:
            return
        sent += match.text
        known = text[: index + 1]
        starts = {stop[:length] for stop in stop_strings for length in range(1, len(stop))}
        held = max((len(start) for start in starts if known.endswith(start)), default=0)
        assert sent == known[: len(known) - held]


def test_a_match_that_may_not_stop_yet_is_text():
    matcher = StopStringMatcher(("ab",), False)
    assert matcher.push("xab", may_stop=False).text == "xab"
    match = matcher.push("yab")
    assert (match.text, match.stop_string) == ("y", "ab")


def test_a_string_that_ends_where_it_may_stop_counts():
    matcher = StopStringMatcher(("ab",), False)
    assert matcher.push("xa", may_stop=False).text == "x"
    assert matcher.push("b").stop_string == "ab"
