"""Patterns of module names that a config holds (`re:.*mlp.(gate|up)_proj$`), in bounded time.

They are no regular expressions here but a few pieces, and all places where a name may go on are
followed at once, so that no pattern takes more than its length times the name's.
"""

import re
from typing import Final, NamedTuple

_WORD: Final = r"(?:[A-Za-z0-9_-]|\\\.)+"
_PIECE: Final = re.compile(
    rf"(?P<wild>\.\*?|\\d\+)|(?P<word>{_WORD})|\((?:\?:)?(?P<words>{_WORD}(?:\|{_WORD})*)\)"
)


class Pattern(NamedTuple):
    """Pieces in their order: for any letters, for digits, or words of which one stands there."""

    pieces: tuple[str | tuple[str, ...], ...]
    to_the_end: bool
    """Whether it ends in `$`: else it may match only a name's beginning, as `re.match` does."""
    text: str

    @property
    def digits(self) -> str:
        """The digits that it tells apart."""
        words = [word for piece in self.pieces if isinstance(piece, tuple) for word in piece]
        return "".join(sorted({letter for letter in "".join(words) if letter.isdigit()}))

    def matches(self, name: str) -> bool:
        """Whether `re.match(text, name)` would find something."""
        places = {0}
        for piece in self.pieces:
            if not places:
                return False
            places = _after(piece, places, name)
        return len(name) in places if self.to_the_end else bool(places)


def _after(piece: str | tuple[str, ...], places: set[int], name: str) -> set[int]:
    """Where a name may go on behind a piece that starts at one of these places."""
    if isinstance(piece, tuple):
        return {
            place + len(word) for word in piece for place in places if name.startswith(word, place)
        }
    if piece == ".*":
        return set(range(min(places), len(name) + 1))
    if piece == ".":
        return {place + 1 for place in places if place < len(name)}
    found: set[int] = set()
    for place in places:
        end = place
        while end < len(name) and name[end].isdecimal():
            end += 1
            found.add(end)
    return found


def parse(text: str) -> Pattern | None:
    """The pattern, or None where it has anything that is not known here."""
    inner = text.removeprefix("^")
    to_the_end = inner.endswith("$")
    inner = inner.removesuffix("$")
    pieces: list[str | tuple[str, ...]] = []
    place = 0
    while place < len(inner):
        found = _PIECE.match(inner, place)
        if found is None:
            return None
        words = found["word"] or found["words"]
        if words is None:
            pieces.append(found["wild"])
        else:
            pieces.append(tuple(words.replace("\\.", ".").split("|")))
        place = found.end()
    return Pattern(tuple(pieces), to_the_end, text)
