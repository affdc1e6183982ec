"""Repair grids as boards: nothing is lost, what is out of reach is not learned, the parser's marks are in place."""

import numpy as np
import pytest

from ruvjax.data.repair import grids
from ruvjax.data.repair.codec import PAD, Codec, learn_codec

FIXED = "def f(a, b):\n    c = (a + b)\n    return c\n"
BROKEN = "def f(a, b)\n    c = (a + b)\n    return c\n"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return learn_codec([FIXED] * 3, 8, 16, 512)


def test_boards_and_texts_round_trip(codec):
    grid = codec.encode(BROKEN)[None]
    boards = grids.to_boards(codec.encode(FIXED)[None])
    assert boards.min() >= 1 and boards.max() < grids.vocabulary(codec)
    assert grids.to_texts(codec, boards, grid) == [FIXED]


def test_rows_out_of_reach_are_neither_learned_nor_read(codec):
    grid = codec.encode(BROKEN)[None]
    labels = grids.to_labels(codec.encode(FIXED)[None], grid).reshape(8, 16)
    assert (labels[:5] > 0).all() and (labels[5:] == 0).all()
    scribbled = grids.to_boards(codec.encode(FIXED)[None]).reshape(8, 16)
    scribbled[6] = 9
    assert grids.to_texts(codec, scribbled.reshape(1, -1), grid) == [FIXED]


def test_an_empty_grid_has_reach_too(codec):
    empty = np.full((1, 8, 16), PAD)
    assert grids.rows_in_reach(empty).sum() == 1 + grids.BELOW


def test_the_parser_marks_its_row_and_token(codec):
    marks = grids.parser_marks(codec, codec.encode(BROKEN))
    assert set(np.unique(marks[0])) == {1, 2} and (marks[1:] == 0).all()
    assert (marks[0] == 2).sum() == 1
    assert (grids.parser_marks(codec, codec.encode(FIXED)) == 0).all()
    question = grids.to_questions(codec, codec.encode(BROKEN)[None])
    vocabulary = grids.vocabulary(codec)
    np.testing.assert_array_equal(question % vocabulary, grids.to_boards(codec.encode(BROKEN)[None]))
    np.testing.assert_array_equal((question // vocabulary).reshape(8, 16), marks)


def test_where_the_token_stands(codec):
    """A stray bracket in the second line: the mark is on it, not on its neighbours."""
    text = "def f(a, b):\n    c = a + b)\n    return c\n"
    grid = codec.encode(text)
    row = codec.tokens
    (place,) = np.flatnonzero(grids.parser_marks(codec, grid)[1] == 2)
    assert row[grid[1, place]] == b")"
