"""Schedules and optimisers against float64 references."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.errors import ConfigError
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer, learning_rate


def rates(config, total):
    return np.asarray([learning_rate(config, step, total) for step in range(total)], np.float64)


def test_cosine_warms_up_peaks_and_ends_at_its_final_share():
    config = OptimizerConfig(lr=0.5, warmup_steps=10, schedule="cosine", final_share=0.1)
    expected = []
    for step in range(100):
        progress = max(0.0, (step + 1 - 10) / 90)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        expected.append(0.5 * min(1.0, (step + 1) / 10) * cosine)
    np.testing.assert_allclose(rates(config, 100), expected, rtol=1e-5)
    assert rates(config, 100).argmax() == 9
    assert rates(config, 100)[-1] == pytest.approx(0.05, rel=1e-5)


def test_wsd_is_flat_and_then_falls_on_a_line():
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_share=0.25, final_share=0.2)
    values = rates(config, 100)
    np.testing.assert_allclose(values[9:75], 1.0)
    np.testing.assert_allclose(values[75:], 1 - 0.8 * np.arange(1, 26) / 25, rtol=1e-5)


def test_constant_holds_the_peak_after_warm_up():
    np.testing.assert_allclose(rates(OptimizerConfig(lr=1.0, warmup_steps=4, schedule="constant"), 20)[3:], 1.0)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_does_not_depend_on_the_length_of_the_run(schedule):
    config = OptimizerConfig(warmup_steps=20, schedule=schedule)
    for step in range(20):
        assert learning_rate(config, step, 1000) == learning_rate(config, step, 2**30)
    if schedule == "cosine":  # beyond warm-up it does, or the check above could not fail
        assert learning_rate(config, 500, 1000) != learning_rate(config, 500, 2**30)


def test_warm_up_longer_than_the_run_is_cut_to_it():
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=100), 9, 10) == 1.0


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_is_the_published_update(toy, clip):
    config = OptimizerConfig(b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1, clip=clip)
    optimizer = build_optimizer(config, toy.Model().spec())
    params = toy.init(toy.Model(), jax.random.key(0))
    state = optimizer.init(params)
    reference = {name: np.asarray(getattr(params, name), np.float64) for name in ("embedding", "mix", "scale")}
    first = {name: np.zeros_like(value) for name, value in reference.items()}
    second = {name: np.zeros_like(value) for name, value in reference.items()}
    decay = {"embedding": 0.1, "mix": 0.1, "scale": 0.0}  # a stacked vector is still a vector
    for step in range(1, 5):
        draw = np.random.default_rng(step)
        gradient = {name: draw.normal(size=value.shape) for name, value in reference.items()}
        updates, state = optimizer.update(toy.Params(**{k: jnp.float32(v) for k, v in gradient.items()}), state, params)
        params = jax.tree.map(lambda p, u: p + 0.01 * u, params, updates)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        cut = min(1.0, clip / norm) if clip else 1.0
        for name, value in reference.items():
            g = gradient[name] * cut
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            moved = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.95**step)) + 1e-6)
            reference[name] = value - 0.01 * (moved + decay[name] * value)
    for name, value in reference.items():
        np.testing.assert_allclose(getattr(params, name), value, atol=2e-6)


def test_lion_takes_the_sign_of_the_interpolated_momentum(toy):
    optimizer = build_optimizer(OptimizerConfig(kind="lion", weight_decay=0.0, clip=0.0), toy.Model().spec())
    params = toy.init(toy.Model(), jax.random.key(0))
    gradient = jax.tree.map(lambda p: p - 0.1, params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -np.sign(g)), updates, gradient)


def test_muon_orthogonalises_each_hidden_matrix_and_nothing_else(toy):
    config = OptimizerConfig(kind="muon", weight_decay=0.0, clip=0.0)
    optimizer = build_optimizer(config, toy.Model().spec())
    params = toy.init(toy.Model(), jax.random.key(0))
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(3), p.shape), params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    size = 0.2 * math.sqrt(toy.WIDTH)  # singular values of a square update at root mean square 0.2
    for layer in range(2):
        values = np.linalg.svd(np.asarray(updates.mix[layer], np.float64), compute_uv=False) / size
        assert 0.5 < values.min() and values.max() < 1.3  # the quintic iteration lands near 1, not on it
        raw = np.linalg.svd(np.asarray(gradient.mix[layer], np.float64), compute_uv=False)
        assert raw.max() / raw.min() > 3  # the gradient itself is far from orthogonal
    for name in ("embedding", "scale"):  # the first update of Adam is the sign
        np.testing.assert_allclose(getattr(updates, name), -np.sign(getattr(gradient, name)), atol=1e-4)


def test_muon_decays_matrices_and_not_vectors(toy):
    params = toy.init(toy.Model(), jax.random.key(0))
    gradient = jax.tree.map(lambda p: p + 1.0, params)

    def update(weight_decay):
        optimizer = build_optimizer(OptimizerConfig(kind="muon", weight_decay=weight_decay), toy.Model().spec())
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    change = jax.tree.map(lambda a, b: a - b, update(0.5), update(0.0))
    for name, share in (("embedding", 0.5), ("mix", 0.5), ("scale", 0.0)):
        np.testing.assert_allclose(getattr(change, name), -share * getattr(params, name), atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "sgd"},
        {"schedule": "linear"},
        {"lr": 0.0},
        {"lr": "1e-3"},
        {"lr": True},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"b2": 1.0},
        {"b1": -0.1},
        {"clip": -1.0},
        {"warmup_steps": 1.5},
        {"warmup_steps": -1},
        {"decay_share": 1.1},
        {"ema": 1.0},
    ],
)
def test_wrong_values_are_named(wrong):
    (name, value), *_ = wrong.items()
    config = OptimizerConfig()
    object.__setattr__(config, name, value)  # past beartype, which only tests switch on
    with pytest.raises(ConfigError, match=f"optimizer.{name}={value!r}"):
        config.__post_init__()
