"""The symmetries of Sudoku: canonical forms, so that equivalent boards can be told, and random ones for training.

They permute the digits, the bands, the rows within a band, the stacks, the columns within a stack, and, where boxes are
square, transpose: 1,296**2 * 2 * 9! of them at 9x9. (Transposing a 6x6 board of 2x3 boxes gives one of 3x2 boxes.)
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt64

from ruvjax.data.puzzles.solver import Box


@functools.cache
def _column_orders(box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Every allowed order of the columns, [orders, size], and the inverses."""
    inner = list(itertools.permutations(range(box.width)))
    orders = [
        [stack * box.width + column for stack, within in zip(stacks, withins) for column in within]
        for stacks in itertools.permutations(range(box.height))
        for withins in itertools.product(inner, repeat=box.height)
    ]
    array = np.array(orders)
    return array, np.argsort(array, axis=1)


@functools.lru_cache(maxsize=1 << 16)
def _least_conjugates(code: int, box: Box) -> tuple[int, np.ndarray]:
    """For rows 1 and 2 (see `canonical_forms`): the least second row over all column orders, and the orders with it."""
    size = box.size
    place = np.array([code // size**i % size for i in reversed(range(size))])
    orders, inverses = _column_orders(box)
    second = np.take_along_axis(inverses, place[orders], axis=1)
    codes = second @ _powers(size)
    return int(codes.min()), np.flatnonzero(codes == codes.min())


def _powers(size: int) -> np.ndarray:
    return size ** np.arange(size - 1, -1, -1, dtype=np.int64)


def canonical_forms(
    solutions: Int[np.ndarray, "boards cells"], clues: Bool[np.ndarray, "boards cells"], box: Box
) -> list[bytes]:
    """The least (solution, clues) over all symmetries of each board: equal exactly where two boards are equivalent.

    solutions: digits from 0; clues: the cells that are given. The board with the least solution in reading order is
    found first; among the symmetries that reach it the least clue pattern decides.

    Not all symmetries are tried. Its first row is 0 1 2 ... whatever row becomes the first, which fixes the digits. Its
    second row then depends only on where each digit of that row stands in the first, and on the order of the columns;
    so the few choices of two rows and a column order that make the second row least are kept, by table. Each of them
    fixes the rest: the other rows and bands sort by their first digit.
    """
    size, count = box.size, len(solutions)
    grids = solutions.reshape(count, 1, size, size)
    masks = clues.reshape(count, 1, size, size)
    if box.height == box.width:
        grids = np.concatenate([grids, grids.swapaxes(2, 3)], axis=1)
        masks = np.concatenate([masks, masks.swapaxes(2, 3)], axis=1)
    pairs = np.array(
        [
            (first, second)
            for first, second in itertools.permutations(range(size), 2)
            if first // box.height == second // box.height
        ]
    )
    column_of = np.argsort(grids, axis=3)
    place = np.take_along_axis(column_of[:, :, pairs[:, 0]], grids[:, :, pairs[:, 1]], axis=3)
    codes = place @ _powers(size)  # [boards, views, pairs]
    kept: list[tuple[int, int, int, int]] = []
    for board in range(count):
        options = [_least_conjugates(code, box) for code in codes[board].reshape(-1).tolist()]
        least = min(code for code, _ in options)
        for number, (code, orders) in enumerate(options):
            if code == least:
                view, pair = divmod(number, len(pairs))
                kept += [(board, view, pair, order) for order in orders.tolist()]
    best: list[bytes] = [b""] * count
    for first in range(0, len(kept), 4096):
        part = np.array(kept[first : first + 4096])
        for board, form in zip(part[:, 0].tolist(), _completed(grids, masks, pairs, part, box)):
            if not best[board] or form < best[board]:
                best[board] = form
    return best


def _completed(grids: np.ndarray, masks: np.ndarray, pairs: np.ndarray, kept: np.ndarray, box: Box) -> list[bytes]:
    """The whole board of each (board, view, pair of rows, column order)."""
    board, view, pair, order = kept.T
    columns = _column_orders(box)[0][order][:, None]
    grid = np.take_along_axis(grids[board, view], columns, axis=2)
    mask = np.take_along_axis(masks[board, view], columns, axis=2)
    number = np.arange(len(kept))
    label = np.argsort(grid[number, pairs[pair, 0]], axis=1)[:, None]
    grid = np.take_along_axis(label, grid.reshape(len(kept), 1, -1), axis=2).reshape(grid.shape)
    heads = grid[:, :, 0]
    bands = heads.reshape(len(kept), -1, box.height).min(2).repeat(box.height, axis=1)
    rank = bands * box.size + heads
    rank[number, pairs[pair, 0]] = -2
    rank[number, pairs[pair, 1]] = -1
    rows = np.argsort(rank, axis=1)[:, :, None]
    cells = [np.take_along_axis(array, rows, axis=1).reshape(len(kept), -1) for array in (grid, mask)]
    return [row.tobytes() for row in np.concatenate(cells, axis=1).astype(np.uint8)]


def signatures(boards: Int[np.ndarray, "boards cells"], box: Box) -> list[bytes]:
    """A cheap invariant: equivalent boards (digits from 1, 0 blank) have equal ones, others mostly not.

    It counts the clues of each row within its band, of each column within its stack, and of each digit.
    """
    given = (boards > 0).reshape(-1, box.size, box.size)
    rows = np.sort(given.sum(2).reshape(-1, box.width, box.height), axis=2) @ (10 ** np.arange(box.height))
    columns = np.sort(given.sum(1).reshape(-1, box.height, box.width), axis=2) @ (10 ** np.arange(box.width))
    lines = [np.sort(rows, axis=1), np.sort(columns, axis=1)]
    if box.height == box.width:
        swap = [tuple(a) > tuple(b) for a, b in zip(*(line.tolist() for line in lines))]
        turned = np.array(swap, bool)[:, None]
        lines = [np.where(turned, lines[1], lines[0]), np.where(turned, lines[0], lines[1])]
    digits = np.sort((boards[:, :, None] == np.arange(1, box.size + 1)).sum(1), axis=1)
    return [row.tobytes() for row in np.concatenate([*lines, digits], axis=1)]


@dataclass(frozen=True)
class SudokuSymmetry:
    """A random symmetry of each board, uniform over all of them. Tokens: 0 padding, 1 blank, digits from 2."""

    box: Box

    @property
    def draws(self) -> int:
        return 3 * self.box.size + self.box.height + self.box.width + 1

    def __call__(
        self,
        inputs: Int[np.ndarray, "batch cells"],
        labels: Int[np.ndarray, "batch cells"],
        puzzle: Int[np.ndarray, "batch"],
        words: UInt64[np.ndarray, "batch draws"],
    ) -> tuple[Int[np.ndarray, "batch cells"], Int[np.ndarray, "batch cells"], Int[np.ndarray, "batch"]]:
        box, size, batch = self.box, self.box.size, len(inputs)
        digits, rows, bands, columns, stacks, flip = np.split(
            words, np.cumsum([size, size, box.width, size, box.height]), axis=1
        )
        rows, columns = _line_order(bands, rows, box.height), _line_order(stacks, columns, box.width)
        cells = rows[:, :, None] * size + columns[:, None, :]
        if box.height == box.width:
            cells = np.where((flip[:, :, None] & np.uint64(1)) != 0, cells.swapaxes(1, 2), cells)
        cells = cells.reshape(batch, -1)
        fixed = np.tile(np.arange(2, dtype=np.int32), (batch, 1))
        token = np.concatenate([fixed, np.argsort(digits, axis=1).astype(np.int32) + 2], axis=1)
        moved = [np.take_along_axis(array, cells, axis=1) for array in (inputs, labels)]
        inputs, labels = (np.take_along_axis(token, array, axis=1) for array in moved)
        return inputs, labels, puzzle


def _line_order(groups: np.ndarray, lines: np.ndarray, within: int) -> np.ndarray:
    """[batch, size] orders of rows (or columns): groups shuffled, and the `within` lines of each group shuffled."""
    inner = np.argsort(lines.reshape(len(lines), -1, within), axis=2)
    return (np.argsort(groups, axis=1)[:, :, None] * within + inner).reshape(len(lines), -1)
