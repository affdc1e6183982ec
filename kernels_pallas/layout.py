"""Dots in the form that XLA:CPU's fast kernels take: row-major operands, the contraction in the usual place."""

import functools
import pathlib

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


def contract(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Contract dimension `a_dim` of `a` with `b_dim` of `b`, batched over leading axes of a 3-D pair, in float32."""
    batch = tuple(range(a.ndim - 2))
    dims = (((a_dim,), (b_dim,)), (batch, batch))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def row_major_transpose(x: jax.Array) -> jax.Array:
    """Swap the last two axes, on a CPU by a copy that is really made.

    XLA turns a written transpose back into a layout, which sends the dot that reads it to a slow kernel. Pinning the
    layout behind a barrier keeps the copy (a tenth of the dot's time) and makes that dot up to 1.5 times faster in
    float32 and four times in bfloat16. Where bfloat16 is emulated the copy only costs.
    """
    swapped = jnp.swapaxes(x, -1, -2)
    if jax.default_backend() != "cpu" or (x.dtype == jnp.bfloat16 and not native_bfloat16()):
        return swapped
    return lax.optimization_barrier(with_layout_constraint(swapped, Layout(tuple(range(x.ndim)))))


def contract_leading(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b, in float32, for a [rows, n] and b [rows, m] (or a batch of both): the gradient of a right operand.

    The narrower of the two is the one that is transposed; where that is b, so is the product.
    """
    if a.shape[-1] <= b.shape[-1]:
        return contract(row_major_transpose(a), b, a.ndim - 1, b.ndim - 2)
    product = contract(row_major_transpose(b), a, b.ndim - 1, a.ndim - 2)
    # Without the barrier the transpose becomes the layout of the product, which bfloat16 dots do not implement.
    return jnp.swapaxes(lax.optimization_barrier(product), -1, -2)


@functools.cache
def native_bfloat16() -> bool:
    """Whether the default backend multiplies bfloat16 in hardware: every GPU and TPU, and CPUs that say so."""
    return jax.default_backend() != "cpu" or cpu_multiplies_bfloat16()


def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU says that it multiplies bfloat16 in hardware."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
