"""Quantized products in plain XLA, with the CPU kernel in front of them where it is there.

A dot with a weight that is dequantized inside the program is slow on a CPU at a few rows (4096 x 4096, one row: 20 ms)
because XLA writes the whole weight out first, into memory that it has just been given. Taken in chunks that stay in a
cache the same dot takes 1.4 ms, less than the float32 weight itself costs (2.2 ms). On a GPU the dequantization fuses
into the dot.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from kernels_pallas import dispatch
from kernels_pallas.layout import native_bfloat16
from kernels_pallas.quant_matmul import cpu
from kernels_pallas.quant_matmul.weight import (
    BLOCK,
    QuantizedWeight,
    block_sums,
    join,
    minima,
    parts,
    split,
    values,
)

# Rows from which XLA's dot makes up for dequantizing, beside the CPU kernel: in float32, and in bfloat16 where the CPU
# multiplies that.
MANY_ROWS, MANY_ROWS_BFLOAT16 = 96, 24
# Weights that are dequantized at a time on a CPU, 8 MiB in float32: a quarter or four times as many take up to twice as
# long at one row.
CHUNK = 2 << 20


def multiply(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """Same contract as the reference; x [rows, inner]."""
    return lax.platform_dependent(x, weight, cpu=_on_cpu, default=_dot)


def pull(dy: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """Same contract as the reference; dy [rows, outer]."""
    return lax.platform_dependent(dy, weight, cpu=_pull_in_chunks, default=_pull_dot)


def _on_cpu(x, weight):
    rows = x.shape[0]
    if rows == 0 or x.dtype == jnp.float64:
        return _dot_in_chunks(x, weight)
    reason = cpu.unavailable()
    if reason:
        dispatch.log_fallback("quant_matmul", "the CPU kernel", reason)
    elif rows < (MANY_ROWS_BFLOAT16 if x.dtype == jnp.bfloat16 and native_bfloat16() else MANY_ROWS):
        return by_kernel(x.astype(jnp.float32), weight)
    return _dot_in_chunks(x, weight)


@custom_vmap
def by_kernel(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """The kernel of `cpu`; vmapped rows against one weight are one call."""
    return cpu.multiply(x, weight)


@by_kernel.def_vmap
def _(size, batched, x, weight):
    if not any(jax.tree.leaves(batched[1])):
        return by_kernel(x.reshape(-1, x.shape[-1]), weight).reshape(size, x.shape[1], -1), True
    if not batched[0]:
        x = jnp.broadcast_to(x, (size, *x.shape))
    return lax.map(lambda operands: by_kernel(*operands), (x, weight)), True


def _less_minima(total, x, weight):
    if weight.mins is None:
        return total
    return total - _contract(block_sums(x.astype(total.dtype)), minima(weight).astype(total.dtype), 1)


def _contract(a, b, b_dim):
    """a [rows, k] with dimension `b_dim` of b, in at least float32."""
    exact = lax.Precision.HIGHEST if a.dtype != jnp.bfloat16 else None
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((1,), (b_dim,)), ((), ())), precision=exact, preferred_element_type=dtype)


def _dot(x, weight):
    """A dot with each part, dequantized in the dtype of x."""
    dots = [_contract(mine, values(part, x.dtype), 1) for part, mine in zip(parts(weight), split(x, weight.kind))]
    return _less_minima(sum(dots[1:], dots[0]), x, weight)


def _dot_in_chunks(x, weight):
    """`_dot`, some rows of the weight after the other."""
    outer, size = weight.shape[-1], _chunk(weight)
    if size == outer:
        return _dot(x, weight)

    def body(i, out):
        start = jnp.minimum(i * size, outer - size)  # the last chunk does rows again where they do not divide
        return lax.dynamic_update_slice_in_dim(out, _dot(x, _slice(weight, start, size)), start, axis=1)

    out = jnp.zeros((x.shape[0], outer), jnp.promote_types(x.dtype, jnp.float32))
    return lax.fori_loop(0, -(-outer // size), body, out)


def _pull_dot(dy, weight):
    dealt = [_contract(dy, values(part, dy.dtype), 0) for part in parts(weight)]
    dx = join(dealt, weight.kind)
    if weight.mins is not None:
        dx = dx - jnp.repeat(_contract(dy, minima(weight).astype(dy.dtype), 0), BLOCK, axis=-1)
    return dx


def _pull_in_chunks(dy, weight):
    """`_pull_dot`, some rows of the weight after the other."""
    outer, size = weight.shape[-1], _chunk(weight)
    if size == outer:
        return _pull_dot(dy, weight)

    def body(i, dx):
        start = jnp.minimum(i * size, outer - size)
        mine = lax.dynamic_slice_in_dim(dy, start, size, axis=1)
        fresh = start + jnp.arange(size) >= i * size
        return dx + _pull_dot(jnp.where(fresh[None], mine, 0), _slice(weight, start, size))

    dx = jnp.zeros((dy.shape[0], weight.shape[-2]), jnp.promote_types(dy.dtype, jnp.float32))
    return lax.fori_loop(0, -(-outer // size), body, dx)


def _chunk(weight):
    inner, outer = weight.shape
    return min(outer, max(1, CHUNK // inner))


def _slice(weight, start, size):
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size, axis=0), weight)
