"""The part of a training run that every task shares: resuming, the live bar, metrics.jsonl, trackers, the loop."""

import time
from collections.abc import Callable
from pathlib import Path

import jax

from experiments import wiring
from experiments.settings import Launch, Run
from experiments.terminal import logger, note
from ruvjax.training.checkpoint import saved_steps
from ruvjax.training.loop import Batches, Fit, TrainerConfig, fit
from ruvjax.training.progress import show_progress
from ruvjax.training.runfolder import RunFolder
from ruvjax.training.state import TrainState
from ruvjax.training.step import Step
from ruvjax.training.trackers import open_trackers


def fit_state(
    run: Run,
    trainer: TrainerConfig,
    launch: Launch,
    folder: RunFolder,
    state: TrainState,
    step: Step,
    batches: Batches,
    evaluate: Callable[[TrainState], dict[str, float]],
    *,
    tokens_per_step: int,
    mesh: jax.sharding.Mesh | None,
    started: float,
) -> Fit:
    """Train from `state`, or go on where the run's newest checkpoint ends. `started` is when the verb began."""
    shared = Path(run.dir).absolute() if run.dir and jax.process_count() > 1 else folder.path
    steps = saved_steps(shared)
    first = steps[-1] if steps and trainer.resume == "auto" else 0
    if first:
        folder.truncate(first)
        note(f"resuming after step {first}")
    tracker = open_trackers(run.trackers, folder.path, "ruvjax", folder.path.name, launch.config)
    try:
        with show_progress(trainer.steps, tokens_per_step, first) as display:
            return fit(
                state,
                step,
                batches,
                config=trainer,
                run_dir=shared,
                on_log=logger(folder, display, tracker),
                evaluate=evaluate,
                sharding=wiring.batch_layout(mesh),
                elapsed=time.monotonic() - started,
            )
    finally:
        tracker.close()
