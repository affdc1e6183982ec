"""The oracle: softmax attention as written in the paper, in float32 (float64 where the inputs are)."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import blocks
from kernels_pallas.attention.mask import Mask


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """softmax(scale * q k^T) v by autodiff-able einsums; a row that may attend to nothing gives zeros."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    group = q.shape[2] // k.shape[2]
    q, k, v = blocks.without_padding(mask, q, k, v)
    wide = [jnp.repeat(x.astype(dtype), group, axis=2) for x in (k, v)]
    scores = scale * jnp.einsum("blhd,bmhd->bhlm", q.astype(dtype), wide[0])
    allowed = mask.allowed(q.shape[1])
    if allowed is None:
        probs = jax.nn.softmax(scores, axis=-1)
    else:
        allowed = allowed[:, None]
        peak = jnp.max(jnp.where(allowed, scores, -1e30), axis=-1, keepdims=True)
        weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - peak, 0.0)), 0.0)
        total = weights.sum(axis=-1, keepdims=True)
        probs = weights / jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("bhlm,bmhd->blhd", probs, wide[1]).astype(q.dtype)
    return blocks.without_padding(mask, out)[0]
