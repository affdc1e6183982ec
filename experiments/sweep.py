"""Sweeps: one process per job, a log per job, a table and a summary.json at the end.

`python -m experiments.train -m model.width=64,128` or `sweep=<grid>`; reached through hydra_plugins/process_launcher.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.complaints import CONFIGS
from experiments.terminal import note
from ruvjax.core.files import write_atomic
from ruvjax.errors import RunError

SHOWN = ("bits_per_byte", "loss", "tokens_per_s")  # the metrics of the table, where a job has them


@dataclass(frozen=True)
class Sweep:
    """What `launch` needs beside the jobs: the verb, the sweep's folder, and how to run."""

    verb: str
    folder: str
    jobs: int = 1
    fail_fast: bool = False
    resumable: bool = False


@dataclass(frozen=True)
class Ended:
    """How one job ended. `code` is its exit code, None where it was not started."""

    job: int
    overrides: tuple[str, ...]
    code: int | None
    run_dir: str
    log: str
    metrics: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0

    @property
    def status(self) -> str:
        if self.code is None:
            return "not started"
        return {0: "done", 130: "interrupted", 143: "interrupted"}.get(self.code, "failed")


def launch(sweep: Sweep, jobs: Sequence[tuple[str, ...]], first: int = 0) -> Path:
    """Run the jobs, print a table and the path of the sweep's summary.json. Raises RunError where a job failed."""
    started = time.monotonic()
    folder = Path(sweep.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen] = []
    ended: list[Ended] = []

    def one(item: tuple[int, tuple[str, ...]]) -> Ended:
        number, overrides = item
        if sweep.fail_fast and any(job.code for job in ended):
            return Ended(number, overrides, None, str(folder / str(number)), "")
        result = _run(sweep, folder, number, overrides, running)
        ended.append(result)
        note(f"job {number} {result.status} ({result.wall_s:.0f} s): {' '.join(overrides)}")
        return result

    pool = ThreadPoolExecutor(max_workers=max(1, sweep.jobs))
    try:
        results = list(pool.map(one, enumerate(jobs, first)))
    except BaseException:  # interrupted: let the jobs save their checkpoints
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            process.wait()
        raise
    finally:
        pool.shutdown()
    return _finish(sweep, folder, results, time.monotonic() - started)


def _run(sweep: Sweep, folder: Path, number: int, overrides: tuple[str, ...], running: list) -> Ended:
    run_dir, log = folder / str(number), folder / f"{number}.log"
    before = _summary(run_dir)
    if before.get("status") == "done" and _overrides_of(run_dir) >= set(overrides):
        return Ended(number, overrides, 0, str(run_dir), str(log), before.get("metrics", {}), before.get("wall_s", 0.0))
    command = [sys.executable, "-m", f"experiments.{sweep.verb}", *overrides, f"run.dir={run_dir}", "hydra.mode=RUN"]
    if sweep.resumable and run_dir.exists():
        command.append("trainer.resume=auto")
    paths = [str(CONFIGS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    started = time.monotonic()
    with log.open("ab") as sink:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        running.append(process)
        code = process.wait()
    code = 128 - code if code < 0 else code  # killed by a signal, as a shell counts it
    metrics = _summary(run_dir).get("metrics", {}) if code == 0 else {}
    return Ended(number, overrides, code, str(run_dir), str(log), metrics, time.monotonic() - started)


def _summary(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        return {}


def _overrides_of(run_dir: Path) -> set[str]:
    try:
        return set((run_dir / "overrides.txt").read_text().splitlines())
    except OSError:
        return set()


def _finish(sweep: Sweep, folder: Path, results: Sequence[Ended], wall: float) -> Path:
    failed = [job for job in results if job.status != "done"]
    shown = [name for name in SHOWN if any(name in job.metrics for job in results)]
    table = Table("job", "overrides", "status", *shown, "seconds")
    common = set.intersection(*(set(job.overrides) for job in results)) if len(results) > 1 else set()
    for job in results:
        values = [f"{job.metrics[name]:.4g}" if name in job.metrics else "" for name in shown]
        own = " ".join(override for override in job.overrides if override not in common)
        table.add_row(str(job.job), own, job.status, *values, f"{job.wall_s:.0f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    summary = {
        "format": 1,
        "status": "failed" if failed else "done",
        "verb": f"sweep of {sweep.verb}",
        "run_dir": str(folder),
        "metrics": {"jobs": len(results), "failed": len(failed)},
        "jobs": [{**asdict(job), "status": job.status} for job in results],
        "wall_s": wall,
    }
    path = folder / "summary.json"
    write_atomic(path, json.dumps(summary, indent=1))
    print(path, flush=True)
    if failed:
        first = failed[0]
        raise RunError(
            f"{len(failed)} of {len(results)} jobs did not finish, job {first.job} first", f"log: {first.log}"
        )
    return path
