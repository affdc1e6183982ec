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
    """Swap the last two axes; for bfloat16 on a CPU that multiplies it natively, make the copy real.

    XLA turns a written transpose back into a layout, which sends a bfloat16 dot to a slow kernel there. Pinning the
    layout behind a barrier keeps the copy (0.2 to 1.5 ms) and makes the dot two to four times faster. In float32, and
    where bfloat16 is emulated, the copy only costs.
    """
    swapped = jnp.swapaxes(x, -1, -2)
    if x.dtype != jnp.bfloat16 or jax.default_backend() != "cpu" or not native_bfloat16():
        return swapped
    return lax.optimization_barrier(with_layout_constraint(swapped, Layout(tuple(range(x.ndim)))))


@functools.cache
def native_bfloat16() -> bool:
    """Whether the default backend multiplies bfloat16 in hardware: every GPU and TPU, and CPUs that say so."""
    if jax.default_backend() != "cpu":
        return True
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
