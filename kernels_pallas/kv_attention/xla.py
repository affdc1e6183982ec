"""Attention over the pages for XLA: a few pages at a time are gathered, dequantized and folded into a running softmax,
each tier apart; the two results are merged by their log-sum-exp. On a CPU one query over 4096 tokens in int8 takes no
longer than a plain softmax over the same keys and values in float32, which are four times the bytes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.kv_attention import hadamard
from kernels_pallas.kv_attention.pages import Pages
from kernels_pallas.kv_attention.tiers import PagedTiers, Store, fetch, tier_views
from kernels_pallas.layout import contract

LOG_ZERO = -1e30


class Part(NamedTuple):
    """Softmax over some of the keys, not normalised: sum of exp(score - peak) v, that sum without v, and the peak."""

    out: jax.Array  # [batch, kv_heads, rows, dim]
    total: jax.Array  # [batch, kv_heads, rows]
    peak: jax.Array


def pages_per_step(batch: int, kv_heads: int, rows: int, page: int, dim: int) -> int:
    """How many pages of each sequence are dequantized at once: 256 tokens, 512 for the rows of a chunk of prompt (a
    quarter faster on two cores), fewer where that is over two mebibytes of keys in float32."""
    tokens = 512 if rows >= 128 else 256
    return max(1, min(tokens // page, 2**19 // max(batch * kv_heads * page * dim, 1)))


def kv_attention(q: jax.Array, tiers: PagedTiers, pages: Pages, positions: jax.Array, scale: float) -> jax.Array:
    """See `kernels_pallas.kv_attention.kv_attention`; positions are int32 [batch, length]."""
    rows, seen = fold(q, positions, tiers.tail_k.bits.shape[1], scale)
    parts = []
    for table, first, end, (k, v) in tier_views(tiers, pages):
        if table.shape[1] == 0 or rows.size == 0:
            continue
        turned = hadamard.rotate(rows) if isinstance(k, Store) and tiers.rotated else rows
        parts.append(_tier(turned, seen, table, first, end, k, v, pages.page))
    return unfold(merge(parts), q) if parts else jnp.zeros_like(q)


def fold(q: jax.Array, positions: jax.Array, kv_heads: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """Queries that share a key head one below the other: scale * q as [batch, kv_heads, rows, dim] in at least float32,
    and the position up to which each row sees, int32 [batch, rows]."""
    batch, length, heads, dim = q.shape
    group = heads // kv_heads
    wide = scale * q.astype(jnp.promote_types(q.dtype, jnp.float32))
    wide = wide.reshape(batch, length, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    return wide.reshape(batch, kv_heads, length * group, dim), jnp.repeat(positions, group, axis=1)


def unfold(rows: jax.Array, q: jax.Array) -> jax.Array:
    """The inverse of `fold` for the result, in the shape and dtype of q."""
    batch, length, heads, dim = q.shape
    kv_heads = rows.shape[1]
    out = rows.reshape(batch, kv_heads, length, heads // kv_heads, dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(q.shape).astype(q.dtype)


def merge(parts: list[Part]) -> jax.Array:
    """One softmax out of those over disjoint sets of keys; zeros where all of them are empty."""
    peak = parts[0].peak
    for part in parts[1:]:
        peak = jnp.maximum(peak, part.peak)
    weights = [jnp.exp(part.peak - peak) for part in parts]
    out = sum(weight[..., None] * part.out for weight, part in zip(weights, parts))
    total = sum(weight * part.total for weight, part in zip(weights, parts))
    return out / jnp.where(total == 0, 1.0, total)[..., None]


def _tier(q, seen, table, first, end, k, v, page) -> Part:
    batch, slots = table.shape
    _, kv_heads, rows, dim = q.shape
    many = min(pages_per_step(batch, kv_heads, rows, page, dim), slots)

    def gather(source, ids):
        return jnp.swapaxes(fetch(source, ids), 1, 2).reshape(batch, kv_heads, many * page, dim).astype(q.dtype)

    def step(i, part: Part) -> Part:
        logical = first[:, None] + i * many + jnp.arange(many)[None, :]
        position = (logical[:, :, None] * page + jnp.arange(page)[None, None, :]).reshape(batch, -1)
        ids = jnp.take_along_axis(table, logical % slots, axis=1)
        valid = position < end[:, None]
        allowed = (valid[:, None, :] & (position[:, None, :] <= seen[:, :, None]))[:, None]
        scores = jnp.where(allowed, contract(q, gather(k, ids), 3, 3), LOG_ZERO)
        peak = jnp.maximum(part.peak, scores.max(axis=-1))
        weights = jnp.where(allowed, jnp.exp(scores - peak[..., None]), 0.0)
        # A page that nobody wrote may hold anything, and 0 * NaN is NaN.
        values = jnp.where(valid[:, None, :, None], gather(v, ids), 0.0)
        shrink = jnp.exp(part.peak - peak)
        out = part.out * shrink[..., None] + contract(weights, values, 3, 2)
        return Part(out, part.total * shrink + weights.sum(axis=-1), peak)

    start = Part(jnp.zeros_like(q), jnp.zeros_like(q[..., 0]), jnp.full_like(q[..., 0], LOG_ZERO))
    steps = jnp.max(-(-(end - first * page) // (many * page)))
    return lax.fori_loop(0, steps, step, start)
