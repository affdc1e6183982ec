"""Kernels under vmap: a mapped axis becomes a part of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def fold(x: jax.Array, axis: int | None, size: int, rows: int) -> jax.Array:
    """[size * rows, ...]: a mapped axis joins the batch of `rows`, the first of every operand."""
    if axis is None:
        if x.shape[0] != rows:
            return x  # a mask shared by the batch and by the mapped axis
        x = jnp.broadcast_to(x[None], (size, *x.shape))
    else:
        x = jnp.moveaxis(x, axis, 0)
        x = jnp.broadcast_to(x, (size, rows, *x.shape[2:]))
    return x.reshape(size * rows, *x.shape[2:])


def over_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of pytrees of arrays [batch, ...] (a mask may have batch 1), under any number of vmaps."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _(size, is_mapped, *operands):
        rows = operands[0].shape[1 if is_mapped[0] else 0]
        folded = jax.tree.map(lambda x, on: fold(x, 0 if on else None, size, rows), operands, tuple(is_mapped))
        out = mapped(*folded)
        return jax.tree.map(lambda x: x.reshape(size, rows, *x.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return mapped
