"""Generated Sudoku: every board has one solution, and no two of them, in any split, are equivalent.

Tokens: 0 padding, 1 blank, digit d is d + 1, so a board of size s has s + 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int

from ruvjax.data.puzzles.solver import Box, candidates, random_solutions, search
from ruvjax.data.puzzles.stream import PuzzleSet, puzzle_set
from ruvjax.data.puzzles.symmetry import SudokuSymmetry, canonical_forms
from ruvjax.errors import ConfigError

_PATIENCE = 12  # blocks in a row without a new board, after which there are taken to be no more


def check_counts(**counts: object) -> None:
    """Raise ConfigError where one is not an integer of its least value: (value, least) by name."""
    for name, (value, least) in counts.items():  # pyright: ignore[reportGeneralTypeIssues]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise ConfigError(f"puzzles.{name}={value!r} is out of range", f"an integer of {least} or more")


def check_box(height: object, width: object) -> Box:
    """The box, or ConfigError where it has no Sudoku of digits 1 to 9."""
    for name, value in (("box_height", height), ("box_width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 4:
            raise ConfigError(f"puzzles.{name}={value!r} is out of range", "an integer from 2 to 4")
    box = Box(height, width)  # pyright: ignore[reportArgumentType]
    if box.size > 9:
        raise ConfigError(
            f"puzzles.box_height={height} by puzzles.box_width={width} needs {box.size} digits", "at most 9"
        )
    return box


@dataclass(frozen=True)
class SudokuSource:
    """`train`, `valid` and `test` boards with boxes of `box_height` by `box_width`, of a rating of `min_rating` or
    more.

    A random full board is dug out until no clue can be spared, then up to `spare` clues, a random number, are put back.
    The rating is that of `ruvjax.data.puzzles.solver`: 0 where singles solve the board, else the guesses taken back.

    A function of the fields alone. Test boards come first, then valid, then train: a larger training split leaves the
    others as they are. Raises ConfigError, also where there are not so many boards that differ.
    """

    box_height: int = 3
    box_width: int = 3
    train: int = 1000
    valid: int = 100
    test: int = 1000
    min_rating: int = 0
    spare: int = 0
    seed: int = 0

    kind: ClassVar[str] = "sudoku"

    def __post_init__(self):
        check_box(self.box_height, self.box_width)
        for name, least in (("train", 1), ("valid", 1), ("test", 1), ("min_rating", 0), ("spare", 0), ("seed", 0)):
            check_counts(**{name: (getattr(self, name), least)})

    @property
    def box(self) -> Box:
        return Box(self.box_height, self.box_width)

    def splits(self) -> dict[str, PuzzleSet]:
        seen: set[bytes] = set()
        wanted = self.test + self.valid + self.train
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        stale = 0
        for clues, solutions, rating in self._blocks():
            hard = np.flatnonzero(rating >= self.min_rating)
            fresh: list[int] = []
            for row, form in zip(hard.tolist(), canonical_forms(solutions[hard], clues[hard], self.box)):
                if form not in seen and len(seen) < wanted:
                    seen.add(form)
                    fresh.append(row)
            parts.append((clues[fresh], solutions[fresh], rating[fresh]))
            stale = 0 if fresh else stale + 1
            if len(seen) == wanted:
                break
            if stale == _PATIENCE:
                raise ConfigError(
                    f"puzzles.train, valid, test ask for {wanted} boards and only {len(seen)} were found that differ",
                    "ask for fewer, lower puzzles.min_rating or raise puzzles.spare",
                )
        clues, solutions, rating = (np.concatenate(arrays) for arrays in zip(*parts))
        labels = solutions + 2
        inputs = np.where(clues, labels, 1)
        ends = np.cumsum([self.test, self.valid, self.train])
        rows = dict(zip(("test", "valid", "train"), np.split(np.arange(wanted), ends[:-1])))
        return {
            split: sudoku_set(inputs[rows[split]], labels[rows[split]], rating[rows[split]], self.box)
            for split in ("train", "valid", "test")
        }

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        # Block k depends on (seed, k) alone, so the boards of a longer run begin with those of a shorter one.
        size = 8192 if self.box.size == 6 and self.min_rating else 256  # large where most boards are thrown away
        block = 0
        while True:
            rng = np.random.default_rng([self.seed, block])
            solutions = random_solutions(size, self.box, rng)
            clues = minimal_clues(solutions, self.box, rng)
            if self.spare:
                share = rng.integers(0, self.spare + 1, (size, 1))
                order = np.argsort(np.where(clues, 2.0, rng.random(clues.shape)), axis=1)
                clues = clues | (np.argsort(order, axis=1) < share)
            found = search(candidates(np.where(clues, solutions + 1, 0), self.box), self.box)
            yield clues, solutions, found.backtracks
            block += 1


def sudoku_set(inputs: np.ndarray, labels: np.ndarray, rating: np.ndarray, box: Box) -> PuzzleSet:
    """A `PuzzleSet` of Sudoku tokens."""
    size = box.size
    return puzzle_set(inputs, labels, rating, size, size, size + 2, augmentation=SudokuSymmetry(box))


def minimal_clues(
    solutions: Int[np.ndarray, "boards cells"], box: Box, rng: np.random.Generator
) -> Bool[np.ndarray, "boards cells"]:
    """Random clues of each full board (digits from 0) that have it as their one solution, none of them to spare.

    With the cells of each board in a random order: the shortest start of it with one solution (by bisection, since more
    clues never add a solution), and of those cells each in turn is left out where that leaves one solution.
    """
    count = len(solutions)
    order = np.argsort(rng.random(solutions.shape), axis=1)
    rank = np.argsort(order, axis=1)
    low, high = np.full(count, box.cells // 3), np.full(count, box.cells)
    while (low < high).any():
        middle = (low + high) // 2
        boards = np.where(rank < middle[:, None], solutions + 1, 0)
        single = search(candidates(boards, box), box).solutions == 1
        low, high = np.where(single | (low == high), low, middle + 1), np.where(single, middle, high)
    clues = rank < high[:, None]
    for step in range(int(high.max())):
        rows = np.flatnonzero(step < high)
        cell = order[rows, step]
        without = clues[rows]
        without[np.arange(len(rows)), cell] = False
        # Any other solution of the rest has another digit in this cell: forbid the digit, and look for one.
        options = candidates(np.where(without, solutions[rows] + 1, 0), box)
        options[cell, np.arange(len(rows))] = box.full ^ (1 << solutions[rows, cell]).astype(box.dtype)
        spared = search(options, box, limit=1).solutions == 0
        clues[rows[spared], cell[spared]] = False
    return clues
