"""Uncertainty on one scale, the positions that are chosen, and the head that learns it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.errors import ConfigError
from ruvjax.lora import guided
from ruvjax.lora.guided import DGR

VOCABULARY = 11
METRICS = ("entropy", "gap", "variance")


def expected(metric, logits):
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    if metric == "entropy":
        return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1) / np.log(VOCABULARY)
    if metric == "gap":
        top = np.sort(logits, axis=-1)
        return 2 / (1 + np.exp(top[..., -1] - top[..., -2]))
    certain = np.eye(VOCABULARY)[0].var()
    return 1 - p.var(axis=-1) / certain


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_that_of_numpy_and_runs_from_sure_to_unsure(metric):
    config, rng = DGR(metric), np.random.default_rng(0)
    measure = jax.jit(guided.uncertainty, static_argnums=0)
    logits = rng.normal(size=(3, 5, VOCABULARY)) * np.exp(rng.normal(size=(3, 5, 1)))
    logits[0, 0, 3:6] = -1e9  # tokens that a sampler forbids
    np.testing.assert_allclose(measure(config, jnp.asarray(logits, jnp.float32)), expected(metric, logits), atol=1e-5)
    direction = rng.normal(size=(VOCABULARY,))
    ladder = np.asarray(measure(config, jnp.asarray(np.outer([0, 0.3, 1, 3, 10, 300], direction), jnp.float32)))
    assert (np.diff(ladder) < 0).all() or (ladder[-2:] < 1e-6).all() and (np.diff(ladder)[:-1] < 0).all()
    np.testing.assert_allclose(ladder[[0, -1]], [1, 0], atol=1e-6)
    assert ((ladder >= 0) & (ladder <= 1)).all()


def test_the_schedule_weighs_late_steps_more_and_is_finite_at_zero():
    unsure = jnp.full((4, 2), 0.3)
    time = jnp.asarray([1.0, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(
        guided.scheduled(DGR(), unsure, time)[:, 0], [0.3, 0.3 / np.sqrt(0.5), 0.6, 1.0], rtol=1e-6
    )
    np.testing.assert_array_equal(guided.scheduled(DGR(by_time=False), unsure, time), unsure)
    assert np.isfinite(guided.scheduled(DGR(), jnp.zeros((1, 2)), jnp.zeros(1))).all()


def test_the_least_sure_candidates_above_the_threshold_are_chosen_up_to_the_cap():
    rng = np.random.default_rng(1)
    unsure, candidates = rng.random((20, 9)).astype(np.float32), rng.random((20, 9)) < 0.6
    config = DGR(threshold=0.4, max_retrievals=3)
    positions, chosen = guided.choose(config, jnp.asarray(unsure), jnp.asarray(candidates))
    for row in range(20):
        able = [i for i in np.argsort(-unsure[row]) if candidates[row, i] and unsure[row, i] > 0.4][:3]
        assert np.asarray(positions[row])[np.asarray(chosen[row])].tolist() == able
    short, _ = guided.choose(config, jnp.asarray(unsure[:, :2]), jnp.asarray(candidates[:, :2]))
    assert short.shape == (20, 2)
    assert not np.asarray(guided.choose(config, jnp.full((1, 9), jnp.nan), jnp.ones((1, 9), bool))[1]).any()


def test_the_head_learns_the_probability_of_being_wrong():
    """Against the closed truth: outcomes are drawn from a known logistic law, and shuffled outcomes teach nothing."""
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(6000, 4)) * [1, 5, 0.2, 1] + [0, 3, 0, -2]
    law = np.array([1.2, -0.3, 3.0, 0.0])
    chance = 1 / (1 + np.exp(-(hidden @ law + 0.5)))
    wrong = rng.random(6000) < chance
    fit = jax.jit(lambda hidden, wrong: guided.fit_head(hidden, wrong, penalty=1e-4))
    head = fit(jnp.asarray(hidden, jnp.float32), jnp.asarray(wrong))
    np.testing.assert_allclose(head.weight, law, atol=0.3)
    found = guided.uncertainty(DGR("head"), jnp.zeros((6000, 2)), jnp.asarray(hidden, jnp.float32), head)
    assert np.abs(found - chance).mean() < 0.02
    control = fit(jnp.asarray(hidden, jnp.float32), jnp.asarray(rng.permutation(wrong)))
    blind = guided.uncertainty(DGR("head"), jnp.zeros((6000, 2)), jnp.asarray(hidden, jnp.float32), control)
    assert np.abs(blind - chance).mean() > 0.15
    never = fit(jnp.asarray(hidden, jnp.float32), jnp.zeros(6000, bool))
    assert np.isfinite(never.weight).all() and float(never.bias) < -2
    with pytest.raises(ConfigError, match="needs a head"):
        guided.uncertainty(DGR("head"), jnp.zeros((1, 2)))
    with pytest.raises(ConfigError, match="fit no head"):
        guided.fit_head(jnp.zeros((0, 3)), jnp.zeros(0, bool))


@pytest.mark.parametrize(
    "settings",
    [{"metric": "doubt"}, {"threshold": 1.5}, {"threshold": True}, {"max_retrievals": 0}, {"top_k": 0}, {"by_time": 1}],
)
def test_a_configuration_that_cannot_be_used_is_named(settings):
    with pytest.raises(ConfigError, match=f"dgr.{next(iter(settings))}"):
        DGR(**settings)
