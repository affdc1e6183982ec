"""Measure ours against peers: `python -m experiments.bench name=diffusion [peer.path=DIR] [peer.python=PATH]`.

    name         which benchmark: banks, decode, diffusion, kernels, mamba, trm
    rows         only these rows, separated by commas (default: all; the file then keeps the other rows it had)
    rounds       how often the sides take turns (default 3)
    peer.path    a checkout of the peer that has to be imported from one (tiny-diffusion, TinyRecursiveModels)
    peer.python  the interpreter that has torch and transformers (default: this one; the extra `parity` brings both)

Each side runs in a process of its own, in turn, with its best allocator; compile time is apart; medians are compared.
It writes experiments/bench/results/<device>/<name>.json, whose path is the last line on stdout.
"""

import json
import re
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.bench.measure import Side, alternate, available, launch
from experiments.bench.rows import MAKE, Row, diffusion
from experiments.bench.rows_banks import banks
from experiments.bench.rows_decode import decode
from experiments.bench.rows_kernels import kernels
from experiments.bench.rows_mamba import mamba
from experiments.bench.rows_trm import trm
from experiments.build import nearest
from ruvjax.core.backend import compute_threads
from ruvjax.core.files import write_json
from ruvjax.errors import ConfigError, RunError, RuvjaxError

BENCHMARKS = {
    "banks": banks,
    "decode": decode,
    "diffusion": diffusion,
    "kernels": kernels,
    "mamba": mamba,
    "trm": trm,
}
RESULTS = Path(__file__).resolve().parent / "results"
# Told beside the table where a row has them.
FACTS = re.compile(
    "same_tokens|(ours|theirs)_(weight_bytes|accuracy|passes_per_token|recall_.*|p[0-9]+_ms_.*|step_ms.*|.*bank_bytes)"
)
USAGE = "usage: python -m experiments.bench name=NAME [rows=A,B] [rounds=3] [peer.path=DIR] [peer.python=PATH]"


@dataclass(frozen=True)
class Job:
    """The command line. Raises ConfigError."""

    name: str
    rows: tuple[str, ...] = ()
    rounds: int = 3
    path: str = ""
    python: str = sys.executable

    def __post_init__(self):
        if self.name not in BENCHMARKS:
            raise ConfigError(f"name={self.name!r} is no benchmark", nearest(self.name, BENCHMARKS))
        known = [row.name for row in BENCHMARKS[self.name]()]
        for row in self.rows:
            if row not in known:
                raise ConfigError(f"rows: {row!r} is no row of {self.name}", nearest(row, known))


def parse(arguments: list[str]) -> Job:
    """The job that `key=value` arguments describe."""
    known = ("name", "rows", "rounds", "peer.path", "peer.python")
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise ConfigError(f"{argument!r} is not key=value", USAGE)
        if key not in known:
            raise ConfigError(f"{key} is not a setting of bench", nearest(key, known))
        values[key] = value
    if "name" not in values:
        raise ConfigError("name is missing", f"one of {', '.join(BENCHMARKS)}")
    rounds = values.get("rounds", "3")
    if not re.fullmatch("[1-9][0-9]?", rounds):
        raise ConfigError(f"rounds={rounds} must be a whole number from 1 to 99")
    rows = tuple(values["rows"].split(",")) if "rows" in values else ()
    return Job(
        values["name"], rows, int(rounds), values.get("peer.path", ""), values.get("peer.python", sys.executable)
    )


def prepared(row: Row, scratch: Path, console: Console) -> dict[str, str]:
    """What both sides are told of the files that they read, which are made for the first row that asks for them."""
    if not row.prepare:
        return {}
    folder = scratch / row.prepare["make"]
    if not folder.exists():
        console.print(f"making the files of {row.name} ...", markup=False)
        folder.mkdir()
        launch(MAKE, {**row.prepare, "work": "make", "folder": str(folder)}, {}, sys.executable)
    return {"folder": str(folder)}


