"""Sweeps: a process, a log and a row of the table per job; failures, fail-fast, and what is done is not done again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.sweep import Sweep, launch
from ruvjax.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.doctor", "-m", "hydra.sweep.dir=sweep", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
def test_two_jobs_in_processes_of_their_own(tmp_path):
    (tmp_path / "corpus.txt").write_text("some words and more of them\n" * 100)
    done = sweep(tmp_path, "data=text", "data.path=corpus.txt", "data.test_share=0.1,0.2")
    assert done.returncode == 0, done.stderr
    summary_path = Path(done.stdout.splitlines()[-1])
    summary = json.loads(summary_path.read_text())
    assert summary_path == tmp_path / "sweep" / "summary.json" and summary["status"] == "done"
    assert [job["status"] for job in summary["jobs"]] == ["done", "done"]
    pids = set()
    for number, share in enumerate((0.1, 0.2)):
        folder = tmp_path / "sweep" / str(number)
        assert f"data.test_share={share}" in (folder / "overrides.txt").read_text().split()
        assert json.loads((folder / "summary.json").read_text())["status"] == "done"
        assert (tmp_path / "sweep" / f"{number}.log").read_text()
        pids.add(json.loads((folder / "run.json").read_text())["pid"])
        assert f"data.test_share={share}" in done.stdout
    assert len(pids) == 2 and os.getpid() not in pids


@pytest.mark.slow
def test_a_failing_job_does_not_stop_the_others_but_the_exit_code_tells(tmp_path):
    done = sweep(tmp_path, "backend=vulkan,auto", "data=text", "data.path=missing.txt")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 1 of 2 jobs did not finish, job 0 first")
    summary = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    assert [job["status"] for job in summary["jobs"]] == ["failed", "done"]
    assert "Vulkan" in (tmp_path / "sweep" / "0.log").read_text()


def test_a_point_that_does_not_compose_is_told_before_any_job_starts(tmp_path):
    done = sweep(tmp_path, "seed=1,2")
    assert done.returncode == 2 and "seed is not a setting" in done.stderr and not list(tmp_path.glob("sweep/*.log"))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package `experiments` whose verb `fake` takes no time: it notes that it ran, and fails for n=2."""
    source = """
import json, pathlib, sys
given = dict(item.split("=", 1) for item in sys.argv[1:])
folder = pathlib.Path(given["run.dir"]); folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "ran.txt", "a") as file: file.write(given["n"])
if given["n"] == "2": sys.exit(1)
(folder / "overrides.txt").write_text("n=" + given["n"])
(folder / "summary.json").write_text(json.dumps({"status": "done", "metrics": {"loss": 0.5}, "wall_s": 1.0}))
"""
    package = tmp_path / "package" / "experiments"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "fake.py").write_text(source)
    monkeypatch.setattr("experiments.sweep.CONFIGS", tmp_path / "package" / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sweep"


def test_what_is_done_is_not_done_again(fake, capsys):
    sweep = Sweep("fake", str(fake))
    launch(sweep, [("n=1",), ("n=3",)])
    launch(sweep, [("n=1",), ("n=3",), ("n=4",)])
    assert sorted((fake / "ran.txt").read_text()) == ["1", "3", "4"]
    launch(sweep, [("n=5",)])  # another job in the place of the first
    assert "5" in (fake / "ran.txt").read_text()
    assert "0.5" in capsys.readouterr().out


def test_fail_fast_starts_no_further_jobs(fake):
    jobs = [("n=1",), ("n=2",), ("n=3",)]
    with pytest.raises(RunError, match="2 of 3"):
        launch(Sweep("fake", str(fake), fail_fast=True), jobs)
    assert (fake / "ran.txt").read_text() == "12"
    with pytest.raises(RunError, match="1 of 3"):
        launch(Sweep("fake", str(fake)), jobs)
    assert (fake / "ran.txt").read_text() == "1223"
    statuses = [job["status"] for job in json.loads((fake / "summary.json").read_text())["jobs"]]
    assert statuses == ["done", "failed", "done"]


def test_jobs_run_side_by_side(fake):
    launch(Sweep("fake", str(fake), jobs=2), [("n=1",), ("n=3",)])
    assert sorted((fake / "ran.txt").read_text()) == ["1", "3"]
