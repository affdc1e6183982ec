"""Flash attention as Mosaic TPU kernels (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691).

Scores stand with keys along sublanes and queries along lanes: maxima and sums over keys are sums of whole registers,
and what is kept for each query (bounds, log-sum-exp) is a row that fills its tile. Results therefore come out with
positions last; the transposes are XLA's, who moves the heads in front of the positions anyway. Blocks of keys are
visited by a table in scalar memory (`blocks.visits`): a block that nothing sees is neither read nor worked on.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.attention import blocks
from kernels_pallas.attention.mask import Mask

LANES = 128
LOG_ZERO = -1e30
TABLE = 2**15  # numbers of a table of blocks in scalar memory; above, one table serves all rows
MAX_DIM = 256


class Tiles(NamedTuple):
    """query, key: positions of a block, multiples of 128."""

    query: int
    key: int


def heuristic(length: int) -> Tiles:
    """Up to 512 positions: the scores of a block, float32, are 1 MiB, and there are about five such arrays."""
    count = -(-length // 512)
    size = -(-length // (count * LANES)) * LANES
    return Tiles(size, size)


def unsupported(q: jax.Array, k: jax.Array, v: jax.Array) -> str:
    """Why the kernels cannot take these operands, "" where they can."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16)):
        return f"{q.dtype}, {k.dtype} and {v.dtype} are not all float32 or all bfloat16"
    if q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries over {k.shape[1]} keys are not written"
    if q.shape[-1] > MAX_DIM:
        return f"a head dimension of {q.shape[-1]} is above {MAX_DIM}"
    return compat.missing("tpu")


class _Grid(NamedTuple):
    """The programs of a kernel: batch, head, block of the results, then what is summed over: heads of a group (only for
    the gradients of keys and values), blocks in the order of the table."""

    batch: int
    group: int
    length: int
    filled: int
    tiles: Tiles
    by_key: bool  # whether the blocks of the results are of keys, and queries are summed over

    @property
    def result_blocks(self) -> int:
        return self.filled // (self.tiles.key if self.by_key else self.tiles.query)

    @property
    def summed_blocks(self) -> int:
        return self.filled // (self.tiles.query if self.by_key else self.tiles.key)

    def fill(self, x, axis: int):
        """Zeros after the last position."""
        ends = [(0, 0)] * x.ndim
        ends[axis] = (0, self.filled - self.length)
        return jnp.pad(x, ends) if self.filled > self.length else x

    def table(self, seen: blocks.Seen):
        """(order, count) of the blocks that are summed over, flat, and whether every row has its own."""
        needed = blocks.needed(seen, *self.tiles)
        if needed.size > TABLE:
            needed = jnp.any(needed, axis=0, keepdims=True)
        order, count = blocks.visits(needed.swapaxes(1, 2) if self.by_key else needed)
        return order.ravel(), count.ravel(), needed.shape[0] > 1

    def spec(self, kind: str, whole: tuple[int, ...], rows: bool):
        """The block of an operand or result of `kind` and shape `whole`; `rows`: every row has its own table."""
        from jax.experimental import pallas as pl

        def index(b, h, n, *rest):
            *of_group, m, order, _ = rest
            turn = order[((b if rows else 0) * self.result_blocks + n) * self.summed_blocks + m]
            i, j = (turn, n) if self.by_key else (n, turn)
            head, kv_head = (h * self.group + of_group[0], h) if self.by_key else (h, lax.div(h, self.group))
            row = b if whole[0] > 1 else 0
            return {
                "queries": (b, head, 0, i),
                "keys": (b, kv_head, j, 0),
                "keys last": (b, kv_head, 0, j),
                "per query": (row, 0, i),
                "per key": (row, j, 0),
                "pairs": (row, j, i),
            }[kind]

        query, key = self.tiles
        shape = {
            "queries": (1, 1, whole[2], query),
            "keys": (1, 1, key, whole[-1]),
            "keys last": (1, 1, whole[2], key),
            "per query": (1, whole[1], query),
            "per key": (1, key, 1),
            "pairs": (1, key, query),
        }[kind]
        return pl.BlockSpec(shape, index, memory_space=compat.mosaic_tpu().VMEM)

    def call(self, kernel, inputs, outputs, scratch, mask: Mask, heads: int, interpret: Any):
        """Run `kernel(inputs, allowed, outputs and scratch, step)`; inputs are (kind, array) pairs, outputs are (kind,
        shape and dtype)."""
        from jax.experimental import pallas as pl

        pltpu = compat.mosaic_tpu()
        seen = blocks.seen(mask, self.length, self.filled)
        order, count, rows = self.table(seen)
        conditions = []
        if mask.restricts() or self.filled > self.length:
            conditions += [("per query", seen.first), ("per query", seen.end)]
        if seen.segments is not None:
            conditions += [("per query", seen.segments[:, None]), ("per key", seen.segments[:, :, None])]
        if mask.dense is not None:
            pairs = self.fill(self.fill(mask.dense.swapaxes(1, 2).astype(jnp.int8), 1), 2)
            conditions.append(("pairs", pairs))
        operands = [*inputs, *conditions]
        summed = (self.group, self.summed_blocks) if self.by_key else (self.summed_blocks,)

        def body(order_ref, count_ref, *refs):
            row = (pl.program_id(0) if rows else 0) * self.result_blocks + pl.program_id(2)
            *of_group, turn = (pl.program_id(3 + axis) for axis in range(len(summed)))
            begins, ends = turn == 0, turn == self.summed_blocks - 1
            if self.by_key:
                begins, ends = begins & (of_group[0] == 0), ends & (of_group[0] == self.group - 1)
            at = order_ref[row * self.summed_blocks + turn]
            key = (pl.program_id(2) if self.by_key else at) * self.tiles.key
            allowed = partial(_allowed, refs[len(inputs) : len(operands)], key, self.tiles, seen.segments is not None)
            step = _Step(begins, turn < count_ref[row], ends)
            kernel(refs[: len(inputs)], allowed, refs[len(operands) :], step)

        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.batch, heads, self.result_blocks, *summed),
                in_specs=[self.spec(kind, x.shape, rows) for kind, x in operands],
                out_specs=[self.spec(kind, x.shape, rows) for kind, x in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[x for _, x in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * 3 + ("arbitrary",) * len(summed),
            ),
            interpret=interpret,
        )(order, count, *(x for _, x in operands))


