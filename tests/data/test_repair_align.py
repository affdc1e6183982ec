import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruvjax.data.repair.align import align
from ruvjax.data.repair.codec import Codec
from ruvjax.errors import InputError

CODEC = Codec(12, 24, ("def", " x", "return", "import", " ="))
TEXT = "def f(x):\n    if x:\n        x = 1\n    y = 2\n    z = 3\n    return x\n"
LINES = TEXT.splitlines(keepends=True)


def check(broken: str, fixed: str, codec: Codec = CODEC) -> np.ndarray:
    inputs, labels, changed = align(codec, broken, fixed)
    assert codec.decode(inputs) == broken and codec.decode(labels) == fixed
    assert np.array_equal(inputs, codec.encode(broken))
    assert np.array_equal(changed, inputs != labels)
    return changed


def rows(changed: np.ndarray) -> list[int]:
    return [int(row) for row in np.nonzero(changed.any(1))[0]]


def test_equal_texts_change_nothing():
    assert not check(TEXT, TEXT).any()


def test_a_fault_within_a_line_changes_its_row():
    assert rows(check(TEXT.replace("if x:", "if x"), TEXT)) == [1]


@pytest.mark.parametrize("number", range(1, len(LINES)))
def test_a_missing_line_is_put_at_the_end_of_the_row_before(number):
    broken = "".join(LINES[:number] + LINES[number + 1 :])
    changed = check(broken, TEXT)
    # a last line has a blank row of its own
    assert rows(changed) == [number if number == len(LINES) - 1 else number - 1]
    assert changed.sum() == len(CODEC.rows(LINES[number])[0])


@pytest.mark.parametrize("number", range(len(LINES) + 1))
def test_a_line_too_many_becomes_an_empty_row(number):
    extra = "    import x\n"
    broken = "".join([*LINES[:number], extra, *LINES[number:]])
    changed = check(broken, TEXT)
    assert rows(changed) == [number]
    assert changed.sum() == len(CODEC.rows(extra)[0])


def test_without_alignment_every_later_row_would_change():
    broken = "".join(LINES[:1] + LINES[2:])
    naive = CODEC.encode(broken) != CODEC.encode(TEXT)
    assert rows(naive) == [1, 2, 3, 4, 5] and rows(check(broken, TEXT)) == [0]


def test_what_does_not_fit_one_row_takes_the_rows_around_it():
    added = ["    " + "+" * 12 + "\n"] * 3
    fixed = "".join(LINES[:2] + added + LINES[2:])
    assert len(rows(check(TEXT, fixed))) > 1
    full = Codec(9, 15, CODEC.pieces)  # no two of these lines in a row, and no row to spare: a line each
    check(TEXT, fixed, full)


def test_a_text_too_large_is_refused():
    for broken, fixed in ((TEXT * 3, TEXT), (TEXT, TEXT * 3)):
        with pytest.raises(InputError, match="needs 18 rows"):
            align(CODEC, broken, fixed)


short = st.lists(st.text("ab", max_size=3), max_size=4).map(lambda lines: "".join(f"{line}\n" for line in lines))


def fewest_changes(codec: Codec, broken: str, fixed: str) -> int:
    """By trying every way to share the lines out to the rows."""
    grid, lines = codec.encode(broken), codec.rows(fixed)
    best = grid.size + 1
    for cuts in itertools.combinations_with_replacement(range(len(lines) + 1), codec.height - 1):
        ends = [0, *cuts, len(lines)]
        shared = [sum(lines[start:end], []) for start, end in itertools.pairwise(ends)]
        if all(len(row) <= codec.width for row in shared):
            best = min(best, int((codec.place(shared) != grid).sum()))
    return best


@given(short, short)
def test_any_two_texts_align(broken, fixed):
    codec = Codec(4, 6, ())
    changed = check(broken, fixed, codec)
    assert changed.sum() >= fewest_changes(codec, broken, fixed)


@given(st.lists(st.text("abcd", min_size=1, max_size=2), min_size=2, max_size=4), st.integers(0, 3), st.booleans())
def test_one_line_more_or_less_takes_the_fewest_changes(lines, place, more):
    codec = Codec(4, 9, ())
    place %= len(lines)
    shorter = lines[:place] + lines[place + 1 :]
    first, second = ("".join(f"{line}\n" for line in part) for part in (lines, shorter))
    broken, fixed = (second, first) if more else (first, second)
    assert check(broken, fixed, codec).sum() == fewest_changes(codec, broken, fixed)
