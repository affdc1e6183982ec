import importlib.util
import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from ruvjax.errors import ConfigError
from ruvjax.training import progress, trackers
from ruvjax.training.progress import show_progress
from ruvjax.training.trackers import Tracker, open_trackers


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def console_of(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None, soft_wrap=True)


def test_plain_lines_where_there_is_no_terminal(clock, capsys):
    console = console_of(False)
    with show_progress(30, tokens_per_step=1000, console=console) as display:
        clock.seconds += 6.0  # the first interval holds the compilation
        display.log(10, {"loss": 3.21})
        display.note("saved")
        clock.seconds += 5.0
        display.log(20, {"loss": 2.0})
    assert console.file.getvalue().splitlines() == [
        "train 10/30 | loss 3.2100 | compile 6.0 s",
        "saved",
        "train 20/30 | loss 2.0000 | 2.0 steps/s | 2.0k tokens/s | 0:05 left | compile 6.0 s",
    ]
    assert capsys.readouterr().out == ""


def test_measured_numbers_of_the_loop_are_preferred(clock):
    console = console_of(False)
    with show_progress(30, start_step=10, label="fit", console=console) as display:
        display.log(11, {"compile_s": 2.5, "tokens_per_s": 1_250_000.0})
    assert console.file.getvalue() == "fit 11/30 | 1.2M tokens/s | compile 2.5 s\n"


def test_a_plan_that_changes_moves_the_end(clock):
    console = console_of(False)
    with show_progress(0, console=console) as display:
        display.log(1, {"compile_s": 0.0})
        clock.seconds += 2.0
        display.log(2, {"total_steps": 4})
    assert console.file.getvalue().splitlines()[1] == "train 2/4 | 2.0 s/step | 0:04 left | compile 0.0 s"


def test_a_bar_on_a_terminal_and_nothing_on_stdout(clock, capsys):
    console = console_of(True)
    with show_progress(4, console=console) as display:
        for step in range(1, 5):
            clock.seconds += 1.0
            display.log(step, {"loss": 1.0 / step})
        print("stdout is the caller's")
    shown = console.file.getvalue()
    assert "4/4 | loss 0.2500 | 1.0 steps/s" in shown and "━" in shown
    assert capsys.readouterr().out == "stdout is the caller's\n"


def test_an_exception_passes_and_the_bar_is_put_away(clock):
    console = console_of(True)
    with pytest.raises(ZeroDivisionError), show_progress(4, console=console) as display:
        display.log(1, {})
        raise ZeroDivisionError
    assert console.file.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_trackers_that_break_never_end_the_run(tmp_path, monkeypatch, capsys):
    seen, closed = [], []

    def broken(step, metrics):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(trackers._OPEN, "wandb", lambda *a: Tracker(broken, lambda: closed.append("wandb")))
    monkeypatch.setitem(
        trackers._OPEN, "mlflow", lambda *a: Tracker(lambda *b: seen.append(b), lambda: closed.append("mlflow"))
    )
    monkeypatch.setitem(trackers._OPEN, "trackio", lambda *a: 1 / 0)
    tracker = open_trackers(["wandb", "mlflow", "trackio"], tmp_path, "p", "r", {})
    for step in (1, 2):
        tracker.log(step, {"loss": 0.5, "kind": "train", "ok": True, "note": None})
    tracker.close()
    assert seen == [(1, {"loss": 0.5}), (2, {"loss": 0.5})] and closed == ["mlflow"]
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "tracker trackio stopped: ZeroDivisionError: division by zero (the run goes on)",
        "tracker wandb stopped: ConnectionError: no route (the run goes on)",
    ]


def test_no_trackers_do_nothing_and_unknown_or_missing_ones_are_refused(tmp_path, monkeypatch):
    tracker = open_trackers([], tmp_path, "p", "r", {})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    with pytest.raises(ConfigError, match="'aim' is not known"):
        open_trackers(["aim"], tmp_path, "p", "r", {})
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(ConfigError, match="tensorboard is not installed") as caught:
        open_trackers(["tensorboard"], tmp_path, "p", "r", {})
    assert "ruvjax[trackers]" in caught.value.hint


@pytest.mark.parametrize("name", trackers.TRACKERS)
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
def test_installed_trackers_leave_files_and_a_clean_stdout(name, tmp_path, monkeypatch, capsys):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the extra ruvjax[trackers]: {name}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is first imported
    tracker = open_trackers([name], tmp_path, "project", "run", {"seed": 0})
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    assert any(path.is_file() for path in tmp_path.rglob("*"))
    captured = capsys.readouterr()
    assert captured.out == "" and "stopped" not in captured.err
