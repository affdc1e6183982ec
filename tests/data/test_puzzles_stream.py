"""The stream of puzzle batches: order, augmentation, resumption, and independence of the batch size."""

import json

import jax
import numpy as np
import pytest

from ruvjax.data.puzzles import ArcAugmentation, MazeSource, PuzzleStream, SudokuSource, evaluation_puzzles
from ruvjax.data.puzzles.arc import on_canvas
from ruvjax.data.puzzles.stream import puzzle_set, random_words
from ruvjax.errors import ConfigError

ROWS = 7


def arc_rows():
    rng = np.random.default_rng(0)
    grids = [on_canvas(rng.integers(0, 10, (3 + i, 5))) for i in range(ROWS)]
    number = 1 + 5 * np.arange(ROWS)
    rating = np.zeros(ROWS, int)
    return puzzle_set(np.stack(grids), np.stack(grids), rating, 30, 30, 12, number, 36, ArcAugmentation(4, 0))


@pytest.fixture(scope="module")
def sets():
    return {
        "sudoku": SudokuSource(2, 2, train=ROWS, valid=1, test=1, spare=2).splits()["train"],
        "maze": MazeSource(7, 7, train=ROWS, valid=1, test=1, min_path=4).splits()["train"],
        "arc": arc_rows(),
    }


@pytest.fixture(params=["sudoku", "maze", "arc"])
def puzzles(request, sets):
    return sets[request.param]


def taken(stream, count):
    return jax.tree.map(lambda *parts: np.concatenate(parts), *[next(stream) for _ in range(count)])


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_batches_are_int32_and_counted(puzzles):
    stream = PuzzleStream(puzzles, 4, 0)
    for number in range(4):
        batch = next(stream)
        assert [leaf.dtype for leaf in jax.tree.leaves(batch)] == [np.int32] * 4
        assert batch.inputs.shape == batch.labels.shape == (4, puzzles.height * puzzles.width)
        np.testing.assert_array_equal(batch.index, np.arange(4 * number, 4 * number + 4))
        assert batch.inputs.max() < puzzles.vocab_size and batch.puzzle.max() < puzzles.puzzle_count


def test_without_augmentation_every_epoch_is_a_permutation(puzzles):
    whole = taken(PuzzleStream(puzzles, ROWS, 0, augment=False), 3)
    for epoch in whole.inputs.reshape(3, ROWS, -1):
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, puzzles.inputs))
    assert len({epoch.tobytes() for epoch in whole.inputs.reshape(3, ROWS, -1)}) == 3
    changed = taken(PuzzleStream(puzzles, ROWS, 0), 3)
    assert (changed.inputs != whole.inputs).any(), "negative control: augmented samples are others"


def test_samples_do_not_depend_on_the_batch_size_or_the_processes(puzzles):
    whole = taken(PuzzleStream(puzzles, 24, 3), 1)
    for batch in (1, 2, 8):
        assert_equal(whole, taken(PuzzleStream(puzzles, batch, 3), 24 // batch))
    shares = [next(PuzzleStream(puzzles, 24, 3, process_index=i, process_count=3)) for i in range(3)]
    assert_equal(whole, jax.tree.map(lambda *parts: np.concatenate(parts), *shares))
    assert (whole.inputs != next(PuzzleStream(puzzles, 24, 4)).inputs).any(), "negative control: another seed"


def test_resume_is_exact_at_every_position(puzzles):
    stream = PuzzleStream(puzzles, 3, 0)
    expected = [next(stream) for _ in range(9)]
    walk = PuzzleStream(puzzles, 3, 0)
    for position in range(8):
        state = json.loads(json.dumps(walk.get_state()))
        resumed = PuzzleStream(puzzles, 3, 0)
        resumed.set_state(state)
        assert_equal(next(resumed), expected[position])
        assert_equal(next(resumed), expected[position + 1])
        next(walk)


def test_a_foreign_position_is_refused(sets):
    state = {**PuzzleStream(sets["sudoku"], 4, 0).get_state(), "next_sample": 8}
    for other in (
        PuzzleStream(sets["sudoku"], 4, 1),
        PuzzleStream(sets["maze"], 4, 0),
        PuzzleStream(sets["sudoku"], 4, 0, augment=False),
    ):
        with pytest.raises(ConfigError, match="another stream"):
            other.set_state(state)
    with pytest.raises(ConfigError, match="inside a batch of 3"):
        PuzzleStream(sets["sudoku"], 3, 0).set_state(state)


def test_index_stays_int32(sets):
    stream = PuzzleStream(sets["maze"], 4, 0)
    stream.set_state({**stream.get_state(), "next_sample": 2**31 - 4})
    np.testing.assert_array_equal(next(stream).index, np.arange(2**31 - 4, 2**31))
    np.testing.assert_array_equal(next(stream).index, np.arange(4))


@pytest.mark.parametrize("options", [{"batch": 0}, {"seed": -1}, {"process_count": 3}, {"process_index": 2}])
def test_bad_configuration(sets, options):
    with pytest.raises(ConfigError):
        PuzzleStream(sets["maze"], **{"batch": 4, "seed": 0, **options})


def test_evaluation_sees_every_row_once(puzzles):
    batches = list(evaluation_puzzles(puzzles, 4))
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    np.testing.assert_array_equal(whole.index, np.arange(8))
    np.testing.assert_array_equal(whole.inputs[:ROWS], puzzles.inputs)
    np.testing.assert_array_equal(whole.labels[:ROWS], puzzles.labels)
    assert not whole.labels[ROWS:].any()


def test_random_words_are_uniform_and_apart():
    words = random_words(0, np.arange(4000), 4)
    assert len(np.unique(words)) == words.size
    assert not np.isin(words, random_words(1, np.arange(4000), 4)).any()
    share = (words[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(share.mean((0, 1)) - 0.5).max() < 0.02  # 5 standard deviations of 16,000 draws
    np.testing.assert_array_equal(words[7:9], random_words(0, np.arange(7, 9), 4))


def test_sudoku_symmetries_are_uniform(sets):
    stream = PuzzleStream(sets["sudoku"], 2000, 0)
    digits = next(stream).labels
    for cell in (0, 5, 15):
        counts = np.bincount(digits[:, cell], minlength=6)[2:]
        assert np.abs(counts - 500).max() < 100  # 5 standard deviations
