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
    expected = 1 + grids.MESSAGES.index("expected ':'")
    assert set(np.unique(marks[0])) == {expected, grids.STOPPED} and (marks[1:] == 0).all()
    assert (marks[0] == grids.STOPPED).sum() == 1
    assert (grids.parser_marks(codec, codec.encode(FIXED)) == 0).all()
    question = grids.to_questions(codec, codec.encode(BROKEN)[None])
    vocabulary = grids.vocabulary(codec)
    np.testing.assert_array_equal(question % vocabulary, grids.to_boards(codec.encode(BROKEN)[None]))
    np.testing.assert_array_equal((question // vocabulary).reshape(8, 16), marks)


@pytest.mark.parametrize(
    ("text", "mark", "bracket"),
    [
        ("def f(a, b):\n    c = a + b)\n    return c\n", grids.STOPPED, ")"),  # it stops at the bracket itself
        ("def f(a, b):\n    c = [a + b\n    return c\n", grids.STOPPED, "["),
        ("def f(a, b):\n    c = (a + b]\n    return c\n", grids.UNMATCHED, "("),
    ],
)
def test_brackets_without_a_partner(codec, text, mark, bracket):
    grid = codec.encode(text)
    marks = grids.parser_marks(codec, grid)
    (row,), (column,) = np.nonzero(marks == mark)
    assert codec.tokens[grid[row, column]].strip() == bracket.encode()


def test_brackets_in_strings_do_not_count(codec):
    text = "def f(a, b)\n    c = '('\n    return c\n"
    assert not (grids.parser_marks(codec, codec.encode(text)) == grids.UNMATCHED).any()


def test_every_mark_is_below_the_number_of_marks(codec):
    for text in (
        BROKEN,
        "x = = 1\n",
        "  x\n",
        "if x:\ny\n",
        "f(a b)\n",
        "(\n",
        ")\n",
        "def f((a)):\n    pass\n",
        "\x00\n",
    ):
        marks = grids.parser_marks(codec, codec.encode(text))
        assert 0 <= marks.min() and marks.max() < grids.MARKS and (marks.any() or text == "\x00\n")
