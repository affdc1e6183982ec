"""The training loop: dispatches steps, keeps time, checkpoints, and stops cleanly whatever happens.

Step n is dispatched before the metrics of step n-1 are fetched, so the device never waits for Python.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from ruvjax.core.files import write_json
from ruvjax.errors import ConfigError, InputError, RunError, RuvjaxError
from ruvjax.training.checkpoint import Checkpoints, latest, restore, save_once
from ruvjax.training.state import TrainState, laid_out
from ruvjax.training.step import Step, compile_step

UNPLANNED = 2**30  # `total` of a run that has not measured its speed yet: far away, so the rate stays at its peak
MEASURED_STEPS = 10  # a plan rests on at least so many steps
MEASURED_SHARE = 0.02  # and on this share of the time budget


@runtime_checkable
class Batches(Protocol):
    """An endless source of batches that can tell and take back its position (JSON values)."""

    def __next__(self) -> Any: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class Interrupted(RuvjaxError):
    """SIGINT or SIGTERM arrived; the step was finished and a checkpoint written. `code` is 130 or 143."""

    def __init__(self, code: int, step: int):
        name = {130: "SIGINT", 143: "SIGTERM"}[code]
        super().__init__(f"{name} after step {step}; checkpoint saved", "continue with trainer.resume=auto")
        self.code = self.exit_code = code


@dataclass(frozen=True)
class TrainerConfig:
    """How long to train and what to do along the way.

    steps: number of updates. 0 plans it from `max_seconds`, which counts from the start of the verb, compilation
        included, and leaves `reserve_seconds` for what follows training; `max_seconds` has no effect otherwise.
    checkpoint_every, eval_every: in updates; 0 for none along the way (a last checkpoint is always written).
    log_every: updates per log record. accumulation: micro-batches per update.
    flat: end where the held-out loss of an evaluation is not lower than the one before by at least this share of it (0:
        go on to the planned end). The learning rate still follows the plan.
    resume: "auto" continues from the newest checkpoint of the run folder, or starts where there is none; "never"
        starts, and refuses a folder that already holds checkpoints.
    """

    steps: int = 0
    max_seconds: float = 300.0
    reserve_seconds: float = 30.0
    checkpoint_every: int = 500
    eval_every: int = 0
    log_every: int = 10
    keep_checkpoints: int = 2
    accumulation: int = 1
    flat: float = 0.0
    resume: str = "never"

    def __post_init__(self):
        least = {
            "steps": 0,
            "checkpoint_every": 0,
            "eval_every": 0,
            "log_every": 1,
            "keep_checkpoints": 1,
            "accumulation": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"trainer.{name}={value!r} must be an integer of at least {low}")
        for name in ("max_seconds", "reserve_seconds"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ConfigError(f"trainer.{name}={value!r} must be a number of seconds, at least 0")
        if not isinstance(self.flat, (int, float)) or isinstance(self.flat, bool) or not 0 <= self.flat < 1:
            raise ConfigError(f"trainer.flat={self.flat!r} must be a share of the loss, from 0 to below 1")
        if self.flat and not self.eval_every:
            raise ConfigError(f"trainer.flat={self.flat} compares evaluations", "set trainer.eval_every")
        if self.resume not in ("auto", "never"):
            raise ConfigError(f"trainer.resume={self.resume!r} is not known", "one of auto, never")
        if not self.steps and self.max_seconds <= self.reserve_seconds:
            raise ConfigError(
                f"trainer.steps=0 and trainer.max_seconds={self.max_seconds!r} leave no time to train beside "
                f"trainer.reserve_seconds={self.reserve_seconds!r}",
                "set trainer.steps, or more trainer.max_seconds",
            )


@dataclass(frozen=True)
class Fit:
    """What `fit` returns.

    steps: updates of this process. tokens: of the whole run. tokens_per_s, compile_s, train_s: of this process; train_s
    leaves out compilation, evaluation and waiting for checkpoints. resumed_from: step of the checkpoint continued from.
    """

    state: TrainState
    steps: int
    tokens: float
    tokens_per_s: float
    compile_s: float
    train_s: float
    resumed_from: int | None


def fit(
    state: TrainState,
    step: Step,
    batches: Batches,
    *,
    config: TrainerConfig,
    run_dir: Path,
    on_log: Callable[[dict[str, Any]], None],
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    sharding: Sharding | None = None,
    elapsed: float = 0.0,
) -> Fit:
    """Train from `state` (or the newest checkpoint) to the planned number of steps, and checkpoint there.

    step: from `make_step`, not jitted; its optimiser state and the buffers of `state` are donated: do not use the
    `state` passed in afterwards. on_log: gets one flat record per `log_every` updates ("kind": "train") and per
    evaluation ("kind": "eval"). evaluate: returns named numbers; must not keep references to the state's arrays.
    sharding: how a batch's first axis lies over devices; None for one device. elapsed: seconds of `max_seconds` that
    were used before the call.

    Raises Interrupted after a signal, RunError where the loss or gradient is not finite (the offending batch and the
    state before it are in `run_dir/nan/<step>`) or a checkpoint cannot be written, InputError where the checkpoint to
    resume from is damaged or foreign, or where `resume` is "never" and there is one.
    """
    run_dir = Path(run_dir)
    newest = latest(run_dir)
    if newest is not None and config.resume == "never":
        raise InputError(
            f"{run_dir} already holds checkpoints", "continue it with trainer.resume=auto, or set another run.dir"
        )
    resumed_from, before = None, {"tokens": 0.0, "revisions": [], "held_out": 0.0}
    if newest is not None:
        state, before = restore(newest, state)
        batches.set_state(before["data"])
        resumed_from = int(state.step)
    if config.steps:
        state = _with_total(state, config.steps)
    elif resumed_from is None:
        state = _with_total(state, UNPLANNED)
    checkpoints = Checkpoints(run_dir, config.keep_checkpoints)
    try:
        with _signals() as caught:
            run = _Run(config, run_dir, on_log, time.monotonic() - elapsed, int(state.step), int(state.total))
            run.tokens, run.revisions = before["tokens"], before["revisions"]
            run.held_out = before.get("held_out", 0.0)
            state = _steps(state, step, batches, run, checkpoints, caught, evaluate, sharding)
        with run.pause():
            _save(checkpoints, state, batches, run)
            checkpoints.wait()
    finally:
        checkpoints.close()
    if run.done < run.total:
        raise Interrupted(caught[0], run.done)
    rate = (run.tokens - before["tokens"]) / run.train_s if run.done > run.first else 0.0
    return Fit(state, run.done - run.first, run.tokens, rate, run.compile_s, run.train_s, resumed_from)


@dataclass
class _Run:
    """The host's view of a run in progress: counters, clocks and the plan."""

    config: TrainerConfig
    run_dir: Path
    on_log: Callable[[dict[str, Any]], None]
    start: float  # of the verb, on the monotonic clock
    first: int  # step at which this process began
    total: int
    done: int = field(init=False)  # steps whose metrics have arrived
    tokens: float = 0.0
    compile_s: float = 0.0
    paused_s: float = 0.0  # evaluation and waiting for checkpoints, since `ready`
    ready: float = 0.0  # when the compiled step was first called
    window: list[dict[str, float]] = field(default_factory=list)  # metrics since the last log
    window_start: float = 0.0  # train_s at the last log
    revisions: list[dict[str, float]] = field(default_factory=list)
    held_out: float = 0.0  # the loss of the last evaluation, 0 before the first

    def __post_init__(self):
        self.done = self.first

    @property
    def train_s(self) -> float:
        """Seconds since the compiled step was first called, less pauses."""
        return time.monotonic() - self.ready - self.paused_s if self.ready else 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.paused_s += time.monotonic() - began


