"""Quantized products in plain XLA, with the CPU kernel in front of them where it is there.

On a CPU a dot with a weight that is dequantized inside the program runs 30 times slower than the float32 dot at one
row, because the weight is written out first. Two forms avoid that: the kernel of `cpu`, and, without a compiler, sums
of int32 products, which XLA turns into one pass over the codes. On a GPU the dequantization fuses into the dot.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from kernels_pallas import dispatch
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

# Rows of x up to which sums of products beat dequantizing the weight for a dot (CPU, 4096 x 4096).
FEW_ROWS = 8
# Rows from which XLA's bfloat16 dot makes up for dequantizing (CPU with bfloat16 arithmetic, 4096 x 4096).
MANY_ROWS_BFLOAT16 = 64
# Weights that are dequantized at a time on a CPU: 8 MiB in float32 stay in a cache, and so bounded are the temporaries.
CHUNK = 2 << 20


def multiply(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """Same contract as the reference; x [rows, inner]."""
    if dispatch.platforms() == ("cpu",):
        return _on_cpu(x, weight)
    return lax.platform_dependent(x, weight, cpu=_on_cpu, default=_dot)


def pull(dy: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """Same contract as the reference; dy [rows, outer]."""
    if dispatch.platforms() == ("cpu",):
        return _pull_in_chunks(dy, weight)
    return lax.platform_dependent(dy, weight, cpu=_pull_in_chunks, default=_pull_dot)


def _on_cpu(x, weight):
    rows = x.shape[0]
    if rows == 0 or x.dtype == jnp.float64:
        return _dot(x, weight)
    large = x.dtype == jnp.bfloat16 and rows >= MANY_ROWS_BFLOAT16
    reason = cpu.missing()
    if reason:
        dispatch.log_fallback("quant_matmul", "the CPU kernel", reason)
    elif not large:
        return by_kernel(x.astype(jnp.float32), weight)
    return by_sums(x, weight) if rows <= FEW_ROWS else _dot_in_chunks(x, weight)


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


def by_sums(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """Integer multiply-and-sum: x in 16-bit fixed point, one step to a block of 32.

    Rounding x changes an output by at most sum_b max|x_b| / 65534 * sum_b |w|, b running over its blocks (Q4_K: of w
    before its minima); all else is float32.
    """
    fixed, step = fixed_point(x)
    codes = [part.codes.astype(jnp.int32).reshape(*part.scales.shape, part.group) for part in parts(weight)]
    scales = [part.scales for part in parts(weight)]
    products = [
        c[None] * mine.astype(jnp.int32).reshape(x.shape[0], 1, *c.shape[1:])
        for c, mine in zip(codes, split(fixed, weight.kind))
    ]
    steps = [step]
    if weight.kind == "Q4_0":
        products = [products[0] + products[1]]
    elif weight.kind == "Q4_K":
        steps = [step[:, 0::2], step[:, 1::2]]
    total = jnp.zeros((), jnp.float32)
    for product, scale, step in zip(products, scales, steps):
        total = total + (product.sum(-1).astype(jnp.float32) * (scale[None] * step[:, None])).sum(-1)
    return _less_minima(total, x, weight)


def fixed_point(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int16 [rows, inner] and the float32 step [rows, inner / 32] of each block; not finite where the block is not."""
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, BLOCK)
    step = jnp.max(jnp.abs(blocks), axis=-1) / 32767
    whole = jnp.round(blocks / jnp.where(step == 0, 1.0, step)[..., None]).astype(jnp.int16)
    # Else XLA would round x again for every row of the weight.
    return lax.optimization_barrier((whole.reshape(x.shape), step))


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
