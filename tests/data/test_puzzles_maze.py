"""Mazes: one shortest path each, no two alike, symmetries that keep them so."""

import numpy as np
import pytest

from ruvjax.data.puzzles import MazeSource, show_board
from ruvjax.data.puzzles.maze import FREE, GOAL, PATH, START, WALL, MazeSymmetry, canonical_maze
from ruvjax.data.puzzles.stream import random_words
from ruvjax.errors import ConfigError

SOURCE = MazeSource(9, 11, train=30, valid=5, test=10, min_path=12, openings=0.2)


def count_paths(inputs, height, width):
    """(length, number) of the shortest ways from S to G: steps of a whole layer at a time over an adjacency matrix."""
    free = inputs != WALL
    cells = np.arange(height * width)
    row, column = np.divmod(cells, width)
    near = np.abs(row[:, None] - row) + np.abs(column[:, None] - column) == 1
    near = (near & free & free[:, None]).astype(object)
    ways = (inputs == START).astype(object)
    for length in range(1, height * width):
        ways = near @ ways
        if ways[inputs == GOAL][0]:
            return length, ways[inputs == GOAL][0]
    raise AssertionError("no way")


@pytest.fixture(scope="module")
def splits():
    return SOURCE.splits()


def check(inputs, labels, rating, height, width):
    assert (inputs == START).sum() == (inputs == GOAL).sum() == 1
    assert count_paths(inputs, height, width) == (rating, 1)
    path = labels == PATH
    assert path.sum() == rating - 1
    np.testing.assert_array_equal(np.where(path, FREE, labels), inputs)
    # What is marked, with S and G, is itself a maze whose way has that length.
    only = np.where(labels >= START, inputs, WALL)
    assert count_paths(only, height, width) == (rating, 1)


def test_every_maze_has_one_shortest_path(splits):
    loops = 0
    for puzzles in splits.values():
        assert (puzzles.height, puzzles.width, puzzles.vocab_size) == (9, 11, 6)
        assert (puzzles.rating >= 12).all()
        for board in zip(puzzles.inputs, puzzles.labels, puzzles.rating.tolist()):
            check(*board, 9, 11)
            loops += (board[0] != WALL).sum() > 2 * 4 * 5 - 1
    assert loops > 20, "a tree of 20 rooms has 39 free cells; most mazes here have loops"


def test_the_published_size():
    puzzles = MazeSource(30, 30, train=2, valid=1, test=1).splits()["train"]
    assert puzzles.inputs.shape == (2, 900) and (puzzles.rating >= 110).all()


def test_no_two_mazes_are_alike(splits):
    symmetry = MazeSymmetry(9, 11)
    forms = [canonical_maze(row, symmetry) for puzzles in splits.values() for row in puzzles.inputs]
    assert len(set(forms)) == len(forms) == 45


@pytest.mark.parametrize("source", [SOURCE, MazeSource(9, 9, train=8, valid=1, test=1, min_path=8)])
def test_symmetries_keep_mazes_valid_and_their_canonical_form(source):
    puzzles = source.splits()["train"]
    symmetry = MazeSymmetry(source.height, source.width)
    assert len(symmetry.orders()) == (8 if source.height == source.width else 4)
    words = random_words(0, np.arange(puzzles.rows), 1)
    inputs, labels, _ = symmetry(puzzles.inputs, puzzles.labels, puzzles.puzzle, words)
    assert (inputs != puzzles.inputs).any()
    for row in range(puzzles.rows):
        check(inputs[row], labels[row], int(puzzles.rating[row]), source.height, source.width)
        assert canonical_maze(inputs[row], symmetry) == canonical_maze(puzzles.inputs[row], symmetry)
        # Negative control: one wall less is another maze.
        other = puzzles.inputs[row].copy()
        other[np.flatnonzero(other == WALL)[3]] = FREE
        assert canonical_maze(other, symmetry) != canonical_maze(puzzles.inputs[row], symmetry)


def test_splits_are_a_function_of_the_fields(splits):
    again = MazeSource(9, 11, train=31, valid=5, test=10, min_path=12, openings=0.2).splits()
    assert again["test"].digest == splits["test"].digest
    assert MazeSource(9, 11, 30, 5, 10, 12, 0.2, seed=1).splits()["test"].digest != splits["test"].digest


def test_a_maze_is_drawn(splits):
    puzzles = splits["test"]
    drawn = show_board(puzzles.labels[0], "maze", 11).splitlines()
    assert len(drawn) == 9 and drawn[0] == "#" * 11
    assert "".join(drawn).count("o") == puzzles.rating[0] - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"height": 4}, "height=4"), ({"openings": 2}, "openings=2"), ({"min_path": 1000}, "longer than any path")],
)
def test_bad_configuration(options, message):
    with pytest.raises(ConfigError, match=message):
        MazeSource(**options)


def test_more_mazes_than_there_are():
    with pytest.raises(ConfigError, match="were found that differ"):
        MazeSource(5, 5, train=500, valid=1, test=1, min_path=1).splits()
