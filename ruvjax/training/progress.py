"""Progress of a run on stderr: a live bar on a terminal, one plain line per log elsewhere. stdout is never written."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SMOOTHING = 0.3  # weight of the newest interval in the shown rates


@dataclass(frozen=True)
class Display:
    """What a loop reports to. `log(step, metrics)` after each logged step; `note(text)` for a line of its own.

    `metrics` may hold `loss` (nats per token) and whatever else the loop logs; `compile_s` (seconds), `tokens_per_s`
    and `total_steps` (a plan that changed) are taken from it where given. Rates are measured between calls; the time
    before the first call holds the compilation and counts for no rate.
    """

    log: Callable[[int, Mapping[str, Any]], None]
    note: Callable[[str], None]


@dataclass
class _Clock:
    total: int
    step: int
    tokens_per_step: int
    started: float = field(default_factory=lambda: time.monotonic())
    seen: float | None = None
    steps_per_s: float = 0.0
    compile_s: float | None = None

    def tick(self, step: int, metrics: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self.total = int(metrics.get("total_steps") or self.total)
        if metrics.get("compile_s") is not None:
            self.compile_s = float(metrics["compile_s"])
        elif self.seen is None and self.compile_s is None:
            self.compile_s = now - self.started
        if self.seen is not None and step > self.step and now > self.seen:
            rate = (step - self.step) / (now - self.seen)
            self.steps_per_s = (
                rate if not self.steps_per_s else self.steps_per_s + SMOOTHING * (rate - self.steps_per_s)
            )
        self.seen, self.step = now, max(step, self.step)


@contextlib.contextmanager
def show_progress(
    total_steps: int,
    tokens_per_step: int = 0,
    start_step: int = 0,
    label: str = "train",
    console: Console | None = None,
) -> Iterator[Display]:
    """Show the progress of a loop that ends at `total_steps` (0: not known yet), until the block is left.

    `console` is where to (default: stderr); its being a terminal decides between the bar and plain lines.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    clock = _Clock(total_steps, start_step, tokens_per_step)
    if not console.is_terminal:
        yield _plain_display(clock, label, console)
        return
    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[status]}"))
    # stdout stays as it is: its last line is the path of summary.json
    with Progress(*columns, console=console, expand=True, redirect_stdout=False, transient=False) as bar:
        task = bar.add_task(label, total=total_steps or None, completed=start_step, status="compiling")

        def log(step: int, metrics: Mapping[str, Any]) -> None:
            clock.tick(step, metrics)
            bar.update(task, completed=step, total=clock.total or None, status=_status(clock, step, metrics))

        yield Display(log, lambda text: bar.console.print(text, markup=False, highlight=False))


def _plain_display(clock: _Clock, label: str, console: Console) -> Display:
    def log(step: int, metrics: Mapping[str, Any]) -> None:
        clock.tick(step, metrics)
        note(f"{label} {_status(clock, step, metrics)}")

    def note(text: str) -> None:
        print(text, file=console.file, flush=True)

    return Display(log, note)


def _status(clock: _Clock, step: int, metrics: Mapping[str, Any]) -> str:
    """One line such as `120/1000 | loss 3.2140 | 11.2 steps/s | 45.9k tokens/s | 1:18 left | compile 6.1 s`."""
    parts = [f"{step}/{clock.total}" if clock.total else f"{step}"]
    if metrics.get("loss") is not None:
        parts.append(f"loss {float(metrics['loss']):.4f}")
    if clock.steps_per_s:
        rate = clock.steps_per_s
        parts.append(f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step")
    tokens = metrics.get("tokens_per_s") or clock.steps_per_s * clock.tokens_per_step
    if tokens:
        parts.append(f"{_short(float(tokens))} tokens/s")
    if clock.steps_per_s and step < clock.total:
        parts.append(f"{_duration((clock.total - step) / clock.steps_per_s)} left")
    if clock.compile_s is not None:
        parts.append(f"compile {clock.compile_s:.1f} s")
    return " | ".join(parts)


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
