"""MicroLoRA against its definition in numpy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.adapted import Lora, low_rank
from ruvjax.lora import ewc, micro
from ruvjax.lora.compose import add
from ruvjax.lora.delta import cut, fresh, tall_qr

INNER, OUTER, RANK, MODULES = 7, 5, 2, 3
adapt = jax.jit(micro.adapt, static_argnames="dropout")
apply_updates, outputs = jax.jit(micro.apply_updates), jax.jit(micro.outputs)
apply_with_ewc = jax.jit(micro.apply_updates_with_ewc)


def lora_of(seed: int, rank: int = RANK, scale: float = 1.5) -> Lora:
    keys = jax.random.split(jax.random.key(seed))
    a, b = jax.random.normal(keys[0], (INNER, rank)), jax.random.normal(keys[1], (rank, OUTER))
    return Lora(a, b, jnp.float32(scale))


def delta_of(lora: Lora) -> np.ndarray:
    a, b, scale = (np.asarray(part, np.float64) for part in (lora.a, lora.b, lora.scale))
    return scale * a @ b


def trained_state() -> micro.Micro:
    """Adapters that already do something."""
    state = micro.init_micro(jax.random.key(0), MODULES, INNER, OUTER, RANK, 4.0)
    b = jax.random.normal(jax.random.key(1), state.lora.b.shape)
    return state.replace(lora=state.lora.replace(b=b))


def numpy_gradient(lora: Lora, x, g) -> tuple[np.ndarray, np.ndarray]:
    a, b, s, x, g = (np.asarray(v, np.float64) for v in (lora.a, lora.b, lora.scale, x, g))
    da, db = np.zeros_like(a), np.zeros_like(b)
    for row, slope in zip(x, g):
        da += s * np.outer(row, b @ slope)
        db += s * np.outer(a.T @ row, slope)
    return da, db


def test_the_gradient_is_that_of_the_inner_product_and_of_the_energy():
    lora = lora_of(0)
    x = jax.random.normal(jax.random.key(3), (4, INNER))
    g = jax.random.normal(jax.random.key(4), (4, OUTER))
    found = micro.gradient(lora, x, g)
    for ours, theirs in zip(found, numpy_gradient(lora, x, g)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    by_jax = jax.grad(lambda ab: jnp.sum(g * low_rank(x, Lora(*ab, lora.scale))))((lora.a, lora.b))
    energy = jax.grad(lambda ab: 0.5 * jnp.sum(jnp.square(low_rank(x, Lora(*ab, lora.scale)))))((lora.a, lora.b))
    of_energy = micro.gradient(lora, x, low_rank(x, lora))
    for ours, theirs in zip((*found, *of_energy), (*by_jax, *energy)):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-4)


def test_adapt_and_apply_are_gradient_descent_by_the_mean():
    state = trained_state()
    before = jax.tree.map(np.asarray, state.lora)
    x = np.random.default_rng(0).normal(size=(2, INNER)).astype(np.float32)
    g = np.random.default_rng(1).normal(size=(2, OUTER)).astype(np.float32)
    every, second = np.ones(MODULES, bool), np.arange(MODULES) == 1
    state = adapt(state, x[0], g[0], 0.9, 2.0, every)
    state = adapt(state, x[1], g[1], 0.9, -1.0, second)
    assert state.count.tolist() == [1, 2, 1]
    state, finite = apply_updates(state, 0.1)
    assert finite and state.count.tolist() == [0] * MODULES and not np.any(state.gradient_a)
    for i in range(MODULES):
        lora = jax.tree.map(lambda leaf, i=i: leaf[i], before)
        da, db = numpy_gradient(lora, x[:1], 2.0 * g[:1])
        if i == 1:
            more = numpy_gradient(lora, x[1:], -g[1:])
            da, db = (da + more[0]) / 2, (db + more[1]) / 2
        np.testing.assert_allclose(state.lora.a[i], lora.a - 0.1 * da, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.lora.b[i], lora.b - 0.1 * db, rtol=1e-4, atol=1e-5)


def test_quality_alone_moves_the_energy_and_invents_nothing():
    x, every = np.ones(INNER, np.float32), np.ones(MODULES, bool)
    blank = micro.init_micro(jax.random.key(0), MODULES, INNER, OUTER, RANK, 4.0)
    after, _ = apply_updates(adapt(blank, x, None, 1.0, 1.0, every), 0.1)
    assert np.array_equal(after.lora.a, blank.lora.a) and not np.any(after.lora.b)
    state = trained_state()
    norm = np.linalg.norm(outputs(state, x, 0))
    for quality, rises in ((1.0, True), (0.0, False)):
        moved, _ = apply_updates(adapt(state, x, None, quality, 1.0, every), 0.01)
        assert (np.linalg.norm(outputs(moved, x, 0)) > norm) == rises
    same, _ = apply_updates(adapt(state, x, None, 0.5, 1.0, every), 0.01)  # the mean itself
    assert np.array_equal(same.lora.b, state.lora.b)


def test_the_running_mean():
    baseline, seen = micro.new_baseline(), [0.5]
    for quality in np.random.default_rng(0).uniform(size=20):
        above, baseline = micro.advantage(baseline, quality)
        np.testing.assert_allclose(above, quality - np.mean(seen), atol=1e-6)
        seen.append(quality)
    np.testing.assert_allclose(baseline.mean, np.mean(seen), atol=1e-6)


def test_dropout_leaves_inputs_out_and_keeps_the_mean():
    state, every = trained_state(), np.ones(MODULES, bool)
    x, g = np.ones(INNER, np.float32), np.ones(OUTER, np.float32)
    whole = adapt(state, x, g, 1.0, 1.0, every).gradient_a[0]
    draw = jax.vmap(lambda key: adapt(state, x, g, 1.0, 1.0, every, key, dropout=0.25).gradient_a[0])
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    left_out = np.all(drawn == 0, axis=2)
    assert abs(left_out.mean() - 0.25) < 0.02
    np.testing.assert_allclose(drawn.mean(0), whole, rtol=0.05)


def test_a_step_that_is_not_finite_changes_nothing():
    state, every = trained_state(), np.ones(MODULES, bool)
    huge = np.full(OUTER, 3e38, np.float32)
    after, finite = apply_updates(adapt(state, np.ones(INNER, np.float32), huge, 1.0, 1e30, every), 1.0)
    assert not finite and np.array_equal(after.lora.a, state.lora.a) and np.array_equal(after.lora.b, state.lora.b)
    assert np.isfinite(after.gradient_a).all()


def test_ewc_holds_a_module_back():
    """From the anchor of an old task, a new gradient moves an adapter less the stronger the penalty."""
    state, every = trained_state(), np.ones(MODULES, bool)
    x, g = np.ones(INNER, np.float32), np.ones(OUTER, np.float32)
    adapters = [jax.tree.map(lambda leaf, i=i: leaf[i], state.lora) for i in range(MODULES)]
    fisher = ewc.Fisher(jnp.full(INNER, 2.0 * OUTER), jnp.full(OUTER, 2.0 * INNER))
    old = [ewc.finish_task(ewc.observe(ewc.nothing_learned(a), fisher, 100), a) for a in adapters]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *old)
    moves = []
    for strength in (0.0, 1.0, 1e9):
        moved, finite = apply_with_ewc(adapt(state, x, g, 1.0, 1.0, every), 0.05, stacked, strength)
        assert finite
        new = jax.tree.map(lambda leaf: leaf[0], moved.lora)
        moves.append(np.linalg.norm(delta_of(new) - delta_of(adapters[0])))
    free, _ = apply_updates(adapt(state, x, g, 1.0, 1.0, every), 0.05)
    np.testing.assert_allclose(
        moves[0],
        np.linalg.norm(delta_of(jax.tree.map(lambda leaf: leaf[0], free.lora)) - delta_of(adapters[0])),
        rtol=1e-4,
    )
    # All entries matter alike: one step of 0.05 x 1 x 2 takes a tenth of the way back, 1 / F all of it.
    np.testing.assert_allclose(moves[1], 0.9 * moves[0], rtol=0.02)
    assert moves[2] < 1e-3 * moves[0]


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_cut_is_the_best_approximation(rank):
    update = add([lora_of(0), lora_of(1, scale=-0.3)])
    found = cut(update, fresh(jax.random.key(5), INNER, OUTER, rank, 2.0))
    u, s, v = np.linalg.svd(delta_of(update))
    s[rank:] = 0
    np.testing.assert_allclose(delta_of(found), u[:, : len(s)] * s @ v[: len(s)], atol=1e-5)
    assert found.a.shape == (INNER, rank) and found.scale == 2.0


def test_directions_that_are_not_used_can_be_learned():
    into = fresh(jax.random.key(5), INNER, OUTER, 4)
    found = cut(add([lora_of(0), fresh(jax.random.key(6), INNER, OUTER, 1)]), into)
    assert np.array_equal(found.a[:, 2:], into.a[:, 2:]) and not np.any(found.b[2:])
    assert np.isfinite(np.asarray(cut(fresh(jax.random.key(7), INNER, OUTER, 2), into).a)).all()
    for broken in (np.nan, np.inf):  # not taken for unused
        for update in (lora_of(0, scale=broken), lora_of(0).replace(a=lora_of(0).a.at[2, 1].set(broken))):
            assert np.isnan(np.asarray(cut(update, into).b)).all()


@pytest.mark.parametrize("rows,rank", [(40, 5), (1030, 5), (2048, 3), (3, 5)])
def test_a_tall_factorisation_by_blocks(rows, rank):
    matrix = jax.random.normal(jax.random.key(0), (rows, rank)).at[:, -1].set(0.0)  # a column that adds nothing
    q, r = jax.jit(tall_qr)(matrix)
    assert q.shape == (rows, min(rows, rank)) and np.allclose(r, np.triu(r))
    np.testing.assert_allclose(np.asarray(q, np.float64) @ np.asarray(r, np.float64), matrix, atol=1e-5)
    np.testing.assert_allclose(np.asarray(q).T @ np.asarray(q), np.eye(q.shape[1]), atol=1e-5)
