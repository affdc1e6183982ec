"""ARC: files of both forms, versions and their inverses, splits, voting, submissions, and every error line."""

import json

import numpy as np
import pytest

from ruvjax.data.puzzles import ArcSource, PuzzleStream, restored, show_board, versions, vote, write_submission
from ruvjax.data.puzzles.arc import ArcAugmentation, canonical_pair, on_canvas, read_grid, turned, turned_back
from ruvjax.errors import ConfigError, InputError

RNG = np.random.default_rng(5)


def grid(height, width):
    return RNG.integers(0, 10, (height, width)).tolist()


def task(seed):
    pairs = [{"input": grid(2 + seed, 3), "output": grid(3, 4 + seed)} for _ in range(4)]
    return {"train": pairs[:3], "test": pairs[3:]}


@pytest.fixture
def tasks():
    return {
        name: {f"{name[0]}{i}": task(i) for i in range(count)} for name, count in (("training", 4), ("evaluation", 2))
    }


def write_folder(root, tasks):
    for subset, part in tasks.items():
        (root / subset).mkdir(parents=True)
        for name, value in part.items():
            (root / subset / f"{name}.json").write_text(json.dumps(value))


def write_kaggle(root, tasks):
    for subset, part in tasks.items():
        answers = {name: [pair["output"] for pair in value["test"]] for name, value in part.items()}
        asked = {
            name: {"train": value["train"], "test": [{"input": pair["input"]} for pair in value["test"]]}
            for name, value in part.items()
        }
        (root / f"arc-agi_{subset}_challenges.json").write_text(json.dumps(asked))
        (root / f"arc-agi_{subset}_solutions.json").write_text(json.dumps(answers))


def test_both_forms_hold_the_same(tmp_path, tasks):
    write_folder(tmp_path / "one" / "data", tasks)
    (tmp_path / "two").mkdir()
    write_kaggle(tmp_path / "two", tasks)
    one, two = (ArcSource(str(tmp_path / name), copies=3, valid=1) for name in ("one", "two"))
    for split, puzzles in one.splits().items():
        assert puzzles.digest == two.splits()[split].digest
    assert one.questions() == two.questions() == [("e0", 0), ("e1", 0)]


def test_splits(tmp_path, tasks):
    # A question of the evaluation tasks, turned and recoloured, is in a training task too.
    twin = tasks["evaluation"]["e0"]["test"][0]
    colours = np.array([0, 2, 3, 4, 5, 6, 7, 8, 9, 1])
    tasks["training"]["t0"]["train"][1] = {
        key: np.rot90(colours[np.array(value)]).tolist() for key, value in twin.items()
    }
    write_folder(tmp_path, tasks)
    splits = ArcSource(str(tmp_path), copies=3, valid=2).splits()
    # 6 tasks of 3 demonstrations, less the twin, and the questions of two training tasks.
    assert [splits[split].rows for split in ("train", "valid", "test")] == [19, 2, 2]
    assert all(part.puzzle_count == 25 and part.vocab_size == 12 and part.height == 30 for part in splits.values())
    assert splits["test"].puzzle.tolist() == [17, 21], "version 0 of tasks 4 and 5"
    assert {17, 21} <= set(splits["train"].puzzle.tolist()), "evaluation demonstrations are learned from"
    np.testing.assert_array_equal(read_grid(splits["test"].labels[0]), twin["output"])
    write_folder(tmp_path / "flat", {"x": tasks["evaluation"]})
    alone = ArcSource(str(tmp_path / "flat" / "x"), copies=0).splits()
    assert [alone[split].rows for split in ("train", "valid", "test")] == [6, 0, 2]


def test_kaggle_questions_without_answers(tmp_path, tasks):
    write_kaggle(tmp_path, {"training": tasks["training"], "test": tasks["evaluation"]})
    (tmp_path / "arc-agi_test_solutions.json").unlink()
    splits = ArcSource(str(tmp_path), subset="test", copies=2, valid=0).splits()
    assert splits["test"].rows == 2 and not splits["test"].labels.any()
    assert not versions(splits["test"], 0, 3).labels.any()


