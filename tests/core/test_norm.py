import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.norm import rms_norm


def written_out(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16), (16,), (0, 16)])
def test_rms_norm_and_its_hand_written_gradient_are_autodiffs(shape):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        x, dy = (jax.random.normal(key, shape, jnp.float64) for key in keys[:2])
        scale = jax.random.normal(keys[2], (16,), jnp.float64)
        y, back = jax.vjp(lambda x, scale: rms_norm(x, scale, 1e-3), x, scale)
        expected, back_of_it = jax.vjp(lambda x, scale: written_out(x, scale, 1e-3), x, scale)
        for ours, theirs in zip((y, *back(dy)), (expected, *back_of_it(dy)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_scale_is_summed_in_float32():
    x = jax.random.normal(jax.random.key(0), (4096, 8)).astype(jnp.bfloat16)
    exact = jax.grad(lambda scale: written_out(x.astype(jnp.float32), scale, 1e-6).sum())(jnp.ones(8))
    ours = jax.grad(lambda scale: rms_norm(x, scale, 1e-6).astype(jnp.float32).sum())(jnp.ones(8))
    np.testing.assert_allclose(ours, exact, atol=0.05)
    in_halves = jnp.cumsum(x, axis=0)[-1].astype(jnp.float32)  # what a sum in bfloat16 loses
    assert np.abs(in_halves - exact).max() > 0.05
