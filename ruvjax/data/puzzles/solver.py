"""A Sudoku solver for many boards at once: it counts solutions and rates difficulty.

A box is `box_height` rows by `box_width` columns, and a board has box_height * box_width rows, columns and digits.
Boards are held as candidates: [cells, boards] of words, bit d set where digit d (from 0) is still possible. One board
is a column, so that every operation runs over the boards in memory order.

The method, and so the rating, is fixed. (1) Singles, all cells at a time until nothing changes: a digit placed in a
row, column or box leaves its other cells, and a digit with one place left in one goes there. (2) Where that stalls,
branch on the cell with the fewest candidates, the first in reading order. The whole tree is searched. The rating of a
board with one solution is the number of dead ends of that tree: 0 where singles suffice, else how often a guess had to
be taken back.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt

_CHUNK = 4096  # boards worked on together: their candidates stay in the cache, and waiting rows stay few


@dataclass(frozen=True)
class Box:
    """The shape of a box, from 2x2 to 3x3, 2x4 and 4x2, which decides that of the board."""

    height: int
    width: int

    @property
    def size(self) -> int:
        """Rows, columns, boxes and digits of the board."""
        return self.height * self.width

    @property
    def cells(self) -> int:
        return self.size**2

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The narrowest word with a bit per digit: solving is bound by memory traffic."""
        return np.uint8 if self.size <= 8 else np.uint16

    @property
    def full(self) -> np.unsignedinteger:
        """The word with every digit's bit."""
        return self.dtype((1 << self.size) - 1)


@dataclass(frozen=True, eq=False)
class Search:
    """What `search` found. solutions: int [boards], counted up to the limit; answer: digits from 0, the first one
    found; backtracks: int [boards], dead ends, the rating where the solution is the only one and the limit was above
    1."""

    solutions: Int[np.ndarray, "boards"]
    backtracks: Int[np.ndarray, "boards"]
    answer: Int[np.ndarray, "boards cells"]


def candidates(boards: Int[np.ndarray, "boards cells"], box: Box) -> UInt[np.ndarray, "cells boards"]:
    """Candidates of boards of digits from 1, with 0 for blanks."""
    bits = np.where(boards > 0, 1 << np.maximum(boards.astype(np.int64) - 1, 0), int(box.full))
    return np.ascontiguousarray(bits.T.astype(box.dtype))