def _steps(state, step, batches, run: _Run, checkpoints, caught, evaluate, sharding) -> TrainState:
    """Dispatch steps until the plan is fulfilled or a signal arrives; everything dispatched is settled on return."""
    config, dispatched, pending = run.config, run.first, None
    compiled = None
    while dispatched < run.total and not caught:
        batch = _place(batches, sharding)
        if compiled is None:
            began = time.monotonic()
            compiled = compile_step(step, state, batch)
            run.ready = time.monotonic()
            run.compile_s = run.ready - began
        state, metrics = compiled(state, batch)
        dispatched += 1
        if pending is not None:
            state = _settle(state, *pending, run)
        pending = (batch, metrics)
        due = [every and dispatched % every == 0 for every in (config.eval_every, config.checkpoint_every)]
        if any(due) or dispatched >= run.total:
            state, pending = _settle(state, *pending, run), None
        if due[0] and evaluate is not None:
            with run.pause():
                found = evaluate(state)
                run.on_log({"kind": "eval", "step": dispatched, **found})
            if config.flat and 0 < (1 - config.flat) * run.held_out < found["eval_loss"]:
                run.total = run.done
            run.held_out = found.get("eval_loss", 0.0)
        if due[1] and dispatched < run.total:
            with run.pause():
                _save(checkpoints, state, batches, run)
    return state if pending is None else _settle(state, *pending, run)


