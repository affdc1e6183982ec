"""The TPU bodies of scan and loss: interpreted against the oracles, and lowered for a TPU. Never run on one here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.unmask import masked_cross_entropy

pytestmark = pytest.mark.pallas


def scan_operands(batch=2, length=24, width=128, state=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (batch, length, width)).astype(dtype)
    delta = jax.nn.softplus(jax.random.normal(keys[1], x.shape) - 2).astype(dtype)
    a = -jnp.exp(jax.random.normal(keys[2], (width, state)))
    b, c = (jax.random.normal(key, (batch, length, state)).astype(dtype) for key in keys[3:5])
    return x, delta, a, b, c, jnp.ones(width), jax.random.normal(keys[5], (batch, width, state))


def scan(impl, reset=None):
    return lambda *o: selective_scan(*o[:6], initial=o[6], reset=reset, impl=impl)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("cut", [False, True])
def test_the_interpreted_scan_is_the_oracle(dtype, tolerance, cut):
    operands = scan_operands(dtype=dtype)
    reset = jnp.zeros((2, 24), bool).at[0, 7].set(True) if cut else None
    for ours, expected in zip(jax.jit(scan("interpret", reset))(*operands), scan("reference", reset)(*operands)):
        scale = max(1.0, float(jnp.abs(expected).max()))
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(expected, np.float32), atol=tolerance * scale
        )


def test_the_gradients_of_the_interpreted_scan_are_the_oracles():
    operands = scan_operands()

    def loss(impl):
        def value(*operands):
            y, final = scan(impl)(*operands)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(final))

        return jax.jit(jax.grad(value, argnums=tuple(range(7))))(*operands)

    for ours, expected in zip(loss("interpret"), loss("reference"), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5 * max(1.0, float(jnp.abs(expected).max())))


def test_the_interpreted_cross_entropy_is_the_oracle():
    logits = 3 * jax.random.normal(jax.random.key(1), (16, 256))
    targets = jax.random.randint(jax.random.key(2), (16,), -1, 255)

    def both(impl):
        def value(logits):
            return jnp.sum(jnp.sin(masked_cross_entropy(logits, targets, 255, impl=impl)))

        return masked_cross_entropy(logits, targets, 255, impl=impl), jax.grad(value)(logits)

    for ours, expected in zip(both("interpret"), both("reference"), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_every_body_lowers_for_a_tpu():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in scan_operands()]
    forward = jax.jit(scan("pallas_tpu")).trace(*shapes).lower(lowering_platforms=("tpu",))
    backward = jax.jit(jax.grad(lambda *o: jnp.sum(scan("pallas_tpu")(*o)[0]))).trace(*shapes)
    logits = jax.ShapeDtypeStruct((16, 256), jnp.float32)
    targets = jax.ShapeDtypeStruct((16,), jnp.int32)
    loss = jax.jit(lambda x, t: masked_cross_entropy(x, t, 255, impl="pallas_tpu")).trace(logits, targets)
    for program in (forward, *(traced.lower(lowering_platforms=("tpu",)) for traced in (backward, loss))):
        assert "tpu_custom_call" in program.as_text()
