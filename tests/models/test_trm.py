"""The tiny recursive model against what the official code computed (recorded), and its rules one by one."""

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from safetensors.numpy import load_file, save_file

from ruvjax.core.norm import rms
from ruvjax.core.params import count, init
from ruvjax.errors import ConfigError, InputError
from ruvjax.io.trm import from_official, load_trm, save_trm, to_official
from ruvjax.models.trm import TinyRecursive
from ruvjax.models.trm_loss import TrmLoss, halting, init_carry, objective, refill
from ruvjax.models.trm_solve import solve
from ruvjax.training.objective import gradient_of
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer, learning_rate
from ruvjax.training.state import init_state
from ruvjax.training.step import make_step

SCRIPT = Path(__file__).parents[2] / "scripts" / "record_golden_trm.py"
_spec = importlib.util.spec_from_file_location("record_golden_trm", SCRIPT)
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@struct.dataclass
class Batch:
    inputs: Any
    labels: Any
    puzzle: Any
    index: Any


def official(mixer: str) -> TinyRecursive:
    return TinyRecursive(
        vocab_size=golden.VOCAB,
        length=golden.CELLS,
        puzzles=golden.PUZZLES,
        prefix=golden.PREFIX,
        width=golden.WIDTH,
        heads=golden.HEADS,
        layers=golden.LAYERS,
        mlp_width=256,
        mix_width=256,
        cycles=golden.CYCLES,
        updates=golden.UPDATES,
        mixer=mixer,
    )


def official_params(model: TinyRecursive):
    names = {name: array.shape for name, array in to_official(model, init(model, jax.random.key(0))).items()}
    return from_official(model, {name: golden.weight(name, shape) for name, shape in names.items()}, "golden")


def batch_of(step: int) -> Batch:
    drawn = golden.boards(step)
    rows = len(drawn["puzzle"])
    index = np.arange(step * rows, (step + 1) * rows, dtype=np.int32)
    return jax.tree.map(jnp.asarray, Batch(**drawn, index=index))


@pytest.fixture(scope="module")
def recorded():
    return np.load(golden.GOLDEN)


@pytest.mark.parametrize("mixer", golden.MIXERS)
def test_three_training_steps_are_the_official_ones(recorded, mixer):
    model = official(mixer)
    params = official_params(model)
    loss = TrmLoss(max_steps=golden.MAX_STEPS, explore=0.0)
    goal = jax.jit(gradient_of(objective(model, loss)))

    @jax.jit
    def forward(params, carry, batch):
        carry = refill(model, params, carry, batch)
        return model.apply(params, carry.inputs, carry.latent, puzzle=carry.puzzle)[0]

    config = OptimizerConfig(
        kind="adam_atan2", lr=1.0, b1=golden.B1, b2=golden.B2, weight_decay=golden.DECAY, clip=0.0,
        puzzle_rate=golden.SIGN_LR / golden.LR,
    )  # fmt: skip
    optimizer = build_optimizer(config, model.spec())
    state = optimizer.init(params)
    carry = init_carry(model, params, batch_of(0))
    for step in range(golden.STEPS):
        want = {key[len(mixer) + 3 :]: recorded[key] for key in recorded if key.startswith(f"{mixer}/{step}/")}
        batch = batch_of(step)
        output = forward(params, carry, batch)
        close = 2e-4 if step == 0 else 2e-3  # an update of 0.01 turns on the sign of the smallest gradients
        np.testing.assert_allclose(output.logits, want["logits"], atol=close)
        np.testing.assert_allclose(output.aux["halt"], want["halt"], atol=close)
        gradient, (carry, metrics) = goal(params, carry, batch, jax.random.key(0))
        np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=close)
        np.testing.assert_array_equal(carry.halted, want["halted"])
        np.testing.assert_allclose(golden.digest(carry.latent.answer), want["answer"], rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(golden.digest(carry.latent.scratch), want["scratch"], rtol=1e-3, atol=2e-3)
        for name, array in to_official(model, gradient).items():
            if f"gradient/{name}" in want and "q_head" not in name:
                size = want[f"gradient/{name}"][1]
                np.testing.assert_allclose(
                    golden.digest(array), want[f"gradient/{name}"], atol=close * size, err_msg=name
                )
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p + golden.LR * u, params, updates)
    for name, array in to_official(model, params).items():
        if "q_head" not in name:  # its second row is never used, and never trained
            want = recorded[f"{mixer}/after/{name}"]
            np.testing.assert_allclose(golden.digest(array), want, rtol=1e-3, atol=2e-3 * want[1], err_msg=name)
    halt = to_official(model, params)["inner.q_head.weight"][0]
    whole = recorded[f"{mixer}/after/inner.q_head.weight"]
    np.testing.assert_allclose(halt[0], whole[2], atol=2e-4)


