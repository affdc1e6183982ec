"""Normalisation, computed in float32 and returned in the input's dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*batch width"], scale: Float[Array, "width"], eps: float) -> Float[Array, "*batch width"]:
    """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse).astype(x.dtype) * _along_last(scale, x)


def layer_norm(
    x: Float[Array, "*batch width"], scale: Float[Array, "width"], eps: float
) -> Float[Array, "*batch width"]:
    """(x - mean) / sqrt(var + eps) * scale, without a bias (the norm of MDLM's transformer)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * inverse).astype(x.dtype) * _along_last(scale, x)


def _along_last(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
