"""The Mosaic GPU kernel for Hopper, for the few rows of decoding: a warpgroup a key head and run of pages.

With one query and a small group each key meets few rows, and the time is that of reading the pages: so they are read
once, as they are stored. The pages of a run, whose addresses come from the page table, are copied into shared memory
while the one before them is worked on, and are dequantized in registers, 64 tokens at a time, in the layout of a matrix
product's result. Products are sums in float32 beside the tensor cores: the arithmetic of `MAX_ROWS` rows takes about as
long as reading bfloat16. Rows of scores lie side by side as [64 tokens, 8 rows]. Sequences are cut into runs so that a
small batch fills the chip too; runs and tiers are merged by their log-sum-exp. Lowered and interpreted, never timed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.kv_attention import hadamard
from kernels_pallas.kv_attention.pages import Pages
from kernels_pallas.kv_attention.tiers import PagedTiers, Store, tier_views
from kernels_pallas.kv_attention.xla import LOG_ZERO, Part, fold, merge, unfold

MAX_ROWS = 8  # columns of the smallest tile of the register layout
TOKENS = 64  # its rows
SLOTS = 2  # pages in shared memory
SHARED_BYTES = 200 << 10  # of the 227 KiB of a block on an H100 or H200
PROGRAMS = 264  # two for each of the 132 cores of an H200


def unsupported(q: jax.Array, tiers: PagedTiers, pages: Pages) -> str:
    """Why the kernel cannot run on these shapes, "" where it can."""
    _, length, heads, dim = q.shape
    _, kv_heads, page, _ = tiers.tail_k.bits.shape
    rows = length * (heads // kv_heads)
    if rows > MAX_ROWS:
        return (
            f"{rows} rows (queries x group) a key head are more than {MAX_ROWS}: matrix products pay, as XLA has them"
        )
    if q.dtype not in (jnp.float32, jnp.bfloat16) or tiers.tail_k.dtype not in ("float32", "bfloat16"):
        return f"queries are {q.dtype}, the tail {tiers.tail_k.dtype}; the kernel takes float32 and bfloat16"
    if dim not in (64, 128):
        return f"a head dimension of {dim}; the kernel takes 64 and 128"
    halves = 2 if pages.store_table.shape[1] and 4 in (tiers.store_k.bits, tiers.store_v.bits) else 1
    if page % (TOKENS * halves) or page > 256:
        return f"pages of {page} tokens; the kernel takes multiples of {TOKENS * halves} up to 256"
    need = 2 * SLOTS * page * dim * tiers.tail_k.bits.dtype.itemsize + MAX_ROWS * dim * 4
    if need > SHARED_BYTES:
        return f"it would need {need >> 10} KiB of shared memory"
    return compat.missing("gpu")


def kv_attention(q: jax.Array, tiers: PagedTiers, pages: Pages, positions: jax.Array, scale: float) -> jax.Array:
    """See `kernels_pallas.kv_attention.kv_attention`; positions are int32 [batch, length]."""
    if q.size == 0:
        return q
    rows, seen = fold(q, positions, tiers.tail_k.bits.shape[1], scale)
    count = rows.shape[2]
    seen = jnp.pad(seen, ((0, 0), (0, MAX_ROWS - count)), constant_values=-1).astype(jnp.int32)
    parts = []
    for table, first, end, (k, v) in tier_views(tiers, pages):
        if table.shape[1] == 0:
            continue
        turned = hadamard.rotate(rows) if isinstance(k, Store) and tiers.rotated else rows
        parts.extend(_tier(turned, seen, table, first, end, k, v, pages.page))
    return unfold(merge(parts), q)


def _tier(q, seen, table, first, end, k, v, page) -> list[Part]:
    """One part for each run of pages."""
    plgpu: Any = compat.mosaic_gpu()
    batch, slots = table.shape
    _, kv_heads, count, dim = q.shape
    runs = max(1, min(slots, PROGRAMS // max(batch * kv_heads, 1)))
    columns = (first[:, None] + jnp.arange(slots)[None, :]) % slots
    sources = [leaf for x in (k, v) for leaf in jax.tree.leaves(x)]
    ids = jnp.clip(jnp.take_along_axis(table, columns, axis=1), 0, sources[0].shape[0] - 1).astype(jnp.int32)
    kinds = [(x.bits, x.scales) if isinstance(x, Store) else (x.dtype, None) for x in (k, v)]
    small = (runs, batch, kv_heads, MAX_ROWS)
    out, total, peak = plgpu.kernel(
        partial(_kernel, kinds=kinds, page=page, count=count, each=-(-slots // runs), leaves=len(sources)),
        out_type=[
            jax.ShapeDtypeStruct((runs, batch, kv_heads, count, dim), jnp.float32),
            jax.ShapeDtypeStruct(small, jnp.float32),
            jax.ShapeDtypeStruct(small, jnp.float32),
        ],
        scratch_types=[
            *(plgpu.SMEM((SLOTS, *x.shape[2:]), x.dtype) for x in sources),
            plgpu.SMEM((count, dim), jnp.float32),
            plgpu.Barrier(num_arrivals=len(sources), num_barriers=SLOTS),
        ],
        grid=(batch, kv_heads, runs),
        grid_names=("sequence", "head", "run"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(q, seen, ids, (first * page).astype(jnp.int32), end.astype(jnp.int32), *sources)
    return [Part(out[i], total[i, :, :, :count], peak[i, :, :, :count]) for i in range(runs)]


def _kernel(q_ref, seen_ref, ids_ref, start_ref, end_ref, *refs, kinds, page, count, each, leaves):
    from jax.experimental import pallas as pl

    plgpu: Any = compat.mosaic_gpu()
    sources, (out_ref, total_ref, peak_ref) = refs[:leaves], refs[leaves : leaves + 3]
    *buffers, sums, ready = refs[leaves + 3 :]
    split = 1 if kinds[0][1] is None else 3
    sequence, head, run = (lax.axis_index(name) for name in ("sequence", "head", "run"))
    start, end, dim = start_ref[sequence], end_ref[sequence], q_ref.shape[-1]
    held = lax.div(jnp.maximum(end - start, 0) + page - 1, page)
    begin = jnp.minimum(run * each, held)
    turns = jnp.minimum(begin + each, held) - begin
    scores_shape, tile_shape = (TOKENS, MAX_ROWS), (TOKENS, dim)
    column, row = (plgpu.broadcasted_iota(jnp.int32, scores_shape, axis, layout=plgpu.Layout.WGMMA) for axis in (1, 0))
    seen = _spread(compat.gpu_load(seen_ref.at[sequence], plgpu.Layout.WGMMA.reduce(0)), 0, scores_shape)

    def fetch(i):
        slot = lax.rem(i, SLOTS)
        for source, buffer in zip(sources, buffers):
            plgpu.copy_gmem_to_smem(source.at[ids_ref[sequence, begin + i], head], buffer.at[slot], ready.at[slot])

    for r in range(count):
        sums[r] = plgpu.layout_cast(jnp.zeros((dim,), jnp.float32), plgpu.Layout.WGMMA.reduce(0))

    @pl.when(turns > 0)
    def _():
        fetch(jnp.int32(0))

    def one(i, carry):
        @pl.when(i + 1 < turns)
        def _():
            plgpu.commit_smem()  # all threads have left the page before, whose place is taken
            fetch(i + 1)

        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(ready.at[slot])
        here = [buffer.at[slot] for buffer in buffers]
        for offset in range(0, page, TOKENS):
            carry = tile(start + (begin + i) * page + offset, offset, here[:split], here[split:], carry)
        return carry

    def tile(position, offset, keys, values, carry):
        total, peak = carry
        wide = _dequantized(keys, kinds[0], offset, page, tile_shape)
        scores = jnp.full(scores_shape, LOG_ZERO, jnp.float32)
        for r in range(count):
            q = _spread(compat.gpu_load(q_ref.at[sequence, head, r], plgpu.Layout.WGMMA.reduce(0)), 0, tile_shape)
            scores = jnp.where(column == r, _spread(jnp.sum(wide * q, axis=1), 1, scores_shape), scores)
        at = position + row
        allowed = (at < end) & (at <= seen) & (column < count)
        scores = jnp.where(allowed, scores, LOG_ZERO)
        higher = jnp.maximum(peak, jnp.max(scores, axis=0))
        weights = jnp.where(allowed, jnp.exp(scores - _spread(higher, 0, scores_shape)), 0.0)
        shrink = jnp.exp(peak - higher)
        shrunk = _spread(shrink, 0, scores_shape)
        # What no token owns may hold anything, and 0 * NaN is NaN.
        owned = _spread(jnp.max(jnp.where(at < end, 1.0, 0.0), axis=1), 1, tile_shape)
        wide = jnp.where(owned > 0.0, _dequantized(values, kinds[1], offset, page, tile_shape), 0.0)
        for r in range(count):
            mine = _spread(jnp.sum(jnp.where(column == r, weights, 0.0), axis=1), 1, tile_shape)
            # The sum so far takes part in that over the tokens, each of which brings its share of it: exact, as 64 is.
            before = _spread(compat.gpu_load(sums.at[r], plgpu.Layout.WGMMA.reduce(0)), 0, tile_shape)
            kept = _spread(jnp.sum(jnp.where(column == r, shrunk, 0.0), axis=1) * (1.0 / TOKENS), 1, tile_shape)
            sums[r] = jnp.sum(mine * wide + kept * before, axis=0)
        return total * shrink + jnp.sum(weights, axis=0), higher

    def constant(value):
        return plgpu.layout_cast(jnp.full((MAX_ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(0))

    total, peak = lax.fori_loop(0, turns, one, (constant(0.0), constant(LOG_ZERO)))
    total_ref[run, sequence, head], peak_ref[run, sequence, head] = total, peak
    for r in range(count):
        out_ref[run, sequence, head, r] = compat.gpu_load(sums.at[r], plgpu.Layout.WGMMA.reduce(0))


def _spread(values, axis: int, shape):
    """Over the rows (axis 0) or the columns (axis 1) of a tile."""
    plgpu: Any = compat.mosaic_gpu()
    return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (1 - axis,)), plgpu.Layout.WGMMA)


def _dequantized(refs, kind, offset: int, page: int, shape):
    """The tokens `offset`..`offset + TOKENS` of a page in shared memory, float32 [TOKENS, dim]."""
    from jax.experimental import pallas as pl

    plgpu: Any = compat.mosaic_gpu()
    form, scales = kind
    if scales is None:
        bits = compat.gpu_load(refs[0].at[pl.ds(offset, TOKENS)], plgpu.Layout.WGMMA)
        return lax.bitcast_convert_type(bits, form).astype(jnp.float32)
    high = form == 4 and offset >= page // 2
    codes = compat.gpu_load(refs[0].at[pl.ds(offset - (page // 2 if high else 0), TOKENS)], plgpu.Layout.WGMMA)
    wide = codes.astype(jnp.int32)
    if form == 4:
        wide = wide >> 4 if high else (wide << 28) >> 28
    axis = 0 if scales == "channel" else 1
    part = pl.ds(0, shape[1]) if axis == 0 else pl.ds(offset, TOKENS)

    def affine(ref):
        bits = compat.gpu_load(ref.at[part], plgpu.Layout.WGMMA.reduce(axis))
        return _spread(lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32), axis, shape)

    return wide.astype(jnp.float32) * affine(refs[1]) + affine(refs[2])
