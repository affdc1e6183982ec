"""The optimisation step: accumulation, averaging, the guard against non-finite values, donation, layouts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ruvjax.core.params import shardings
from ruvjax.core.sharding import RULES, MeshConfig, batch_sharding, make_mesh
from ruvjax.training.objective import gradient_of
from ruvjax.training.state import params_sha256
from ruvjax.training.step import compile_step, make_step


def run(toy, steps, batches=None, place_batch=lambda batch: batch, **setup):
    """The state after so many steps, and the metrics of each."""
    state, step = toy.setup(**setup)
    state = state.replace(total=jax.device_put(jnp.int32(20), state.total.sharding))
    batches = toy.Batches() if batches is None else batches
    compiled, metrics = None, []
    for _ in range(steps):
        batch = place_batch(next(batches))
        compiled = compile_step(step, state, batch) if compiled is None else compiled
        state, values = compiled(state, batch)
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def relative(tree, reference):
    """Largest difference of any leaf, relative to that leaf's largest entry."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()) for a, b in pairs)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradient_is_that_of_the_whole_batch(toy, parts):
    params, batch, key = toy.setup()[0].params, next(toy.Batches()), jax.random.key(7)
    whole, (_, expected) = jax.jit(gradient_of(toy.objective))(params, None, batch, key)
    parted, (_, metrics) = jax.jit(gradient_of(toy.objective, parts))(params, None, batch, key)
    assert relative(parted, whole) < 1e-6
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6), name


def test_equal_weights_for_unequal_micro_batches_would_be_wrong(toy):
    params, batch, key = toy.setup()[0].params, next(toy.Batches()), jax.random.key(7)
    gradient = jax.jit(gradient_of(toy.objective))
    whole, _ = gradient(params, None, batch, key)
    parts = [gradient(params, None, jax.tree.map(lambda x, i=i: x[i::2], batch), key) for i in range(2)]
    assert len({int(metrics["tokens"]) for _, (_, metrics) in parts}) == 2
    assert relative(jax.tree.map(lambda a, b: (a + b) / 2, parts[0][0], parts[1][0]), whole) > 1e-3


def test_micro_batches_keep_each_rows_carry(toy):
    def objective(params, carry, batch, key):
        loss, (_, metrics) = toy.objective(params, None, batch, key)
        return loss, (carry + batch.index, metrics)

    params, batch, carry = toy.setup()[0].params, next(toy.Batches()), jnp.arange(toy.ROWS)
    for parts in (1, 4):
        _, (moved, _) = jax.jit(gradient_of(objective, parts))(params, carry, batch, jax.random.key(0))
        np.testing.assert_array_equal(moved, carry + batch.index)


def test_a_batch_that_does_not_divide_is_refused(toy):
    with pytest.raises(ValueError, match="8 rows does not divide into 3"):
        gradient_of(toy.objective, 3)(toy.setup()[0].params, None, next(toy.Batches()), jax.random.key(0))


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
def test_one_batch_is_overfitted(toy, kind):
    class Same(toy.Batches):
        def __next__(self):
            self.position = 0
            return super().__next__()

    lr = {"adamw": 0.05, "lion": 0.01, "muon": 0.05}[kind]
    _, metrics = run(toy, 60, Same(), kind=kind, lr=lr, schedule="constant", ema=0.0)
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    assert metrics[0]["lr"] == pytest.approx(lr / 4)


def test_average_follows_its_recurrence(toy):
    state, step = toy.setup(ema=0.95)
    reference = jax.tree.map(lambda p: np.asarray(p, np.float64), state.params)
    batches = toy.Batches()
    compiled = compile_step(step, state, toy.Batches().__next__())
    for n in range(12):
        state, _ = compiled(state, next(batches))
        decay = min(0.95, (1 + n) / (10 + n))
        reference = jax.tree.map(
            lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p, np.float64), reference, state.params
        )
    jax.tree.map(lambda e, r: np.testing.assert_allclose(e, r, atol=1e-6), state.ema, reference)
    assert state.average is state.ema
    assert toy.setup(ema=0.0)[0].ema is None