def test_without_the_puzzle_vector_the_golden_numbers_are_missed(recorded):
    """The negative control of the test above: it compares what it says it compares."""
    model = official("mlp")
    params = official_params(model)
    carry = refill(model, params, init_carry(model, params, batch_of(0)), batch_of(0))
    output, _ = model.apply(params, carry.inputs, carry.latent)
    right, _ = model.apply(params, carry.inputs, carry.latent, puzzle=carry.puzzle)
    assert np.abs(np.asarray(output.logits) - recorded["mlp/0/logits"]).max() > 1e-2
    np.testing.assert_allclose(right.logits, recorded["mlp/0/logits"], atol=2e-4)


TINY = TinyRecursive(
    vocab_size=6, length=6, rows=2, columns=3, prefix=3, width=8, heads=2, mlp_width=12, mix_width=10, layers=1,
    cycles=2, updates=2,
)  # fmt: skip


def tiny(mixer="mlp", **changes):
    model = dataclasses.replace(TINY, mixer=mixer, **changes)
    params = init(model, jax.random.key(1))
    return model, params.replace(halt=jax.random.normal(jax.random.key(2), params.halt.shape))


def boards(rows=4, seed=0, first=0):
    draw = np.random.default_rng(seed)
    cells = draw.integers(1, 6, (2, rows, 6)).astype(np.int32)
    drawn = Batch(cells[0], cells[1], np.zeros(rows, np.int32), np.arange(first, first + rows, dtype=np.int32))
    return jax.tree.map(jnp.asarray, drawn)


SLOW_AXIAL = ["mlp", "attention", pytest.param("axial", marks=pytest.mark.slow)]


@pytest.mark.parametrize("mixer", SLOW_AXIAL)
def test_only_the_last_cycle_carries_gradient(mixer):
    """Finite differences that freeze the first cycles agree; those that move them too do not."""
    model, params = tiny(mixer)
    last = dataclasses.replace(model, cycles=1)
    batch = boards()

    def loss(p, latent, network=model):
        return network.apply(p, batch.inputs, latent, puzzle=batch.puzzle)[0].logits[:, :, 0].sum()

    start = model.init_latent(params, 4)
    gradient = jax.grad(loss)(params, start).layers.up
    _, between = last.apply(params, batch.inputs, start, puzzle=batch.puzzle)
    direction = jax.random.normal(jax.random.key(5), params.layers.up.shape)
    step = 1e-2

    def moved(amount):
        return params.replace(layers=params.layers.replace(up=params.layers.up + amount * direction))

    frozen = (loss(moved(step), between, last) - loss(moved(-step), between, last)) / (2 * step)
    through = (loss(moved(step), start) - loss(moved(-step), start)) / (2 * step)
    ours = float((gradient * direction).sum())
    assert ours == pytest.approx(float(frozen), rel=2e-2)
    assert abs(ours - float(through)) > 5 * abs(ours - float(frozen))


