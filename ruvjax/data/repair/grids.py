"""Repair grids as the boards of a recursive model, with what Python's parser says of them.

Most cells of a grid are padding (of 16 x 24, 338 on the average function of the standard library), so a board holds
strips: one for each of several functions, only the cells in play. A strip begins with a token of its own and then has,
row by row, the tokens of the row and the SLACK cells after them; an answer that needs other cells cannot be given.

On a board 0 means "nothing" in a question and "not learned" in an answer, id i of the codec is token i + 1, and the
last token begins a strip. A question's cells carry a mark (token + vocabulary * mark), what a programmer would be told:
in the row where the parser stopped the kind of its message, at the token where it stopped STOPPED, and UNMATCHED at
brackets without a partner. A text that parses has none (messages differ a little between Python versions; a model wants
the version it was trained with).
"""

import ast
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ruvjax.data.puzzles.stream import PuzzleBatch
from ruvjax.data.repair.codec import PAD, Codec
from ruvjax.data.repair.pairs import RepairStream
from ruvjax.data.repair.syntax import CLOSING, OPENING, lex
from ruvjax.errors import InputError

SLACK = 2  # cells in play after the last token of a row
# What the parser says, by how its message begins; the last kind is any other message.
MESSAGES = (
    "expected ':'",
    "expected an indented block",
    "unexpected indent",
    "unindent does not match",
    "unmatched",
    "closing parenthesis",
    "invalid syntax. Perhaps you forgot a comma",
    "invalid syntax",
)
NEVER_CLOSED = len(MESSAGES) + 1  # "'(' was never closed" begins with the bracket
OTHER = NEVER_CLOSED + 1
STOPPED = OTHER + 1
UNMATCHED = STOPPED + 1
MARKS = UNMATCHED + 1


def vocabulary(codec: Codec) -> int:
    """Tokens of a board."""
    return codec.vocab_size + 2


def begin(codec: Codec) -> int:
    """The token that begins a strip."""
    return codec.vocab_size + 1


