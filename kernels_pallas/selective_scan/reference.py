"""The oracles: both recurrences as the papers write them, position by position, in float32 (float64 for float64)."""

import jax
import jax.numpy as jnp
from jax import lax


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    initial: jax.Array | None,
    reset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Autodiff-able `lax.scan` over positions; it stores every state for the backward pass."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    batch, length, width = x.shape
    wide = [value.astype(dtype).swapaxes(0, 1) for value in (x, delta, b, c)]
    state = jnp.zeros((batch, width, a.shape[-1]), dtype) if initial is None else initial.astype(dtype)
    cut = jnp.zeros((batch, length), bool) if reset is None else reset

    def step(state, now):
        x, delta, b, c, cut = now
        state = jnp.where(cut[:, None, None], 0, state)
        decay = jnp.exp(delta[:, :, None] * a.astype(dtype)[None])
        state = decay * state + (delta * x)[:, :, None] * b[:, None, :]
        return state, jnp.einsum("bdn,bn->bd", state, c) + d.astype(dtype)[None] * x

    final, y = lax.scan(step, state, (*wide, cut.T))
    return y.swapaxes(0, 1).astype(x.dtype), final


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
    """The recurrence with one decay per head, by autodiff-able `lax.scan` over positions."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    batch, length, heads, dim = x.shape
    shared = heads // b.shape[2]
    b, c = (jnp.repeat(value, shared, axis=2) for value in (b, c))
    wide = [value.astype(dtype).swapaxes(0, 1) for value in (x, delta, b, c)]
    state = jnp.zeros((batch, heads, dim, b.shape[-1]), dtype) if initial is None else initial.astype(dtype)
    cut = jnp.zeros((batch, length), bool) if reset is None else reset

    def step(state, now):
        x, delta, b, c, cut = now
        state = jnp.where(cut[:, None, None, None], 0, state)
        decay = jnp.exp(delta * a.astype(dtype)[None])
        state = decay[:, :, None, None] * state + (delta[:, :, None] * x)[..., None] * b[:, :, None, :]
        return state, jnp.einsum("bhpn,bhn->bhp", state, c) + d.astype(dtype)[None, :, None] * x

    final, y = lax.scan(step, state, (*wide, cut.T))
    return y.swapaxes(0, 1).astype(x.dtype), final