class _Step(NamedTuple):
    """Of a program: whether it is the first and the last of its result, and whether its block has to be visited."""

    begins: jax.Array
    needed: jax.Array
    ends: jax.Array


def _allowed(refs, start, tiles: Tiles, segments: bool):
    """bool [keys, queries] of a block whose first key is `start`, or None where everything is allowed."""
    if not refs:
        return None
    first, end, *rest = refs
    key = start + lax.broadcasted_iota(jnp.int32, (tiles.key, tiles.query), 0)
    found = None
    for part in range(first.shape[1]):
        inside = (key >= first[0, part : part + 1, :]) & (key < end[0, part : part + 1, :])
        found = inside if found is None else found | inside
    if segments:
        of_query, of_key, *rest = rest
        found = found & (of_key[0] == of_query[0])
    if rest:
        found = found & (rest[0][0].astype(jnp.int32) != 0)
    return found


def _dot(a, b, a_dim: int, b_dim: int):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), precision, jnp.float32)


def _positions_last(x):
    """[batch, heads, dim, length]"""
    return x.transpose(0, 2, 3, 1)


def _plan(q, k, tiles: Tiles | None, by_key: bool) -> _Grid:
    batch, length, heads, _ = q.shape
    tiles = tiles or heuristic(length)
    filled = -(-length // math.lcm(*tiles)) * math.lcm(*tiles)
    return _Grid(batch, heads // k.shape[2], length, filled, tiles, by_key)


def forward(q, k, v, mask: Mask, scale: float, *, tiles: Tiles | None = None, interpret: Any = False):
    """The result as `attention` gives it, and the log-sum-exp of each query, float32 [batch, heads, 1, length], which
    is -1e30 where a query sees nothing."""
    grid = _plan(q, k, tiles, by_key=False)
    heads, dim = q.shape[2:]
    q, k, v = blocks.without_padding(mask, q, k, v)
    inputs = [
        ("queries", grid.fill(_positions_last(q), 3)),
        ("keys", grid.fill(k.transpose(0, 2, 1, 3), 2)),
        ("keys last", grid.fill(_positions_last(v), 3)),
    ]
    outputs = [
        ("queries", jax.ShapeDtypeStruct((grid.batch, heads, dim, grid.filled), q.dtype)),
        ("queries", jax.ShapeDtypeStruct((grid.batch, heads, 1, grid.filled), jnp.float32)),
    ]
    query = grid.tiles.query
    scratch = [(dim, query), (1, query), (1, query)]
    out, lse = grid.call(partial(_forward_kernel, scale=scale), inputs, outputs, scratch, mask, heads, interpret)
    return out[..., : grid.length].transpose(0, 3, 1, 2), lse[..., : grid.length]


def _forward_kernel(inputs, allowed, refs, step: _Step, *, scale):
    from jax.experimental import pallas as pl

    q_ref, k_ref, v_ref = inputs
    out_ref, lse_ref, sum_ref, peak_ref, total_ref = refs

    @pl.when(step.begins)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        peak_ref[...] = jnp.full_like(peak_ref, LOG_ZERO)

    @pl.when(step.needed)
    def _():
        keep, v = allowed(), v_ref[0, 0]
        scores = _dot(k_ref[0, 0], q_ref[0, 0], 1, 0) * scale
        if keep is not None:
            scores = jnp.where(keep, scores, LOG_ZERO)
        before = peak_ref[...]
        peak = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.exp(scores - peak)
        if keep is not None:
            weights = jnp.where(keep, weights, 0.0)
        shrink = jnp.exp(before - peak)
        total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        sum_ref[...] = sum_ref[...] * shrink + _dot(v, weights.astype(v.dtype), 1, 0)
        peak_ref[...] = peak

    @pl.when(step.ends)
    def _():
        total = jnp.where(total_ref[...] == 0.0, 1.0, total_ref[...])
        out_ref[0, 0] = (sum_ref[...] / total).astype(out_ref.dtype)
        lse_ref[0, 0] = peak_ref[...] + jnp.log(total)


def backward(q, k, v, mask: Mask, out, lse, dout, scale: float, *, tiles: Tiles | None = None, interpret: Any = False):
    """The gradients of q, k and v. Weights are computed again from the log-sum-exp, in a kernel by blocks of queries
    and in one by blocks of keys."""
    heads, kv_heads, dim = *q.shape[2:3], *k.shape[2:]
    q, k, v, out, dout = *blocks.without_padding(mask, q, k, v), out, *blocks.without_padding(mask, dout)
    inner = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).swapaxes(1, 2)[:, :, None]
    grid = _plan(q, k, tiles, by_key=False)
    inputs = [
        *(("queries", grid.fill(_positions_last(x), 3)) for x in (q, dout)),
        *(("keys", grid.fill(x.transpose(0, 2, 1, 3), 2)) for x in (k, v)),
        *(("queries", grid.fill(x, 3)) for x in (lse, inner)),
    ]

    def run(kernel, grid, kind, heads, x, scratch):
        shape = (grid.batch, heads, dim, grid.filled) if kind == "queries" else (grid.batch, heads, grid.filled, dim)
        outputs = [(kind, jax.ShapeDtypeStruct(shape, like.dtype)) for like in x]
        return grid.call(partial(kernel, scale=scale), inputs, outputs, scratch, mask, heads, interpret)

    (dq,) = run(_query_kernel, grid, "queries", heads, (q,), [(dim, grid.tiles.query)])
    by_key = grid._replace(by_key=True)
    dk, dv = run(_key_kernel, by_key, "keys", kv_heads, (k, v), [(grid.tiles.key, dim)] * 2)
    return (
        dq[..., : grid.length].transpose(0, 3, 1, 2),
        dk[:, :, : grid.length].swapaxes(1, 2),
        dv[:, :, : grid.length].swapaxes(1, 2),
    )


def _weights(inputs, allowed, scale):
    """The weights and the gradients of the scores, float32 [keys, queries]."""
    q_ref, dout_ref, k_ref, v_ref, lse_ref, inner_ref = inputs
    keep = allowed()
    weights = jnp.exp(_dot(k_ref[0, 0], q_ref[0, 0], 1, 0) * scale - lse_ref[0, 0])
    if keep is not None:
        weights = jnp.where(keep, weights, 0.0)
    dweights = _dot(v_ref[0, 0], dout_ref[0, 0], 1, 0)
    return weights, weights * (dweights - inner_ref[0, 0]) * scale


def _query_kernel(inputs, allowed, refs, step: _Step, *, scale):
    from jax.experimental import pallas as pl

    dq_ref, sum_ref = refs

    @pl.when(step.begins)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(step.needed)
    def _():
        k = inputs[2][0, 0]
        _, dscores = _weights(inputs, allowed, scale)
        sum_ref[...] += _dot(k, dscores.astype(k.dtype), 0, 0)

    @pl.when(step.ends)
    def _():
        dq_ref[0, 0] = sum_ref[...].astype(dq_ref.dtype)


def _key_kernel(inputs, allowed, refs, step: _Step, *, scale):
    from jax.experimental import pallas as pl

    dk_ref, dv_ref, dk_sum, dv_sum = refs

    @pl.when(step.begins)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(step.needed)
    def _():
        q, dout = inputs[0][0, 0], inputs[1][0, 0]
        weights, dscores = _weights(inputs, allowed, scale)
        dv_sum[...] += _dot(weights.astype(dout.dtype), dout, 1, 1)
        dk_sum[...] += _dot(dscores.astype(q.dtype), q, 1, 1)

    @pl.when(step.ends)
    def _():
        dk_ref[0, 0] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)
