"""The loop: exact resumption, signals, the guard's report, planning by time, records."""

import json
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.params import shardings
from ruvjax.core.sharding import RULES, MeshConfig, batch_sharding, make_mesh
from ruvjax.errors import ConfigError, InputError, RunError
from ruvjax.training import loop
from ruvjax.training.checkpoint import latest, saved_steps
from ruvjax.training.loop import Interrupted, TrainerConfig


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    batches = toy.Batches()
    result = toy.train(tmp_path_factory.mktemp("whole"), batches, steps=10)
    return toy.digests(result.state), batches.position


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(toy, tmp_path, uninterrupted):
    class Stop(Exception):
        pass

    class Failing(toy.Batches):
        def __next__(self):
            if self.position == 7:
                raise Stop
            return super().__next__()

    with pytest.raises(Stop):
        toy.train(tmp_path, Failing(), steps=10, checkpoint_every=3)
    assert saved_steps(tmp_path) == [3, 6]
    batches = toy.Batches()
    result = toy.train(tmp_path, batches, steps=10, checkpoint_every=3, resume="auto")
    assert (result.resumed_from, result.steps) == (6, 4)
    assert (toy.digests(result.state), batches.position) == uninterrupted
    again = toy.train(tmp_path, toy.Batches(), steps=10, resume="auto")
    assert (again.resumed_from, again.steps, again.tokens_per_s) == (10, 0, 0.0)
    assert again.tokens == result.tokens > 0
    assert toy.digests(again.state) == uninterrupted[0]


def test_a_resumed_run_with_another_data_position_differs(toy, tmp_path, uninterrupted):
    class Forgetful(toy.Batches):
        def set_state(self, state):
            pass

    toy.train(tmp_path, steps=6)
    result = toy.train(tmp_path, Forgetful(), steps=10, resume="auto")
    assert toy.digests(result.state)["params"] != uninterrupted[0]["params"]


def test_a_run_folder_in_use_is_not_trained_over(toy, tmp_path):
    toy.train(tmp_path, steps=1)
    with pytest.raises(InputError, match="already holds checkpoints") as caught:
        toy.train(tmp_path, steps=2)
    assert "trainer.resume=auto" in caught.value.hint
    assert toy.train(tmp_path / "new", steps=1, resume="auto").resumed_from is None


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_so(toy, tmp_path, uninterrupted, number, code):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def log(record):
        if record["step"] == 4:
            signal.raise_signal(number)

    with pytest.raises(Interrupted, match="checkpoint saved") as caught:
        toy.train(tmp_path, on_log=log, steps=10)
    assert (caught.value.code, caught.value.exit_code) == (code, code)
    assert "trainer.resume=auto" in caught.value.hint
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    (step,) = saved_steps(tmp_path)
    assert 4 <= step <= 6  # the step in flight and the one after may have been dispatched
    result = toy.train(tmp_path, steps=10, resume="auto")
    assert toy.digests(result.state) == uninterrupted[0]


def test_a_second_signal_is_not_swallowed(toy, tmp_path):
    def log(record):
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            toy.train(tmp_path, on_log=log, steps=10)
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_runs_off_the_main_thread(toy, tmp_path):
    steps = []
    thread = threading.Thread(target=lambda: steps.append(toy.train(tmp_path, steps=2).steps))
    thread.start()
    thread.join()
    assert steps == [2]


