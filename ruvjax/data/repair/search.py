"""Repair by search: of the edits that parse, the one that a model finds most probable.

The logits of an answer's cells, from one forward pass, give every candidate text a gain: how much more probable its
cells are than those of the text as it stands, in nats. Cells on which the two agree cancel, and so do the normalisers
of the softmax, so a gain is a sum of a few differences of logits. All edits of one token, any token of the vocabulary
in any place, are ranked like that, beside the edits that Python's grammar suggests. The parser is the critic (as in
BIFI, Yasunaga and Liang 2021, arXiv:2106.06600): it sees the candidates in the order of their gain until it takes one.
"""

import keyword
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ruvjax.data.repair.bugs import Edit
from ruvjax.data.repair.codec import EOL, PAD, Codec
from ruvjax.data.repair.syntax import CLOSING, OPENING, lex, parse
from ruvjax.errors import ConfigError

_TOKEN_EDITS = 512  # of one token that are kept, beside those of the grammar
_IMPOSSIBLE = -1e9  # stands for a logit of -inf: of several in one sum, infinities would make NaN


class Candidate(NamedTuple):
    """`row` of the grid gets the ids `cells` (none: the line goes); `gain` in nats over the unchanged text."""

    gain: float
    row: int
    cells: tuple[int, ...]


@dataclass(frozen=True)
class Search:
    """tries: candidates shown to the parser, at most. margin: a text that parses is changed for a gain of at least so
    many nats. Raises ConfigError."""

    tries: int = 2000
    margin: float = 4.0

    def __post_init__(self):
        if isinstance(self.tries, bool) or not isinstance(self.tries, int) or self.tries < 1:
            raise ConfigError(f"tries={self.tries!r} is out of range", "an integer of 1 or more")
        if isinstance(self.margin, bool) or not isinstance(self.margin, int | float) or self.margin != self.margin:
            raise ConfigError(f"margin={self.margin!r} is not a number of nats")


def best_edit(
    codec: Codec, logits: Float[np.ndarray, "height width vocab"], grid: Int[np.ndarray, "height width"], search: Search
) -> str | None:
    """The text of `grid` after the most probable single edit that parses; None where no candidate does, or where the
    text parses already and no gain reaches the margin.

    `logits`: of the codec's ids in the cells of the answer; -inf where an answer cannot be.
    """
    text = codec.decode(grid)
    logits = np.maximum(logits.astype(np.float64), _IMPOSSIBLE)  # float32 would lose the finite part of a sum
    candidates, least = token_edits(logits, grid, _TOKEN_EDITS), max(search.margin, _IMPOSSIBLE / 2)
    if parse(text) is None:
        candidates, least = [*candidates, *suggested_edits(codec, logits, grid)], _IMPOSSIBLE / 2
    candidates = [one for one in candidates if one.gain >= least]
    lines = [codec.decode(row[None]) for row in grid]
    seen = {text}
    for one in sorted(candidates, key=lambda one: -one.gain):
        if len(seen) > search.tries:
            return None
        line = codec.decode(np.array([one.cells], np.int32))
        changed = "".join([*lines[: one.row], line, *lines[one.row + 1 :]])
        if changed not in seen:
            seen.add(changed)
            if parse(changed) is not None:
                return changed
    return None


def token_edits(
    logits: Float[np.ndarray, "height width vocab"], grid: Int[np.ndarray, "height width"], count: int
) -> list[Candidate]:
    """The `count` best edits of one token, best first: replaced, put in or taken out; and lines taken out.

    A token put in or taken out moves the rest of its row by one cell, as in `align`. Newlines stay where they are.
    """
    found: list[Candidate] = []
    for row, cells in enumerate(grid):
        length = int((cells != PAD).sum())
        if length:
            found += _row_edits(logits[row], cells[:length].astype(np.int64), row, count)
    return sorted(found, key=lambda one: -one.gain)[:count]


def _row_edits(logits: np.ndarray, own: np.ndarray, row: int, count: int) -> list[Candidate]:
    length, cells = len(own), tuple(own.tolist())
    places = length - 1 if own[-1] == EOL else length  # whose tokens may change
    here = np.arange(length)
    stays = logits[here, own]
    found = [Candidate(float((logits[:length, PAD] - stays).sum()), row, ())]
    to_left = _from_here_on(logits[here, np.append(own[1:], PAD)] - stays)
    found += [Candidate(float(to_left[i]), row, cells[:i] + cells[i + 1 :]) for i in range(places)]
    replaced = logits[:places] - stays[:places, None]
    replaced[here[:places], own[:places]] = -np.inf
    found += [
        Candidate(gain, row, (*cells[:i], token, *cells[i + 1 :])) for gain, i, token in _largest(replaced, count)
    ]
    if length < len(logits):
        to_right = _from_here_on(logits[here + 1, own] - logits[here + 1, np.append(own[1:], PAD)])
        put_in = logits[:length] - stays[:, None] + to_right[:, None]
        found += [Candidate(gain, row, (*cells[:i], token, *cells[i:])) for gain, i, token in _largest(put_in, count)]
    return found