def in_play(grid: Int[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """The cells of a broken grid that an answer may change."""
    lengths = (grid != PAD).sum(axis=1)
    return np.arange(grid.shape[1])[None, :] < np.where(lengths, lengths + SLACK, 0)[:, None]


def question(codec: Codec, grid: Int[np.ndarray, "height width"], marks: bool = True) -> Int[np.ndarray, "cells"]:
    """The strip of a broken grid, with marks where they are wanted."""
    cells = grid + 1
    if marks:
        cells = cells + vocabulary(codec) * parser_marks(codec, grid)
    return np.concatenate([[begin(codec)], cells[in_play(grid)]]).astype(np.int32)


def answer(
    labels: Int[np.ndarray, "height width"], grid: Int[np.ndarray, "height width"]
) -> Int[np.ndarray, "cells"] | None:
    """The strip of the answer to `grid`, or None where it needs cells that are not in play."""
    play = in_play(grid)
    if labels[~play].any():
        return None
    return np.concatenate([[0], labels[play] + 1]).astype(np.int32)


def parser_marks(codec: Codec, grid: Int[np.ndarray, "height width"]) -> Int[np.ndarray, "height width"]:
    """The marks of one grid whose rows are the lines of a text; all 0 where it parses."""
    marks = np.zeros(grid.shape, np.int32)
    text = codec.decode(grid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as an invalid escape sequence
        try:
            ast.parse(text)
            return marks
        except SyntaxError as error:
            row, column = max(error.lineno or 1, 1) - 1, max(error.offset or 1, 1) - 1
            message = error.msg
        except (ValueError, RecursionError, MemoryError):
            return marks
    lengths = np.zeros(grid.shape, np.int64)
    for place in zip(*np.nonzero(grid)):
        lengths[place] = len(codec.decode(grid[place].reshape(1, 1)))
    ends = np.cumsum(lengths)
    row = min(row, grid.shape[0] - 1)
    marks[row] = _kind_of(message)
    flat = marks.reshape(-1)
    for place in _unmatched(text):
        flat[int(np.searchsorted(ends, place, side="right"))] = UNMATCHED
    before = int(ends[row * grid.shape[1] - 1]) if row else 0
    stopped = int(np.searchsorted(ends, before + column, side="right"))
    flat[min(stopped, (row + 1) * grid.shape[1] - 1)] = STOPPED
    return marks


def _kind_of(message: str) -> int:
    for number, beginning in enumerate(MESSAGES, start=1):
        if message.startswith(beginning):
            return number
    return NEVER_CLOSED if message.endswith("was never closed") else OTHER


def _unmatched(text: str) -> list[int]:
    """Where in `text` the brackets without a partner stand."""
    open_ones: list[tuple[str, int]] = []
    alone: list[int] = []
    for token in lex(text):
        if token.kind != "sign" or token.text not in OPENING + CLOSING:
            continue
        if token.text in OPENING:
            open_ones.append((token.text, token.start))
        elif open_ones and OPENING.index(open_ones[-1][0]) == CLOSING.index(token.text):
            open_ones.pop()
        else:
            alone.append(token.start)
    return alone + [start for _, start in open_ones]


def pack(sizes: Sequence[int], length: int, boards: int = 0) -> tuple[list[tuple[int, int] | None], int]:
    """(board, first cell) for each strip, and the number of boards: the longest first, each on the first board with
    room for it. Of `boards` (0: as many as it takes) too few leave None for some. Raises InputError for a strip longer
    than a board.
    """
    if max(sizes, default=0) > length:
        raise InputError(
            f"a function takes {max(sizes)} cells of a board of {length}",
            "repair a shorter one, or train with a larger model.length",
        )
    room = [length] * boards
    places: list[tuple[int, int] | None] = [None] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        board = next((board for board, free in enumerate(room) if free >= sizes[number]), None)
        if board is None:
            if boards:
                continue
            room.append(length)
            board = len(room) - 1
        places[number] = (board, length - room[board])
        room[board] -= sizes[number]
    return places, len(room)


def on_boards(
    strips: Sequence[Int[np.ndarray, "_"]], places: Sequence[tuple[int, int] | None], boards: int, length: int
) -> Int[np.ndarray, "boards length"]:
    """The boards that hold each strip in its place."""
    filled = np.zeros((boards, length), np.int32)
    for strip, place in zip(strips, places):
        if place is not None:
            filled[place[0], place[1] : place[1] + len(strip)] = strip
    return filled


def grid_logits(
    codec: Codec, logits: Float[np.ndarray, "cells tokens"], grid: Int[np.ndarray, "height width"]
) -> Float[np.ndarray, "height width vocab"]:
    """Logits of the codec's ids from those of the strip of `grid`; -inf in cells that are not in play, where padding
    alone has 0."""
    found = np.full((*grid.shape, codec.vocab_size), -np.inf, np.float32)
    found[..., PAD] = 0.0
    found[in_play(grid)] = logits[1:, 1 : codec.vocab_size + 1]
    return found


class BoardStream:
    """The batches of a `RepairStream` on `boards` boards of `length` cells; what finds no room is left out.

    Every batch comes `repeat` times in a row, for rows that change their board in turn (`TrmLoss.stagger`). Positions
    are the stream's, and how often the batch at hand has come.
    """

    def __init__(
        self, stream: RepairStream, codec: Codec, boards: int, length: int, marks: bool = True, repeat: int = 1
    ):
        self._stream, self._codec, self._marks = stream, codec, marks
        self._boards, self._length, self._repeat = boards, length, repeat
        self._before = stream.get_state()
        self._served, self._batch = repeat, None

    def __next__(self) -> PuzzleBatch:
        if self._batch is None or self._served >= self._repeat:
            self._before = self._stream.get_state()
            self._batch, self._served = self._pack(), 0
        self._served += 1
        return self._batch

    def _pack(self) -> PuzzleBatch:
        found = next(self._stream)
        answers = [answer(labels, grid) for labels, grid in zip(found.labels, found.inputs)]
        kept = [i for i, strip in enumerate(answers) if strip is not None and len(strip) <= self._length]
        strips = [strip for i in kept if (strip := answers[i]) is not None]
        places, _ = pack([len(strip) for strip in strips], self._length, self._boards)
        questions = [
            question(self._codec, found.inputs[i], self._marks) if place is not None else np.empty(0, np.int32)
            for i, place in zip(kept, places)
        ]
        inputs, labels = (on_boards(part, places, self._boards, self._length) for part in (questions, strips))
        index = np.resize(found.index, self._boards).astype(np.int32)
        return PuzzleBatch(inputs, labels, np.zeros(self._boards, np.int32), index)

    def get_state(self) -> dict[str, Any]:
        if self._batch is None or self._served >= self._repeat:
            return {**self._stream.get_state(), "served": 0}
        return {**self._before, "served": self._served}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state({key: value for key, value in state.items() if key != "served"})
        self._batch, self._served = None, self._repeat
        for _ in range(int(state.get("served", 0))):
            next(self)
