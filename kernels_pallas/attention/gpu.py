"""Attention on CUDA: cuDNN's kernels where they know the mask, else flash attention as Mosaic GPU kernels for Hopper.

A program is one warpgroup with 64 queries (64 keys, for the gradients of keys and values). The blocks that it sums over
come by TMA into two buffers, one fetched while the other is worked on, in the order of a table (`blocks.visits`): what
nothing sees is neither read nor worked on. Weights go through shared memory to the second product: registers would save
a write, but the interpreter, which is what checks these kernels without a GPU, multiplies from shared memory only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.attention import blocks
from kernels_pallas.attention.mask import Mask

BLOCK = 64  # queries and keys of a block: the rows of a warpgroup's matrix product
SLOTS = 2  # blocks in shared memory of what is summed over
LOG_ZERO = -1e30
MAX_DIM = 128


def cudnn_unsupported(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> str:
    """Why cuDNN cannot take this call, "" where it can."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float16, jnp.bfloat16)):
        return f"{q.dtype}, {k.dtype} and {v.dtype} are not all float16 or all bfloat16"
    if q.shape[-1] % 8 or q.shape[-1] > MAX_DIM:
        return f"a head dimension of {q.shape[-1]} is no multiple of 8 up to {MAX_DIM}"
    if mask.window and not mask.causal:
        return "it knows windows of causal masks only"
    if mask.block or mask.diffusion or mask.segments is not None or mask.dense is not None:
        return "it knows causal masks, their windows, and lengths only"
    capability = compat.compute_capability()
    if capability and float(capability) < 8.0:
        return f"its attention is for compute capability 8.0 and later, and this device has {capability}"
    return ""


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """`attention` by cuDNN, whose gradient is cuDNN's too."""
    lengths = None if mask.lengths is None else mask.lengths.astype(jnp.int32)
    q, k, v = blocks.without_padding(mask, q, k, v)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=mask.causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=(mask.window - 1, 0) if mask.window else None,
        implementation="cudnn",
    )
    # What cuDNN leaves at padding is not documented.
    return blocks.without_padding(mask, out)[0]


