"""Running functions that nobody vouches for, on given arguments, in a process that can do nothing else.

The process (`worker`) is an isolated interpreter in an empty temporary folder and a session of its own: `-S`, no site
packages, and what `-I` stands for but that it reads its environment, which is empty but for the hash seed (without that
the order of sets would differ from process to process). Before it reads a line of the code it bounds processor time,
address space and open files, allows no new process, no byte in any file and no core dump, and leaves the network and
its user namespace where Linux permits. Then an audit hook, which cannot be taken back, refuses every event but plain
computing: opening files, sockets, processes, foreign functions, imports beyond a list. Each call runs under a timer of
processor time whose signal kills, so that neither loops inside C code nor `except BaseException` outlive it; the other
functions of the batch go on in a new process. What is silent for `wall_seconds` is killed with its process group.

This holds against accidents, and against what a corrupted or generated function does by chance. It is no wall against
an attacker who knows Python's internals: `checks` lets only functions in that a static check finds harmless.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ruvjax.errors import ConfigError, RunError

MODULES = (
    "base64", "binascii", "bisect", "calendar", "cmath", "collections", "colorsys", "copy", "decimal", "fractions",
    "functools", "heapq", "itertools", "keyword", "math", "numbers", "operator", "re", "statistics", "string", "struct",
    "textwrap", "unicodedata",
)  # fmt: skip
KILLED = "! killed"
_MOST_BYTES = 64 << 20  # that are read of one process


@dataclass(frozen=True)
class Limits:
    """cpu_seconds: processor time of one call. memory_mb: address space of the process. wall_seconds: longest silence.

    deaths: how often a function may kill the process before its remaining cases count as killed. Raises ConfigError.
    """

    cpu_seconds: float = 0.5
    memory_mb: int = 512
    wall_seconds: float = 20.0
    deaths: int = 1

    def __post_init__(self):
        for name, least, most in (
            ("cpu_seconds", 0.01, 3600),
            ("memory_mb", 64, 1 << 20),
            ("wall_seconds", 0.1, 3600),
            ("deaths", 1, 1000),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ConfigError(f"{name}={value!r} is out of range", f"a number from {least} to {most}")


@dataclass(frozen=True)
class Case:
    """One call: a literal tuple of arguments, and for a method the literal dict of the attributes of its object."""

    arguments: str
    attributes: str = ""


@dataclass(frozen=True)
class Job:
    """Call `name`, which `source` defines, on every case."""

    source: str
    name: str
    cases: tuple[Case, ...]


def run_jobs(jobs: Sequence[Job], limits: Limits) -> list[list[str]]:
    """The outcome of every case of every job.

    "= RESULT after ARGUMENTS" where the call returned plain data (iterators are read, up to 1000 items), the same text
    in every process; "! NAME" where it raised the exception NAME; "! refused" where it tried what is not allowed,
    whether or not that showed; "! killed" where it ran out of time or took the process down; "! Opaque" for other
    results. Raises RunError where no process can be started.
    """
    outcomes = [[KILLED] * len(job.cases) for job in jobs]
    deaths = [0] * len(jobs)
    first_job, first_case = 0, 0
    while first_job < len(jobs):
        if first_case >= len(jobs[first_job].cases) or deaths[first_job] >= limits.deaths:
            first_job, first_case = first_job + 1, 0
            continue
        rest = [
            {
                "source": job.source,
                "name": job.name,
                "cases": [[case.arguments, case.attributes] for case in job.cases],
                "first": first_case if number == 0 else 0,
            }
            for number, job in enumerate(jobs[first_job:])
        ]
        expected = [
            (number, case)
            for number, job in enumerate(jobs[first_job:])
            for case in range(first_case if number == 0 else 0, len(job.cases))
        ]
        answered = 0
        for number, case, outcome in _run_worker(rest, expected, limits):
            outcomes[first_job + number][case] = outcome
            answered += 1
        reached, first_case = _after(jobs, first_job, first_case, answered)
        if reached < len(jobs):  # the case that comes next is the one that killed the process
            deaths[reached] += 1
            first_case += 1
        first_job = reached
    return outcomes


def _after(jobs: Sequence[Job], job: int, case: int, answered: int) -> tuple[int, int]:
    """The (job, case) that follows `answered` cases from (job, case) on; jobs without cases are passed over."""
    case += answered
    while job < len(jobs) and case >= len(jobs[job].cases):
        case -= len(jobs[job].cases)
        job += 1
    return job, case


def _run_worker(
    jobs: list[dict[str, object]], expected: list[tuple[int, int]], limits: Limits
) -> list[tuple[int, int, str]]:
    """(job, case, outcome) in the `expected` order until one process has done everything, or dies, or is killed."""
    bounds = {"cpu_seconds": limits.cpu_seconds, "memory_mb": limits.memory_mb}
    request = json.dumps({"limits": bounds, "modules": list(MODULES), "jobs": jobs}).encode()
    worker = str(Path(__file__).with_name("worker.py"))
    with tempfile.TemporaryDirectory(prefix="ruvjax-check-") as folder:
        # The request is a file, so that writing it cannot wait for a process that does not read.
        with tempfile.TemporaryFile() as request_file:
            request_file.write(request)
            request_file.seek(0)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-s", "-S", "-B", worker],
                    stdin=request_file,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env={"PYTHONHASHSEED": "0"},
                    start_new_session=True,
                )
            except OSError as error:
                raise RunError(f"no process to check functions in could be started: {error.strerror}") from error
        try:
            data = _read(process, limits.wall_seconds)
        finally:
            _kill(process)
    answers: list[tuple[int, int, str]] = []
    for line, (number, case) in zip(data.split(b"\n")[:-1], expected):
        try:
            answer = json.loads(line)
        except ValueError:
            break
        if not isinstance(answer, list) or answer[:2] != [number, case] or not isinstance(answer[-1], str):
            break  # the worker writes every case in order: this is from elsewhere
        answers.append((number, case, answer[-1]))
    return answers


def _read(process: "subprocess.Popen[bytes]", wall_seconds: float) -> bytes:
    """The output of `process` until it ends, is silent for `wall_seconds`, or has said too much."""
    assert process.stdout is not None
    number, data = process.stdout.fileno(), bytearray()
    deadline = time.monotonic() + wall_seconds
    while len(data) < _MOST_BYTES:
        ready, _, _ = select.select([number], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        part = os.read(number, 1 << 16)
        if not part:
            break
        data += part
        deadline = time.monotonic() + wall_seconds
    return bytes(data)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its session has the id of the process
    except (ProcessLookupError, PermissionError):
        pass  # everything in it has ended
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
