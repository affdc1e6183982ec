"""Sudoku: generator, solver and rating, canonical forms against brute force, random symmetries."""

import itertools

import numpy as np
import pytest

from ruvjax.data.puzzles import SudokuSource, parse_board, show_board
from ruvjax.data.puzzles.solver import Box, candidates, random_solutions, search
from ruvjax.data.puzzles.stream import random_words
from ruvjax.data.puzzles.sudoku import minimal_clues
from ruvjax.data.puzzles.symmetry import SudokuSymmetry, canonical_forms, signatures
from ruvjax.errors import ConfigError, InputError

BOXES = [Box(2, 2), Box(2, 3), Box(3, 3)]


def units(box):
    size = box.size
    rows = [[(r, c) for c in range(size)] for r in range(size)]
    columns = [[(r, c) for r in range(size)] for c in range(size)]
    boxes = [
        [(r + i, c + j) for i in range(box.height) for j in range(box.width)]
        for r in range(0, size, box.height)
        for c in range(0, size, box.width)
    ]
    return rows + columns + boxes


def peers(box):
    found = {cell: set() for unit in units(box) for cell in unit}
    for unit in units(box):
        for cell in unit:
            found[cell] |= set(unit) - {cell}
    return found


def solutions_of(board, box, limit=2):
    """Brute force: fill the cell with the fewest digits that clash with nothing, and nothing cleverer."""
    size, near = box.size, peers(box)
    grid = {(i // size, i % size): int(digit) for i, digit in enumerate(board)}
    found = []
    if any(grid[c] and grid[c] == grid[p] for c in grid for p in near[c]):
        return found

    def fill():
        open_ = [cell for cell in grid if not grid[cell]]
        if not open_:
            found.append([grid[i // size, i % size] for i in range(size * size)])
            return
        options = {c: set(range(1, size + 1)) - {grid[p] for p in near[c]} for c in open_}
        cell = min(open_, key=lambda c: len(options[c]))
        for digit in options[cell]:
            grid[cell] = digit
            fill()
            grid[cell] = 0
            if len(found) >= limit:
                return

    fill()
    return found


def singles_solve(board, box):
    """Whether naked and hidden singles, one at a time, fill the board."""
    size, near = box.size, peers(box)
    grid = {(i // size, i % size): int(digit) for i, digit in enumerate(board)}
    moved = True
    while moved:
        moved = False
        options = {c: set(range(1, size + 1)) - {grid[p] for p in near[c]} for c in grid if not grid[c]}
        for cell, digits in options.items():
            if len(digits) == 1:
                grid[cell], moved = digits.pop(), True
                break
        for unit in units(box) if not moved else []:
            for digit in range(1, size + 1):
                places = [c for c in unit if digit in options.get(c, ())]
                if len(places) == 1 and not moved:
                    grid[places[0]], moved = digit, True
    return all(grid.values())


def line_orders(groups, within):
    inner = list(itertools.permutations(range(within)))
    for outer in itertools.permutations(range(groups)):
        for chosen in itertools.product(inner, repeat=groups):
            yield [group * within + line for group, part in zip(outer, chosen) for line in part]


def least_by_brute_force(solution, clues, box):
    """The least (solution, clues) over all symmetries, one by one."""
    size, best = box.size, None
    grids = [(solution.reshape(size, size), clues.reshape(size, size))]
    if box.height == box.width:
        grids.append((grids[0][0].T, grids[0][1].T))
    rows = list(line_orders(box.width, box.height))
    columns = list(line_orders(box.height, box.width))
    for grid, mask in grids:
        for row, column in itertools.product(rows, columns):
            moved = grid[row][:, column]
            form = np.argsort(moved[0])[moved].astype(np.uint8).tobytes()
            if best is None or form <= best[0]:
                whole = (form, mask[row][:, column].astype(np.uint8).tobytes())
                best = whole if best is None else min(best, whole)
    return best[0] + best[1]


def boards(box, count, seed=0):
    rng = np.random.default_rng(seed)
    solutions = random_solutions(count, box, rng)
    return solutions, minimal_clues(solutions, box, rng)


def moved_boards(box, solutions, clues, seed):
    """Random symmetries by the training augmentation: (solutions from 0, clues)."""
    symmetry = SudokuSymmetry(box)
    words = random_words(seed, np.arange(len(solutions)), symmetry.draws)
    labels = (solutions + 2).astype(np.int32)
    inputs = np.where(clues, labels, 1).astype(np.int32)
    inputs, labels, _ = symmetry(inputs, labels, np.zeros(len(labels), np.int32), words)
    return inputs, labels


@pytest.fixture(scope="module")
def sets():
    return {
        Box(2, 2): SudokuSource(2, 2, train=60, valid=10, test=20, spare=6).splits(),
        Box(2, 3): SudokuSource(2, 3, train=40, valid=10, test=20, min_rating=1).splits(),
        Box(3, 3): SudokuSource(3, 3, train=12, valid=2, test=8).splits(),
    }


@pytest.mark.parametrize("box", BOXES)
def test_every_board_has_one_solution_by_brute_force(sets, box):
    for puzzles in sets[box].values():
        assert puzzles.vocab_size == box.size + 2 and puzzles.inputs.dtype == puzzles.labels.dtype == np.int32
        assert puzzles.height == puzzles.width == box.size and puzzles.puzzle_count == 1
        for inputs, labels in zip(puzzles.inputs, puzzles.labels):
            assert solutions_of(inputs - 1, box) == [(labels - 1).tolist()]


@pytest.mark.parametrize("box", BOXES)
def test_rating_is_zero_where_singles_solve(sets, box):
    for split, count in (("train", 12), ("test", 8)):
        puzzles = sets[box][split]
        for inputs, rating in zip(puzzles.inputs[:count], puzzles.rating):
            assert singles_solve(inputs - 1, box) == (rating == 0)
    if box == Box(2, 3):
        assert all((puzzles.rating >= 1).all() for puzzles in sets[box].values())


def test_no_two_boards_of_any_split_are_equivalent(sets):
    for box, splits in sets.items():
        if box == Box(3, 3):
            continue
        forms = [
            least_by_brute_force(labels - 2, inputs > 1, box)
            for puzzles in splits.values()
            for inputs, labels in zip(puzzles.inputs[:15], puzzles.labels[:15])
        ]
        assert len(set(forms)) == len(forms)


@pytest.mark.parametrize("box", BOXES[:2])
def test_canonical_form_is_the_least_over_all_symmetries(box):
    solutions, clues = boards(box, 12)
    # An automorphic grid as well, where many symmetries reach the least solution and the clues must decide.
    shift = [(box.width * (r % box.height) + r // box.height + c) % box.size for r, c in np.ndindex(box.size, box.size)]
    solutions[0] = shift
    clues[0] = np.arange(box.cells) % 5 < 2
    expected = [least_by_brute_force(*board, box) for board in zip(solutions, clues)]
    assert canonical_forms(solutions, clues, box) == expected


@pytest.mark.parametrize("box", BOXES)
def test_canonical_form_is_the_same_under_symmetries_and_differs_otherwise(box):
    solutions, clues = boards(box, 8, seed=1)
    forms = canonical_forms(solutions, clues, box)
    marks = signatures(np.where(clues, solutions + 1, 0), box)
    for seed in range(5):
        inputs, labels = moved_boards(box, solutions, clues, seed)
        assert canonical_forms(labels - 2, inputs > 1, box) == forms
        assert signatures(inputs - 1, box) == marks
        assert (labels != solutions + 2).any(1).mean() > 0.5
    other = clues.copy()
    other[np.arange(8), (~clues).argmax(1)] = True
    assert not set(canonical_forms(solutions, other, box)) & set(forms), "negative control: another clue"


def test_there_are_as_many_minimal_boards_of_4x4_as_are_known():
    solutions, clues = boards(Box(2, 2), 4000)
    assert len(set(canonical_forms(solutions, clues, Box(2, 2)))) == 36


@pytest.mark.parametrize("box", BOXES)
def test_symmetries_keep_boards_valid(sets, box):
    puzzles = sets[box]["train"]
    inputs, labels = moved_boards(box, puzzles.labels - 2, puzzles.inputs > 1, 3)
    given = inputs > 1
    np.testing.assert_array_equal(given.sum(1), (puzzles.inputs > 1).sum(1))
    np.testing.assert_array_equal(inputs[given], labels[given])
    found = search(candidates(inputs - 1, box), box)
    assert (found.solutions == 1).all()
    np.testing.assert_array_equal(found.answer + 2, labels)


def test_splits_are_a_function_of_the_fields_and_test_does_not_depend_on_train(sets):
    again = SudokuSource(2, 3, train=41, valid=10, test=20, min_rating=1).splits()
    first = sets[Box(2, 3)]
    assert again["test"].digest == first["test"].digest and again["valid"].digest == first["valid"].digest
    np.testing.assert_array_equal(again["train"].inputs[:40], first["train"].inputs)
    other = SudokuSource(2, 2, train=60, valid=10, test=20, spare=6, seed=1).splits()
    assert other["test"].digest != sets[Box(2, 2)]["test"].digest


def test_the_solver_agrees_with_brute_force_on_any_clues():
    box, rng = Box(2, 3), np.random.default_rng(4)
    solutions = random_solutions(60, box, rng) + 1
    questions = np.where(rng.random(solutions.shape) < 0.25, solutions, 0)
    rows = np.arange(60)
    cell = questions.argmax(1)
    questions[rows[::3], cell[::3]] = questions[rows[::3], cell[::3]] % 6 + 1  # a wrong digit: often no solution
    counts = search(candidates(questions, box), box).solutions
    assert counts.tolist() == [len(solutions_of(board, box)) for board in questions]
    assert set(counts.tolist()) == {0, 1, 2}


def test_an_empty_board_is_given_up_early():
    assert search(candidates(np.zeros((1, 81), int), Box(3, 3)), Box(3, 3)).solutions.tolist() == [2]


BOARD = "1 . | . . / . . | . 2 / . 3 | . . / . . | 4 .".replace("/", "\n-+-\n")


def test_a_typed_board_is_read_and_drawn():
    tokens = parse_board("1...\n...2\n.3..\n..4.".replace(".", "_"), 2, 2)
    np.testing.assert_array_equal(tokens, parse_board(BOARD, 2, 2))
    drawn = show_board(tokens, "sudoku", 4, 2, 2)
    assert drawn.splitlines()[:3] == ["1 . | . .", ". . | . 2", "----+----"]
    np.testing.assert_array_equal(parse_board(drawn, 2, 2), tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1...", "the board has 4 cells, not 16"),
        ("1.....x.........", "'x' in row 2, column 3"),
        ("5...............", "'5' in row 1, column 1"),
        ("²...............", "row 1, column 1"),
        ("1..1............", "two digits 1 in row 1"),
        ("1...........1...", "two digits 1 in column 1"),
        ("1....1..........", "two digits 1 in box 1"),
        ("12....3........4", "no solution|several"),
        ("123...4.........", "no solution"),
        ("1...............", "several solutions"),
    ],
)
def test_a_bad_board_is_one_clear_line(text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_board(text, 2, 2)
    assert "\n" not in caught.value.line() and caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [({"box_height": 1}, "box_height=1"), ({"box_height": 4, "box_width": 4}, "needs 16"), ({"train": 0}, "train=0"),
     ({"test": True}, "test=True"), ({"min_rating": -1}, "min_rating=-1"), ({"seed": 1.5}, "seed=1.5")],
)  # fmt: skip
def test_bad_configuration(options, message):
    with pytest.raises(ConfigError, match=message):
        SudokuSource(**options)


def test_more_boards_than_there_are():
    with pytest.raises(ConfigError, match="only 3[56] were found"):
        SudokuSource(2, 2, train=50, valid=1, test=1).splits()
