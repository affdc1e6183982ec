"""Runs the two sides of a row in turn, each in a process of its own, under the allocator that suits it best."""

import ctypes.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels_pallas.layout import cpu_multiplies_bfloat16
from ruvjax.core.backend import compute_threads
from ruvjax.errors import InputError, RunError

HERE = Path(__file__).resolve().parent
GLIBC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 62),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class Program:
    """One side: a module of ours (it has no .py), or a script of this folder that a peer's interpreter runs.

    checkout: a file by which the project that it imports from `peer.path` is known, "" where it needs none.
    imports: the modules that its interpreter must have, and install: where they come from.
    """

    title: str
    source: str
    checkout: str = ""
    imports: tuple[str, ...] = ("torch",)
    install: str = "the extra `parity`"

    @property
    def is_ours(self) -> bool:
        return not self.source.endswith(".py")


@dataclass(frozen=True)
class Side:
    """What one side did: every timed repetition in seconds, under its best settings, and what it was."""

    seconds: tuple[float, ...]
    compile_seconds: float
    settings: str
    parameters: int
    device: str
    versions: Mapping[str, str]
    limit_share: float | None = None  # of the rate (of matmuls, of memory) measured beside it
    peak_bytes: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # beside the time, by name
    tokens: tuple[int, ...] = ()  # that a decoder wrote

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def allocators() -> dict[str, dict[str, str]]:
    """The environments tried: as it comes; glibc told to keep its memory; tcmalloc where it is installed."""
    found: dict[str, dict[str, str]] = {"malloc": {}}
    if sys.platform == "linux":
        found["glibc, tuned"] = GLIBC
        library = ctypes.util.find_library("tcmalloc") or ctypes.util.find_library("tcmalloc_minimal")
        if library:
            found["tcmalloc"] = {"LD_PRELOAD": library}
    return found


def launch(program: Program, job: Mapping[str, Any], settings: Mapping[str, str], python: str) -> dict[str, Any]:
    """Run one process and read its report. Raises RunError where it fails or measured something that cannot be."""
    kept = {key: value for key, value in os.environ.items() if key not in (*GLIBC, "LD_PRELOAD")}
    command = [sys.executable, "-m", program.source] if program.is_ours else [python, str(HERE / program.source)]
    done = subprocess.run(
        [*command, json.dumps(job)], cwd=HERE.parents[1], env=kept | dict(settings), capture_output=True, text=True
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{program.title} failed with exit status {done.returncode}: {reason}", " ".join(command))
    try:
        report = json.loads(last)
    except ValueError as error:
        raise RunError(f"{program.title} printed no report", " ".join(command)) from error
    broken = [value for value in report["values"] if value != value or abs(value) == float("inf")]
    if broken or (job["work"] == "sample" and any(report["values"])):
        raise RunError(f"{program.title} computed {report['values']}: its time says nothing", " ".join(command))
    return report


def available(program: Program, python: str, path: str) -> str:
    """Why the peer cannot run, or "". Raises InputError for a `peer.path` that is not the project."""
    if program.is_ours:
        return ""
    names = ", ".join(program.imports)
    probe = subprocess.run([python, "-c", f"import {names}"], capture_output=True)
    if probe.returncode:
        return f"{python} cannot import {names}: install {program.install}, or give peer.python"
    if not program.checkout:
        return ""
    if not path:
        return f"give a checkout of {program.title} as peer.path"
    if not (Path(path) / program.checkout).is_file():
        raise InputError(f"peer.path={path}: no checkout of {program.title} there (it has a {program.checkout})")
    return ""


def best_of(tried: Sequence[tuple[dict[str, Any], Any]]) -> tuple[dict[str, Any], Any]:
    """The fastest of the (report, setting) pairs; where memory was measured, the leanest of those within 5% of it."""
    medians = [statistics.median(report["seconds"]) for report, _ in tried]
    close = [pair for pair, median in zip(tried, medians) if median <= 1.05 * min(medians)]
    if all("step_bytes" in report for report, _ in close):
        return min(close, key=lambda pair: pair[0]["step_bytes"])
    return tried[medians.index(min(medians))]


def alternate(
    sides: Sequence[tuple[Program, Mapping[str, Any]]], dtypes: Sequence[str], rounds: int, python: str
) -> list[Side]:
    """Run the sides in turn, `rounds` times.

    The first round tries every allocator and dtype for each side; the later ones keep what was best for it (`best_of`),
    and the result holds the repetitions of that alone. On a CPU that emulates bfloat16 it is not tried beside another.
    """
    threads = compute_threads()
    variants = [(f"{name}, {dtype}", env, dtype) for name, env in allocators().items() for dtype in dtypes]
    first: list[list[tuple[dict[str, Any], tuple[str, dict[str, str], str]]]] = [[] for _ in sides]
    for variant in variants:
        emulated = bool(first[0]) and first[0][0][0]["device"] == "cpu" and not cpu_multiplies_bfloat16()
        if emulated and variant[2] == "bfloat16" != dtypes[0]:
            continue
        for tried, (program, job) in zip(first, sides):
            report = launch(program, {**job, "dtype": variant[2], "threads": threads}, variant[1], python)
            tried.append((report, variant))
    best = [best_of(tried) for tried in first]
    seconds = [list(report["seconds"]) for report, _ in best]
    for _ in range(rounds - 1):
        for collected, (_, variant), (program, job) in zip(seconds, best, sides):
            full = {**job, "dtype": variant[2], "threads": threads}
            collected += launch(program, full, variant[1], python)["seconds"]
    return [
        Side(
            tuple(s),
            r["first"],
            variant[0],
            r["parameters"],
            r["device"],
            r["versions"],
            r.get("limit_share"),
            r.get("step_bytes"),
            r.get("facts", {}),
            tuple(r.get("tokens", ())),
        )
        for s, (r, variant) in zip(seconds, best)
    ]
