import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import layout
from ruvjax.core.linear import embed, linear, readout

SHAPES = [((3, 5, 8), 16), ((7, 8), 3), ((1, 1, 1), 1), ((0, 8), 4)]


@pytest.mark.parametrize("shape,outer", SHAPES)
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_linear_and_its_gradients_are_those_of_the_plain_product(shape, outer, dtype, tolerance):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape).astype(dtype)
    w = jax.random.normal(keys[1], (shape[-1], outer))
    dy = jax.random.normal(keys[2], (*shape[:-1], outer)).astype(dtype)
    y, pull = jax.vjp(linear, x, w)
    dx, dw = pull(dy)
    exact = [np.asarray(a, np.float64) for a in (x, w.astype(dtype), dy)]
    flat, dflat = exact[0].reshape(-1, shape[-1]), exact[2].reshape(-1, outer)
    scale = np.sqrt(shape[-1] * outer)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact[0] @ exact[1], atol=tolerance * scale)
    np.testing.assert_allclose(np.asarray(dx, np.float64), exact[2] @ exact[1].T, atol=tolerance * scale)
    np.testing.assert_allclose(np.asarray(dw, np.float64), flat.T @ dflat, atol=tolerance * scale)
    assert dx.dtype == x.dtype and dw.dtype == w.dtype


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_readout_gradients(dtype, tolerance):
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 8)).astype(dtype)
    table = jax.random.normal(jax.random.key(1), (11, 8))
    logits, pull = jax.vjp(readout, hidden, table)
    assert logits.dtype == jnp.float32
    g = jax.random.normal(jax.random.key(2), logits.shape)
    dh, dt = pull(g)
    h64, t64, g64 = (np.asarray(a, np.float64) for a in (hidden, table, g))
    np.testing.assert_allclose(logits, h64 @ t64.T, atol=8 * tolerance)
    np.testing.assert_allclose(np.asarray(dh, np.float64), g64 @ t64, atol=20 * tolerance)
    np.testing.assert_allclose(dt, np.einsum("blv,blw->vw", g64, h64), atol=20 * tolerance)


def test_embed_gradient_adds_up_repeated_tokens():
    table = jax.random.normal(jax.random.key(0), (5, 3))
    tokens = jnp.array([[1, 1, 4], [0, 1, 2]], jnp.int32)
    dy = jax.random.normal(jax.random.key(1), (2, 3, 3))
    (gradient,) = jax.vjp(lambda t: embed(tokens, t), table)[1](dy)
    expected = np.zeros((5, 3))
    np.add.at(expected, np.asarray(tokens).reshape(-1), np.asarray(dy).reshape(-1, 3))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("native", [False, True])
def test_the_layout_forms_give_equal_gradients(monkeypatch, native):
    """The constrained copy is chosen by the CPU's instructions, so both forms are run here whatever the machine."""
    monkeypatch.setattr(layout, "native_bfloat16", lambda: native)
    x = jax.random.normal(jax.random.key(0), (4, 32, 64)).astype(jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (64, 48))

    def run(x, w):
        return jax.grad(lambda x, w: jnp.sum(linear(x, w).astype(jnp.float32) ** 2), argnums=(0, 1))(x, w)

    dx, dw = jax.jit(run)(x, w)
    y = np.asarray(linear(x, w), np.float64)
    expected = np.asarray(x, np.float64).reshape(-1, 64).T @ (2 * y).reshape(-1, 48)
    np.testing.assert_allclose(dw, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())
    assert np.isfinite(np.asarray(dx, np.float32)).all()


def test_linear_under_vmap_over_weights():
    x = jax.random.normal(jax.random.key(0), (3, 4, 8))
    w = jax.random.normal(jax.random.key(1), (3, 8, 2))
    gradient = jax.grad(lambda w: jnp.sum(jax.vmap(linear)(x, w) ** 2))(w)
    expected = jax.grad(lambda w: jnp.sum(jnp.einsum("nbi,nio->nbo", x, w) ** 2))(w)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
