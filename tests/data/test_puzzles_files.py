"""The public CSV files, on small ones made here: what is read, what is left out, and every error line."""

import numpy as np
import pytest

from ruvjax.data.puzzles import MazeCsvSource, MazeSource, SudokuCsvSource
from ruvjax.data.puzzles.solver import random_solutions
from ruvjax.data.puzzles.stream import random_words
from ruvjax.data.puzzles.sudoku import minimal_clues, sudoku_set
from ruvjax.data.puzzles.symmetry import SudokuSymmetry, canonical_forms
from ruvjax.errors import ConfigError, InputError

HEADER = "source,question,answer,rating\n"


def text(tokens, alphabet):
    return "".join(alphabet[token] for token in tokens)


def line(question, answer, rating=1):
    return f"made,{question},{answer},{rating}\n"


@pytest.fixture(scope="module")
def boards():
    """30 rows of 9x9 as (question, answer), and the tokens."""
    box, rng = SudokuCsvSource.box, np.random.default_rng(0)
    solutions = random_solutions(28, box, rng)
    clues = minimal_clues(solutions, box, rng)
    puzzles = sudoku_set(np.where(clues, solutions + 2, 1), solutions + 2, np.zeros(28, int), box)
    lines = [(text(q, "?.123456789"), text(a, "?.123456789")) for q, a in zip(puzzles.inputs, puzzles.labels)]
    return puzzles, lines


def write(path, lines):
    path.write_text(HEADER + "".join(line(*row) for row in lines))
    return str(path)


def test_a_folder_of_train_and_test(tmp_path, boards):
    puzzles, lines = boards
    # Test holds two boards of the training file, moved by a symmetry: training has to leave them out.
    symmetry = SudokuSymmetry(SudokuCsvSource.box)
    words = random_words(9, np.arange(2), symmetry.draws)
    moved = symmetry(puzzles.inputs[:2], puzzles.labels[:2], puzzles.puzzle[:2], words)
    twins = [(text(q, "?.123456789"), text(a, "?.123456789")) for q, a in zip(*moved[:2])]
    write(tmp_path / "train.csv", lines[:20])
    write(tmp_path / "test.csv", [*twins, *lines[20:26]])
    splits = SudokuCsvSource(str(tmp_path), train=0, valid=4, test=0).splits()
    assert splits["test"].rows == 8 and splits["train"].rows + splits["valid"].rows == 18
    forms = [
        canonical_forms(part.labels - 2, part.inputs > 1, SudokuCsvSource.box)
        for part in (splits["train"], splits["valid"], splits["test"])
    ]
    assert len(set().union(*forms)) == sum(map(len, forms))
    known = set(map(bytes, puzzles.labels))
    assert all(bytes(row) in known for row in splits["train"].labels)
    assert splits["train"].vocab_size == 11 and splits["train"].augmentation == symmetry
    few = SudokuCsvSource(str(tmp_path), train=5, valid=2, test=3).splits()
    assert [few[split].rows for split in ("train", "valid", "test")] == [5, 2, 3]
    assert few["test"].digest == SudokuCsvSource(str(tmp_path), train=6, valid=2, test=3).splits()["test"].digest


def test_one_file_is_split_and_ratings_select(tmp_path, boards):
    _, lines = boards
    path = write(tmp_path / "all.csv", [(*row, i) for i, row in enumerate(lines)])
    splits = SudokuCsvSource(path, train=0, valid=3, test=5, min_rating=10).splits()
    ratings = np.concatenate([part.rating for part in splits.values()])
    assert sorted(ratings.tolist()) == list(range(10, 28))


def swap(row, cell, mark):
    return row[:cell] + mark + row[cell + 1 :]


