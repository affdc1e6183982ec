"""What this machine offers, and which body of each kernel op runs here and why: `python -m experiments.doctor`."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import wiring
from experiments.kernel_choice import kernel_rows
from experiments.runner import main
from experiments.settings import Doctor, Launch
from ruvjax.core import allocator, backend
from ruvjax.data.sources import SPLITS
from ruvjax.errors import RuvjaxError
from ruvjax.training.provenance import collect_provenance

EXTRAS = {
    "hub": "datasets",
    "gguf": "gguf",
    "trackers": "tensorboard",
    "sweep": "optuna",
    "serve": "fastapi",
    "parity": "torch",
    "notebook": "nbclient",
}
Rows = list[tuple[str, str]]


def run(job: Doctor, launch: Launch) -> Path:
    """Print the findings; returns the path of summary.json. Raises BackendError for a backend that cannot run here."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend)
    sections = {
        "Python": python_rows(),
        "Devices": device_rows(),
        "Allocator": allocator_rows(),
        "Kernels": kernel_rows(job.kernels.attention_impl),
        "Data": data_rows(job),
        "Disk": disk_rows(Path(job.run.dir or job.run.root)),
    }
    console = Console(width=None if sys.stdout.isatty() else 120)
    for title, rows in sections.items():
        console.print(_table(title, rows))
    with launch.folder(job.run) as folder:
        folder.write_provenance(collect_provenance({}, vars(allocator.report())))
        found: dict[str, Any] = {title.lower(): dict(rows) for title, rows in sections.items()}
        return folder.finish("done", found, time.monotonic() - started)


def _table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def python_rows() -> Rows:
    found = backend.report()
    extras = [name for name, module in EXTRAS.items() if _installed(module)]
    return [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("jax", f"{found.jax}, jaxlib {found.jaxlib}"),
        ("extras", ", ".join(extras) or "none"),
    ]


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def device_rows() -> Rows:
    found = backend.report()
    rows = [("backend", found.backend), ("processes", f"{found.process_id + 1} of {found.process_count}")]
    for device in found.devices:
        memory = f", {device.memory / 2**30:.1f} GiB" if device.memory else ""
        rows.append((f"device {device.id}", f"{device.kind} ({device.platform}){memory}"))
    rows.append(("compute threads", str(found.compute_threads)))
    rows.append(("XLA flags", found.xla_flags or "none"))
    rows += [(f"no {kind}", reason) for kind, reason in found.unavailable]
    return rows


def allocator_rows() -> Rows:
    found = allocator.report()
    return [
        ("malloc", found.allocator),
        ("tuned", ", ".join(found.applied) or "nothing changed"),
        ("from the environment", ", ".join(found.kept) or "nothing"),
        ("huge pages", f"{found.huge_pages}, {found.huge_bytes / 2**20:.0f} MiB in use"),
        ("note", found.note or "none"),
    ]


def data_rows(job: Doctor) -> Rows:
    """The configured corpus by split, or why it cannot be read."""
    try:
        splits = job.data.splits()
    except RuvjaxError as error:
        return [(type(job.data).__name__, error.line())]
    sizes = [
        f"{split} {len(splits[split])} documents, {sum(len(d.data) for d in splits[split]) / 1e6:.2f} MB"
        for split in SPLITS
    ]
    return [(type(job.data).__name__, "; ".join(sizes))]


def disk_rows(folder: Path) -> Rows:
    """Free space where runs are kept, and whether they can be written."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    writable = "writable" if os.access(place, os.W_OK) else "NOT writable"
    return [(str(folder), f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f} GiB, {writable}")]


if __name__ == "__main__":
    sys.exit(main("doctor", run))
