"""The multiply from the left against einsum in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.mixing import mix


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_values_and_gradients(dtype, tolerance):
    draw = np.random.default_rng(0)
    x, w, dy = draw.normal(size=(5, 2, 3)), draw.normal(size=(5, 7)), draw.normal(size=(7, 2, 3))
    x32, w32 = jnp.asarray(x, dtype), jnp.float32(w)
    y, pull = jax.vjp(mix, x32, w32)
    dx, dw = pull(jnp.asarray(dy, dtype))
    assert y.dtype == dx.dtype == jnp.dtype(dtype) and dw.dtype == jnp.float32
    for ours, exact in (
        (y, np.einsum("lf,lbd->fbd", w, x)),
        (dx, np.einsum("lf,fbd->lbd", w, dy)),
        (dw, np.einsum("lbd,fbd->lf", x, dy)),
    ):
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, atol=tolerance * np.abs(exact).max())
