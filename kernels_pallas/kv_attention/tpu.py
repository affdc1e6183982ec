"""The TPU kernel: one flash pass a tier, a page of all key heads at a time, its address read from the page table.

Scales and offsets never touch the codes. With one scale a channel, q . (s * c + o) = (q * s) . c + q . o, and the
values are scaled after the sum; with one a token, the scores and the weights take them. Codes are exact in bfloat16.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.kv_attention import hadamard
from kernels_pallas.kv_attention.pages import Pages
from kernels_pallas.kv_attention.tiers import PagedTiers, Store, from_bits, tier_views
from kernels_pallas.kv_attention.xla import LOG_ZERO, Part, fold, merge, unfold

ROWS = 8  # float32 sublanes: the queries of a key head are padded to a multiple of these
MEMORY = 12 * 2**20  # of the 16 MiB of VMEM that the smallest supported chip has


def unsupported(q: jax.Array, tiers: PagedTiers, pages: Pages) -> str:
    """Why the compiled kernel cannot run on these shapes, "" where it can."""
    batch, length, heads, dim = q.shape
    _, kv_heads, page, _ = tiers.tail_k.bits.shape
    if dim % 128:
        return f"a head dimension of {dim} is no multiple of 128 lanes"
    least = 64 if 4 in (tiers.store_k.bits, tiers.store_v.bits) else 32
    if pages.store_table.shape[1] and page % least:
        return f"pages of {page} tokens are no multiple of {least}, the tile of their codes"
    rows = -(-length * (heads // kv_heads) // ROWS) * ROWS
    # Two buffers of each page; queries, result and accumulator; scores and weights of one head.
    page_bytes = 4 * kv_heads * page * dim * tiers.tail_k.bits.dtype.itemsize
    need = page_bytes + kv_heads * rows * dim * 4 * 5 + rows * page * 4 * 4
    if need > MEMORY:
        return f"it would need {need >> 20} MiB of VMEM"
    return ""


def kv_attention(
    q: jax.Array, tiers: PagedTiers, pages: Pages, positions: jax.Array, scale: float, interpret: bool = False
) -> jax.Array:
    """See `kernels_pallas.kv_attention.kv_attention`; positions are int32 [batch, length]."""
    if q.size == 0:
        return q
    rows, seen = fold(q, positions, tiers.tail_k.bits.shape[1], scale)
    count = rows.shape[2]
    padding = -count % ROWS
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padding), (0, 0)))
    seen = jnp.pad(seen, ((0, 0), (0, padding)), constant_values=-1)[:, :, None]
    parts = []
    for table, first, end, (k, v) in tier_views(tiers, pages):
        if table.shape[1] == 0:
            continue
        turned = hadamard.rotate(rows) if isinstance(k, Store) and tiers.rotated else rows
        # bfloat16 queries multiply in bfloat16, as the codes are exact there; the sums are float32 all the same.
        operand = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
        parts.append(_tier(turned, seen, table, first, end, k, v, pages.page, operand, interpret))
    return unfold(merge(parts)[:, :, :count], q)


def _tier(q, seen, table, first, end, k, v, page, operand, interpret) -> Part:
    from jax.experimental import pallas as pl

    pltpu = compat.mosaic_tpu()
    batch, slots = table.shape
    _, kv_heads, rows, dim = q.shape
    columns = (first[:, None] + jnp.arange(slots)[None, :]) % slots
    pool = (k.codes if isinstance(k, Store) else k.bits).shape[0]
    ids = jnp.clip(jnp.take_along_axis(table, columns, axis=1), 0, pool - 1)

    def at_page(b, i, ids, first, end):
        # Past the last page the address stays, so that nothing more is read.
        last = jnp.maximum(lax.div(end[b] - 1, page) - first[b], 0)
        return ids[b, jnp.minimum(i, last)]

    def paged(x):
        shape = (None, *x.shape[1:])
        return pl.BlockSpec(shape, lambda b, i, *tables: (at_page(b, i, *tables), *(0 for _ in x.shape[1:])))

    def per_sequence(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, i, *tables: (b, *(0 for _ in x.shape[1:])))

    sources = [leaf for x in (k, v) for leaf in jax.tree.leaves(x)]
    out = [
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, rows, 1), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, rows, 1), jnp.float32),
    ]
    kinds = [(x.bits, x.scales) if isinstance(x, Store) else (x.dtype, None) for x in (k, v)]
    result = pl.pallas_call(
        partial(_kernel, pl=pl, page=page, operand=operand, kinds=kinds),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, slots),
            in_specs=[per_sequence(q), per_sequence(seen), *(paged(x) for x in sources)],
            out_specs=[per_sequence(x) for x in out],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="kv_attention",
    )(ids, first, end, q, seen, *sources)
    return Part(result[0], result[1][..., 0], result[2][..., 0])


def _kernel(ids, first, end, q_ref, seen_ref, *refs, pl, page, operand, kinds):
    """One page of one sequence. The results are the accumulators: their block stays while the pages go by."""
    del ids
    out_ref, total_ref, peak_ref = refs[-3:]
    sequence, i = pl.program_id(0), pl.program_id(1)
    start = (first[sequence] + i) * page

    @pl.when(i == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        peak_ref[...] = jnp.full_like(peak_ref, LOG_ZERO)

    @pl.when(start < end[sequence])
    def _():
        position = start + lax.broadcasted_iota(jnp.int32, (1, page), 1)
        valid = position < end[sequence]
        allowed = valid & (position <= seen_ref[...])
        tokens = start + lax.broadcasted_iota(jnp.int32, (page, 1), 0) < end[sequence]
        split = 1 if kinds[0][1] is None else 3
        keys, values = refs[:split], refs[split:-3]
        key_scales, value_scales = ([from_bits(ref[...], "bfloat16") for ref in part[1:]] for part in (keys, values))
        for head in range(q_ref.shape[0]):
            one = slice(head, head + 1)
            scores = _scores(q_ref[head], keys[0][head], [x[one] for x in key_scales], kinds[0], operand)
            scores = jnp.where(allowed, scores, LOG_ZERO)
            before = peak_ref[head]
            peak = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.where(allowed, jnp.exp(scores - peak), 0.0)
            shrink = jnp.exp(before - peak)
            added = _values(weights, values[0][head], [x[one] for x in value_scales], kinds[1], operand, valid, tokens)
            out_ref[head] = out_ref[head] * shrink + added
            total_ref[head] = total_ref[head] * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            peak_ref[head] = peak


def _scores(q, keys, affine, kind, operand):
    """[rows, page] scores of one head's queries [rows, dim]."""
    form, scales = kind
    if scales is None:
        return _dot(q, from_bits(keys, form), 1, operand)
    codes, (scale, offset) = _codes(keys, form), affine
    if scales == "channel":
        return _dot(q * scale, codes, 1, operand) + jnp.sum(q * offset, axis=-1, keepdims=True)
    return _dot(q, codes, 1, operand) * scale + jnp.sum(q, axis=-1, keepdims=True) * offset


def _values(weights, values, affine, kind, operand, valid, tokens):
    """[rows, dim] sums of one head's values under `weights` [rows, page]; what no token owns may hold anything."""
    form, scales = kind
    if scales is None:
        return _dot(weights, jnp.where(tokens, from_bits(values, form), 0.0), 0, operand)
    codes, (scale, offset) = _codes(values, form), affine
    if scales == "channel":
        return _dot(weights, codes, 0, operand) * scale + jnp.sum(weights, axis=-1, keepdims=True) * offset
    scale, offset = jnp.where(valid, scale, 0.0), jnp.where(valid, offset, 0.0)
    return _dot(weights * scale, codes, 0, operand) + jnp.sum(weights * offset, axis=-1, keepdims=True)


def _codes(packed, bits):
    wide = packed.astype(jnp.int32)
    if bits == 4:
        wide = jnp.concatenate([(wide << 28) >> 28, wide >> 4], axis=0)
    return wide.astype(jnp.float32)


def _dot(a, b, b_dim, operand):
    precision = lax.Precision.HIGHEST if operand == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (b_dim,)), ((), ()))
    return lax.dot_general(a.astype(operand), b.astype(operand), dims, precision, jnp.float32)
