"""Decode attention over a paged cache of two tiers: a tail in the model's precision, a store of int8 or int4.

`pages` and `tiers` hold the cache and the pure functions that change it; `kv_attention` reads it.
"""

import math
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import compat
from kernels_pallas.dispatch import Body, dispatch
from kernels_pallas.kv_attention import gpu, reference, tpu, xla
from kernels_pallas.kv_attention.pages import (
    CacheError,
    Migration,
    Pages,
    Reservation,
    can_migrate,
    check,
    empty_pages,
    evict,
    plan_migration,
    release,
    reserve,
    rollback,
    share,
)
from kernels_pallas.kv_attention.tiers import (
    PagedTiers,
    Store,
    Tail,
    Usage,
    append,
    dense,
    empty_tiers,
    migrate,
    quantize_pages,
    usage,
    write,
)

__all__ = [
    "CacheError",
    "Migration",
    "PagedTiers",
    "Pages",
    "Reservation",
    "Store",
    "Tail",
    "Usage",
    "append",
    "can_migrate",
    "check",
    "dense",
    "empty_pages",
    "empty_tiers",
    "evict",
    "kv_attention",
    "migrate",
    "plan_migration",
    "quantize_pages",
    "release",
    "reserve",
    "rollback",
    "share",
    "usage",
    "write",
]


def kv_attention(
    q: Float[Array, "batch length heads dim"],
    tiers: PagedTiers,
    pages: Pages,
    positions: Int[Array, "batch length"] | None = None,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Array, "batch length heads dim"]:
    """softmax(scale * q k^T) v over the keys and values that `pages` and `tiers` hold.

    heads is a multiple of the cache's kv_heads. A query sees the keys whose position is not above its own. `positions`
    are by default the last `length` ones of each sequence, so that a chunk which has just been appended attends
    causally within itself. Queries that shall see everything get `pages.lengths - 1`; one that may see nothing
    (position -1, an empty sequence) yields zeros. `scale` is 1/sqrt(dim) by default. The result has the shape and dtype
    of q. It is not differentiable on all implementations: decoding needs no gradient.

    The GPU kernel is for decoding, up to 8 rows (queries x group) for each key head. With more of them the op is bound
    by arithmetic, a smaller store saves memory and no time, and the XLA form is the one to take; it also is where a
    page or head dimension does not fit, which `impl="pallas_gpu"` says. Raises ValueError where heads, dim or batch do
    not fit the cache, `kernels_pallas.dispatch.ImplError` for an `impl` that is not there.
    """
    batch, length, heads, dim = q.shape
    _, kv_heads, page, cached_dim = tiers.tail_k.bits.shape
    if heads % kv_heads:
        raise ValueError(f"kv_attention: {heads} query heads are not a multiple of {kv_heads} key heads")
    if dim != cached_dim:
        raise ValueError(f"kv_attention: queries have {dim} channels, the cache {cached_dim}")
    if batch != pages.lengths.shape[0]:
        raise ValueError(f"kv_attention: {batch} rows of queries, the cache holds {pages.lengths.shape[0]} sequences")
    if page != pages.page:
        raise ValueError(f"kv_attention: pages of {page} tokens in the tiers, of {pages.page} in the tables")
    if positions is None:
        positions = pages.lengths[:, None] - length + jnp.arange(length, dtype=jnp.int32)[None, :]
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    bodies = {
        "reference": Body(partial(reference.kv_attention, scale=scale)),
        "xla": Body(partial(xla.kv_attention, scale=scale)),
        "pallas_gpu": Body(partial(gpu.kv_attention, scale=scale), gpu.unsupported(q, tiers, pages)),
        "pallas_tpu": Body(
            partial(tpu.kv_attention, scale=scale), compat.missing("tpu") or tpu.unsupported(q, tiers, pages)
        ),
        "interpret": Body(partial(tpu.kv_attention, scale=scale, interpret=True), compat.missing("tpu")),
    }
    return dispatch("kv_attention", impl, bodies, q, tiers, pages, positions)
