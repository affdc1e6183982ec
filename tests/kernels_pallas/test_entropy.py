"""Entropy of logits against numpy in float64, in every body, with forbidden tokens and rows that are certain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import native
from kernels_pallas.dispatch import ImplError
from kernels_pallas.entropy import cpu, entropy, reference, xla

missing = native.unavailable(cpu.SOURCE, cpu.TARGETS)
needs_compiler = pytest.mark.skipif(bool(missing), reason=f"no native entropy: {missing}")
BODIES = {"native": cpu.entropy, "xla": xla.entropy, "reference": reference.entropy}


def expected(logits):
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)


@pytest.mark.parametrize("body", [pytest.param("native", marks=needs_compiler), "xla", "reference"])
@pytest.mark.parametrize("vocabulary", [1, 7, 16, 530])
def test_every_body_is_numpy(body, vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(9, vocabulary)) * np.exp(2 * rng.normal(size=(9, 1))) + 50 * rng.normal(size=(9, 1))
    logits[0, : vocabulary // 2] = -np.inf
    logits[1, : vocabulary // 2] = -1e30  # as a sampler forbids a token
    logits[2] = 3.0
    found = jax.jit(BODIES[body])(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found, expected(logits.astype(np.float32).astype(np.float64)), atol=2e-5)
    broken = logits.copy()
    broken[4, vocabulary // 2] = np.nan
    found = np.asarray(jax.jit(BODIES[body])(jnp.asarray(broken, jnp.float32)))
    assert np.isfinite(np.delete(found, 4)).all()  # a broken row breaks no other


def test_the_op_takes_any_shape_and_has_no_gradient():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 40)), jnp.bfloat16)
    np.testing.assert_allclose(entropy(logits), expected(np.asarray(logits, np.float64)), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(entropy)(logits), entropy(logits), atol=1e-6)
    assert entropy(jnp.zeros((0, 4))).shape == (0,)
    assert not jax.grad(lambda x: jnp.sum(entropy(x)))(logits.astype(jnp.float32)).any()
    with pytest.raises(ImplError, match="not written"):
        entropy(logits, impl="pallas_tpu")