def test_a_loop_over_the_updates_is_the_unrolled_recursion():
    model, params = tiny()
    loop = dataclasses.replace(model, unroll=False)
    batch, start = boards(), model.init_latent(params, 4)

    def loss(p, network):
        return network.apply(p, batch.inputs, start)[0].logits.sum()

    one, other = (jax.jit(jax.value_and_grad(partial(loss, network=m)))(params) for m in (model, loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, other)


def test_rms_has_the_gradient_of_its_formula():
    x, dy = (jax.random.normal(jax.random.key(n), (3, 4, 5)) for n in (0, 1))

    def plain(x, axis):
        return x / jnp.sqrt(jnp.mean(x * x, axis=axis, keepdims=True) + 1e-5)

    for axis in (0, -1):
        ours, theirs = (jax.vjp(partial(f, axis=axis), x) for f in (lambda x, axis: rms(x, axis, 1e-5), plain))
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
        np.testing.assert_allclose(ours[1](dy)[0], theirs[1](dy)[0], rtol=1e-4, atol=1e-5)


def test_axial_attention_sees_its_row_and_column_only():
    model, params = tiny("axial", cycles=1, updates=1)
    base = model.init_latent(params, 1)
    bent = base.replace(scratch=base.scratch.at[0, 3].add(1.0))  # the first cell of the board: row 1 below the prefix

    def network(latent):  # one pass of the network over the scratch latent
        one = model.apply(params, jnp.ones((1, 6), jnp.int32), latent)[1].scratch
        return np.asarray(one[0]).reshape(3, 3, -1)

    # One layer: along the row, then along the columns; so cell (1, 0) reaches row 1, and through it every column.
    changed = np.abs(network(bent) - network(base)).max(-1) > 1e-6
    assert changed.all()
    flat = params.replace(layers=params.layers.replace(column_o=0 * params.layers.column_o))
    params = flat
    changed = np.abs(network(bent) - network(base)).max(-1) > 1e-6
    np.testing.assert_array_equal(changed, [[0, 0, 0], [1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("mixer", ["attention", "axial"])
def test_masked_cells_change_nothing(mixer):
    model, params = tiny(mixer)
    inputs = boards().inputs
    mask = jnp.ones((4, 6), bool).at[:, 4].set(False)
    other = inputs.at[:, 4].set(5 - inputs[:, 4] % 5)
    start = model.init_latent(params, 4)
    one, two = (model.apply(params, x, start, mask=mask)[0].logits for x in (inputs, other))
    kept = np.array([0, 1, 2, 3, 5])
    np.testing.assert_allclose(one[:, kept], two[:, kept], atol=1e-5)
    unmasked = [model.apply(params, x, start)[0].logits for x in (inputs, other)]
    assert np.abs(np.asarray(unmasked[0] - unmasked[1])[:, kept]).max() > 1e-3
    with pytest.raises(ConfigError, match="mixer=mlp"):
        tiny()[0].apply(tiny()[1], inputs, start, mask=mask)


def test_halted_rows_are_refilled_and_others_go_on():
    model, params = tiny()
    goal = jax.jit(objective(model, TrmLoss(max_steps=3, explore=0.0)))
    carry = init_carry(model, params, boards())
    first, second = boards(seed=0), boards(seed=1, first=4)
    _, (carry, metrics) = goal(params, carry, first, jax.random.key(0))
    np.testing.assert_array_equal(carry.inputs, first.inputs)
    np.testing.assert_array_equal(carry.steps, 1)
    assert metrics["tokens"] == 24 and metrics["loss_sum"] == pytest.approx(
        24 * float(metrics["answer_loss"] + 0.5 * metrics["halt_loss"]), rel=1e-5
    )
    carry = carry.replace(halted=jnp.array([True, False, True, False]))
    _, (after, _) = goal(params, carry, second, jax.random.key(1))
    np.testing.assert_array_equal(after.inputs, np.where([[1], [0], [1], [0]], second.inputs, first.inputs))
    np.testing.assert_array_equal(after.steps, [1, 2, 1, 2])
    # A refilled row is what it would be in a batch of new rows.
    _, (fresh, _) = goal(params, init_carry(model, params, second), second, jax.random.key(1))
    np.testing.assert_allclose(after.latent.answer[0], fresh.latent.answer[0], atol=1e-6)
    assert np.abs(np.asarray(after.latent.answer[1] - fresh.latent.answer[1])).max() > 1e-3


def test_staggered_rows_change_puzzles_in_turn():
    model, params = tiny()
    loss = TrmLoss(max_steps=4, explore=0.0, stagger=True)
    params = params.replace(halt_bias=params.halt_bias - 100.0)  # nobody halts before the last step
    goal = jax.jit(objective(model, loss))
    carry = init_carry(model, params, boards(), loss)
    halted = []
    for step in range(8):
        _, (carry, _) = goal(params, carry, boards(first=4 * step), jax.random.key(0))
        halted.append(np.asarray(carry.halted))
    np.testing.assert_array_equal(np.array(halted), np.tile(np.eye(4, dtype=bool)[::-1], (2, 1)))


def test_the_minimum_of_steps_is_drawn_by_sample_number():
    loss = TrmLoss(max_steps=16, explore=0.5)
    index = jnp.arange(4000, dtype=jnp.int32)
    halt = jnp.ones(4000)  # everybody would stop
    key = jax.random.key(3)
    stopped = {n: np.asarray(halting(loss, halt, jnp.full(4000, n), index, key)) for n in (1, 2, 8, 16)}
    # Half draw nothing; of the others (n - 1) / 15 have a minimum of at most n.
    for n, share in ((1, 0.5), (2, 0.5 + 0.5 / 15), (8, 0.5 + 0.5 * 7 / 15), (16, 1.0)):
        assert stopped[n].mean() == pytest.approx(share, abs=4 * 0.5 / np.sqrt(4000))
    part = halting(loss, halt[:7], jnp.full(7, 1), index[100:107], key)
    np.testing.assert_array_equal(part, stopped[1][100:107])  # whatever the batch
    never = halting(TrmLoss(explore=0.0), -halt, jnp.full(4000, 15), index, key)
    assert not np.asarray(never).any()


def test_padding_is_not_learned():
    model, params = tiny()
    batch = boards()
    value = objective(model, TrmLoss())(params, init_carry(model, params, batch), batch, jax.random.key(0))[0]
    labels = batch.labels.at[:, 2:].set(0)
    cut = batch.replace(labels=labels)
    gradient = jax.grad(
        lambda p: objective(model, TrmLoss())(p, init_carry(model, params, cut), cut, jax.random.key(0))[0]
    )(params)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    other = cut.replace(labels=jnp.where(labels == 0, -100, labels))
    losses = [
        objective(model, TrmLoss())(params, init_carry(model, params, b), b, jax.random.key(0))[0] for b in (cut, other)
    ]
    assert losses[0] == losses[1] != value


@pytest.mark.parametrize("kind", ["adam_atan2", "muon"])
def test_it_learns_one_batch_and_leaves_the_starts_alone(kind):
    model, params = tiny()
    config = OptimizerConfig(kind=kind, lr=1e-2, weight_decay=0.1, schedule="constant", warmup_steps=1, b2=0.95)
    optimizer = build_optimizer(config, model.spec())
    batch = boards()
    batch = batch.replace(labels=batch.inputs)
    state = init_state(params, optimizer, jax.random.key(0), ema=True, carry=init_carry(model, params, batch))
    loss = TrmLoss(max_steps=4)
    step = jax.jit(make_step(objective(model, loss), optimizer, partial(learning_rate, config), ema=0.9))
    values = []
    for _ in range(60):
        state, metrics = step(state, batch)
        values.append(float(metrics["answer_loss"]))
    assert values[-1] < 0.6 * values[0]
    for name in ("answer_start", "latent_start"):
        np.testing.assert_array_equal(getattr(state.params, name), getattr(params, name))
        np.testing.assert_array_equal(getattr(state.ema, name), getattr(params, name))
    answers, halts = solve(model, state.params, batch.inputs, batch.puzzle, steps=4)
    assert answers.shape == (4, 4, 6) and halts.shape == (4, 4)
    assert (np.asarray(answers[-1]) == batch.labels).mean() > 0.6


def test_micro_batches_give_the_gradient_of_the_batch():
    model, params = tiny()
    batch, key = boards(), jax.random.key(0)
    goal = objective(model, TrmLoss())
    carry = init_carry(model, params, batch)
    whole, (after, metrics) = gradient_of(goal)(params, carry, batch, key)
    parts, (split, sums) = gradient_of(goal, 2)(params, carry, batch, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after, split)
    assert metrics["tokens"] == sums["tokens"]


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    model, params = tiny(width=32, mlp_width=64)
    half = dataclasses.replace(model, dtype="bfloat16")
    inputs = boards().inputs
    one, two = (m.apply(params, inputs, m.init_latent(params, 4))[0].logits for m in (model, half))
    assert two.dtype == jnp.float32
    np.testing.assert_allclose(one, two, atol=0.1)


def test_the_published_sizes():
    # As the official code counts them, less the second row of the halting head (513) and with the two start vectors
    # (1024) and, for one puzzle, its vector (512), which are buffers there.
    extra = 1024 + 512 - 513
    assert count(TinyRecursive()) == 5_028_866 + extra
    assert count(TinyRecursive(mixer="attention")) == 6_828_034 + extra


@pytest.mark.parametrize("mixer", ["mlp", "axial"])
def test_an_export_comes_back(tmp_path, mixer):
    model, params = tiny(mixer)
    save_trm(tmp_path / "model", model, params, {"kind": "sudoku"})
    again, read, puzzles = load_trm(tmp_path / "model")
    assert again == model and puzzles == {"kind": "sudoku"}
    jax.tree.map(np.testing.assert_array_equal, params, read)
    save_trm(tmp_path / "model", model, params)  # over the old one
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something other"):
        save_trm(tmp_path / "model", model, params)


def test_a_damaged_export_is_one_clear_line(tmp_path):
    model, params = tiny()
    folder = save_trm(tmp_path / "model", model, params)
    whole = load_file(folder / "model.safetensors")
    lacking = {name: x for name, x in whole.items() if "lm_head" not in name}
    save_file(lacking, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lack inner\.lm_head"):
        load_trm(folder)
    save_file(whole | {"inner.extra": np.zeros(1, np.float32)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"inner\.extra"):
        load_trm(folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="safetensors"):
        load_trm(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="'llama'"):
        load_trm(folder)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mixer": "conv"}, r"model\.mixer='conv'"),
        ({"cycles": 0}, r"model\.cycles=0"),
        ({"prefix": 0}, r"model\.prefix=0"),
        ({"mixer": "axial", "rows": 3}, r"model\.rows=3"),
        ({"mixer": "attention", "heads": 3}, r"model\.heads=3"),
        ({"dtype": "int8"}, r"model\.dtype='int8'"),
        ({"mixer": "attention", "begin": 5}, r"model\.begin=5 with model\.mixer=attention, model\.prefix=3"),
        ({"begin": 5, "puzzles": 0, "prefix": 0}, r"model\.begin=5 with model\.mixer=mlp"),
    ],
)
def test_wrong_values_are_named(wrong, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(TINY, **wrong)


def test_a_board_of_another_length_is_refused():
    model, params = tiny()
    with pytest.raises(ConfigError, match="7 cells"):
        model.apply(params, jnp.ones((1, 7), jnp.int32), model.init_latent(params, 1))
