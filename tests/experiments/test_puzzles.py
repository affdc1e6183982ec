"""Training, evaluating and sampling on puzzles: the baseline, the intervals, the animations, and whole runs."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console
from scipy.stats import binom

from experiments import puzzles
from experiments.boards import Board, Solving, animate_board, frame, html_boards, read_maze, settled
from experiments.build import build
from experiments.complaints import compose_config
from experiments.puzzle_arc import attempts_right
from experiments.puzzle_scoring import bands, first_rows, lookup, score, share
from experiments.puzzle_settings import PuzzleDrawing, PuzzleEvaluate, PuzzleEvaluation, PuzzleSample, PuzzleTrain
from experiments.settings import Kernels, Launch, ModelPath, Run
from ruvjax.core.params import init
from ruvjax.data.puzzles.sudoku import SudokuSource
from ruvjax.errors import InputError

SUDOKU = Board("sudoku", 4, 2, 2)
SOURCE = SudokuSource(2, 2, train=24, valid=8, test=12, spare=6)
SHORT = [
    "experiment=trm_sudoku4",
    "puzzles.train=24",
    "puzzles.valid=8",
    "puzzles.test=12",
    "pipeline.batch=8",
    "model.width=16",
    "model.mlp_width=16",
    "model.mix_width=16",
    "model.updates=1",
    "objective.max_steps=3",
    "trainer.steps=6",
    "trainer.checkpoint_every=3",
    "trainer.eval_every=3",
    "trainer.log_every=2",
    "evaluation.shown=2",
]


@pytest.fixture(scope="module")
def sets():
    return SOURCE.splits()


def job_of(*overrides):
    config = compose_config("train", [*SHORT, *overrides])
    return build(config), Launch("train", OmegaConf.to_container(config, resolve=True), tuple(overrides))


def test_wilson_intervals_hold_their_level():
    assert share(0, 10).low == 0 and share(10, 10).high == pytest.approx(1)
    for p in (0.05, 0.5, 0.9):
        weights = binom.pmf(np.arange(101), 100, p)
        held = [share(k, 100).low <= p <= share(k, 100).high for k in range(101)]
        assert 0.92 < float(weights @ held) < 0.99


def test_bands_double():
    assert bands(0) == [(0, 0)]
    assert bands(5) == [(0, 0), (1, 1), (2, 3), (4, 7)]


def test_lookup_finds_what_was_seen_and_only_that(sets):
    train, test = sets["train"], sets["test"]
    assert lookup(train, train, "sudoku", images=0).mean == 1.0
    assert lookup(first_rows(train, 2), test, "sudoku", images=0).mean < 0.5
    # Of a training board turned by a symmetry, enough images hold the answer (4x4 has 288 full boards).
    assert lookup(train, test, "sudoku", images=200).mean > 0.9


def test_scores_count_whole_boards(sets):
    job, _ = job_of()
    test = sets["test"]
    model = puzzles.fit_board(job.model, test)
    params = init(model, __import__("jax").random.key(0))
    found = score(model, params, test, batch=5, steps=2, shown=3)
    assert found.exact.shape == (2, 12) and found.answers.shape == (2, 3, 16)
    whole = score(model, params, test, batch=12, steps=2, shown=12)
    np.testing.assert_array_equal(found.exact, whole.exact)
    np.testing.assert_allclose(found.cells, whole.cells)
    np.testing.assert_array_equal(whole.exact, (whole.answers == test.labels[None]).all(-1))
    assert sum(value.n for value in found.by_rating().values()) == 12
    unknown = dataclasses.replace(test, labels=np.zeros_like(test.labels))
    assert not score(model, params, unknown, batch=12, steps=1).exact.any()


def test_a_run_trains_exports_reports_and_is_evaluated(tmp_path, capsys):
    job, launch = job_of(f"run.dir={tmp_path / 'run'}")
    assert isinstance(job, PuzzleTrain)
    summary = json.loads(puzzles.train(job, launch).read_text())
    metrics = summary["metrics"]
    assert summary["status"] == "done" and metrics["steps"] == 6 and metrics["boards"] == 12
    for name in ("exact_accuracy", "cell_accuracy", "lookup_accuracy", "halt_accuracy"):
        assert 0 <= metrics[name] <= 1
    assert re.fullmatch("[0-9a-f]{64}", metrics["params_sha256"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('figure class="board"') == 2 and "Boards being solved" in page and "://" not in page
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [3, 6]

    run = Run("evaluate", dir=str(tmp_path / "evaluate"))
    path, kernels = ModelPath(str(tmp_path / "run")), Kernels()
    evaluation = PuzzleEvaluate(run, path, None, "test", PuzzleEvaluation(batch=7), kernels)
    again = json.loads(puzzles.evaluate(evaluation, Launch("evaluate", {}, ())).read_text())["metrics"]
    assert again["exact_accuracy"] == metrics["exact_accuracy"]
    assert again["exact_by_step"] == metrics["exact_by_step"]

    board = "12.. .... .... ..3."
    drawing = PuzzleDrawing(prompt=SUDOKU.text(SOURCE.splits()["test"].inputs[0]).replace("\n", " "))
    sample = PuzzleSample(Run("sample", dir=str(tmp_path / "sample")), path, drawing, kernels)
    drawn = json.loads(puzzles.sample(sample, Launch("sample", {}, ())).read_text())
    assert drawn["metrics"]["steps"] == 3
    printed = capsys.readouterr()
    assert "|" in printed.out and "step 3:" in printed.err
    for prompt, message in (
        ("11.. .... .... ....", "two digits 1 in row 1"),
        (board, "several solutions"),
        ("12", "2 cells, not 16"),
        ("", "no board"),
    ):
        wrong = dataclasses.replace(sample, sample=PuzzleDrawing(prompt=prompt), run=Run("s", dir=str(tmp_path / "s")))
        with pytest.raises(InputError, match=message):
            puzzles.sample(wrong, Launch("sample", {}, ()))
    nine = SudokuSource(3, 2, train=2, valid=1, test=1)
    with pytest.raises(InputError, match="the boards are 6x6"):
        puzzles.evaluate(dataclasses.replace(evaluation, puzzles=nine), Launch("evaluate", {}, ()))


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(tmp_path):
    steady = ["optimizer.schedule=constant", "optimizer.warmup_steps=1"]  # the rates do not depend on the run's length
    job, launch = job_of(f"run.dir={tmp_path / 'whole'}", *steady)
    whole = json.loads(puzzles.train(job, launch).read_text())["metrics"]
    half, launch = job_of(f"run.dir={tmp_path / 'parts'}", "trainer.steps=3", *steady)
    puzzles.train(half, launch)
    (tmp_path / "parts" / "summary.json").unlink()
    rest, launch = job_of(f"run.dir={tmp_path / 'parts'}", "trainer.resume=auto", *steady)
    parts = json.loads(puzzles.train(rest, launch).read_text())["metrics"]
    assert parts["resumed_from"] == 3 and parts["steps"] == whole["steps"] == 6
    assert parts["params_sha256"] == whole["params_sha256"]
    other, launch = job_of(f"run.dir={tmp_path / 'other'}", "seed=1", *steady)
    assert json.loads(puzzles.train(other, launch).read_text())["metrics"]["params_sha256"] != whole["params_sha256"]


def solving():
    inputs = np.array([1, 3, 1, 1], np.int32)
    answers = np.array([[2, 3, 2, 2], [4, 3, 2, 2]], np.int32)
    return Solving(inputs, answers, np.array([-3.0, 1.0]), np.array([4, 3, 2, 5], np.int32))


def test_a_cell_is_coloured_since_it_last_changed():
    np.testing.assert_array_equal(settled(solving(), 0), [0, -1, 0, 0])
    np.testing.assert_array_equal(settled(solving(), 1), [1, -1, 0, 0])
    assert solving().solved is False
    text = frame(Board("sudoku", 2, 1, 2), solving(), 1).plain
    assert text.startswith("step 2/2") and "3 2" in text


def test_the_animation_is_drawn_on_terminals_and_told_elsewhere():
    board = Board("sudoku", 2, 1, 2)
    screen, plain = io.StringIO(), io.StringIO()
    animate_board(board, solving(), 0.0, Console(file=screen, force_terminal=True, width=80))
    animate_board(board, solving(), 0.0, Console(file=plain, width=80))
    assert "step 2/2" in screen.getvalue() and "\x1b" in screen.getvalue()
    assert "step 1: 3 cells changed, halting logit -3.0" in plain.getvalue() and "\x1b" not in plain.getvalue()


def test_the_page_holds_every_frame_and_nothing_runs_away():
    page = html_boards(Board("sudoku", 2, 1, 2), [solving()], ["<b>a board</b>"])
    assert "<b>a board" not in page
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])
    assert data["frames"] == [["1", "2", "1", "1"], ["3", "2", "1", "1"]]
    assert data["given"] == [".", "2", ".", "."] and data["truth"] == ["3", "2", "1", "4"]
    assert html_boards(SUDOKU, [], []) == ""


def test_a_typed_maze_is_checked():
    np.testing.assert_array_equal(read_maze("#S /#G#", 3, 6), [1, 3, 2, 1, 4, 1])
    for text, message in (
        ("#S/#G", "2 rows of up to 2"),
        ("#S /#S#", "2 cells S"),
        ("#S /###", "0 cells G"),
        ("#Sx/#G#", "'x'"),
    ):
        columns, length = (3, 9) if "up to" in message else (3, 6)
        with pytest.raises(InputError, match=message):
            read_maze(text, columns, length)
    assert Board("maze", 3).text(np.array([1, 3, 2, 1, 4, 5])) == "#S\n#Go"


def test_two_attempts_are_judged(sets):
    from ruvjax.data.puzzles.arc import on_canvas
    from ruvjax.data.puzzles.stream import puzzle_set

    grids = [np.array([[1, 2]]), np.array([[3]]), np.array([[4]])]
    labels = np.stack([on_canvas(grids[0]), on_canvas(grids[1]), np.zeros(900, np.int32)])
    held = puzzle_set(labels, labels, np.zeros(3), 30, 30, 12)
    found = attempts_right(held, [[grids[0]], [grids[2], grids[1]], []])
    assert found == {"arc_pass_at_1": 0.5, "arc_pass_at_2": 1.0, "arc_questions": 3}


@pytest.mark.variant  # minutes; CI runs the steps of it in the other tests
def test_the_smoke_experiment_learns(tmp_path):
    config = compose_config("train", ["experiment=trm_sudoku4", f"run.dir={tmp_path / 'run'}", "trainer.steps=700"])
    launch = Launch("train", OmegaConf.to_container(config, resolve=True), ())
    metrics = json.loads(puzzles.train(build(config), launch).read_text())["metrics"]
    assert metrics["exact_accuracy"] > 0.8