def test_a_grid_survives_the_canvas():
    for height, width in ((1, 1), (3, 7), (30, 1), (29, 30), (30, 30)):
        board = RNG.integers(0, 10, (height, width))
        np.testing.assert_array_equal(read_grid(on_canvas(board)), board)
    small = on_canvas(np.array([[1, 2], [3, 4]]), 5, 6).reshape(30, 30)
    assert small[5:8, 6:9].tolist() == [[3, 4, 1], [5, 6, 1], [1, 1, 0]] and np.count_nonzero(small) == 8
    assert read_grid(np.zeros(900, np.int32)).shape == (0, 0)
    ragged = on_canvas(np.ones((4, 4), int)).reshape(30, 30).copy()
    ragged[3, 1] = 0
    assert read_grid(ragged.reshape(-1)).shape == (3, 4), "the largest rectangle of colours"


def test_versions_and_their_inverses():
    for turn in range(8):
        board = RNG.integers(0, 10, (2, 3))
        np.testing.assert_array_equal(turned_back(turned(board, turn), turn), board)
    square = np.arange(9).reshape(3, 3)
    assert len({turned(square, turn).tobytes() for turn in range(8)}) == 8
    augmentation = ArcAugmentation(copies=20, seed=0)
    shown = set()
    for puzzle in range(1, 43):
        board = RNG.integers(0, 10, (4, 6))
        changed = augmentation.apply(board, puzzle)
        np.testing.assert_array_equal(augmentation.restore(changed, puzzle), board)
        np.testing.assert_array_equal(restored(on_canvas(changed), puzzle, augmentation), board)
        assert (changed == 0).sum() == (board == 0).sum(), "0 stays 0"
        shown.add((augmentation.version(puzzle)[0], augmentation.version(puzzle)[1].tobytes()))
        pair = (board, board)
        assert canonical_pair(pair) == canonical_pair((changed, changed))
    assert len(shown) == 41, "version 0 of both tasks is the task; the others differ"
    assert canonical_pair((board, board)) != canonical_pair((board, board.T)), "negative control"


def test_the_stream_shows_versions_of_the_pair(tmp_path, tasks):
    write_folder(tmp_path, tasks)
    puzzles = ArcSource(str(tmp_path), copies=3, valid=1).splits()["train"]
    augmentation = puzzles.augmentation
    batch = next(PuzzleStream(puzzles, 64, 0))
    originals = {row.tobytes() for row in np.concatenate([puzzles.inputs, puzzles.labels], axis=1)}
    moved, numbers = 0, set()
    for inputs, labels, number in zip(batch.inputs, batch.labels, batch.puzzle.tolist()):
        pair = []
        for tokens in (inputs, labels):
            canvas = tokens.reshape(30, 30)
            rows, columns = np.nonzero(canvas > 1)
            part = canvas[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] - 2
            pair.append(on_canvas(augmentation.restore(part, number)))
            moved += rows.min() + columns.min() > 0
        assert np.concatenate(pair).tobytes() in originals
        numbers.add((number - 1) % 4)
    assert moved > 100 and numbers == {0, 1, 2, 3}