def test_every_bad_row_is_one_clear_line(tmp_path, boards):
    _, lines = boards
    question, answer = lines[1]
    given = next(i for i, mark in enumerate(question) if mark != ".")
    blank = next(i for i, mark in enumerate(question) if mark == ".")
    near = next(i for i in range(81) if i != given and i // 9 == given // 9)
    other = "1" if question[given] != "1" else "2"
    cases = [
        ((question[:-1], answer), "question has 80 cells, not 81"),
        ((question, answer + "1"), "answer has 82 cells"),
        ((swap(question, blank, "x"), answer), "'x' in row"),
        ((swap(question, near, question[given]), answer), "two digits"),
        ((question, swap(answer, given, other)), "does not solve"),
        ((question, question), "does not solve"),
        ((swap(question, given, "."), answer), "several solutions"),
        ((question, ""), "is missing"),
        ((question, answer, "hard"), "'hard' is no number"),
        ((question, answer, "inf"), "is no number"),
    ]
    for bad, message in cases:
        path = write(tmp_path / "bad.csv", [lines[0], bad, *lines[2:8]])
        with pytest.raises(InputError, match=message) as caught:
            SudokuCsvSource(path, train=0, valid=2, test=2).splits()
        assert "bad.csv', row 2" in str(caught.value) and "\n" not in caught.value.line() and caught.value.hint
    # The solver is what finds several solutions: without it that row passes.
    path = write(tmp_path / "bad.csv", [lines[0], cases[6][0], *lines[2:8]])
    assert SudokuCsvSource(path, train=0, valid=2, test=2, verify=0).splits()["test"].rows == 2


def test_bad_files(tmp_path, boards):
    _, lines = boards
    for name, content, message in (
        ("empty.csv", b"", "no column 'question'"),
        ("header.csv", HEADER.encode(), "too few rows"),
        ("other.csv", b"question,rating\n1,2\n", "no column 'answer'"),
        ("binary.csv", b"question,answer\n\xff\xfe,1\n", "no CSV file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            SudokuCsvSource(str(tmp_path / name), valid=1, test=1).splits()
    with pytest.raises(InputError, match="train.csv' cannot be read"):
        SudokuCsvSource(str(tmp_path)).splits()
    with pytest.raises(InputError, match="too few rows"):
        SudokuCsvSource(write(tmp_path / "few.csv", lines[:3]), valid=2, test=2).splits()
    with pytest.raises(ConfigError, match="path is not set"):
        SudokuCsvSource()
    with pytest.raises(ConfigError, match="verify=-1"):
        SudokuCsvSource("x", verify=-1)


@pytest.fixture(scope="module")
def mazes():
    puzzles = MazeSource(9, 9, train=20, valid=1, test=1, min_path=6).splits()["train"]
    return puzzles, [(text(q, "?# SGo"), text(a, "?# SGo")) for q, a in zip(puzzles.inputs, puzzles.labels)]


def test_mazes_are_read_and_their_mirror_images_left_out(tmp_path, mazes):
    puzzles, lines = mazes
    mirrored = [tuple("".join(part[i : i + 9][::-1] for i in range(0, 81, 9)) for part in row) for row in lines[:3]]
    write(tmp_path / "train.csv", lines[:14])
    write(tmp_path / "test.csv", [*mirrored, *lines[14:]])
    splits = MazeCsvSource(str(tmp_path), valid=2).splits()
    assert splits["test"].rows == 9 and splits["train"].rows + splits["valid"].rows == 11
    known = {bytes(row): rating for row, rating in zip(puzzles.labels, puzzles.rating)}
    for row, rating in zip(splits["train"].labels, splits["train"].rating):
        assert known[bytes(row)] == rating


def test_bad_mazes(tmp_path, mazes):
    _, lines = mazes
    question, answer = lines[1]
    path = answer.index("o")
    for bad, message in (
        ((question[:-1], answer), "not 9x9"),
        ((swap(question, 0, "x"), answer), "holds 'x'"),
        ((question.replace("S", " "), answer.replace("S", " ")), "one S, one G"),
        ((question, swap(answer, path, " ")), "no path from S to G"),
        ((question, question), "no path"),
        ((swap(question, path, "#"), answer), "no path"),
    ):
        file = write(tmp_path / "bad.csv", [lines[0], bad, *lines[2:8]])
        with pytest.raises(InputError, match=message) as caught:
            MazeCsvSource(file, valid=2, test=2).splits()
        assert "row " in str(caught.value) and "\n" not in caught.value.line()