def test_non_finite_loss_stops_and_saves_batch_and_state(toy, tmp_path):
    class Poisoned(toy.Batches):
        def __next__(self):
            batch = super().__next__()
            return batch.replace(index=batch.index - 10**6 * (self.position == 5))

    def objective(params, carry, batch, key):
        loss, aux = toy.objective(params, carry, batch, key)
        return jnp.where(batch.index[0] < 0, jnp.inf, 1.0) * loss, aux

    def train(batches, steps, run_dir):
        state, step = toy.setup(loss=objective)
        config = TrainerConfig(steps=steps, checkpoint_every=2, resume="auto")
        return loop.fit(state, step, batches, config=config, run_dir=run_dir, on_log=lambda record: None)

    with pytest.raises(RunError, match=r"not finite in the update after step 4; batch and state are in .*nan/4"):
        train(Poisoned(), 10, tmp_path)
    folder = tmp_path / "nan" / "4"
    with np.load(folder / "batch.npz", allow_pickle=False) as batch:
        assert sorted(batch) == ["index", "tokens"]
        assert batch["index"].max() < 0
    assert json.loads((folder / "metrics.json").read_text())["loss"] == "inf"
    assert (folder / "state").is_dir()
    assert saved_steps(tmp_path) == [2, 4]
    healthy = train(toy.Batches(), 10, tmp_path)  # the same data without the bad batch
    assert healthy.resumed_from == 4
    assert toy.digests(healthy.state) == toy.digests(train(toy.Batches(), 10, tmp_path / "other").state)


def test_time_decides_the_number_of_steps_and_the_schedule(toy, tmp_path, monkeypatch):
    """On a clock where a batch takes 0.5 s: 100 s less 10 s in reserve less 30 s used before are 120 batches."""
    clock = Clock(monkeypatch)
    records = []
    result = toy.train(
        tmp_path, clock.batches(toy, 0.5), records.append, max_seconds=100.0, reserve_seconds=10.0, elapsed=30.0
    )
    assert result.steps == pytest.approx(120, abs=3)
    assert 85 < clock.now + 30 <= 91
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["total_steps"] == result.steps == int(result.state.total)
    assert plan["revisions"][0]["after_step"] == 10
    assert records[0]["total_steps"] == 0  # not planned yet
    assert records[-1]["lr"] == pytest.approx(0.05 * 1e-2, rel=1e-3)  # the schedule ends with the run
    assert max(record["lr"] for record in records) == pytest.approx(1e-2, rel=1e-2)


def test_a_run_that_slows_down_is_cut_to_its_budget_and_one_that_speeds_up_is_not(toy, tmp_path, monkeypatch):
    for after, low, high in ((2.0, 60, 75), (0.1, 155, 165)):
        clock = Clock(monkeypatch)
        batches = clock.batches(toy, 0.5, after=after)
        result = toy.train(tmp_path / str(after), batches, max_seconds=90.0, reserve_seconds=10.0)
        assert low <= result.steps <= high
        assert clock.now <= 82


def test_a_plan_survives_resumption(toy, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)

    def stop(record):
        if record["step"] == 20:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        toy.train(tmp_path, clock.batches(toy, 0.5), stop, max_seconds=40.0, reserve_seconds=10.0)
    planned = json.loads((tmp_path / "plan.json").read_text())["total_steps"]
    result = toy.train(tmp_path, clock.batches(toy, 0.1), max_seconds=40.0, reserve_seconds=10.0, resume="auto")
    assert int(result.state.step) == planned