def _save(checkpoints: Checkpoints, state: TrainState, batches: Batches, run: _Run) -> None:
    progress = {"tokens": run.tokens, "revisions": run.revisions, "held_out": run.held_out}
    checkpoints.save(state, {**progress, "data": batches.get_state()})


def _place(batches: Batches, sharding: Sharding | None) -> Any:
    try:
        batch = next(batches)
    except StopIteration as error:
        raise RunError(
            "the data ran out before the last step", "training needs an endless source of batches"
        ) from error
    if sharding is None:
        return jax.device_put(batch)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def _settle(state: TrainState, batch: Any, metrics: dict[str, jax.Array], run: _Run) -> TrainState:
    """Fetch the metrics of one step; stop the run where they are not finite; log; keep the plan."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not values.pop("finite"):
        raise _not_finite(state, batch, values, run)
    run.done += 1
    run.tokens += values["tokens"]
    run.window.append(values)
    if run.done % run.config.log_every == 0 or run.done == run.total:
        _log(run)
    return state if run.config.steps else _plan(state, run)


def _log(run: _Run) -> None:
    """One record: means over the window, weighted by tokens; rates without compilation and evaluation."""
    now = run.train_s
    weights = np.array([values["tokens"] for values in run.window])
    shares = weights / max(weights.sum(), 1.0)
    names = [name for name in run.window[0] if name not in ("tokens", "loss_sum")]
    means = {name: float(shares @ [values[name] for values in run.window]) for name in names}
    seconds = max(now - run.window_start, 1e-9)
    run.on_log(
        {
            "kind": "train",
            "step": run.done,
            **means,
            "lr": run.window[-1]["lr"],
            "tokens": run.tokens,
            "tokens_per_s": float(weights.sum()) / seconds,
            "steps_per_s": len(run.window) / seconds,
            "total_steps": run.total if run.total != UNPLANNED else 0,
            "elapsed_s": time.monotonic() - run.start,
            "compile_s": run.compile_s,
        }
    )
    run.window.clear()
    run.window_start = now


def _plan(state: TrainState, run: _Run) -> TrainState:
    """Fix the number of steps once the speed is known; later only lower it, where the run would overrun its budget."""
    config, now = run.config, time.monotonic()
    left = config.max_seconds - config.reserve_seconds - (now - run.start)
    measured, steps = now - run.ready, run.done - run.first
    enough = steps >= MEASURED_STEPS and measured >= MEASURED_SHARE * config.max_seconds
    if left > 0 and not enough:
        return state
    total = run.done + max(1, int(left / (measured / steps)))  # 1: a step may be on its way already
    if total >= run.total or (run.revisions and run.done % config.log_every):
        return state
    run.total = total
    run.revisions.append({"after_step": run.done, "total_steps": total, "step_seconds": measured / steps})
    if jax.process_index() == 0:
        budget = {"max_seconds": config.max_seconds, "reserve_seconds": config.reserve_seconds}
        plan = {"format": 1, "total_steps": total, **budget, "revisions": run.revisions}
        write_json(run.run_dir / "plan.json", plan)
    return _with_total(state, total)


def _with_total(state: TrainState, total: int) -> TrainState:
    return replace(state, total=laid_out(jnp.int32(total), state.total.sharding))


def _not_finite(state: TrainState, batch: Any, values: dict[str, float], run: _Run) -> RunError:
    """Save what is needed to look into it. The state took no update since the offending batch."""
    folder = run.run_dir / "nan" / str(run.done)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    arrays: dict[str, Any] = {jax.tree_util.keystr(path).strip("."): np.asarray(leaf) for path, leaf in leaves}
    np.savez(folder / "batch.npz", **arrays)
    save_once(folder / "state", state)
    shown = {name: value if np.isfinite(value) else str(value) for name, value in values.items()}
    write_json(folder / "metrics.json", {"format": 1, "after_step": run.done, **shown})
    return RunError(
        f"loss {values['loss']:g} or gradient norm {values['grad_norm']:g} is not finite in the update after step "
        f"{run.done}; batch and state are in {folder}",
        "lower optimizer.lr, set optimizer.clip, or look at the batch",
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the exit code of the first SIGINT or SIGTERM; a second one acts as if this were not here."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, frame: Any) -> None:
        caught.append(128 + number)
        put_back()

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        put_back()
