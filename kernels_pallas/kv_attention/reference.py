"""The oracle: dequantize the whole cache and take one softmax over both tiers, in float32 (float64 where it is)."""

import jax
import jax.numpy as jnp

from kernels_pallas.kv_attention.pages import Pages
from kernels_pallas.kv_attention.tiers import PagedTiers, dense


def kv_attention(q: jax.Array, tiers: PagedTiers, pages: Pages, positions: jax.Array, scale: float) -> jax.Array:
    """See `kernels_pallas.kv_attention.kv_attention`; positions are int32 [batch, length]."""
    k, v, position, valid = dense(tiers, pages)
    dtype = jnp.promote_types(q.dtype, k.dtype)
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(dtype), group, axis=2) for x in (k, v))
    scores = scale * jnp.einsum("bqhd,bkhd->bhqk", q.astype(dtype), k, precision="highest")
    allowed = (valid[:, None, :] & (position[:, None, :] <= positions[:, :, None]))[:, None]
    peak = jnp.max(jnp.where(allowed, scores, -1e30), axis=-1, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - peak, 0.0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    probs = weights / jnp.where(total == 0, 1.0, total)
    return jnp.einsum("bhqk,bkhd->bqhd", probs, v, precision="highest").astype(q.dtype)
