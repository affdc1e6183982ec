"""The public puzzle files Sudoku-Extreme and Maze-Hard: CSV with the columns source, question, answer, rating."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ruvjax.data.puzzles.maze import FREE, GOAL, PATH, START, MazeSymmetry, canonical_maze, maze_set, shortest_paths
from ruvjax.data.puzzles.solver import Box, has_duplicates
from ruvjax.data.puzzles.stream import PuzzleSet
from ruvjax.data.puzzles.sudoku import check_counts, sudoku_set
from ruvjax.data.puzzles.symmetry import canonical_forms, signatures
from ruvjax.data.puzzles.text import MAZE, check_boards, check_consistent, sudoku_digits
from ruvjax.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a file. `number` counts from 1, without the header; rating is 0 where the file has none."""

    path: Path
    number: int
    question: str
    answer: str
    rating: int

    @property
    def where(self) -> str:
        return f"{str(self.path)!r}, row {self.number}"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a CSV with a header. Raises InputError naming file and row."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            for column in ("question", "answer"):
                if column not in header:
                    raise InputError(
                        f"{str(path)!r} has no column {column!r}", "its header is source,question,answer,rating"
                    )
            places = [header.index(column) if column in header else -1 for column in ("question", "answer", "rating")]
            for number, line in enumerate(lines, 1):
                question, answer, rating = (line[i] if 0 <= i < len(line) else "" for i in places)
                where = f"{str(path)!r}, row {number}"
                if not question or not answer:
                    raise InputError(f"{where}: question or answer is missing", "every row has both")
                try:
                    rated = int(float(rating or 0))
                except (ValueError, OverflowError) as error:
                    raise InputError(f"{where}: rating {rating!r} is no number", "such as 37") from error
                yield Row(path, number, question, answer, rated)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}", "check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{str(path)!r} is no CSV file: {error}", "UTF-8 text with a header") from error


