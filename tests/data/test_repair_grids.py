"""Repair grids as boards: nothing is lost, what is out of play is not learned, the parser's marks are in place."""

import numpy as np
import pytest

from ruvjax.data.repair import grids
from ruvjax.data.repair.align import align
from ruvjax.data.repair.codec import PAD, Codec, learn_codec
from ruvjax.data.repair.functions import Function
from ruvjax.data.repair.pairs import RepairCorpus, RepairSource
from ruvjax.data.repair.syntax import parse
from ruvjax.errors import InputError

FIXED = "def f(a, b):\n    c = (a + b)\n    return c\n"
BROKEN = "def f(a, b)\n    c = (a + b)\n    return c\n"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return learn_codec([FIXED] * 3, 8, 16, 512)


def test_a_strip_holds_the_cells_in_play(codec):
    grid = codec.encode(BROKEN)
    strip = grids.question(codec, grid, marks=False)
    assert strip[0] == grids.begin(codec) == grids.vocabulary(codec) - 1
    lengths = (grid != PAD).sum(axis=1)[:3]
    assert len(strip) == 1 + lengths.sum() + 3 * grids.SLACK  # the rows below the text are not in play
    assert codec.decode(strip[None, 1:] - 1) == BROKEN
    inputs, labels, _ = align(codec, BROKEN, FIXED)
    answer = grids.answer(labels, inputs)
    assert answer is not None and answer[0] == 0 and len(answer) == len(strip)
    assert codec.decode(answer[None, 1:] - 1) == FIXED


def test_a_full_row_has_no_slack(codec):
    grid = np.ones((1, 16), np.int32)
    assert grids.in_play(grid).sum() == 16
    grid[0, 15:] = PAD
    assert grids.in_play(grid).sum() == 16
    assert len(grids.question(codec, np.zeros((4, 16), np.int32))) == 1


def test_an_answer_out_of_play_is_none(codec):
    inputs, labels, _ = align(codec, "def f(a, b):\n", FIXED)
    assert grids.answer(labels, inputs) is None


def test_strips_are_packed_longest_first():
    assert grids.pack([3, 8, 5, 2], 10) == ([(1, 5), (0, 0), (1, 0), (0, 8)], 2)
    assert grids.pack([3, 8, 5, 2], 10, 1) == ([None, (0, 0), None, (0, 8)], 1)
    assert grids.pack([], 10) == ([], 0)
    with pytest.raises(InputError, match="takes 11 cells of a board of 10"):
        grids.pack([11], 10)
    strips = [np.full(size, size) for size in (3, 8, 5, 2)]
    boards = grids.on_boards(strips, *grids.pack([3, 8, 5, 2], 10), 10)
    np.testing.assert_array_equal(boards, [[8] * 8 + [2] * 2, [5] * 5 + [3] * 3 + [0] * 2])


def test_logits_go_back_to_the_grid(codec):
    grid = codec.encode(BROKEN)
    strip = grids.question(codec, grid, marks=False)
    logits = np.eye(grids.vocabulary(codec), dtype=np.float32)[strip]
    found = grids.grid_logits(codec, logits, grid)
    np.testing.assert_array_equal(found.argmax(axis=-1), grid)
    assert np.isneginf(found[3:, :, 1:]).all() and np.isfinite(found[grids.in_play(grid)]).all()


@pytest.fixture(scope="module")
def corpus(codec) -> RepairCorpus:
    texts = [FIXED, FIXED.replace("+", "*"), "def g(a):\n    return [a, a]\n"]
    functions = [Function(f"f{number}", text) for number, text in enumerate(texts)]
    return RepairCorpus(RepairSource(8, 16, 512), codec, dict.fromkeys(("train", "valid", "test"), functions))


def test_batches_repeat_and_resume(corpus, codec):
    def stream() -> grids.BoardStream:
        return grids.BoardStream(corpus.stream(6, 0), codec, 2, 64, repeat=2)

    batches = stream()
    seen, states = [], []
    for _ in range(6):
        states.append(batches.get_state())
        seen.append(next(batches))
    assert [state["served"] for state in states] == [0, 1] * 3
    assert all(seen[i] is seen[i + 1] for i in (0, 2, 4)) and (seen[0].inputs != seen[2].inputs).any()
    for number, state in enumerate(states):
        again = stream()
        again.set_state(state)
        for batch in seen[number:]:
            np.testing.assert_array_equal(next(again).inputs, batch.inputs)


def test_boards_hold_whole_pairs(corpus, codec):
    batch = next(grids.BoardStream(corpus.stream(6, 0), codec, 2, 64))
    tokens = batch.inputs % grids.vocabulary(codec)
    assert batch.inputs.shape == batch.labels.shape == (2, 64)
    begins = tokens == grids.begin(codec)
    assert begins.sum() >= 2 and (batch.labels[begins] == 0).all()
    assert ((batch.labels > 0) == ((tokens > 0) & ~begins)).all()
    for row, labels in zip(begins, batch.labels):
        for part in np.split(labels, np.nonzero(row)[0])[1:]:
            assert parse(codec.decode(np.maximum(part - 1, PAD)[None])) is not None


def test_the_parser_marks_its_row_and_token(codec):
    marks = grids.parser_marks(codec, codec.encode(BROKEN))
    expected = 1 + grids.MESSAGES.index("expected ':'")
    assert set(np.unique(marks[0])) == {expected, grids.STOPPED} and (marks[1:] == 0).all()
    assert (marks[0] == grids.STOPPED).sum() == 1
    assert (grids.parser_marks(codec, codec.encode(FIXED)) == 0).all()
    grid = codec.encode(BROKEN)
    question, vocabulary = grids.question(codec, grid), grids.vocabulary(codec)
    np.testing.assert_array_equal(question % vocabulary, grids.question(codec, grid, marks=False))
    np.testing.assert_array_equal(question[1:] // vocabulary, marks[grids.in_play(grid)])


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
