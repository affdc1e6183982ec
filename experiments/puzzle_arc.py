"""ARC answers by vote: a model answers augmented versions of each question, and two grids a question are handed in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.puzzle_scoring import score
from ruvjax.data.puzzles.arc import ArcAugmentation, ArcSource, read_grid, versions
from ruvjax.data.puzzles.stream import PuzzleSet
from ruvjax.data.puzzles.voting import ATTEMPTS, restored, vote, write_submission
from ruvjax.models.trm import TinyRecursive

SUBMISSION = "submission.json"


def answer_by_vote(
    model: TinyRecursive,
    params: Any,
    source: ArcSource,
    puzzles: PuzzleSet,
    *,
    count: int,
    batch: int,
    steps: int,
    path: Path,
    impl: str | None = None,
) -> dict[str, Any]:
    """Write the two attempts for every question of `puzzles` (the test split) to `path`.

    `count` versions of each question are answered, undone and voted on. Returns the share of questions, among those
    whose answer is known, that the first attempt and that either attempt gets right.
    """
    augmentation = puzzles.augmentation
    assert isinstance(augmentation, ArcAugmentation)
    count = min(count, augmentation.copies + 1)
    varied = versions(puzzles, 0, count)
    found = score(model, params, varied, batch=batch, steps=steps, shown=varied.rows, impl=impl)
    ranked: list[list[np.ndarray]] = []
    for row in range(puzzles.rows):
        mine = range(row * count, (row + 1) * count)
        answers = [
            (restored(found.answers[-1, i], int(varied.puzzle[i]), augmentation), float(found.halts[-1, i]))
            for i in mine
        ]
        ranked.append(vote(answers))
    write_submission(path, source.questions(), ranked)
    return attempts_right(puzzles, ranked)


def attempts_right(puzzles: PuzzleSet, ranked: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
    """The share of questions with a known answer that one attempt, and two, get right."""
    first, either, known = 0, 0, 0
    for labels, grids in zip(puzzles.labels, ranked, strict=True):
        if not (labels > 0).any():
            continue
        known += 1
        truth = read_grid(labels)
        right = [np.array_equal(grid, truth) for grid in grids[:ATTEMPTS]]
        first += bool(right[:1] and right[0])
        either += any(right)
    shares = {"arc_pass_at_1": first / known, "arc_pass_at_2": either / known} if known else {}
    return {**shares, "arc_questions": len(ranked)}
