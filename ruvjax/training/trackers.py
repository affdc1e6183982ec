"""Optional trackers beside metrics.jsonl: tensorboard, wandb (offline) and mlflow (SQLite) in the run's folder, unless
WANDB_MODE=online or MLFLOW_TRACKING_URI say otherwise, and trackio in its own store, where its dashboard looks.

A tracker is a pair of functions. One that breaks says so once on stderr and is left out from there on: a tracker never
ends a run.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruvjax.errors import ConfigError

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True)
class Tracker:
    """`log(step, metrics)` records numbers (anything else in `metrics` is left out); `close()` ends the record."""

    log: Callable[[int, Mapping[str, Any]], None]
    close: Callable[[], None]


def open_trackers(names: Sequence[str], run_dir: Path, project: str, run: str, config: Mapping[str, Any]) -> Tracker:
    """One tracker that feeds all of `names`; with no names it does nothing.

    Raises ConfigError for a name that is not known and for one whose package is not installed.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ConfigError(f"tracker {unknown[0]!r} is not known", "one of " + ", ".join(TRACKERS))
    opened: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some greet on stdout, whose last line is the summary's path
                opened[name] = _OPEN[name](run_dir, project, run, config)
        except ImportError as error:
            raise ConfigError(
                f"tracker {name} is not installed: {error}", "install the extra ruvjax[trackers]"
            ) from error
        except Exception as error:
            _drop(name, error)

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in metrics.items() if _is_number(value)}
        for name in list(opened):
            try:
                opened[name].log(step, numbers)
            except Exception as error:
                del opened[name]
                _drop(name, error)

    def close() -> None:
        for name in list(opened):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    opened.pop(name).close()
            except Exception as error:
                _drop(name, error)

    return Tracker(log, close)


def _drop(name: str, error: Exception) -> None:
    reason = (str(error).strip().splitlines() or [""])[0]
    print(f"tracker {name} stopped: {type(error).__name__}: {reason} (the run goes on)", file=sys.stderr, flush=True)


def _is_number(value: Any) -> bool:
    return (
        not isinstance(value, (str, bytes, bool, type(None)))
        and getattr(value, "ndim", 0) == 0
        and hasattr(value, "__float__")
    )


def _tensorboard(run_dir: Path, project: str, run: str, config: Mapping[str, Any]) -> Tracker:
    # The writer of the tensorboard package itself: the usual SummaryWriter comes with torch or tensorflow.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(run_dir / "tensorboard"))

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        values = [Summary.Value(tag=key, simple_value=value) for key, value in metrics.items()]
        writer.add_event(Event(step=step, summary=Summary(value=values)))

    return Tracker(log, writer.close)


def _wandb(run_dir: Path, project: str, run: str, config: Mapping[str, Any]) -> Tracker:
    import wandb

    mode = "online" if os.environ.get("WANDB_MODE") == "online" else "offline"  # nothing leaves the machine unasked
    record = wandb.init(
        project=project,
        name=run,
        dir=str(run_dir),
        config=dict(config),
        mode=mode,
        settings=wandb.Settings(console="off", silent=True),
    )
    return Tracker(lambda step, metrics: record.log(dict(metrics), step=step), record.finish)


def _mlflow(run_dir: Path, project: str, run: str, config: Mapping[str, Any]) -> Tracker:
    from mlflow.tracking import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(project)
    experiment = found.experiment_id if found else client.create_experiment(project)
    record = client.create_run(experiment, run_name=run).info.run_id

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        for key, value in metrics.items():
            client.log_metric(record, key, value, step=step)

    return Tracker(log, lambda: client.set_terminated(record))


def _trackio(run_dir: Path, project: str, run: str, config: Mapping[str, Any]) -> Tracker:
    import trackio

    trackio.init(project=project, name=run, config=dict(config), embed=False)
    return Tracker(lambda step, metrics: trackio.log(dict(metrics), step=step), trackio.finish)


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
