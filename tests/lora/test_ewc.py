"""EWC on deltas: dense float64 forms, the closed-form Fisher information of a softmax regression, and its controls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.adapted import Lora
from ruvjax.errors import ConfigError
from ruvjax.lora import ewc
from ruvjax.lora.compose import add

INNER, OUTER, RANK = 6, 4, 2


def lora_of(seed: int, *layers: int, rank: int = RANK) -> Lora:
    keys = jax.random.split(jax.random.key(seed))
    a, b = jax.random.normal(keys[0], (*layers, INNER, rank)), jax.random.normal(keys[1], (*layers, rank, OUTER))
    return Lora(a, b, jnp.full(layers, 1.5))


def delta_of(lora: Lora) -> np.ndarray:
    a, b, scale = (np.asarray(part, np.float64) for part in (lora.a, lora.b, lora.scale))
    return scale[..., None, None] * a @ b


def dense(fisher: ewc.Fisher) -> np.ndarray:
    row, column = (np.asarray(v, np.float64) for v in (fisher.row, fisher.column))
    return row[..., :, None] * column[..., None, :] / row.sum(-1)[..., None, None]


def fisher_of(seed: int, *layers: int) -> ewc.Fisher:
    return ewc.squares(jax.random.normal(jax.random.key(seed), (*layers, INNER, OUTER)))


def after_a_task(*layers: int) -> ewc.EwcState:
    begun = ewc.observe(ewc.nothing_learned(lora_of(0, *layers)), fisher_of(1, *layers), 10)
    return ewc.finish_task(begun, lora_of(2, *layers))


def dense_penalty(state: ewc.EwcState, lora: Lora) -> float:
    return 0.5 * np.sum(dense(state.importance) * np.square(delta_of(lora) - delta_of(state.anchor)))


def regauged(lora: Lora, seed: int = 9) -> Lora:
    """The same delta by other factors."""
    m = np.eye(RANK) + 0.8 * np.random.default_rng(seed).normal(size=(RANK, RANK))
    return lora.replace(a=jnp.float32(np.asarray(lora.a) @ m), b=jnp.float32(np.linalg.inv(m) @ np.asarray(lora.b)))


@pytest.mark.parametrize("layers", [(), (3,)])
def test_the_penalty_is_the_dense_one(layers):
    state = after_a_task(*layers)
    for update in (lora_of(3, *layers), add([lora_of(4, *layers), lora_of(5, *layers)])):
        np.testing.assert_allclose(ewc.penalty(state, update), dense_penalty(state, update), rtol=1e-5)
    np.testing.assert_allclose(ewc.penalty(state, lora_of(2, *layers)), 0, atol=1e-4)
    assert float(ewc.penalty(ewc.nothing_learned(lora_of(0)), lora_of(3))) == 0


def test_a_tree_of_adapters_inside_an_objective():
    state = {"q": after_a_task(3), "head": after_a_task()}
    adapters = {"q": lora_of(3, 3), "head": lora_of(4)}
    value, slope = jax.jit(jax.value_and_grad(lambda tree: ewc.ewc_penalty(state, tree)))(adapters)
    wanted = sum(dense_penalty(state[path], adapters[path]) for path in adapters)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    away = delta_of(adapters["head"]) - delta_of(state["head"].anchor)
    in_delta = dense(state["head"].importance) * away
    b = np.asarray(adapters["head"].b, np.float64)
    np.testing.assert_allclose(slope["head"].a, 1.5 * in_delta @ b.T, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="different sites: head"):
        ewc.ewc_penalty(state, {"q": adapters["q"]})


def test_the_gauge_of_the_factors_does_not_matter():
    state, update = after_a_task(), lora_of(3)
    other = regauged(update)
    np.testing.assert_allclose(delta_of(other), delta_of(update), atol=1e-5)
    np.testing.assert_allclose(ewc.penalty(state, other), ewc.penalty(state, update), rtol=1e-4)
    steps = [delta_of(ewc.pull(state, lora, 0.01)) for lora in (update, other)]
    np.testing.assert_allclose(*steps, atol=1e-4)
    # Control: a gradient step on the factors themselves goes elsewhere in each gauge.
    slope = jax.grad(lambda ab, lora: ewc.penalty(state, lora.replace(a=ab[0], b=ab[1])))

    def plain(lora):
        da, db = slope((lora.a, lora.b), lora)
        return delta_of(lora.replace(a=lora.a - 0.01 * da, b=lora.b - 0.01 * db))

    assert np.abs(plain(update) - plain(other)).max() > 100 * np.abs(steps[0] - steps[1]).max()


@pytest.mark.parametrize("strength", [0.01, 1e6])
def test_a_pull_is_the_step_in_delta_space_cut_to_the_rank(strength):
    state, update = after_a_task(), lora_of(3)
    fisher = dense(state.importance)
    step = min(strength, 1 / fisher.max())
    wanted = delta_of(update) - step * fisher * (delta_of(update) - delta_of(state.anchor))
    u, s, v = np.linalg.svd(wanted, full_matrices=False)
    np.testing.assert_allclose(
        delta_of(ewc.pull(state, update, strength)), u[:, :RANK] * s[:RANK] @ v[:RANK], atol=1e-4
    )
    values = [float(ewc.penalty(state, update))]
    for _ in range(5):
        update = ewc.pull(state, update, strength)
        values.append(float(ewc.penalty(state, update)))
    assert values == sorted(values, reverse=True)
    np.testing.assert_allclose(
        delta_of(ewc.pull(ewc.nothing_learned(update), update, 1.0)), delta_of(update), atol=1e-5
    )


def test_squares_of_rows_are_those_of_the_gradient():
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(9, INNER)), rng.normal(size=(9, OUTER))
    found = ewc.squares_of_rows(jnp.float32(x), jnp.float32(g))
    np.testing.assert_allclose(found.row, np.square(x.T @ g).sum(1), rtol=1e-4)
    np.testing.assert_allclose(found.column, np.square(x.T @ g).sum(0), rtol=1e-4)


CLASSES, EXAMPLES = 4, 4000


def regression():
    """A softmax regression [INNER, CLASSES] away from the optimum, inputs of unequal scale, and labels of its own."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, INNER)) * np.linspace(0.3, 2.0, INNER)
    weight = rng.normal(size=(INNER, CLASSES)) * 0.5
    logits = x @ weight
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    labels = (p.cumsum(1) > rng.uniform(size=(EXAMPLES, 1))).argmax(1)
    closed = np.einsum("ni,nj->ij", x**2, p * (1 - p)) / EXAMPLES  # E[x_i^2 p_j (1 - p_j)]
    return x, weight, labels, closed


