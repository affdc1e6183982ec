"""The oracle: every selected pair of matrices gathered and multiplied, in float32 (float64 where the inputs are)."""

import jax
import jax.numpy as jnp


def lora_bank(x: jax.Array, a: jax.Array, b: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """x [rows, length, in], a [bank, in, rank], b [bank, rank, out], ids and weights [rows, k]; differentiable by
    autodiff. See `kernels_pallas.lora_bank.lora_bank`."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x_wide, a, b, weights = (value.astype(dtype) for value in (x, a[ids], b[ids], weights))
    inner = jnp.einsum("sli,skir->slkr", x_wide, a, precision="highest")
    return jnp.einsum("slkr,sk,skro->slo", inner, weights, b, precision="highest").astype(x.dtype)