class Clock:
    """A clock for the loop that only loading a batch moves."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(loop.time, "monotonic", lambda: self.now)

    def batches(self, toy, seconds, after=None):
        clock = self

        class Slow(toy.Batches):
            def __next__(self):
                clock.now += seconds if after is None or self.position < 40 else after
                return super().__next__()

        return Slow()


def test_records_hold_means_over_their_window(toy, tmp_path):
    single, windows = [], []
    toy.train(tmp_path / "one", on_log=single.append, steps=7)
    toy.train(tmp_path / "three", on_log=windows.append, steps=7, log_every=3)
    assert [record["step"] for record in windows] == [3, 6, 7]
    tokens = np.diff([0.0, *(record["tokens"] for record in single)])
    expected = np.average([record["loss"] for record in single[3:6]], weights=tokens[3:6])
    assert windows[1]["loss"] == pytest.approx(expected, rel=1e-6)
    assert windows[1]["lr"] == single[5]["lr"]
    assert windows[-1]["tokens"] == single[-1]["tokens"]
    assert all(type(value) in (int, float, str) for record in windows for value in record.values())
    assert {
        "kind",
        "grad_norm",
        "masked",
        "tokens_per_s",
        "steps_per_s",
        "elapsed_s",
        "compile_s",
        "total_steps",
    } <= windows[0].keys()


def test_evaluation_sees_the_state_and_is_recorded(toy, tmp_path, uninterrupted):
    records = []

    def evaluate(state):
        return {"at": float(state.step), "mean": float(jnp.mean(state.average.mix))}

    result = toy.train(tmp_path, on_log=records.append, evaluate=evaluate, steps=10, eval_every=4)
    evaluations = [record for record in records if record["kind"] == "eval"]
    assert [(record["step"], record["at"]) for record in evaluations] == [(4, 4.0), (8, 8.0)]
    assert toy.digests(result.state) == uninterrupted[0]
    assert latest(tmp_path).name == "10"


def test_a_flat_held_out_loss_ends_the_run_also_after_a_resumption(toy, tmp_path):
    losses = {2: 4.0, 4: 3.0, 6: 2.99, 8: 1.0}

    def evaluate(state):
        return {"eval_loss": losses[int(state.step)]}

    flat = {"steps": 10, "eval_every": 2, "flat": 0.1, "evaluate": evaluate}
    whole = toy.train(tmp_path / "whole", **flat)
    assert int(whole.state.step) == 6 and saved_steps(tmp_path / "whole") == [6]
    never = toy.train(tmp_path / "never", **{**flat, "flat": 0.003, "steps": 8})
    assert int(never.state.step) == 8  # 0.33% better is better
    toy.train(tmp_path / "part", steps=5, eval_every=2, evaluate=evaluate)
    resumed = toy.train(tmp_path / "part", resume="auto", **flat)
    assert int(resumed.state.step) == 6  # compared with the evaluation before the resumption


def test_data_that_ends_is_a_clear_error(toy, tmp_path):
    class Short(toy.Batches):
        def __next__(self):
            if self.position == 2:
                raise StopIteration
            return super().__next__()

    with pytest.raises(RunError, match="the data ran out"):
        toy.train(tmp_path, Short(), steps=5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"steps": 1.5},
        {"log_every": 0},
        {"keep_checkpoints": 0},
        {"accumulation": 0},
        {"accumulation": True},
        {"eval_every": "10"},
        {"max_seconds": -1.0},
        {"max_seconds": "long"},
        {"reserve_seconds": float("nan")},
        {"resume": "yes"},
        {"resume": False},
    ],
)
def test_wrong_values_are_named(wrong):
    ((name, value),) = wrong.items()
    config = TrainerConfig()
    object.__setattr__(config, name, value)  # past beartype, which only tests switch on
    with pytest.raises(ConfigError, match=f"trainer.{name}={value!r}"):
        config.__post_init__()


def test_no_time_to_train_is_refused():
    with pytest.raises(ConfigError, match="leave no time to train"):
        TrainerConfig(steps=0, max_seconds=10.0, reserve_seconds=10.0)
    TrainerConfig(steps=1, max_seconds=0.0)


def test_a_run_on_a_mesh_follows_the_run_on_one_device_and_resumes(toy, tmp_path):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = shardings(toy.Model(), mesh, RULES)

    def train(run_dir, steps, place=None, sharding=None):
        records = []
        state, step = toy.setup(place=place)
        config = TrainerConfig(steps=steps, log_every=1, resume="auto")
        on_log, rows = records.append, sharding
        result = loop.fit(state, step, toy.Batches(), config=config, run_dir=run_dir, on_log=on_log, sharding=rows)
        return result, [record["loss"] for record in records]

    def spread(run_dir, steps):
        return train(run_dir, steps, lambda params: jax.device_put(params, layout), batch_sharding(mesh))

    _, one = train(tmp_path / "one", 6)
    whole, many = spread(tmp_path / "many", 6)
    assert many == pytest.approx(one, rel=1e-6)
    assert whole.state.params.mix.sharding == layout.mix
    copy = tmp_path / "one" / "checkpoints" / "6"
    shutil.copytree(copy, tmp_path / "moved" / "checkpoints" / "6")
    (_, further), (resumed, moved) = train(tmp_path / "one", 9), spread(tmp_path / "moved", 9)
    assert resumed.resumed_from == 6
    assert moved == pytest.approx(further, rel=1e-6)