def log_likelihood(weights, example):
    x, label = example
    return jax.nn.log_softmax(x @ weights["head"])[label]


def test_the_fisher_information_of_a_softmax_regression_is_the_closed_form():
    x, weight, labels, closed = regression()
    weights = {"head": jnp.float32(weight)}
    found = ewc.estimate(log_likelihood, weights, (jnp.float32(x), jnp.int32(labels)), chunk=500)["head"]
    np.testing.assert_allclose(found.row, closed.sum(1), rtol=0.08)
    np.testing.assert_allclose(found.column, closed.sum(0), rtol=0.08)
    # What is kept of it, its sums, gives the entries back up to this error.
    error = np.linalg.norm(dense(found) - closed) / np.linalg.norm(closed)
    assert error < 0.1
    # Control: the square of the mean gradient is not Fisher information (it is near 0 for labels of the model's own).
    mean = jax.grad(lambda w: jnp.mean(jax.vmap(lambda *e: log_likelihood(w, e))(jnp.float32(x), jnp.int32(labels))))
    wrong = ewc.squares(mean(weights)["head"])
    assert np.asarray(wrong.row).sum() < 0.05 * closed.sum()
    # Control: labels from elsewhere give the empirical form, which is another where the model is wrong.
    other = jnp.full(EXAMPLES, 2)
    empirical = ewc.estimate(log_likelihood, weights, (jnp.float32(x), other), chunk=500)["head"]
    assert np.abs(np.asarray(empirical.column) / closed.sum(0) - 1).max() > 0.3


