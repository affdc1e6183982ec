"""From what a model answers to many versions of an ARC question to two attempts per question, as the contest has it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ruvjax.data.puzzles.arc import ArcAugmentation, read_grid

ATTEMPTS = 2


def restored(tokens: np.ndarray, puzzle: int, augmentation: ArcAugmentation) -> np.ndarray:
    """The grid of colours that an answer, tokens [900] to version `puzzle`, stands for in the task as it is."""
    return augmentation.restore(read_grid(tokens), puzzle)


def vote(answers: Sequence[tuple[np.ndarray, float]]) -> list[np.ndarray]:
    """The distinct grids of (grid, confidence), most frequent first, then by mean confidence; empty ones left out."""
    grids: dict[tuple[tuple[int, ...], bytes], tuple[np.ndarray, list[float]]] = {}
    for grid, confidence in answers:
        if grid.size:
            key = (grid.shape, np.ascontiguousarray(grid, np.int64).tobytes())
            grids.setdefault(key, (grid, []))[1].append(float(confidence))
    # The key last, so that equal votes rank the same whatever order they came in.
    ranked = sorted(grids.items(), key=lambda item: (-len(item[1][1]), -float(np.mean(sorted(item[1][1]))), item[0]))
    return [grid for _, (grid, _) in ranked]


def write_submission(
    path: Path, questions: Sequence[tuple[str, int]], ranked: Sequence[Sequence[np.ndarray]]
) -> dict[str, list[dict[str, list[list[int]]]]]:
    """Write and return {task: [{"attempt_1": grid, "attempt_2": grid} per question]} as JSON.

    questions: (task, number of the question), as `ArcSource.questions` lists them; ranked: the grids of each, best
    first. A missing second attempt repeats the first; without any it is a grid of one black cell.
    """
    result: dict[str, list[dict[str, list[list[int]]]]] = {}
    for (task, _), grids in sorted(zip(questions, ranked), key=lambda item: item[0]):
        first = grids[0] if len(grids) else np.zeros((1, 1), np.int64)
        attempts = [first, *grids[1:ATTEMPTS]]
        attempts += [first] * (ATTEMPTS - len(attempts))
        result.setdefault(task, []).append(
            {f"attempt_{i + 1}": np.asarray(grid).astype(int).tolist() for i, grid in enumerate(attempts)}
        )
    path.write_text(json.dumps(result), "utf-8")
    return result
