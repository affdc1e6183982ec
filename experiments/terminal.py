"""Lines for the reader of the terminal. They go to stderr: stdout is kept for results and the path of summary.json."""

import sys
from collections.abc import Callable
from typing import Any

from ruvjax.training.runfolder import RunFolder


def note(text: str) -> None:
    """Print one line on stderr."""
    print(text, file=sys.stderr, flush=True)


def logger(folder: RunFolder, display: Any, tracker: Any) -> Callable[[dict[str, Any]], None]:
    """What the loop reports to: metrics.jsonl, the terminal, the trackers."""

    def log(record: dict[str, Any]) -> None:
        folder.log(record)
        tracker.log(record["step"], record)
        if record["kind"] == "train":
            display.log(record["step"], record)
        else:
            values = ", ".join(f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float))
            display.note(f"step {record['step']}: {values}")

    return log