def test_versions_of_a_set_are_restored_and_win_the_vote(tmp_path, tasks):
    write_folder(tmp_path, tasks)
    source = ArcSource(str(tmp_path), copies=5, valid=1)
    test = source.splits()["test"]
    views = versions(test, 0, 6)
    assert views.rows == 12 and views.puzzle.tolist() == [*range(25, 31), *range(31, 37)]
    ranked = []
    for row in range(2):
        answers = [
            (restored(views.labels[i], int(views.puzzle[i]), test.augmentation), 0.1)
            for i in range(6 * row, 6 * row + 6)
        ]
        ranked.append(vote([*answers, (np.ones((2, 2), int), 0.99)]))
    result = write_submission(tmp_path / "submission.json", source.questions(), ranked)
    assert result == json.loads((tmp_path / "submission.json").read_text())
    for name, part in tasks["evaluation"].items():
        assert result[name] == [{"attempt_1": part["test"][0]["output"], "attempt_2": [[1, 1], [1, 1]]}]
    with pytest.raises(ConfigError, match="do not exist"):
        versions(test, 4, 3)


def test_votes_count_first_and_confidence_decides_ties():
    a, b, c = (np.full((1, 2), colour) for colour in (1, 2, 3))
    answers = [(a, 0.1), (b, 0.5), (c, 0.9), (b, 0.3), (a, 0.2), (np.zeros((0, 0), int), 1.0)]
    assert [int(grid[0, 0]) for grid in vote(answers)] == [2, 1, 3]
    assert [int(grid[0, 0]) for grid in vote(answers[::-1])] == [2, 1, 3]
    assert vote([]) == []


def test_a_submission_without_enough_grids(tmp_path):
    grids = [[np.ones((1, 1), int)], []]
    result = write_submission(tmp_path / "s.json", [("b", 1), ("b", 0)], grids)
    assert result == {"b": [{"attempt_1": [[0]], "attempt_2": [[0]]}, {"attempt_1": [[1]], "attempt_2": [[1]]}]}


def test_a_grid_is_drawn():
    assert show_board(on_canvas(np.array([[1, 0], [2, 3]])), "arc", 30) == "10/\n23/\n//"


GOOD = {"input": [[1]], "output": [[2]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ({"train": [GOOD]}, "keys train and test"),
        ({"train": [{"input": [[1]]}], "test": []}, "train pair 1: input or output is missing"),
        ({"train": [GOOD], "test": [{"output": [[1]]}]}, "test pair 1: input or output"),
        ({"train": [GOOD, {**GOOD, "input": [[1] * 31]}], "test": []}, "train pair 2, input is 1x31"),
        ({"train": [{**GOOD, "output": [[1]] * 31}], "test": []}, "train pair 1, output is 31x1"),
        ({"train": [{**GOOD, "input": [[1, 2], [3]]}], "test": []}, "ragged: rows of 1 to 2"),
        ({"train": [{**GOOD, "input": [[10]]}], "test": []}, "holds 10"),
        ({"train": [{**GOOD, "input": [[-1]]}], "test": []}, "holds -1"),
        ({"train": [{**GOOD, "input": [[1.0]]}], "test": []}, "holds 1.0"),
        ({"train": [{**GOOD, "input": [[True]]}], "test": []}, "holds True"),
        ({"train": [{**GOOD, "input": []}], "test": []}, "is no grid"),
        ({"train": [{**GOOD, "input": [1]}], "test": []}, "is no grid"),
    ],
)
def test_a_bad_task_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        ArcSource(str(tmp_path)).splits()
    assert "bad.json" in str(caught.value) and "\n" not in caught.value.line() and caught.value.hint


def test_bad_folders(tmp_path, tasks):
    with pytest.raises(ConfigError, match="path"):
        ArcSource()
    with pytest.raises(InputError, match="is no folder"):
        ArcSource(str(tmp_path / "none")).splits()
    with pytest.raises(InputError, match="holds no .json"):
        ArcSource(str(tmp_path)).splits()
    write_kaggle(tmp_path, {"evaluation": tasks["evaluation"]})
    with pytest.raises(InputError, match="test_challenges.json"):
        ArcSource(str(tmp_path), subset="test").splits()
    (tmp_path / "arc-agi_evaluation_solutions.json").write_text('{"e0": []}')
    with pytest.raises(InputError, match="not one per question"):
        ArcSource(str(tmp_path)).splits()