def _choose(
    path: str, train: int, valid: int, test: int, min_rating: int, seed: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """(train, valid, test) in random order, of train up to twice as many as asked, since duplicates will go.

    Of a folder, the test rows are those of test.csv, the others those of train.csv.
    """
    root = Path(path).expanduser()
    files = [root / "train.csv", root / "test.csv"] if root.is_dir() else [root]
    orders: list[np.ndarray] = []
    for number, file in enumerate(files):
        # Only the numbers: the public training file has 3.8 million rows, of which a recipe uses a thousand.
        rated = np.array([row.number for row in read_rows(file) if row.rating >= min_rating], np.int64)
        orders.append(np.random.default_rng([seed, number]).permutation(rated))
    tested = orders[-1][:test] if test else orders[-1]
    rest = orders[0] if len(orders) > 1 else orders[0][len(tested) :]
    if len(tested) < max(test, 1) or len(rest) <= valid:
        raise InputError(
            f"{path!r} has too few rows rated {min_rating} or more: {len(tested)} for test, {len(rest)} for the rest",
            "set puzzles.test for one file; ask for fewer, or lower puzzles.min_rating",
        )
    learned = rest[valid:][: 2 * train] if train else rest[valid:]
    parts = ((files[0], learned), (files[0], rest[:valid]), (files[-1], tested))
    train_rows, valid_rows, test_rows = (_pick(file, numbers) for file, numbers in parts)
    return train_rows, valid_rows, test_rows


def _pick(path: Path, numbers: np.ndarray) -> list[Row]:
    wanted = set(numbers.tolist())
    rows = {row.number: row for row in read_rows(path) if row.number in wanted}
    return [rows[number] for number in numbers.tolist()]


def _distinct(forms: dict[str, list[bytes]], limit: int) -> dict[str, list[int]]:
    """The rows of each split that are not in a split before it (test, valid, train) nor earlier in their own."""
    seen: set[bytes] = set()
    chosen: dict[str, list[int]] = {}
    for split in ("test", "valid", "train"):
        chosen[split] = []
        for row, form in enumerate(forms[split]):
            if form not in seen and not (split == "train" and limit and len(chosen[split]) == limit):
                seen.add(form)
                chosen[split].append(row)
    return chosen


def _check(source: "SudokuCsvSource | MazeCsvSource") -> None:
    if not isinstance(source.path, str) or not source.path:
        raise ConfigError("puzzles.path is not set", "puzzles.path=FILE.csv, or a folder with train.csv and test.csv")
    limits = {"train": 0, "valid": 1, "test": 0, "min_rating": 0, "seed": 0}
    for name, least in limits.items():
        check_counts(**{name: (getattr(source, name), least)})


@dataclass(frozen=True)
class SudokuCsvSource:
    """`train`, `valid` and `test` rows of Sudoku-Extreme, or of any 9x9 boards in its form; 0 takes all for train or
    test.

    path: the folder with train.csv and test.csv, or one CSV that is then split. Rows are drawn by `seed`; equivalent
    boards are left out of the later of test, valid, train. Every row used is checked against its answer; that the
    answer is the only one takes a solver, and is checked for the first `verify` rows of each split.

    Raises ConfigError, and InputError naming file and row.
    """

    path: str = ""
    train: int = 1000
    valid: int = 1000
    test: int = 0
    min_rating: int = 0
    verify: int = 1000
    seed: int = 0

    kind: ClassVar[str] = "sudoku"
    box: ClassVar[Box] = Box(3, 3)

    def __post_init__(self):
        _check(self)
        check_counts(verify=(self.verify, 0))

    def splits(self) -> dict[str, PuzzleSet]:
        box = self.box
        train, valid, test = _choose(self.path, self.train, self.valid, self.test, self.min_rating, self.seed)
        rows = {"test": test, "valid": valid, "train": train}
        boards = {split: _boards(part, box) for split, part in rows.items()}
        for split, (questions, _) in boards.items():
            where = [row.where for row in rows[split][: self.verify]]
            check_boards(questions[: self.verify], box, where)
        # Canonical forms only where a cheap invariant leaves a doubt: test.csv has 400,000 rows.
        marks = {split: signatures(questions, box) for split, (questions, _) in boards.items()}
        counts: dict[bytes, int] = {}
        for mark in (mark for part in marks.values() for mark in part):
            counts[mark] = counts.get(mark, 0) + 1
        forms: dict[str, list[bytes]] = {}
        for split, (questions, answers) in boards.items():
            forms[split] = list(marks[split])
            doubtful = np.array([i for i, mark in enumerate(marks[split]) if counts[mark] > 1], np.int64)
            for i, form in zip(doubtful, canonical_forms(answers[doubtful] - 1, questions[doubtful] > 0, box)):
                forms[split][i] = form
        chosen = _distinct(forms, self.train)
        sets: dict[str, PuzzleSet] = {}
        for split in ("train", "valid", "test"):
            questions, answers = (array[chosen[split]] for array in boards[split])
            rating = np.array([rows[split][i].rating for i in chosen[split]], np.int32)
            sets[split] = sudoku_set(questions + 1, answers + 1, rating, box)
        return sets


def _boards(rows: list[Row], box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Digits of questions and answers, each answer checked to be a full valid board that agrees with its question."""
    questions = np.stack([sudoku_digits(row.question, box, f"{row.where}, question") for row in rows])
    answers = np.stack([sudoku_digits(row.answer, box, f"{row.where}, answer") for row in rows])
    check_consistent(questions, box, [row.where for row in rows])
    wrong = (answers == 0).any(1) | has_duplicates(answers, box) | ((questions > 0) & (questions != answers)).any(1)
    for row in np.flatnonzero(wrong):
        raise InputError(f"{rows[row].where}: the answer does not solve the question", "the row is damaged")
    return questions, answers


@dataclass(frozen=True)
class MazeCsvSource:
    """`train`, `valid` and `test` rows of Maze-Hard, or of square mazes in its form; 0 takes all for train or test.

    path: the folder with train.csv and test.csv, or one CSV that is then split. A maze is its rows joined, of `#`,
    space, S and G, the answer the same with `o` along the path. Rows are drawn by `seed`; what differs by turns and
    reflections only is left out of the later of test, valid, train. The rating becomes the length of the path.

    Raises ConfigError, and InputError naming file and row.
    """

    path: str = ""
    train: int = 0
    valid: int = 100
    test: int = 0
    min_rating: int = 0
    seed: int = 0

    kind: ClassVar[str] = "maze"

    def __post_init__(self):
        _check(self)

    def splits(self) -> dict[str, PuzzleSet]:
        train, valid, test = _choose(self.path, self.train, self.valid, self.test, self.min_rating, self.seed)
        rows = {"test": test, "valid": valid, "train": train}
        side = round(len(test[0].question) ** 0.5)
        symmetry = MazeSymmetry(side, side)
        mazes = {split: [_maze(row, side) for row in part] for split, part in rows.items()}
        forms = {split: [canonical_maze(maze[0], symmetry) for maze in part] for split, part in mazes.items()}
        chosen = _distinct(forms, self.train)
        sets: dict[str, PuzzleSet] = {}
        for split in ("train", "valid", "test"):
            inputs, labels, rating = zip(*[mazes[split][i] for i in chosen[split]])
            sets[split] = maze_set(np.stack(inputs), np.stack(labels), np.array(rating, np.int32), side, side)
        return sets


def _maze(row: Row, side: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(question tokens, answer tokens, path length) of a row whose answer is a path from S to G."""
    for name, text in (("question", row.question), ("answer", row.answer)):
        if len(text) != side * side:
            raise InputError(
                f"{row.where}: the {name} has {len(text)} cells, not {side}x{side}",
                "all mazes are square and of one size",
            )
        unknown = set(text) - set(MAZE)
        if unknown:
            raise InputError(f"{row.where}: the {name} holds {min(unknown)!r}", "cells are #, space, S, G and o")
    question, answer = (np.array([MAZE.index(mark) + 1 for mark in text]) for text in (row.question, row.answer))
    starts, goals = np.flatnonzero(question == START), np.flatnonzero(question == GOAL)
    if len(starts) != 1 or len(goals) != 1 or (question == PATH).any():
        raise InputError(f"{row.where}: the question needs one S, one G and no o", "the row is damaged")
    marked = answer == PATH
    path = (answer >= START).reshape(side, side)
    steps = int(shortest_paths(path, int(starts[0]))[0][goals[0]])
    if (np.where(marked, FREE, answer) != question).any() or steps != marked.sum() + 1:
        raise InputError(f"{row.where}: the answer is no path from S to G of the question", "the row is damaged")
    return question, answer, steps
