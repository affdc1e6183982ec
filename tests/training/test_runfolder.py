import errno
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

from ruvjax.core import files
from ruvjax.errors import ConfigError, InputError, RunError
from ruvjax.training import runfolder
from ruvjax.training.runfolder import append_line, newest_unfinished, open_run, read_metrics, run_state

CONFIG = {"run": {"name": "a"}, "seed": 0, "trainer": {"steps": 3, "resume": "never"}}
ROOT = Path(__file__).resolve().parents[2]


def checkpointed(folder):
    (folder.checkpoints / "10").mkdir(parents=True)
    return folder


def leave(folder, **changes):
    """Make the folder look as one whose process is gone (or whose identity has `changes`)."""
    identity = json.loads((folder.path / "run.json").read_text())
    identity.update({"pid": 2**30, "process_start": "gone:0", **changes})
    (folder.path / "run.json").write_text(json.dumps(identity))
    return folder


def test_a_new_run_has_its_files_and_ends_with_a_summary(tmp_path):
    folder = open_run(tmp_path, "a", "train", CONFIG, ["seed=0", "trainer.steps=3"])
    assert folder.path.parent == tmp_path / "a" and not folder.resumed
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == CONFIG
    assert (folder.path / "overrides.txt").read_text() == "seed=0\ntrainer.steps=3\n"
    assert json.loads((folder.path / "run.json").read_text())["format"] == 1
    folder.log({"step": 1, "loss": np.float32(0.5), "kind": "train"})
    path = folder.finish("done", {"bits": np.float64(1.5), "worst": float("inf"), "n": np.int64(3)}, 2.0)
    assert json.loads(path.read_text()) == {
        "format": 1,
        "status": "done",
        "verb": "train",
        "run_dir": str(folder.path),
        "metrics": {"bits": 1.5, "worst": None, "n": 3},
        "wall_s": 2.0,
    }
    assert read_metrics(folder.metrics) == [{"step": 1, "loss": 0.5, "kind": "train"}]
    assert run_state(folder.path) == "done"


def test_simultaneous_starts_get_folders_of_their_own(tmp_path):
    barrier, paths = threading.Barrier(8), []

    def start():
        barrier.wait()
        paths.append(open_run(tmp_path, "a", "train", CONFIG).path)

    threads = [threading.Thread(target=start) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(paths)) == 8


CLAIM = """
import sys, time
from ruvjax.errors import InputError
from ruvjax.training.runfolder import open_run
try:
    open_run("runs", "a", "train", {"seed": 0}, directory=sys.argv[1])
    print("mine", flush=True)
except InputError as error:
    print("refused:", error.line(), flush=True)
sys.stdin.read()  # alive until the test has seen both
"""


def test_one_of_two_processes_gets_a_named_folder(tmp_path):
    command = [sys.executable, "-c", CLAIM, str(tmp_path / "x")]
    pair = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    lines = sorted(process.stdout.readline() for process in pair)
    for process in pair:
        process.communicate()
    assert lines[0] == "mine\n"
    assert "in use by process" in lines[1]
    # both are gone: the folder can be taken again
    assert run_state(tmp_path / "x") == "killed"
    open_run("runs", "a", "train", {"seed": 0}, directory=tmp_path / "x")


def test_a_folder_that_is_just_being_claimed_is_waited_for(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    errors = []

    def claim():
        try:
            open_run("runs", "a", "train", CONFIG, directory=tmp_path)
        except InputError as error:
            errors.append(str(error))

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (tmp_path / "config.yaml").write_text("seed: 0\n")
        second = threading.Thread(target=claim)
        second.start()
        second.join(0.2)
        assert second.is_alive()
        first = {"pid": os.getppid(), "process_start": runfolder._process_start(os.getppid()), "host": platform.node()}
        (tmp_path / "run.json").write_text(json.dumps(first))
    second.join()
    assert "in use by process" in errors[0]


def test_a_torn_last_line_is_left_out_and_truncation_leaves_no_duplicates(tmp_path):
    folder = open_run(tmp_path, "a", "train", CONFIG)
    for step in (1, 2, 3):
        folder.log({"step": step, "loss": 1.0 / step})
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(folder.metrics)] == [1, 2, 3]
    folder.truncate(2)
    folder.log({"step": 3, "loss": 0.25})
    assert [(record["step"], record["loss"]) for record in read_metrics(folder.metrics)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.25),
    ]
    assert folder.metrics.read_text().endswith("}\n")


def test_a_broken_line_in_the_middle_is_an_error_and_no_file_is_no_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)


def test_non_finite_metrics_are_null(tmp_path):
    folder = open_run(tmp_path, "a", "train", CONFIG)
    folder.log({"step": 1, "loss": float("nan"), "grad_norm": np.float32("inf")})
    assert folder.metrics.read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'


def test_a_finished_run_of_another_configuration_is_not_overwritten(tmp_path):
    directory = tmp_path / "x"
    open_run("runs", "a", "train", CONFIG, directory=directory).finish("done", {"loss": 1}, 1.0)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="another configuration") as caught:
        open_run("runs", "a", "train", {**CONFIG, "seed": 1}, directory=directory)
    assert "trainer.resume=auto" in caught.value.hint and caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    resumed = open_run("runs", "a", "train", {**CONFIG, "seed": 1}, directory=directory, resume=True)
    assert resumed.resumed
    assert yaml.safe_load((directory / "config-1.yaml").read_text()) == CONFIG