def test_non_finite_gradient_changes_nothing_then_or_later(toy):
    class Poisoned(toy.Batches):
        def __next__(self):
            batch = super().__next__()
            bad = self.position == 3
            return batch.replace(index=batch.index - 10**6 * bad)

    def objective(params, carry, batch, key):
        loss, aux = toy.objective(params, carry, batch, key)
        return jnp.where(batch.index[0] < 0, jnp.nan, 1.0) * loss, aux

    before, _ = run(toy, 2, Poisoned(), loss=objective)
    after, metrics = run(toy, 5, Poisoned(), loss=objective)
    assert [values["finite"] for values in metrics] == [1, 1, 0, 1, 1]
    assert not after.healthy
    assert toy.digests(after) == toy.digests(before)
    assert toy.digests(after) != toy.digests(run(toy, 1, Poisoned(), loss=objective)[0])


def test_a_new_total_compiles_nothing_and_changes_the_rate(toy):
    state, step = toy.setup(warmup_steps=1)
    batch = next(toy.Batches())
    compiled, rates = compile_step(step, state, batch), []
    for total in (10, 20):  # an executable compiled ahead of time raises where it would need another
        state, metrics = compiled(state.replace(total=jnp.int32(total)), batch)
        state = state.replace(step=jnp.int32(5))
        rates.append(float(metrics["lr"]))
    assert rates[0] != rates[1]


def test_the_old_state_is_donated(toy):
    state, step = toy.setup()
    batch = next(toy.Batches())
    new, _ = compile_step(step, state, batch)(state, batch)
    assert state.params.mix.is_deleted()
    assert not new.params.mix.is_deleted()


def test_digest_sees_every_bit_name_and_type(toy):
    params = toy.setup()[0].params
    assert params_sha256(params) == params_sha256(jax.tree.map(np.asarray, params))
    other = np.asarray(params.mix).copy()
    other.view(np.uint32)[0, 0, 0] ^= 1
    different = [
        params.replace(mix=other),
        {"embedding": params.embedding, "mix": params.mix, "scale": params.scale},
        params.replace(mix=params.mix.astype(jnp.bfloat16)),
        params.replace(mix=params.mix.reshape(-1)),
    ]
    assert len({params_sha256(tree) for tree in (params, *different)}) == 5


@pytest.mark.parametrize(
    "mesh, accumulation, kind",
    [
        ({"data": 8}, 1, "adamw"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2, "adamw"),
        ({"data": 1, "fsdp": 4, "tensor": 2}, 1, "muon"),
    ],
)
def test_a_mesh_gives_the_losses_of_one_device(toy, mesh, accumulation, kind):
    mesh = make_mesh(MeshConfig(**mesh))
    layout = shardings(toy.Model(), mesh, RULES)
    rows = batch_sharding(mesh)
    _, expected = run(toy, 4, kind=kind)
    state, metrics = run(
        toy,
        4,
        place_batch=lambda batch: jax.device_put(batch, rows),
        place=lambda params: jax.device_put(params, layout),
        accumulation=accumulation,
        kind=kind,
    )
    for one, many in zip(expected, metrics, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert state.params.mix.sharding == layout.mix
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == state.params.mix.shape]
    assert moments and all(leaf.sharding.is_equivalent_to(layout.mix, 3) for leaf in moments)
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(state))
    assert state.step.sharding == NamedSharding(mesh, PartitionSpec())


def test_what_the_objective_closes_over_is_an_argument_of_the_program(toy):
    """Weights that are not trained: large ones are handed in, and are neither donated nor written into the program."""
    frozen = jnp.ones((256, 256))
    state, _ = toy.setup()
    params, optimizer = {"scale": jnp.ones(256)}, optax.sgd(1.0)
    state = state.replace(params=params, opt_state=optimizer.init(params), ema=None)

    def objective(params, carry, batch, key):
        loss = jnp.mean(jnp.square(params["scale"][None, :] @ frozen))
        return loss, (carry, {"loss_sum": loss, "tokens": jnp.float32(1)})

    compiled = compile_step(
        make_step(objective, optimizer, lambda *_: jnp.float32(1e-4)), state, toy.Batches().__next__()
    )
    first, metrics = compiled(state, toy.Batches().__next__())
    _, again = compiled(first, toy.Batches().__next__())
    assert float(metrics["loss"]) == 256**2 and float(again["loss"]) < float(metrics["loss"])
    text = compiled.func.as_text()
    assert "f32[256,256]" in text.splitlines()[0] and not re.search(r"f32\[256,256\]\S* constant", text)
    np.testing.assert_array_equal(frozen, np.ones((256, 256)))
