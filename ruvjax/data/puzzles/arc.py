"""ARC tasks (ARC-AGI-1 and 2, as folders of task files or in the Kaggle form) as puzzles on a 30x30 canvas.

Tokens: 0 padding, 1 the edge that ends a grid, colour c is c + 2. A grid lies at the canvas' top left (training moves
it); its edge is the row of marks below it and the column of marks to its right, where the canvas has room for them.

Each task has `copies` augmented versions, each a puzzle with an embedding of its own: version k of task t has number
1 + t * (copies + 1) + k, and version 0 is the task as it is. A version is one of eight turns and reflections and one
permutation of the colours 1 to 9, the same for every pair of the task.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, UInt64

from ruvjax.data.puzzles.stream import PuzzleSet, puzzle_set, random_words
from ruvjax.data.puzzles.sudoku import check_counts
from ruvjax.errors import ConfigError, InputError

SIDE = 30
EDGE, FIRST_COLOUR, VOCABULARY = 1, 2, 12

Pair = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True, eq=False)
class ArcTask:
    """A task: demonstrations and questions as (input, output) grids of colours; an output may be unknown (None)."""

    name: str
    train: list[Pair]
    test: list[Pair]


def turned(grid: np.ndarray, turn: int) -> np.ndarray:
    """Symmetry `turn` (0 to 7) of a grid: quarter turns, after a transposition from 4 on."""
    return np.rot90(grid.T if turn >= 4 else grid, turn % 4)


def turned_back(grid: np.ndarray, turn: int) -> np.ndarray:
    """The inverse of `turned`."""
    grid = np.rot90(grid, -(turn % 4))
    return grid.T if turn >= 4 else grid


def on_canvas(grid: Int[np.ndarray, "height width"], row: int = 0, column: int = 0) -> Int[np.ndarray, "cells"]:
    """Tokens of a grid of colours with its first cell at (row, column) of the canvas."""
    canvas = np.zeros((SIDE, SIDE), np.int32)
    bottom, right = row + grid.shape[0], column + grid.shape[1]
    canvas[row:bottom, column:right] = grid + FIRST_COLOUR
    canvas[bottom : bottom + 1, column:right] = EDGE
    canvas[row:bottom, right : right + 1] = EDGE
    return canvas.reshape(-1)


def read_grid(tokens: Int[np.ndarray, "cells"]) -> Int[np.ndarray, "height width"]:
    """The grid a canvas shows at its top left: of all rectangles there that hold colours alone, the largest.

    A canvas without a colour in its corner shows a grid of 0 x 0.
    """
    canvas = np.asarray(tokens).reshape(SIDE, SIDE)
    best, width = (0, 0), SIDE
    for row in range(SIDE):
        width = min(width, int(np.argmin(np.append(canvas[row, :width] >= FIRST_COLOUR, False))))
        if (row + 1) * width > best[0] * best[1]:
            best = (row + 1, width)
    return canvas[: best[0], : best[1]].astype(np.int64) - FIRST_COLOUR


@dataclass(frozen=True)
class ArcAugmentation:
    """A random version of each sample's task, and a random place on the canvas (input and output move alike)."""

    copies: int
    seed: int

    @property
    def draws(self) -> int:
        return 3

    def version(self, puzzle: int) -> tuple[int, Int[np.ndarray, "10"]]:
        """(turn, colours) of puzzle number `puzzle`, 1 or more: colour c of the task is colours[c] in this version."""
        if (puzzle - 1) % (self.copies + 1) == 0:
            return 0, np.arange(10)
        words = random_words(self.seed, np.array([puzzle]), 10)[0]
        return int(words[0] % np.uint64(8)), np.concatenate([[0], 1 + np.argsort(words[1:])])

    def apply(self, grid: Int[np.ndarray, "height width"], puzzle: int) -> Int[np.ndarray, "rows columns"]:
        """A grid of a task as version `puzzle` shows it."""
        turn, colours = self.version(puzzle)
        return colours[turned(grid, turn)]

    def restore(self, grid: Int[np.ndarray, "height width"], puzzle: int) -> Int[np.ndarray, "rows columns"]:
        """The inverse of `apply`."""
        turn, colours = self.version(puzzle)
        return turned_back(np.argsort(colours)[grid], turn)

    def __call__(
        self,
        inputs: Int[np.ndarray, "batch cells"],
        labels: Int[np.ndarray, "batch cells"],
        puzzle: Int[np.ndarray, "batch"],
        words: UInt64[np.ndarray, "batch draws"],
    ) -> tuple[Int[np.ndarray, "batch cells"], Int[np.ndarray, "batch cells"], Int[np.ndarray, "batch"]]:
        puzzle = puzzle + (words[:, 0] % np.uint64(self.copies + 1)).astype(np.int32)
        inputs, labels = inputs.copy(), labels.copy()
        for i, number in enumerate(puzzle.tolist()):
            grids = [self.apply(read_grid(part[i]), number) for part in (inputs, labels)]
            room = [SIDE + 1 - max(grid.shape[axis] for grid in grids) for axis in (0, 1)]
            place = [int(word % np.uint64(free)) for word, free in zip(words[i, 1:], room)]
            inputs[i], labels[i] = (on_canvas(grid, *place) for grid in grids)
        return inputs, labels, puzzle