def test_an_unfinished_run_with_results_is_not_overwritten_but_one_without_is(tmp_path):
    folder = leave(open_run("runs", "a", "train", CONFIG, directory=tmp_path / "x"))
    folder = open_run("runs", "a", "train", {**CONFIG, "seed": 1}, directory=folder.path)  # it had done nothing
    folder.log({"step": 1})
    leave(folder)
    with pytest.raises(InputError, match="another configuration"):
        open_run("runs", "a", "train", CONFIG, directory=folder.path)


def test_the_same_configuration_starts_over_and_keeps_what_was_there(tmp_path):
    folder = checkpointed(open_run("runs", "a", "train", CONFIG, directory=tmp_path / "x"))
    folder.log({"step": 1})
    folder.finish("done", {}, 1.0)
    again = {**CONFIG, "run": {"name": "b"}, "trainer": {"steps": 3, "resume": "auto"}}  # nothing that changes results
    folder = open_run("runs", "a", "train", again, directory=tmp_path / "x")
    assert run_state(folder.path) == "killed" and not folder.summary.exists() and not folder.checkpoints.exists()
    assert read_metrics(folder.path / "replaced-1" / "metrics.jsonl") == [{"step": 1}]
    assert (folder.path / "replaced-1" / "checkpoints" / "10").is_dir()


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        open_run("runs", "a", "train", CONFIG, directory=tmp_path / "file")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text("theirs: 1\n")
    with pytest.raises(InputError, match="no run of ours"):
        open_run("runs", "a", "train", CONFIG, directory=tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["config.yaml"]
    folder = leave(open_run("runs", "a", "train", CONFIG, directory=tmp_path / "trained"))
    with pytest.raises(InputError, match="'train', not of 'evaluate'"):
        open_run("runs", "a", "evaluate", CONFIG, directory=folder.path, resume=True)
    for name in ("", "../up", "a/b", ".hidden"):
        with pytest.raises(ConfigError, match="not a folder name"):
            open_run(tmp_path, name, "train", CONFIG)


def test_resume_takes_the_newest_unfinished_run_of_the_name(tmp_path):
    def start(name, age, verb="train"):
        return leave(checkpointed(open_run(tmp_path, name, verb, CONFIG)), started=1000.0 - age)

    old, new = start("a", age=5), start("a", age=3)
    start("a", age=2).finish("done", {}, 1.0)
    start("b", age=1)
    start("a", age=1, verb="speculate")
    leave(open_run(tmp_path, "a", "train", CONFIG), started=1000.0)  # no checkpoint: nothing to continue
    assert newest_unfinished(tmp_path, "a") == new.path
    new.finish("interrupted", {}, 1.0)
    folder = open_run(tmp_path, "a", "train", CONFIG, resume=True)
    assert folder.path == new.path and folder.resumed and not folder.summary.exists()
    # a live process holds it now: the next one is taken instead
    leave(folder, pid=os.getppid(), process_start=runfolder._process_start(os.getppid()))
    assert run_state(new.path) == "running"
    assert open_run(tmp_path, "a", "train", CONFIG, resume=True).path == old.path
    assert newest_unfinished(tmp_path, "nothing") is None
    assert not open_run(tmp_path, "c", "train", CONFIG, resume=True).resumed


def test_provenance_of_a_resumed_run_keeps_the_earlier_one(tmp_path):
    folder = open_run("runs", "a", "train", CONFIG, directory=tmp_path / "x")
    folder.write_provenance({"git": "one"})
    folder = open_run("runs", "a", "train", CONFIG, directory=tmp_path / "x", resume=True)
    record = json.loads(folder.write_provenance({"git": "two"}).read_text())
    assert record == {"format": 1, "git": "two", "earlier": [{"format": 1, "git": "one"}]}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_one_clear_line():
    with pytest.raises(RunError, match="disk is full: could not write /dev/full") as caught:
        append_line(Path("/dev/full"), '{"step": 1}')
    assert "\n" not in caught.value.line() and caught.value.exit_code == 1


def test_a_line_cut_short_by_a_full_disk_is_taken_back(tmp_path, monkeypatch):
    folder = open_run(tmp_path, "a", "train", CONFIG)
    folder.log({"step": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(RunError, match="disk is full"):
        folder.log({"step": 2})
    assert folder.metrics.read_text() == '{"step": 1}\n'


def test_a_full_disk_at_the_start_or_the_end_leaves_nothing_half_written(tmp_path, monkeypatch):
    folder = open_run(tmp_path, "a", "train", CONFIG)
    folder.log({"step": 1})
    kept = {path: path.read_bytes() for path in folder.path.iterdir()}

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", full)
    for write in (
        lambda: folder.finish("done", {}, 1.0),
        lambda: folder.truncate(0),
        lambda: folder.write_provenance({}),
    ):
        with pytest.raises(RunError, match="disk is full"):
            write()
    with pytest.raises(RunError, match="disk is full"):
        open_run(tmp_path, "b", "train", CONFIG)
    with pytest.raises(RunError, match="disk is full"):
        open_run("runs", "b", "train", CONFIG, directory=tmp_path / "named")
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == kept
    assert not list((tmp_path / "b").iterdir()) and not (tmp_path / "named").exists()


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        append_line(tmp_path / "missing" / "metrics.jsonl", "{}")
