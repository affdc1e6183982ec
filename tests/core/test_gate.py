import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.gate import swiglu


def plain(gate, up):
    return gate / (1 + jnp.exp(-gate)) * up


def test_value_and_gradients_are_the_formulas():
    with jax.enable_x64(True):
        gate, up, dy = (jax.random.normal(jax.random.key(i), (3, 5), jnp.float64) * 4 for i in range(3))
        got, expected = (jax.vjp(form, gate, up) for form in (swiglu, plain))
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-12)
        for ours, theirs in zip(got[1](dy), expected[1](dy)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize("gate", [-1e4, -90.0, 0.0, 90.0, 1e4])
def test_large_gates_stay_finite(gate):
    x = jnp.full((1,), gate, jnp.float32)
    grads = jax.grad(lambda g, u: swiglu(g, u).sum(), argnums=(0, 1))(x, jnp.full((1,), 2.0))
    assert np.isfinite(np.asarray(grads)).all()
    np.testing.assert_allclose(swiglu(x, jnp.full((1,), 2.0)), 2.0 * max(gate, 0.0), atol=1e-6)


def test_bfloat16_is_rounded_once():
    gate, up = (jax.random.normal(jax.random.key(i), (64, 64)).astype(jnp.bfloat16) for i in range(2))
    exact = plain(gate.astype(jnp.float32), up.astype(jnp.float32))
    np.testing.assert_array_equal(swiglu(gate, up), exact.astype(jnp.bfloat16))
