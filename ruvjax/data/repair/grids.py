"""Repair grids as the boards of a recursive model, with what Python's parser says of them.

On a board 0 means "not learned", as for puzzles, and id i of the codec is token i + 1. A question's cells carry a mark
(token + vocabulary * mark): MARKS kinds, none, "the parser stopped in this row", and "at this token", as a programmer
would see it; a text that parses has none. The answer is learned in the rows that the broken text fills and the two
after it; below them nothing can change, and an answer is cut there.
"""

import ast
import warnings
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from ruvjax.data.puzzles.stream import PuzzleBatch
from ruvjax.data.repair.codec import PAD, Codec
from ruvjax.data.repair.pairs import RepairStream

BELOW = 2  # learned rows after the last one of the broken text
MARKS = 3


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
    """Where Python's parser stops in the text of `grid` (one line a row): 1 in its row, 2 at its token, 0 elsewhere."""
    marks = np.zeros(grid.shape, np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as an invalid escape sequence
        try:
            ast.parse(codec.decode(grid))
            return marks
        except SyntaxError as error:
            row, column = (error.lineno or 1) - 1, (error.offset or 1) - 1
        except (ValueError, RecursionError, MemoryError):
            return marks
    row = min(row, grid.shape[0] - 1)
    marks[row] = 1
    ends = np.cumsum([len(codec.decode(cell.reshape(1, 1))) for cell in grid[row]])
    marks[row, min(int(np.searchsorted(ends, column, side="right")), grid.shape[1] - 1)] = 2
    return marks


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