def versions(puzzles: PuzzleSet, first: int, count: int) -> PuzzleSet:
    """Versions `first` to `first + count - 1` of every row of an ARC set, all versions of a row in a sequence, unmoved.

    What a model answers to them is to be restored (`ArcAugmentation.restore`) and voted on.
    """
    augmentation = puzzles.augmentation
    if not isinstance(augmentation, ArcAugmentation) or not 0 <= first < first + count <= augmentation.copies + 1:
        raise ConfigError(
            f"versions {first} to {first + count - 1} do not exist", "puzzles.copies says how many there are"
        )
    number = (puzzles.puzzle[:, None] + np.arange(first, first + count)).reshape(-1)
    parts: list[np.ndarray] = []
    for tokens in (puzzles.inputs, puzzles.labels):
        grids = [read_grid(row) for row in tokens]
        parts.append(
            np.stack([on_canvas(augmentation.apply(grids[i // count], n)) for i, n in enumerate(number.tolist())])
        )
    rating = puzzles.rating.repeat(count)
    return puzzle_set(parts[0], parts[1], rating, SIDE, SIDE, VOCABULARY, number, puzzles.puzzle_count, augmentation)


def canonical_pair(pair: Pair) -> bytes:
    """The least of a pair over turns, reflections and permutations of the colours 1 to 9."""
    forms: list[bytes] = []
    for turn in range(8):
        grids = [turned(grid, turn) for grid in pair if grid is not None]
        label = {0: 0}
        cells = [[label.setdefault(c, len(label)) for c in grid.reshape(-1).tolist()] for grid in grids]
        forms.append(repr([grid.shape for grid in grids]).encode() + b"".join(map(bytes, cells)))
    return min(forms)


@dataclass(frozen=True)
class ArcSource:
    """The tasks under `path`. Training rows are the pairs of the training tasks and the demonstrations of the
    evaluation tasks, as the published recipes have it; test rows are the questions of the evaluation tasks.

    path: a folder with `training` and `evaluation` (also inside `data`) of task files, or one with Kaggle's
        `*_<subset>_challenges.json` and `*_<subset>_solutions.json`, or a folder of task files, then all for
        evaluation.
    subset: which tasks are to be answered: evaluation, or test (Kaggle form; answers may be missing).
    copies: augmented versions of each task. valid: the questions of so many training tasks are kept for validation,
    drawn
        by `seed`, which also decides the versions.

    A training pair is left out where validation or test holds the same one but for turns, reflections and colours, and
    so is a validation pair where the test does. Raises ConfigError, and InputError naming the file, task and grid.
    """

    path: str = ""
    subset: str = "evaluation"
    copies: int = 1000
    valid: int = 20
    seed: int = 0

    kind: ClassVar[str] = "arc"

    def __post_init__(self):
        for name in ("path", "subset"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"puzzles.{name}={getattr(self, name)!r} is not set", "puzzles.path=FOLDER")
        check_counts(copies=(self.copies, 0), valid=(self.valid, 0), seed=(self.seed, 0))

    def tasks(self) -> tuple[list[ArcTask], list[ArcTask]]:
        """(training tasks, tasks to be answered), each by name."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise InputError(f"{self.path!r} is no folder", "puzzles.path is a folder of ARC tasks")
        if (root / "data" / self.subset).is_dir():
            root = root / "data"
        if (root / self.subset).is_dir():
            other = root / "training"
            return (_read_folder(other) if other.is_dir() else []), _read_folder(root / self.subset)
        if any(root.glob("*_challenges.json")):
            training = _read_kaggle(root, "training", required=False)
            return training, _read_kaggle(root, self.subset, required=True)
        return [], _read_folder(root)

    def questions(self) -> list[tuple[str, int]]:
        """(task name, number of the question) of each row of the test split."""
        return [(task.name, i) for task in self.tasks()[1] for i in range(len(task.test))]

    def splits(self) -> dict[str, PuzzleSet]:
        training, answered = self.tasks()
        rng = np.random.default_rng([self.seed, 0])
        kept = set(rng.permutation(len(training))[: min(self.valid, len(training) // 2)].tolist())
        rows: dict[str, list[tuple[int, Pair]]] = {"train": [], "valid": [], "test": []}
        for number, task in enumerate([*training, *answered]):
            questions = "test" if number >= len(training) else "valid" if number in kept else "train"
            rows["train"] += [(number, pair) for pair in task.train]
            rows[questions] += [(number, pair) for pair in task.test]
        taken = {canonical_pair(pair) for _, pair in rows["test"]}
        for split in ("valid", "train"):
            forms = [canonical_pair(pair) for _, pair in rows[split]]
            rows[split] = [row for row, form in zip(rows[split], forms) if form not in taken and row[1][1] is not None]
            taken |= set(forms)
        count = 1 + (len(training) + len(answered)) * (self.copies + 1)
        return {split: self._set(part, count) for split, part in rows.items()}

    def _set(self, rows: list[tuple[int, Pair]], count: int) -> PuzzleSet:
        blank = np.zeros(SIDE * SIDE, np.int32)
        inputs = [on_canvas(pair[0]) for _, pair in rows]
        labels = [blank if pair[1] is None else on_canvas(pair[1]) for _, pair in rows]
        number = np.array([1 + task * (self.copies + 1) for task, _ in rows], np.int32)
        return puzzle_set(
            np.array(inputs, np.int32),
            np.array(labels, np.int32),
            np.zeros(len(rows), np.int32),
            SIDE,
            SIDE,
            VOCABULARY,
            number,
            count,
            ArcAugmentation(self.copies, self.seed),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}", "check the path") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}", "an ARC file is UTF-8 JSON") from error
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} holds no JSON object", "an ARC file is an object")
    return value


def _read_folder(folder: Path) -> list[ArcTask]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(f"folder {str(folder)!r} holds no .json file", "one file per task")
    return [_task(file.stem, _read_json(file), None, f"{str(file)!r}") for file in files]


def _read_kaggle(root: Path, subset: str, required: bool) -> list[ArcTask]:
    files = sorted(root.glob(f"*{subset}_challenges.json"))
    if not files:
        if required:
            raise InputError(f"{str(root)!r} holds no *{subset}_challenges.json", "set puzzles.subset to what it holds")
        return []
    solutions = files[0].with_name(files[0].name.replace("_challenges", "_solutions"))
    answers = _read_json(solutions) if solutions.exists() else {}
    return [
        _task(name, task, answers.get(name), f"{str(files[0])!r}, task {name}")
        for name, task in sorted(_read_json(files[0]).items())
    ]


def _task(name: str, value: Any, answers: Any, where: str) -> ArcTask:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), list) for key in ("train", "test")):
        raise InputError(f"{where}: the keys train and test with lists are missing", "see the ARC format")
    parts: dict[str, list[Pair]] = {"train": [], "test": []}
    for key, pairs in parts.items():
        for number, pair in enumerate(value[key]):
            place = f"{where}, {key} pair {number + 1}"
            if not isinstance(pair, dict) or "input" not in pair or (key == "train" and "output" not in pair):
                raise InputError(f"{place}: input or output is missing", "each pair has both; a question its input")
            output = pair.get("output")
            if key == "test" and answers is not None:
                if not isinstance(answers, list) or len(answers) != len(value["test"]):
                    raise InputError(
                        f"{where}: the solutions are not one per question", "take both files from one place"
                    )
                output = answers[number]
            known = None if output is None else _grid(output, f"{place}, output")
            pairs.append((_grid(pair["input"], f"{place}, input"), known))
    return ArcTask(name, parts["train"], parts["test"])


def _grid(value: Any, where: str) -> np.ndarray:
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        raise InputError(f"{where} is no grid", "a list of rows, each a list of colours")
    widths = {len(row) for row in value}
    if len(widths) > 1:
        raise InputError(f"{where} is ragged: rows of {min(widths)} to {max(widths)} cells", "rows are equally long")
    if len(value) > SIDE or len(value[0]) > SIDE:
        raise InputError(f"{where} is {len(value)}x{len(value[0])}", f"at most {SIDE}x{SIDE}")
    for colour in (cell for row in value for cell in row):
        if isinstance(colour, bool) or not isinstance(colour, int) or not 0 <= colour <= 9:
            raise InputError(f"{where} holds {colour!r}", "colours are the integers 0 to 9")
    return np.array(value, np.int64)