def measure(row: Row, job: Job, console: Console, files: Mapping[str, str] = {}) -> tuple[dict[str, Any], Side]:
    """One row of the result file, and our side of it. `theirs` is None where the peer cannot run here."""
    missing = available(row.peer, job.python, job.path)
    if missing:
        console.print(f"{row.name}: {row.peer.title} is not run: {missing}", style="yellow", markup=False)
    sides = [(row.program, {**row.job, **row.ours, **files})]
    if not missing:
        sides.append((row.peer, {**row.job, **row.theirs, **files, "path": job.path}))
    measured = alternate(sides, row.dtypes, job.rounds, job.python)
    rates = [row.tokens / side.median for side in measured]
    ours, theirs = measured[0], measured[1] if not missing else None
    if theirs is not None and ours.device != theirs.device:
        raise RunError(f"{row.name}: ours ran on {ours.device}, {row.peer.title} on {theirs.device}")
    record = {
        "name": row.name,
        "ours": rates[0],
        "theirs": None if theirs is None else rates[1],
        "unit": row.unit,
        "peer": row.peer.title,
        "ratio": None if theirs is None else rates[0] / rates[1],
        "limit_share": ours.limit_share,
        "ours_peak_bytes": ours.peak_bytes,
        "theirs_peak_bytes": None if theirs is None else theirs.peak_bytes,
        "ours_settings": ours.settings,
        "ours_parameters": ours.parameters,
        "ours_compile_s": ours.compile_seconds,
        "theirs_settings": None if theirs is None else theirs.settings,
        "theirs_parameters": None if theirs is None else theirs.parameters,
        "theirs_versions": None if theirs is None else dict(theirs.versions),
        "repetitions": [len(side.seconds) for side in measured],
    }
    for side, found in zip(("ours", "theirs"), measured):
        record |= {f"{side}_{name}": value for name, value in found.facts.items()}
    if theirs is not None and ours.tokens and theirs.tokens:
        record["same_tokens"] = sum(a == b for a, b in zip(ours.tokens, theirs.tokens)) / len(ours.tokens)
    return record, ours


def slug(device: str) -> str:
    """The folder of a device's results: cpu-2 for a CPU of two threads, nvidia-h200."""
    if device == "cpu":
        return f"cpu-{compute_threads()}"
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def keep(path: Path, result: dict[str, Any], order: list[str]) -> None:
    """Write the rows just measured, beside the rows that were measured before and not now."""
    rows = {row["name"]: row for row in result["rows"]}
    if path.is_file():
        rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]} | rows
    kept = [rows[name] for name in order if name in rows]
    write_json(path, {**result, "rows": kept})


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("row", "ours", "theirs", "unit", "ratio", "peer", "our settings", "their settings")
    for row in rows:
        digits = 0 if row["unit"] == "tokens/s" else 3
        theirs = "-" if row["theirs"] is None else f"{row['theirs']:,.{digits}f}"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        settings = (row["ours_settings"], row["theirs_settings"] or "-")
        facts = [f"{name} {row[name]:,.3f}".removesuffix(".000") for name in row if FACTS.fullmatch(name)]
        if facts:
            console.print(f"{row['name']}: {', '.join(facts)}", markup=False)
        table.add_row(row["name"], f"{row['ours']:,.{digits}f}", theirs, row["unit"], ratio, row["peer"], *settings)
    console.print(table)


def run(job: Job, console: Console) -> Path:
    rows = BENCHMARKS[job.name]()
    records: list[dict[str, Any]] = []
    path = None
    with tempfile.TemporaryDirectory(prefix="ruvjax-bench-") as scratch:
        for row in rows:
            if job.rows and row.name not in job.rows:
                continue
            console.print(f"{row.name} ...", markup=False)
            record, ours = measure(row, job, console, prepared(row, Path(scratch), console))
            records.append(record)
            path = RESULTS / slug(ours.device) / f"{job.name}.json"
            result = {"format_version": 1, "device": path.parent.name, "versions": dict(ours.versions), "rows": records}
            keep(path, result, [row.name for row in rows])  # after each row: the benchmark takes minutes
    show(records, console)
    assert path is not None
    return path


def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        path = run(parse(arguments), Console(stderr=True, width=None if sys.stderr.isatty() else 160))
    except RuvjaxError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
