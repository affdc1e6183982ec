"""Mamba-2's recurrence by matrix products: quadratic inside chunks, a scan over the states between them.

Within a chunk, position t reads position s with weight (c_t . b_s) exp(sum of delta a over s+1..t) (Dao and Gu 2024,
section 6). Chunks are recomputed in the backward pass, so memory holds one chunk's matrices and the states between.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 64


def state_space_dual(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    initial: jax.Array | None,
    reset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Same contract as the reference."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    batch, length, heads, dim = x.shape
    groups, size = b.shape[2:]
    shared = heads // groups
    wide, delta, b, c = (value.astype(dtype) for value in (x, delta, b, c))
    state = jnp.zeros((batch, heads, dim, size), dtype) if initial is None else initial.astype(dtype)
    # Heads of one group lie together, and the group with the batch: every product below is a batched dot.
    state = state.reshape(batch, groups, shared, dim, size)
    rows = (
        (delta[..., None] * wide).reshape(batch, length, groups, shared, dim),
        (delta * a.astype(dtype)[None, None]).reshape(batch, length, groups, shared),
        b,
        c,
        jnp.zeros((batch, length), jnp.int32) if reset is None else jnp.cumsum(reset, axis=1, dtype=jnp.int32),
    )
    step = min(CHUNK, length)
    filled = -(-length // step) * step

    def cut(value: jax.Array) -> jax.Array:
        if filled != length:  # the last run goes on; zero inputs with decay 1 change no state
            mode: Any = "edge" if value.dtype == jnp.int32 else "constant"
            value = jnp.pad(value, ((0, 0), (0, filled - length), *((0, 0),) * (value.ndim - 2)), mode=mode)
        return jnp.moveaxis(value.reshape(batch, -1, step, *value.shape[2:]), 1, 0)

    carry = (state, jnp.zeros((batch,), jnp.int32))
    (state, _), y = lax.scan(jax.checkpoint(_chunk), carry, tuple(cut(value) for value in rows))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, filled, heads, dim)[:, :length]
    y = y + d.astype(dtype)[None, None, :, None] * wide
    return y.astype(x.dtype), state.reshape(batch, heads, dim, size)


def _chunk(carry, inputs):
    """One chunk of every row. `run` numbers the stretches between resets; a position reads its own run only."""
    state, last_run = carry
    u, log_decay, b, c, run = inputs
    total = jnp.cumsum(log_decay, axis=1)  # [batch, chunk, groups, shared]
    end = total[:, -1:]
    length = total.shape[1]
    position = jnp.arange(length)
    reads = (position[:, None] >= position[None, :])[None] & (run[:, :, None] == run[:, None, :])
    span = total[:, :, None] - total[:, None, :]  # [batch, target, source, groups, shared]
    weight = jnp.where(reads[..., None, None], jnp.exp(jnp.where(reads[..., None, None], span, 0.0)), 0.0)
    scores = jnp.einsum("btgn,bsgn->btsg", c, b)
    inside = jnp.einsum("bgrts,bsgrp->btgrp", jnp.moveaxis(scores[..., None] * weight, (1, 2), (3, 4)), u)
    goes_on = (run == last_run[:, None]).astype(u.dtype)[:, :, None, None]
    across = jnp.einsum("btgn,bgrpn->btgrp", c, state) * (jnp.exp(total) * goes_on)[..., None]
    same_end = (run == run[:, -1:]).astype(u.dtype)[:, :, None, None]
    arriving = u * (jnp.exp(end - total) * same_end)[..., None]
    kept = (jnp.exp(end) * goes_on[:, -1:])[:, 0, :, :, None, None]
    state = kept * state + jnp.einsum("bsgrp,bsgn->bgrpn", arriving, b)
    return (state, run[:, -1]), inside + across
