"""Adam-atan2 and the sign rule against their formulas in float64, and which weights each rule reaches."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.params import ParamSpec
from ruvjax.training.adam_atan2 import scale_by_adam_atan2
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer


def test_it_is_the_published_update():
    b1, b2 = 0.9, 0.95
    rule = scale_by_adam_atan2(b1, b2)
    params = {"w": jnp.zeros((4, 3))}
    state, first, second = rule.init(params), np.zeros((4, 3)), np.zeros((4, 3))
    for step in range(1, 6):
        g = np.random.default_rng(step).normal(size=(4, 3)) * 10.0 ** (step - 3)
        updates, state = rule.update({"w": jnp.float32(g)}, state)
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g * g
        expected = np.arctan2(first, np.sqrt(second / (1 - b2**step))) / (1 - b1**step)
        np.testing.assert_allclose(updates["w"], expected, rtol=2e-5)
        inside = np.arctan2(first / (1 - b1**step), np.sqrt(second / (1 - b2**step)))
        if step < 5:  # the control: the correction inside the arc tangent is another rule
            assert np.abs(inside - expected).max() > 1e-3


def test_it_does_not_see_the_scale_of_the_gradient():
    g = {"w": jnp.float32(np.random.default_rng(0).normal(size=(8,)))}
    rule = scale_by_adam_atan2()
    updates = [rule.update({"w": g["w"] * scale}, rule.init(g))[0]["w"] for scale in (1.0, 1e-6, 1e6)]
    np.testing.assert_allclose(updates[1], updates[0], rtol=1e-5)
    np.testing.assert_allclose(updates[2], updates[0], rtol=1e-5)


def test_no_gradient_no_update():
    zeros = {"w": jnp.zeros((3,))}
    rule = scale_by_adam_atan2()
    updates, _ = rule.update(zeros, rule.init(zeros))
    assert not np.asarray(updates["w"]).any()


@dataclass(frozen=True)
class Model:
    def spec(self):
        return {
            "puzzles": ParamSpec((4, 3), ("puzzles", "embed"), "normal"),
            "matrix": ParamSpec((2, 3, 3), ("layers", "embed", "mlp")),
            "vector": ParamSpec((2, 3), ("layers", None), "normal"),
            "a_log": ParamSpec((2, 3, 4), ("layers", "mlp", None), "normal"),
            "d": ParamSpec((2, 3), ("layers", "mlp"), "normal"),
            "dt_bias": ParamSpec((2, 3), ("layers", "mlp"), "normal"),
            "conv": ParamSpec((2, 4, 3), ("layers", None, "mlp"), "normal"),
        }


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.float32(rng.normal(size=spec.shape)) for name, spec in Model().spec().items()}


@pytest.mark.parametrize("kind", ["adamw", "adam_atan2", "lion", "muon"])
def test_puzzle_vectors_go_by_sign_and_untouched_rows_stay(kind):
    config = OptimizerConfig(kind=kind, weight_decay=0.5, puzzle_rate=3.0, clip=0.0)
    optimizer = build_optimizer(config, Model().spec())
    params, gradient = drawn(0), drawn(1)
    gradient["puzzles"] = gradient["puzzles"].at[1].set(0.0).at[2, 0].set(0.0)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    expected = -3.0 * (np.sign(gradient["puzzles"]) + 0.5 * np.asarray(params["puzzles"]))
    expected[1] = 0.0
    np.testing.assert_allclose(updates["puzzles"], expected, rtol=1e-6)
    assert updates["puzzles"][2, 0] != 0  # its row is touched: decay holds


@pytest.mark.parametrize("kind", ["adamw", "adam_atan2", "lion", "muon"])
def test_decay_reaches_matrices_and_no_per_channel_weight(kind):
    params, gradient = drawn(0), drawn(1)

    def update(decay):
        optimizer = build_optimizer(OptimizerConfig(kind=kind, weight_decay=decay, clip=0.0), Model().spec())
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    change = jax.tree.map(lambda a, b: np.asarray(a - b), update(0.5), update(0.0))
    for name in ("matrix", "conv"):
        np.testing.assert_allclose(change[name], -0.5 * np.asarray(params[name]), atol=1e-5)
    for name in ("vector", "a_log", "d", "dt_bias"):
        assert not change[name].any()


def test_muon_leaves_state_space_weights_to_adam():
    params, gradient = drawn(0), drawn(1)
    optimizer = build_optimizer(OptimizerConfig(kind="muon", weight_decay=0.0, clip=0.0), Model().spec())
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    for name in ("a_log", "d", "dt_bias", "conv", "vector"):  # the first update of Adam is the sign
        np.testing.assert_allclose(updates[name], -np.sign(gradient[name]), atol=1e-4)
    values = np.linalg.svd(np.asarray(updates["matrix"][0], np.float64), compute_uv=False) / (0.2 * math.sqrt(3))
    assert values.max() / values.min() < 3