def test_logistic_regression_by_the_exact_expectation_over_labels():
    """Both labels of each example, weighted by their probability: F_i = E[x_i^2 p (1 - p)], without sampling."""
    x, weight, _, _ = regression()
    x, w = x[:200], weight[:, :1]
    p = 1 / (1 + np.exp(-(x @ w)[:, 0]))
    closed = np.mean(x**2 * (p * (1 - p))[:, None], 0)

    def scaled(weights, example):  # the square of sqrt(probability) times a gradient is weighted by the probability
        row, sign, probability = example
        return jnp.sqrt(probability) * jax.nn.log_sigmoid(sign * (row @ weights["w"])[0])

    examples = (np.r_[x, x], np.r_[np.ones(200), -np.ones(200)], np.r_[p, 1 - p])
    found = ewc.estimate(scaled, {"w": jnp.float32(w)}, jax.tree.map(jnp.float32, examples), chunk=64)["w"]
    np.testing.assert_allclose(2 * np.asarray(found.row), closed, rtol=1e-4)
    np.testing.assert_allclose(2 * np.asarray(found.column), closed.sum(), rtol=1e-4)


def test_the_running_form_and_the_tasks():
    state = ewc.nothing_learned(lora_of(0))
    first, second = fisher_of(1), fisher_of(2)
    state = ewc.observe(state, first, 3, 0.9)
    finished = ewc.finish_task(state, lora_of(2))
    np.testing.assert_allclose(finished.importance.row, first.row, rtol=1e-5)  # not shrunk by its start at zero
    state = ewc.observe(state, second, 2, 0.9)
    kept = [0.9**5 * 0 + 0.9**2 * (1 - 0.9**3), 1 - 0.9**2]
    wanted = (kept[0] * np.asarray(first.row) + kept[1] * np.asarray(second.row)) / sum(kept)
    finished = ewc.finish_task(state, lora_of(2))
    np.testing.assert_allclose(finished.importance.row, wanted, rtol=1e-5)
    again = ewc.finish_task(ewc.observe(finished, second, 1), lora_of(3), 0.5)
    np.testing.assert_allclose(again.importance.row, 0.5 * wanted + np.asarray(second.row), rtol=1e-5)
    np.testing.assert_allclose(delta_of(again.anchor), delta_of(lora_of(3)), rtol=1e-5)
    idle = ewc.finish_task(again, lora_of(4))
    np.testing.assert_allclose(idle.importance.row, again.importance.row)
    assert int(idle.tasks) == 3 and float(idle.weight) == 0
    with pytest.raises(ConfigError, match="the anchor"):
        ewc.finish_task(state, lora_of(0, rank=3))


def test_the_end_of_a_task_is_seen_in_its_inputs():
    rng = np.random.default_rng(0)
    watch = jax.jit(lambda shift, values: jax.lax.scan(ewc.observe_shift, shift, values))
    steady = rng.normal(size=(400, 32))
    shift, ended = watch(ewc.nothing_observed(32), jnp.float32(steady))
    assert not np.any(ended)
    np.testing.assert_allclose(shift.mean, steady.mean(0), atol=1e-5)
    np.testing.assert_allclose(shift.squares / 399, steady.var(0, ddof=1), rtol=1e-4)
    moved = 3.0 + rng.normal(size=(10, 32))
    after, ended = watch(shift, jnp.float32(moved))
    assert np.asarray(ended).tolist() == [True] + [False] * 9 and int(after.count) == 10
    _, ended = watch(shift, jnp.float32(0.5 + rng.normal(size=(10, 32))))
    assert not np.any(ended)  # control: a drift of half a deviation is no boundary
    _, ended = watch(ewc.nothing_observed(32), jnp.float32(np.r_[steady[:40], moved]))
    assert not np.any(ended)  # too few to judge by
