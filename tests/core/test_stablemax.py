"""Stable-max against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.stablemax import cross_entropy, log_stablemax


def by_definition(x):
    s = np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))
    return np.log(s / s.sum(-1, keepdims=True))


@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_it_is_the_quotient_in_float64(scale):
    x = np.random.default_rng(0).normal(size=(5, 7)) * scale
    np.testing.assert_allclose(log_stablemax(jnp.float32(x)), by_definition(x), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(np.exp(log_stablemax(jnp.float32(x))).sum(-1), 1.0, rtol=1e-5)
    softmax = jax.nn.log_softmax(jnp.float32(x))  # the control: another function
    assert np.abs(np.asarray(softmax) - by_definition(x)).max() > 1e-3


def test_its_slope_has_no_kink_at_zero():
    x = np.array([[0.0, 0.0, 2.0, -3.0]])
    step = 1e-6
    numeric = [(by_definition(x + step * e)[0, 0] - by_definition(x - step * e)[0, 0]) / (2 * step) for e in np.eye(4)]
    exact = jax.grad(lambda v: log_stablemax(v)[0, 0])(jnp.float32(x))[0]
    np.testing.assert_allclose(exact, numeric, atol=1e-5)


def test_far_out_logits_stay_finite():
    x = jnp.array([[1e30, -1e30, 0.0]], jnp.float32)
    assert np.isfinite(log_stablemax(x)).all()
    assert np.isfinite(jax.grad(lambda v: cross_entropy(v, jnp.array([1])).sum())(x)).all()


def test_cross_entropy_picks_the_label():
    x = np.random.default_rng(1).normal(size=(2, 3, 5))
    labels = np.array([[0, 4, 2], [1, 1, 3]], np.int32)
    picked = -np.take_along_axis(by_definition(x), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(jnp.float32(x), jnp.asarray(labels)), picked, rtol=1e-5)
    softmax = -np.take_along_axis(np.asarray(jax.nn.log_softmax(jnp.float32(x))), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(jnp.float32(x), jnp.asarray(labels), stablemax=False), softmax, rtol=1e-6)
