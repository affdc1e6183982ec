"""Repair by search: of the edits that parse, the one that a model likes best.

A model's logits of the answer's cells, from one forward pass, give every candidate text a gain: how much more probable
its cells are than those of the text as it stands, in nats (only cells that differ count; all others cancel). So all
edits of one token, any token of the vocabulary at any place, are ranked without another pass, beside edits of
more tokens that Python's grammar suggests. The parser is the critic, as in BIFI (Yasunaga and Liang 2021,
arXiv:2106.06600): candidates are shown to it in the order of their gain until it takes one.
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


class Candidate(NamedTuple):
    """`gain` in nats over the unchanged text; `row` is replaced by the ids `cells` (none: the line goes)."""

    gain: float
    row: int
    cells: tuple[int, ...]


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
            found += _row_edits(logits[row], [int(cell) for cell in cells[:length]], row, count)
    return sorted(found, key=lambda one: -one.gain)[:count]


def _row_edits(logits: np.ndarray, cells: list[int], row: int, count: int) -> list[Candidate]:
    length, width = len(cells), len(logits)
    ended = cells[-1] == EOL
    places = length - 1 if ended else length  # tokens that may change
    own = np.array(cells)
    stays = logits[np.arange(length), own]
    found = [Candidate(float((logits[:length, PAD] - stays).sum()), row, ())]
    # what it is worth to move the tokens from each place on by one cell
    after = np.array([*cells[1:], PAD])
    left = np.cumsum((logits[np.arange(length), after] - stays)[::-1])[::-1]
    found += [Candidate(float(left[i]), row, (*cells[:i], *cells[i + 1 :])) for i in range(places)]
    worth = logits[:places] - stays[:places, None]
    worth[np.arange(places), own[:places]] = -np.inf
    worth[:, [PAD, EOL]] = -np.inf
    found += [
        Candidate(float(worth[i, token]), row, (*cells[:i], token, *cells[i + 1 :]))
        for i, token in _largest(worth, count)
    ]
    if length < width:
        last = length + 1
        there = np.array([*cells[1:], PAD])
        moved = logits[np.arange(1, last), own] - logits[np.arange(1, last), there]
        right = np.cumsum(moved[::-1])[::-1]
        if not ended:
            right = np.append(right, 0.0)
        begin = len(right)
        stay = np.append(stays, logits[length, PAD])[:begin]
        worth = logits[:begin] - stay[:, None] + right[:, None]
        worth[:, [PAD, EOL]] = -np.inf
        found += [
            Candidate(float(worth[i, token]), row, (*cells[:i], token, *cells[i:]))
            for i, token in _largest(worth, count)
        ]
    return found


def _largest(worth: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The places (row, column) of the `count` largest numbers."""
    count = min(count, worth.size)
    flat = np.argpartition(worth, worth.size - count, axis=None)[worth.size - count :] if count else []
    return [divmod(int(place), worth.shape[1]) for place in flat]


def line_edits(
    codec: Codec, logits: Float[np.ndarray, "height width vocab"], grid: Int[np.ndarray, "height width"], text: str
) -> list[Candidate]:
    """The `respellings` of a text that fit the grid, with their gains, in no order."""
    found: list[Candidate] = []
    lines = text.split("\n")
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)])
    for edit in respellings(text):
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


def respellings(text: str) -> Iterator[Edit]:
    """Edits within a line that may take several tokens: another indentation, a word that is nearly a keyword, a bracket
    within a word or at its ends."""
    begin = 0
    for line in text.split("\n")[:-1]:
        blanks = len(line) - len(line.lstrip(" "))
        for count in {blanks - 4, blanks - 1, blanks + 1, blanks + 4, blanks // 4 * 4, blanks // 4 * 4 + 4}:
            if count >= 0 and count != blanks:
                yield Edit(begin, begin + blanks, " " * count)
        begin += len(line) + 1
    for token in lex(text):
        if token.kind not in ("name", "keyword"):
            continue
        for word in _WORDS:
            if word != token.text and nearly(token.text, word):
                yield Edit(token.start, token.end, word)
        for place in range(token.start, token.end + 1):
            for sign in OPENING + CLOSING:
                yield Edit(place, place, sign)


def nearly(word: str, other: str) -> bool:
    """Whether one letter put in, taken out or replaced, or two neighbours exchanged, make one word the other."""
    if abs(len(word) - len(other)) > 1:
        return False
    first = next((i for i, (a, b) in enumerate(zip(word, other)) if a != b), min(len(word), len(other)))
    a, b = word[first:], other[first:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (len(a) > 1 and a[1::-1] == b[:2] and a[2:] == b[2:])


@dataclass(frozen=True)
class Search:
    """How far to look: `edits` of one token, the best ones; `tries`, candidates shown to the parser; `margin`, the
    gain in nats from which a text that parses is changed."""

    edits: int = 512
    tries: int = 2000
    margin: float = 0.0

    def __post_init__(self):
        for name in ("edits", "tries"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"search.{name}={value!r} is out of range", "an integer of 1 or more")


def best_edit(
    codec: Codec, logits: Float[np.ndarray, "height width vocab"], grid: Int[np.ndarray, "height width"], search: Search
) -> tuple[str, float] | None:
    """(text, gain) of the first edit that parses, or None where there is none."""
    text = codec.decode(grid)
    broken = parse(text) is None
    found = token_edits(logits, grid, search.edits)
    if broken:
        found = sorted([*found, *line_edits(codec, logits, grid, text)], key=lambda one: -one.gain)
    lines = [codec.decode(row[None]) for row in grid]
    seen: set[str] = {text}
    for one in found:
        if len(seen) > search.tries or (not broken and one.gain < search.margin):
            return None
        line = codec.decode(np.array([one.cells], np.int32)) if one.cells else ""
        changed = "".join([*lines[: one.row], line, *lines[one.row + 1 :]])
        if changed in seen:
            continue
        seen.add(changed)
        if parse(changed) is not None:
            return changed, one.gain
    return None