def _from_here_on(gains: np.ndarray) -> np.ndarray:
    return np.cumsum(gains[::-1])[::-1]


def _largest(gains: np.ndarray, count: int) -> list[tuple[float, int, int]]:
    """(gain, place, token) of the `count` largest of [places, vocab], padding and newlines left out."""
    gains[:, [PAD, EOL]] = -np.inf
    count = min(count, gains.size)
    flat = np.argpartition(gains, gains.size - count, axis=None)[gains.size - count :]
    return [
        (float(gains[place]), *place)
        for place in zip(*(part.tolist() for part in np.unravel_index(flat, gains.shape)))
        if gains[place] > -np.inf
    ]


def suggested_edits(
    codec: Codec, logits: Float[np.ndarray, "height width vocab"], grid: Int[np.ndarray, "height width"]
) -> list[Candidate]:
    """The `grammar_edits` of the text of `grid` that fit it, in no order."""
    text = codec.decode(grid)
    lines = text.split("\n")
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)])
    found: list[Candidate] = []
    for edit in grammar_edits(text):
        row = int(np.searchsorted(starts, edit.start, side="right")) - 1
        begin = int(starts[row])
        changed = Edit(edit.start - begin, edit.end - begin, edit.new).apply(lines[row])
        cells = codec.rows(changed + "\n")[0]
        if len(cells) <= codec.width:
            found.append(Candidate(_gain(logits[row], grid[row], cells), row, tuple(cells)))
    return found


def _gain(logits: np.ndarray, before: np.ndarray, cells: list[int]) -> float:
    after = np.zeros_like(before)
    after[: len(cells)] = cells
    places = np.nonzero(after != before)[0]
    return float((logits[places, after[places]] - logits[places, before[places]]).sum())


_WORDS = tuple(sorted({*keyword.kwlist, *keyword.softkwlist} - {"_"}))
_COMPARISONS = ("==", "!=", "<=", ">=")
_TURNED = dict(zip(OPENING + CLOSING, CLOSING + OPENING))


def grammar_edits(text: str) -> Iterator[Edit]:
    """The edits within a line that may be what a text that does not parse wants: another indentation; a colon, comma
    or bracket put in; one of two equal signs, or a bracket, taken out; a bracket of another kind; a comparison for `=`;
    a keyword for what is nearly one."""
    begin, above = 0, 0
    for line in text.split("\n")[:-1]:
        blanks = len(line) - len(line.lstrip(" "))
        down = blanks // 4 * 4
        for count in {blanks - 4, blanks - 1, blanks + 1, blanks + 4, down, down + 4, above}:
            if count >= 0 and count != blanks:
                yield Edit(begin, begin + blanks, " " * count)
        begin += len(line) + 1
        above = blanks
    before = ""
    for token in lex(text):
        if token.kind == "newline":
            continue
        start, end, word = token.start, token.end, token.text
        yield from (Edit(end, end, sign) for sign in (":", ",", *OPENING, *CLOSING))
        yield from (Edit(start, start, sign) for sign in OPENING)
        if token.kind in ("name", "keyword"):
            yield from (Edit(start, end, other) for other in _WORDS if other != word and nearly(word, other))
            # what stood before a bracket that is missing now touches what follows
            yield from (Edit(place, place, sign) for place in range(start + 1, end) for sign in OPENING)
        elif word in _TURNED:
            yield Edit(start, end, "")
            kind = OPENING if word in OPENING else CLOSING
            yield from (Edit(start, end, sign) for sign in (*kind, _TURNED[word]) if sign != word)
        elif word == before and token.kind == "sign":
            yield Edit(start, end, "")
        elif word == "=":
            yield from (Edit(start, end, sign) for sign in _COMPARISONS)
        before = word


def nearly(word: str, other: str) -> bool:
    """Whether one letter put in, taken out or replaced, or two neighbours exchanged, make one word the other."""
    if abs(len(word) - len(other)) > 1:
        return False
    first = next((i for i, (a, b) in enumerate(zip(word, other)) if a != b), min(len(word), len(other)))
    a, b = word[first:], other[first:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[1::-1] == b[:2] and a[2:] == b[2:])