def _twice(groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(bits set at least once, bits set at least twice) over the cells of each unit."""
    once, twice = groups[0] | groups[1], groups[0] & groups[1]
    for group in groups[2:]:
        twice |= once & group
        once |= group
    return once, twice


def _units(cells: np.ndarray, box: Box) -> list[list[np.ndarray]]:
    """For rows, columns and boxes: the first cells of all units, the second cells of all, ... as views."""
    size = box.size
    grid = cells.reshape(size, size, -1)
    boxes = cells.reshape(box.width, box.height, box.height, box.width, -1)
    return [
        [grid[:, i] for i in range(size)],
        [grid[i] for i in range(size)],
        [boxes[:, i, :, j] for i in range(box.height) for j in range(box.width)],
    ]


def _spread(units: list[np.ndarray], box: Box) -> np.ndarray:
    """For each cell, the union of what its row, column and box hold in `units`."""
    rows, columns, boxes = units
    size = box.size
    parts = (rows[:, None] | columns[None]).reshape(box.width, box.height, box.height, box.width, -1)
    return (parts | boxes[:, None, :, None]).reshape(size * size, -1)


def _where(mask: np.ndarray, box: Box) -> np.ndarray:
    """All bits where `mask` holds, else none: `np.where` and `any` on words are several times slower than bits."""
    return -mask.astype(box.dtype)


def _union(units: np.ndarray, box: Box) -> np.ndarray:
    """The bits set in any unit of each board."""
    return np.bitwise_or.reduce(units.reshape(box.size, -1), axis=0)


def propagate(
    cells: UInt[np.ndarray, "cells boards"], box: Box
) -> tuple[UInt[np.ndarray, "cells boards"], Bool[np.ndarray, "boards"]]:
    """Singles until nothing changes; also which boards turned out impossible (their candidates mean nothing)."""
    one, zero = box.dtype(1), box.dtype(0)
    bad = np.zeros(cells.shape[1], bool)
    result = cells.copy()
    work, active = result, np.arange(cells.shape[1])
    while True:
        several = work & (work - one)
        single = work & _where(several == zero, box)
        broken = (work == zero).any(0)
        placed, only = [], []
        for fixed, every in zip(_units(single, box), _units(work, box)):
            once, twice = _twice(fixed)
            broken |= _union(twice, box) != 0
            placed.append(once)
            once, twice = _twice(every)
            broken |= _union(once ^ box.full, box) != 0
            only.append(once & ~twice)
        after = (work & ~_spread(placed, box)) | single
        hidden = after & _spread(only, box)
        broken |= np.bitwise_or.reduce(hidden & (hidden - one), axis=0) != 0  # two digits that have no other place
        after = after & _where(hidden == zero, box) | hidden
        moving = (np.bitwise_or.reduce(after ^ work, axis=0) != 0) & ~broken
        bad[active[broken]] = True
        left = np.count_nonzero(moving)
        if 2 * left > len(active):
            work = after  # moving boards out costs more than another round of the few that are at rest
            continue
        result[:, active] = after
        if not left:
            return result, bad
        active, work = active[moving], np.compress(moving, after, axis=1)


def search(cells: UInt[np.ndarray, "cells boards"], box: Box, limit: int = 2) -> Search:
    """Search the whole tree of each board, giving a board up once `limit` solutions of it are known.

    Depth first by chunks, so the memory is bounded whatever the board.
    """
    boards = cells.shape[1]
    found = np.zeros(boards, np.int64)
    backtracks = np.zeros(boards, np.int64)
    answer = np.zeros((boards, box.cells), np.int64)
    stack = [(cells[:, i : i + _CHUNK], np.arange(i, min(i + _CHUNK, boards))) for i in range(0, boards, _CHUNK)]
    while stack:
        work, owner = stack.pop()
        wanted = found[owner] < limit
        if not wanted.all():
            work, owner = work[:, wanted], owner[wanted]
        if not owner.size:
            continue
        work, bad = propagate(work, box)
        np.add.at(backtracks, owner[bad], 1)
        counts = np.bitwise_count(work)
        solved = ~bad & (counts == 1).all(0)
        np.add.at(found, owner[solved], 1)
        answer[owner[solved]] = _digits(work[:, solved]).T
        open_ = ~bad & ~solved & (found[owner] < limit)
        if open_.any():
            work, owner, counts = work[:, open_], owner[open_], counts[:, open_]
            cell = np.where(counts > 1, counts, 255).argmin(0)
            children, owners = [], []
            for digit in range(box.size):
                bit = box.dtype(1 << digit)
                rows = np.flatnonzero(work[cell, np.arange(len(owner))] & bit)
                child = work[:, rows]
                child[cell[rows], np.arange(len(rows))] = bit
                children.append(child)
                owners.append(owner[rows])
            child, owner = np.concatenate(children, axis=1), np.concatenate(owners)
            stack += [(child[:, i : i + _CHUNK], owner[i : i + _CHUNK]) for i in range(0, len(owner), _CHUNK)]
    return Search(np.minimum(found, limit), backtracks, answer)


def _digits(cells: np.ndarray) -> np.ndarray:
    """The digit, from 0, of each single candidate."""
    return np.bitwise_count(cells - cells.dtype.type(1)).astype(np.int64)


def random_solutions(count: int, box: Box, rng: np.random.Generator) -> Int[np.ndarray, "count cells"]:
    """Full boards of digits from 0: random digits in the most constrained cells, begun anew at a contradiction."""
    done = np.zeros((0, box.cells), np.int64)
    work = np.full((box.cells, count), box.full)
    while len(done) < count:
        work, bad = propagate(work, box)
        counts = np.bitwise_count(work)
        solved = ~bad & (counts == 1).all(0)
        done = np.concatenate([done, _digits(work[:, solved]).T])
        work[:, bad] = box.full
        counts[:, bad] = box.size
        work, counts = work[:, ~solved], counts[:, ~solved]
        if work.shape[1]:
            # The least count decides, a random fraction between equals.
            cell = (np.where(counts > 1, counts, 255) + rng.random(counts.shape, np.float32)).argmin(0)
            places = np.arange(len(cell))
            options = (work[cell, places][None] >> np.arange(box.size, dtype=box.dtype)[:, None]) & 1
            digit = np.where(options, rng.random(options.shape), -1).argmax(0)
            work[cell, places] = (1 << digit).astype(box.dtype)
    return done[:count]


def has_duplicates(boards: Shaped[np.ndarray, "boards cells"], box: Box) -> Bool[np.ndarray, "boards"]:
    """Which boards (digits from 1, 0 blank) hold two equal digits in a row, column or box."""
    bits = np.where(boards > 0, 1 << np.maximum(boards.astype(np.int64) - 1, 0), 0).T.astype(box.dtype)
    bits = np.ascontiguousarray(bits)
    clash = np.zeros(len(boards), bool)
    for groups in _units(bits, box):
        clash |= _twice(groups)[1].reshape(box.size, -1).any(0)
    return clash
