"""How many held-out boards a model answers exactly, and what looking the answer up in the training boards gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.boards import Solving
from ruvjax.data.puzzles.stream import PuzzleSet, evaluation_puzzles, random_words
from ruvjax.data.repair.evaluate import wilson
from ruvjax.models.trm import TinyRecursive
from ruvjax.models.trm_solve import solve

BLANK = 1  # of Sudoku
_CHUNK = 4096  # training images compared at a time


@dataclass(frozen=True)
class Share:
    """A share of `n` boards with its 95% interval (Wilson 1927), which keeps its level near 0 and 1 too."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1%} of {self.n} ({self.low:.1%} to {self.high:.1%})"


def share(right: int, n: int) -> Share:
    """Raises ValueError where there are no boards."""
    if n < 1:
        raise ValueError("a share of no boards")
    return Share(right / n, *wilson(right, n), n)


@dataclass(frozen=True, eq=False)
class Score:
    """What a model answered on `n` boards, after each supervision step.

    exact: bool [steps, n]; cells: share of labelled cells right after the last step [n]; halts: float [steps, n];
    answers: int32 [steps, shown, cells] of the first boards.
    """

    puzzles: PuzzleSet
    exact: np.ndarray
    cells: np.ndarray
    halts: np.ndarray
    answers: np.ndarray

    @property
    def overall(self) -> Share:
        return share(int(self.exact[-1].sum()), self.exact.shape[1])

    def by_rating(self) -> dict[str, Share]:
        """The share by difficulty, in bands whose limits double."""
        rating, found = self.puzzles.rating[: self.exact.shape[1]], {}
        for low, high in bands(int(rating.max(initial=0))):
            inside = (rating >= low) & (rating <= high)
            if inside.any():
                name = str(low) if low == high else f"{low}-{high}"
                found[name] = share(int(self.exact[-1][inside].sum()), int(inside.sum()))
        return found

    def solvings(self, count: int) -> list[Solving]:
        count = min(count, self.answers.shape[1])
        inputs, labels = self.puzzles.inputs, self.puzzles.labels
        return [Solving(inputs[i], self.answers[:, i], self.halts[:, i], labels[i]) for i in range(count)]

    def metrics(self) -> dict[str, Any]:
        overall = self.overall
        confident = self.halts[-1] > 0
        return {
            "exact_accuracy": overall.mean,
            "exact_accuracy_low": overall.low,
            "exact_accuracy_high": overall.high,
            "exact_by_rating": {band: vars(value) for band, value in self.by_rating().items()},
            "exact_by_step": [float(row.mean()) for row in self.exact],
            "cell_accuracy": float(self.cells.mean()),
            "halt_accuracy": float((confident == self.exact[-1]).mean()),
            "boards": overall.n,
        }


def bands(highest: int) -> list[tuple[int, int]]:
    """0, 1, 2-3, 4-7, ... up to the band that holds `highest`."""
    limits, low = [(0, 0)], 1
    while low <= highest:
        limits.append((low, 2 * low - 1))
        low *= 2
    return limits


def first_rows(puzzles: PuzzleSet, count: int) -> PuzzleSet:
    """The first `count` boards (0: all)."""
    if not count or count >= puzzles.rows:
        return puzzles
    cut = {name: getattr(puzzles, name)[:count] for name in ("inputs", "labels", "puzzle", "rating")}
    kept = {name: getattr(puzzles, name) for name in ("height", "width", "vocab_size", "puzzle_count", "augmentation")}
    return PuzzleSet(**cut, **kept, digest=f"{puzzles.digest}[:{count}]")


def score(
    model: TinyRecursive,
    params: Any,
    puzzles: PuzzleSet,
    *,
    batch: int,
    steps: int,
    shown: int = 0,
    impl: str | None = None,
) -> Score:
    """Run every supervision step on every board; nobody halts."""
    batch = min(batch, puzzles.rows)
    exact, cells, halts, answers = [], [], [], []
    kept = 0
    for rows in evaluation_puzzles(puzzles, batch):
        answer, halt = jax.device_get(solve(model, params, rows.inputs, rows.puzzle, steps=steps, impl=impl))
        real = rows.index < puzzles.rows
        learned = rows.labels > 0
        right = (answer == rows.labels[None]) & learned[None]
        exact.append(
            ((right == learned[None]).all(-1) & learned.any(-1)[None])[:, real]
        )  # unknown answers are not right
        cells.append((right[-1].sum(-1) / np.maximum(learned.sum(-1), 1))[real])
        halts.append(halt[:, real])
        if kept < shown:
            answers.append(answer[:, : min(shown - kept, int(real.sum()))])
            kept += answers[-1].shape[1]
    whole = np.concatenate(answers, axis=1) if answers else np.zeros((steps, 0, puzzles.inputs.shape[1]), np.int32)
    return Score(puzzles, np.concatenate(exact, axis=1), np.concatenate(cells), np.concatenate(halts, axis=1), whole)


def lookup(train: PuzzleSet, test: PuzzleSet, kind: str, images: int, seed: int = 0) -> Share:
    """What memorising gives: each test board gets the answer of the training image that agrees with most of its cells.

    The images are the training boards and `images` random symmetric ones of each. Of a Sudoku the given cells are
    compared with the image's answer (an image that agrees with all of them would be the solution), of anything else the
    questions with each other. Given cells keep what is given.
    """
    sudoku = kind == "sudoku"
    best = np.full(test.rows, -1, np.int64)
    answer = np.zeros_like(test.labels)
    given = (test.inputs > BLANK) if sudoku else np.ones(test.inputs.shape, bool)
    asked = _one_hot(np.where(given, test.inputs, 0), test.vocab_size)
    copies = [(train.inputs, train.labels)]
    if train.augmentation is not None:
        rows = np.tile(np.arange(train.rows), images)
        for part in np.array_split(rows, max(1, len(rows) // _CHUNK)):
            if len(part):
                start = sum(len(inputs) for inputs, _ in copies)
                words = random_words(seed, np.arange(start, start + len(part)), train.augmentation.draws)
                changed = train.augmentation(train.inputs[part], train.labels[part], train.puzzle[part], words)
                copies.append(changed[:2])
    for inputs, labels in copies:
        for first in range(0, len(inputs), _CHUNK):
            questions, answers = inputs[first : first + _CHUNK], labels[first : first + _CHUNK]
            agree = asked @ _one_hot(answers if sudoku else questions, test.vocab_size).T
            place = agree.argmax(axis=1)
            found = agree[np.arange(test.rows), place].astype(np.int64)
            better = found > best
            best[better] = found[better]
            answer[better] = answers[place[better]]
    if sudoku:
        answer = np.where(given, test.inputs, answer)
    learned = test.labels > 0
    right = ((answer == test.labels) | ~learned).all(axis=1)
    return share(int(right.sum()), test.rows)


def _one_hot(tokens: np.ndarray, vocab: int) -> np.ndarray:
    """float32 [rows, cells * vocab], all zero where the token is 0."""
    return (tokens[:, :, None] == np.arange(1, vocab)[None, None, :]).reshape(len(tokens), -1).astype(np.float32)


def describe(metrics: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    low, high = metrics["exact_accuracy_low"], metrics["exact_accuracy_high"]
    return (
        f"{metrics['exact_accuracy']:.1%} of {metrics['boards']} held-out boards exact (95%: {low:.1%} to {high:.1%}), "
        f"{metrics['cell_accuracy']:.1%} of cells"
    )
