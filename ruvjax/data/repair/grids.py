"""Repair grids as the boards of a recursive model, with what Python's parser says of them.

On a board 0 means "not learned", as for puzzles, and id i of the codec is token i + 1. A question's cells carry a mark
(token + vocabulary * mark), what a programmer would be told: in the row where the parser stopped the kind of its
message, at the token where it stopped STOPPED, and UNMATCHED at brackets without a partner. A text that parses has none
(messages differ a little between Python versions; a model wants the version it was trained with). The answer is learned
in the rows that the broken text fills and the two after it; below them nothing can change, and an answer is cut there.
"""

import ast
import warnings
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from ruvjax.data.puzzles.stream import PuzzleBatch
from ruvjax.data.repair.codec import PAD, Codec
from ruvjax.data.repair.pairs import RepairStream
from ruvjax.data.repair.syntax import CLOSING, OPENING, lex

BELOW = 2  # learned rows after the last one of the broken text
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


def rows_in_reach(grids: Int[np.ndarray, "batch height width"]) -> Bool[np.ndarray, "batch height"]:
    """The rows of a broken grid that an answer may change."""
    filled = (grids != PAD).any(axis=2)
    last = grids.shape[1] - 1 - np.argmax(filled[:, ::-1], axis=1)
    last = np.where(filled.any(axis=1), last, 0)
    return np.arange(grids.shape[1])[None, :] <= last[:, None] + BELOW


def to_boards(grids: Int[np.ndarray, "batch height width"]) -> Int[np.ndarray, "batch cells"]:
    """Codec ids as board tokens, row by row."""
    return (grids + 1).reshape(len(grids), -1).astype(np.int32)


def to_questions(
    codec: Codec, grids: Int[np.ndarray, "batch height width"], marks: bool = True
) -> Int[np.ndarray, "batch cells"]:
    """Boards of broken grids, with marks where they are wanted."""
    boards = to_boards(grids)
    if not marks:
        return boards
    found = np.stack([parser_marks(codec, grid) for grid in grids]).reshape(boards.shape)
    return boards + vocabulary(codec) * found


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
    ends = np.cumsum([len(codec.decode(cell.reshape(1, 1))) for cell in grid.reshape(-1)])
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


def to_labels(
    grids: Int[np.ndarray, "batch height width"], inputs: Int[np.ndarray, "batch height width"]
) -> Int[np.ndarray, "batch cells"]:
    """The answer's tokens, 0 in the rows out of reach."""
    return to_boards(grids) * np.repeat(rows_in_reach(inputs), grids.shape[2], axis=1)


def to_texts(
    codec: Codec, boards: Int[np.ndarray, "batch cells"], inputs: Int[np.ndarray, "batch height width"]
) -> list[str]:
    """The texts of a model's answers, each ended by a newline, as every function is."""
    grids = np.maximum(np.asarray(boards).reshape(inputs.shape) - 1, PAD)
    grids = np.where(rows_in_reach(inputs)[..., None], grids, PAD)
    return [_ended(codec.decode(grid)) for grid in grids]


def _ended(text: str) -> str:
    return text if text.endswith("\n") or not text else text + "\n"


def vocabulary(codec: Codec) -> int:
    """Tokens of a board."""
    return codec.vocab_size + 1


class BoardStream:
    """The batches of a `RepairStream` as boards without a puzzle vector. Positions are the stream's."""

    def __init__(self, stream: RepairStream, codec: Codec, marks: bool = True):
        self._stream, self._codec, self._marks = stream, codec, marks

    def __next__(self) -> PuzzleBatch:
        found = next(self._stream)
        labels = to_labels(found.labels, found.inputs)
        questions = to_questions(self._codec, found.inputs, self._marks)
        return PuzzleBatch(questions, labels, np.zeros(len(labels), np.int32), found.index)

    def get_state(self) -> dict[str, Any]:
        return self._stream.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state)