def unsupported(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> str:
    """Why the kernels of this file cannot take these operands, "" where they can."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float16, jnp.bfloat16)):
        return f"{q.dtype}, {k.dtype} and {v.dtype} are not all float16 or all bfloat16"
    if q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries and {k.shape[1]} keys are not of one length"
    if q.shape[-1] > MAX_DIM:
        return f"a head dimension of {q.shape[-1]} is above {MAX_DIM}"
    if mask.dense is not None:
        return "the mask is dense"
    capability = compat.compute_capability()
    if capability:
        if capability != "9.0":
            return f"the products are Hopper's, compute capability 9.0, and this device has {capability}"
        # jax refuses its own kernel here where it is causal; ours compares positions for other masks just the same.
        if 12080 <= compat.cuda_runtime() < 12091 and (mask.restricts() or q.shape[1] % BLOCK):
            return "ptxas of CUDA 12.8.0 to 12.9.0 compiles masked kernels wrongly; CUDA 12.9.1 or 13 would do"
    return compat.missing("gpu")


class _Conditions(NamedTuple):
    """References of a mask in a kernel, None where it sets none."""

    first: Any
    end: Any
    segments: Any

    def allowed(self, batch, query, key, axis: int, shape):
        """bool of the layout of scores, or None; `query` and `key` are first positions, keys stand along `axis`."""
        from jax.experimental import pallas as pl

        if self.first is None:
            return None
        plgpu: Any = compat.mosaic_gpu()
        row = batch if self.first.shape[0] > 1 else 0
        at = key + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
        found = None
        for part in range(self.first.shape[1]):
            first, end = (
                _along(ref.at[row, part, pl.ds(query, BLOCK)], 1 - axis, shape) for ref in (self.first, self.end)
            )
            inside = (at >= first) & (at < end)
            found = inside if found is None else found | inside
        if self.segments is not None:
            of_query = _along(self.segments.at[batch, pl.ds(query, BLOCK)], 1 - axis, shape)
            of_key = _along(self.segments.at[batch, pl.ds(key, BLOCK)], axis, shape)
            found = found & (of_query == of_key)
        return found


def _vector(ref, axis: int):
    """A vector from memory into the registers of what stands along `axis` of a matrix."""
    plgpu: Any = compat.mosaic_gpu()
    return compat.gpu_load(ref, plgpu.Layout.WGMMA.reduce(1 - axis))


def _spread(values, axis: int, shape):
    """A vector along `axis`, over a matrix."""
    plgpu: Any = compat.mosaic_gpu()
    return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (axis,)), plgpu.Layout.WGMMA)


def _along(ref, axis: int, shape):
    return _spread(_vector(ref, axis), axis, shape)


def _constant(value: float, shape, rows: bool = False):
    plgpu: Any = compat.mosaic_gpu()
    layout = plgpu.Layout.WGMMA.reduce(1) if rows else plgpu.Layout.WGMMA
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _product(a, b, shape):
    """a b, float32 in registers, for two references to shared memory."""
    from jax.experimental import pallas as pl

    plgpu: Any = compat.mosaic_gpu()

    def run(sum_ref):
        plgpu.wgmma(sum_ref, a, b)
        return sum_ref[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


class _Grid(NamedTuple):
    """Sizes after positions and channels were filled up with zeros, and which blocks are the programs'."""

    batch: int
    length: int
    filled: int
    group: int
    dim: int
    channels: int  # of `dim`, filled up
    dtype: Any
    by_key: bool  # whether programs are blocks of keys, and sum over queries

    @staticmethod
    def of(q, k, by_key: bool) -> "_Grid":
        batch, length, heads, dim = q.shape
        filled, channels = (-(-size // BLOCK) * BLOCK for size in (length, dim))
        return _Grid(batch, length, filled, heads // k.shape[2], dim, channels, q.dtype, by_key)

    def fill(self, x):
        """Zeros after the last position and channel of [batch, length, heads, dim]."""
        ends = ((0, 0), (0, self.filled - self.length), (0, 0), (0, self.channels - self.dim))
        return jnp.pad(x, ends) if any(end for _, end in ends) else x

    def cut(self, x):
        return x[:, : self.length, :, : self.dim]

    def tile(self, *more: int) -> Any:
        """Shared memory for matrices of 64 rows as TMA and products want it."""
        plgpu: Any = compat.mosaic_gpu()
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((*more[:-1], BLOCK, more[-1]), self.dtype, transforms=transforms)

    def call(self, kernel, given, streamed, vectors, outputs, weights: int, mask: Mask, interpret: Any):
        """Run `kernel(program, held, at, vectors, outputs, weights, conditions)`.

        Blocks of the `given` arrays stay in shared memory, blocks of the `streamed` come in turn; `vectors` and
        `outputs` are for the kernel to read and write; `weights` is how many score matrices it keeps in shared memory.
        """
        plgpu: Any = compat.mosaic_gpu()
        seen = blocks.seen(mask, self.length, self.filled)
        needed = blocks.needed(seen, BLOCK, BLOCK)
        order, count = blocks.visits(needed.swapaxes(1, 2) if self.by_key else needed)
        restricted = mask.restricts() or self.filled > self.length
        conditions = [seen.first, seen.end] if restricted else []
        conditions += [] if seen.segments is None else [seen.segments]
        operands = [*given, *streamed, *vectors, order, count, *conditions]
        sizes = [len(given), len(streamed), len(vectors), 2, len(conditions), len(outputs)]

        def body(*refs):
            parts, start = [], 0
            for size in (*sizes, len(given), len(streamed), weights, 2):
                parts.append(refs[start : start + size])
                start += size
            sources, streams, vectors, (order, count), conditions, outputs, held, buffers, weight, barriers = parts
            first, end, segments = (*conditions, *(None,) * (3 - len(conditions)))
            program = _Program(self, order, count, streams, buffers, barriers[1])
            program.hold(sources, held, barriers[0])
            kernel(program, held, vectors, outputs, weight, _Conditions(first, end, segments))

        blocks_, heads = self.filled // BLOCK, given[0].shape[2]
        scratch = [
            *(self.tile(self.channels) for _ in given),
            *(self.tile(SLOTS, self.channels) for _ in streamed),
            *(self.tile(BLOCK) for _ in range(weights)),
            plgpu.Barrier(num_arrivals=len(given)),
            plgpu.Barrier(num_arrivals=len(streamed), num_barriers=SLOTS),
        ]
        return plgpu.kernel(
            body,
            out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
            scratch_types=scratch,
            grid=(heads, blocks_, self.batch),
            grid_names=("head", "block", "batch"),
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
            **({} if interpret is None else {"interpret": interpret}),
        )(*operands)


class _Program(NamedTuple):
    """One program: where it stands, and the blocks that come to it."""

    grid: _Grid
    order: Any
    count: Any
    streams: Any
    buffers: Any
    ready: Any

    @property
    def batch(self):
        return lax.axis_index("batch")

    @property
    def head(self):
        return lax.axis_index("head")

    @property
    def start(self):
        """The first position of its own block."""
        return lax.axis_index("block") * BLOCK

    @property
    def row(self):
        return self.batch if self.order.shape[0] > 1 else 0

    def hold(self, sources, held, barrier):
        from jax.experimental import pallas as pl

        plgpu: Any = compat.mosaic_gpu()
        for source, buffer in zip(sources, held):
            plgpu.copy_gmem_to_smem(source.at[self.batch, pl.ds(self.start, BLOCK), self.head], buffer, barrier)
        plgpu.barrier_wait(barrier)

    def visits(self):
        """How many blocks come, those of all heads of a group where keys are summed for."""
        count = self.count[self.row, lax.axis_index("block")]
        return count * self.grid.group if self.grid.by_key else count

    def at(self, i):
        """(head, first position) of the i-th block that comes."""
        if not self.grid.by_key:
            return lax.div(self.head, self.grid.group), self.order[self.row, lax.axis_index("block"), i] * BLOCK
        count = jnp.maximum(self.count[self.row, lax.axis_index("block")], 1)
        turn = self.order[self.row, lax.axis_index("block"), lax.rem(i, count)]
        return self.head * self.grid.group + lax.div(i, count), turn * BLOCK

    def fetch(self, i):
        from jax.experimental import pallas as pl

        plgpu: Any = compat.mosaic_gpu()
        slot = lax.rem(i, SLOTS)
        head, start = self.at(i)
        for source, buffer in zip(self.streams, self.buffers):
            index = (self.batch, pl.ds(start, BLOCK), head)
            plgpu.copy_gmem_to_smem(source.at[index], buffer.at[slot], self.ready.at[slot])

    def over_blocks(self, step: Callable[..., Any], carry):
        """Fold `step(blocks, head, first position, carry)` over the blocks that come."""
        from jax.experimental import pallas as pl

        plgpu: Any = compat.mosaic_gpu()
        count = self.visits()

        @pl.when(count > 0)
        def _():
            self.fetch(jnp.int32(0))

        def one(i, carry):
            plgpu.commit_smem()  # all threads have left the block before, whose place is taken

            @pl.when(i + 1 < count)
            def _():
                self.fetch(i + 1)

            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(self.ready.at[slot])
            return step([buffer.at[slot] for buffer in self.buffers], *self.at(i), carry)

        return lax.fori_loop(0, count, one, carry)


def forward(q, k, v, mask: Mask, scale: float, *, interpret: Any = None):
    """See `kernels_pallas.attention.tpu.forward`."""
    grid = _Grid.of(q, k, by_key=False)
    q, k, v = (grid.fill(x) for x in blocks.without_padding(mask, q, k, v))
    outputs = [(q.shape, q.dtype), ((grid.batch, q.shape[2], grid.filled), jnp.float32)]
    kernel = partial(_forward_kernel, scale=scale)
    out, lse = grid.call(kernel, [q], [k, v], [], outputs, 1, mask, interpret)
    return grid.cut(out), lse[:, :, None, : grid.length]


def _forward_kernel(program: _Program, held, vectors, outputs, weight, conditions: _Conditions, *, scale):
    from jax.experimental import pallas as pl

    del vectors
    plgpu: Any = compat.mosaic_gpu()
    (q,), (out_ref, lse_ref), (weight_ref,) = held, outputs, weight
    scores_of, sums_of = (BLOCK, BLOCK), (BLOCK, program.grid.channels)

    def step(arrived, head, start, carry):
        del head
        k, v = arrived
        sums, peak, total = carry
        scores = _product(q, k.transpose((1, 0)), scores_of) * scale
        keep = conditions.allowed(program.batch, program.start, start, 1, scores_of)
        if keep is not None:
            scores = jnp.where(keep, scores, LOG_ZERO)
        higher = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - _spread(higher, 0, scores_of))
        if keep is not None:
            weights = jnp.where(keep, weights, 0.0)
        shrink = jnp.exp(peak - higher)
        weight_ref[...] = weights.astype(weight_ref.dtype)
        plgpu.commit_smem()
        sums = sums * _spread(shrink, 0, sums_of) + _product(weight_ref, v, sums_of)
        return sums, higher, total * shrink + jnp.sum(weights, axis=1)

    carry = (_constant(0.0, sums_of), _constant(LOG_ZERO, (BLOCK,), True), _constant(0.0, (BLOCK,), True))
    sums, peak, total = program.over_blocks(step, carry)
    total = jnp.where(total == 0.0, 1.0, total)
    own = pl.ds(program.start, BLOCK)
    out_ref[program.batch, own, program.head] = (sums / _spread(total, 0, sums_of)).astype(out_ref.dtype)
    lse_ref[program.batch, program.head, own] = peak + jnp.log(total)


def backward(q, k, v, mask: Mask, out, lse, dout, scale: float, *, interpret: Any = None):
    """See `kernels_pallas.attention.tpu.backward`."""
    grid = _Grid.of(q, k, by_key=False)
    (dout,) = blocks.without_padding(mask, dout)
    inner = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    vectors = [jnp.pad(x, ((0, 0), (0, 0), (0, grid.filled - grid.length))) for x in (lse[:, :, 0], inner)]
    q, k, v, dout = (grid.fill(x) for x in (*blocks.without_padding(mask, q, k, v), dout))
    kernel = partial(_query_kernel, scale=scale)
    (dq,) = grid.call(kernel, [q, dout], [k, v], vectors, [(q.shape, q.dtype)], 1, mask, interpret)
    kernel = partial(_key_kernel, scale=scale)
    by_key = grid._replace(by_key=True)
    dk, dv = by_key.call(kernel, [k, v], [q, dout], vectors, [(k.shape, k.dtype)] * 2, 2, mask, interpret)
    return grid.cut(dq), grid.cut(dk), grid.cut(dv)


def _weights(scores, keep, lse, scale):
    weights = jnp.exp(scores * scale - lse)
    return weights if keep is None else jnp.where(keep, weights, 0.0)


def _query_kernel(program: _Program, held, vectors, outputs, weight, conditions: _Conditions, *, scale):
    from jax.experimental import pallas as pl

    plgpu: Any = compat.mosaic_gpu()
    (q, dout), (dq_ref,), (weight_ref,) = held, outputs, weight
    shape, own = (BLOCK, BLOCK), pl.ds(program.start, BLOCK)
    lse, inner = (_vector(ref.at[program.batch, program.head, own], 0) for ref in vectors)

    def run(sum_ref):
        def step(arrived, head, start, carry):
            del head
            k, v = arrived
            keep = conditions.allowed(program.batch, program.start, start, 1, shape)
            weights = _weights(_product(q, k.transpose((1, 0)), shape), keep, _spread(lse, 0, shape), scale)
            dweights = _product(dout, v.transpose((1, 0)), shape)
            dscores = weights * (dweights - _spread(inner, 0, shape)) * scale
            weight_ref[...] = dscores.astype(weight_ref.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(sum_ref, weight_ref, k)
            plgpu.wgmma_wait(0)
            return carry

        program.over_blocks(step, jnp.int32(0))
        return sum_ref[...]

    dq = pl.run_scoped(run, plgpu.ACC((BLOCK, program.grid.channels), jnp.float32))
    dq_ref[program.batch, own, program.head] = dq.astype(dq_ref.dtype)


def _key_kernel(program: _Program, held, vectors, outputs, weight, conditions: _Conditions, *, scale):
    from jax.experimental import pallas as pl

    plgpu: Any = compat.mosaic_gpu()
    (k, v), (dk_ref, dv_ref), (weight_ref, dscores_ref), (lse_ref, inner_ref) = held, outputs, weight, vectors
    shape, sums_of = (BLOCK, BLOCK), (BLOCK, program.grid.channels)

    def run(dk_sum, dv_sum):
        def step(arrived, head, start, carry):
            q, dout = arrived
            keep = conditions.allowed(program.batch, start, program.start, 0, shape)
            index = (program.batch, head, pl.ds(start, BLOCK))
            lse, inner = (_along(ref.at[index], 1, shape) for ref in (lse_ref, inner_ref))
            weights = _weights(_product(k, q.transpose((1, 0)), shape), keep, lse, scale)
            dscores = weights * (_product(v, dout.transpose((1, 0)), shape) - inner) * scale
            weight_ref[...] = weights.astype(weight_ref.dtype)
            dscores_ref[...] = dscores.astype(dscores_ref.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(dv_sum, weight_ref, dout)
            plgpu.wgmma(dk_sum, dscores_ref, q)
            plgpu.wgmma_wait(0)
            return carry

        program.over_blocks(step, jnp.int32(0))
        return dk_sum[...], dv_sum[...]

    dk, dv = pl.run_scoped(run, *(plgpu.ACC(sums_of, jnp.float32),) * 2)
    own = pl.ds(program.start, BLOCK)
    dk_ref[program.batch, own, program.head] = dk.astype(dk_ref.dtype)
    dv_ref[program.batch, own, program.head] = dv.astype(dv_ref.dtype)
