"""Boards as text: typed ones read and checked, any of them drawn in plain characters."""

import numpy as np
from jaxtyping import Int

from ruvjax.data.puzzles.solver import Box, candidates, has_duplicates, search
from ruvjax.errors import ConfigError, InputError

MAZE = "# SGo"  # tokens 1 to 5; 0 is padding
_BLANKS = ".0_"
_FRAME = "|+-"


def parse_board(text: str, box_height: int = 3, box_width: int = 3) -> Int[np.ndarray, "cells"]:
    """int32 tokens of a typed Sudoku: digits, blanks as `.`, `0` or `_`; spaces, line ends and `|`, `+`, `-` mean
    nothing.

    Raises InputError for a wrong length, a character that is no digit of the board, two equal digits in a row, column
    or box, and a board without a solution or with several.
    """
    box = Box(box_height, box_width)
    cells = "".join(text.split()).translate({ord(mark): None for mark in _FRAME})
    board = sudoku_digits(cells, box, "the board")
    check_boards(board[None], box, ["the board"])
    return board.astype(np.int32) + 1


def sudoku_digits(cells: str, box: Box, where: str) -> Int[np.ndarray, "cells"]:
    """Digits from 1, 0 for blanks; `where` names the board in errors."""
    size = box.size
    if len(cells) != box.cells:
        raise InputError(
            f"{where} has {len(cells)} cells, not {box.cells}", f"{size} rows of {size} digits, with . for a blank"
        )
    digits = "123456789"[:size]
    for number, mark in enumerate(cells):
        if mark not in _BLANKS and mark not in digits:
            row, column = divmod(number, size)
            raise InputError(
                f"{where}: {mark!r} in row {row + 1}, column {column + 1} is no digit of a board of {size}",
                f"digits are 1 to {size}, a blank is .",
            )
    return np.array([0 if mark in _BLANKS else int(mark) for mark in cells])


def check_boards(boards: Int[np.ndarray, "boards cells"], box: Box, where: list[str]) -> None:
    """Raise InputError naming the first board (digits from 1, 0 blank) that has not exactly one solution."""
    check_consistent(boards, box, where)
    found = search(candidates(boards, box), box).solutions
    for row in np.flatnonzero(found != 1):
        if found[row]:
            raise InputError(f"{where[row]} has several solutions", "a puzzle has one; add clues")
        raise InputError(f"{where[row]} has no solution", "no digits fit the blanks; check the clues")


def check_consistent(boards: Int[np.ndarray, "boards cells"], box: Box, where: list[str]) -> None:
    """Raise InputError naming the first board with two equal digits in a row, column or box."""
    for row in np.flatnonzero(has_duplicates(boards, box)):
        raise InputError(f"{where[row]} is invalid: {_duplicate(boards[row], box)}", "change one of the two")


def _duplicate(board: np.ndarray, box: Box) -> str:
    size = box.size
    rows, columns = np.divmod(np.arange(box.cells), size)
    boxes = rows // box.height * box.height + columns // box.width
    for name, unit in (("row", rows), ("column", columns), ("box", boxes)):
        for number in range(size):
            digits, counts = np.unique(board[(unit == number) & (board > 0)], return_counts=True)
            if (counts > 1).any():
                return f"two digits {digits[counts > 1][0]} in {name} {number + 1}"
    raise ValueError("no two digits are equal")


def show_board(tokens: Int[np.ndarray, "cells"], kind: str, width: int, box_height: int = 0, box_width: int = 0) -> str:
    """`tokens` of a sudoku, maze or arc board of `width` columns as lines of plain text.

    sudoku: boxes of `box_height` by `box_width` are set apart, blanks are dots. maze: # wall, S, G, o path. arc:
    colours as digits, `/` for the edges of a grid. Padding inside a sudoku and tokens that do not exist are `?`.
    """
    rows = np.asarray(tokens).reshape(-1, width).tolist()
    if kind == "maze":
        alphabet = "." + MAZE
        return "\n".join("".join(alphabet[t] if t < len(alphabet) else "?" for t in row).rstrip() for row in rows)
    if kind == "arc":
        alphabet = " /0123456789"
        lines = ["".join(alphabet[t] if t < len(alphabet) else "?" for t in row).rstrip() for row in rows]
        return "\n".join(lines).rstrip("\n")
    if kind != "sudoku" or box_height < 1 or box_width < 1:
        raise ConfigError(
            f"kind={kind!r} with boxes of {box_height}x{box_width} cannot be shown", "sudoku, maze or arc"
        )
    alphabet = "?." + "123456789"[: box_height * box_width]
    lines: list[str] = []
    for number, row in enumerate(rows):
        marks = [alphabet[t] if t < len(alphabet) else "?" for t in row]
        parts = [" ".join(marks[i : i + box_width]) for i in range(0, width, box_width)]
        if number and number % box_height == 0:
            lines.append("-+-".join("-" * len(part) for part in parts))
        lines.append(" | ".join(parts))
    return "\n".join(lines)
