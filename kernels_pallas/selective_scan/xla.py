"""The selective scan for XLA: sequential inside chunks, many chunks at once, states recomputed in the backward pass.

A step of one short row is too little work for a compiled operation, so a block of the sequence is cut into chunks that
advance together. The first pass runs every chunk from a zero state; a short scan over the chunks turns their ends into
the states they start from; the second pass runs them from there. The backward pass does the same with the adjoint. Kept
for it are only the states at the starts of chunks, [length / CHUNK, batch, state, width]; within a block the states are
computed again. The width lies last, so that every operation of a step is a vector operation. On a CPU this beats
`lax.associative_scan`, which multiplies the work by log(length) and writes all states out (figures: experiments/bench).
"""

from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.layout import contract

CHUNK = 32  # positions of a chunk
PARALLEL = 1 << 15  # how many numbers the states of the chunks that advance together hold; they fit the L2 cache


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
    """Same contract as the reference."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    batch, length, width = x.shape
    wide = x.astype(dtype)
    state = jnp.zeros((batch, width, a.shape[-1]), dtype) if initial is None else initial.astype(dtype)
    cut = None if reset is None else reset.astype(dtype)[..., None]
    inputs = (wide, delta.astype(dtype), a.astype(dtype).T, b.astype(dtype), c.astype(dtype))
    body = _single if length == 1 else _scan
    y, final = cast(tuple[jax.Array, jax.Array], body(*inputs, state.swapaxes(1, 2), cut))
    return (y + d.astype(dtype)[None, None] * wide).astype(x.dtype), final.swapaxes(1, 2)


def _decay(delta, a, cut):
    """[batch, state, width]: what a position leaves of the state, nothing where it is reset."""
    decay = jnp.exp(delta[:, None, :] * a[None])
    return decay if cut is None else decay * (1.0 - cut)[:, :, None]


def _single(x, delta, a, b, c, state, cut):
    """One position: what a decoding step computes."""
    decay = _decay(delta[:, 0], a, None if cut is None else cut[:, 0])
    state = decay * state + b[:, 0, :, None] * (delta * x)
    return jnp.sum(c[:, 0, :, None] * state, axis=1)[:, None], state


@dataclass(frozen=True)
class _Cut:
    """How a sequence is cut: blocks of `together` chunks of `steps` positions."""

    blocks: int
    together: int
    steps: int

    @staticmethod
    def of(batch: int, length: int, state: int, width: int) -> "_Cut":
        steps = min(CHUNK, length)
        chunks = -(-length // steps)
        together = max(1, min(chunks, PARALLEL // (batch * state * width)))
        return _Cut(-(-chunks // together), together, steps)

    def split(self, value):
        """[batch, length, n] to [blocks, steps, together * batch, n]; zeros fill the end: they change no state."""
        if value is None:
            return None
        batch, length, size = value.shape
        filled = self.blocks * self.together * self.steps
        if filled != length:
            value = jnp.pad(value, ((0, 0), (0, filled - length), (0, 0)))
        value = value.reshape(batch, self.blocks, self.together, self.steps, size)
        return value.transpose(1, 3, 2, 0, 4).reshape(self.blocks, self.steps, self.together * batch, size)

    def join(self, value, batch: int, length: int):
        """Back to [batch, length, n]."""
        value = value.reshape(self.blocks, self.steps, self.together, batch, value.shape[-1])
        return value.transpose(3, 0, 2, 1, 4).reshape(batch, -1, value.shape[-1])[:, :length]

    def starts(self, initial, arrived, kept, reverse: bool = False):
        """The state that each chunk starts from, [together * batch, ...], and that after the last one."""
        split = (value.reshape(self.together, *initial.shape) for value in (arrived, kept))

        def step(state, now):
            return now[1] * state + now[0], state

        final, starts = lax.scan(step, initial, tuple(split), reverse=reverse)
        return starts.reshape(arrived.shape), final


def _kept(delta, a, cut):
    """What a whole chunk leaves of the state it starts from; delta is [steps, rows, width]."""
    kept = jnp.exp(jnp.sum(delta, axis=0)[:, None, :] * a[None])
    return kept if cut is None else kept * jnp.prod(1.0 - cut, axis=0)[:, :, None]


@jax.custom_vjp
def _scan(x, delta, a, b, c, initial, cut):
    return _scan_fwd(x, delta, a, b, c, initial, cut)[0]


def _scan_fwd(x, delta, a, b, c, initial, cut):
    batch, length, _ = x.shape
    plan = _Cut.of(batch, length, *a.shape)

    def advance(state, now):
        delta, u, b, cut = now
        return _decay(delta, a, cut) * state + b[:, :, None] * u[:, None, :]

    def read(state, now):
        *inputs, c = now
        state = advance(state, inputs)
        return state, jnp.sum(c[:, :, None] * state, axis=1)

    def block(state, inputs):
        x, delta, b, c, cut = inputs
        moves = (delta, delta * x, b, cut)
        if plan.together == 1:
            starts = state
            state, y = lax.scan(read, starts, (*moves, c))
            return state, (y, starts)
        rows = jnp.zeros((plan.together * batch, *a.shape), x.dtype)
        arrived, _ = lax.scan(lambda state, now: (advance(state, now), None), rows, moves)
        starts, state = plan.starts(state, arrived, _kept(delta, a, cut))
        _, y = lax.scan(read, starts, (*moves, c))
        return state, (y, starts)

    final, (y, starts) = lax.scan(block, initial, tuple(plan.split(value) for value in (x, delta, b, c, cut)))
    return (plan.join(y, batch, length), final), (x, delta, a, b, c, cut, starts)


def _scan_bwd(saved, cotangents):
    x, delta, a, b, c, cut, starts = saved
    dy, dfinal = cotangents
    batch, length, _ = x.shape
    plan = _Cut.of(batch, length, *a.shape)

    def again(state, now):
        delta, u, b, cut = now
        left = _decay(delta, a, cut) * state
        return left + b[:, :, None] * u[:, None, :], left

    def retreat(adjoint, now):
        """From the gradient of the state after a position to that of the state before it."""
        delta, c, dy, cut = now
        return _decay(delta, a, cut) * (adjoint + c[:, :, None] * dy[:, None, :])

    def gather(carry, now):
        adjoint, da = carry
        x, delta, u, b, c, cut, dy, left = now
        g = adjoint + c[:, :, None] * dy[:, None, :]
        moved = g * left  # d loss / d (delta a)
        arrived = jnp.sum(g * b[:, :, None], axis=1)  # d loss / d (delta x)
        ddelta = jnp.sum(moved * a[None], axis=1) + arrived * x
        db = contract(g, u[:, :, None], 2, 1)[..., 0]
        dc = contract(left + b[:, :, None] * u[:, None, :], dy[:, :, None], 2, 1)[..., 0]
        carry = _decay(delta, a, cut) * g, da + moved * delta[:, None, :]
        return carry, (arrived * delta, ddelta, db, dc)

    def block(carry, inputs):
        adjoint, da = carry
        x, delta, b, c, cut, dy, start = inputs
        u = delta * x
        _, left = lax.scan(again, start, (delta, u, b, cut))
        rows, moves = jnp.zeros_like(start), (x, delta, u, b, c, cut, dy, left)
        if plan.together == 1:
            (adjoint, added), grads = lax.scan(gather, (adjoint, rows), moves, reverse=True)
            return (adjoint, da + jnp.sum(added, axis=0)), grads
        short = (delta, c, dy, cut)
        arrived, _ = lax.scan(lambda adjoint, now: (retreat(adjoint, now), None), rows, short, reverse=True)
        ends, adjoint = plan.starts(adjoint, arrived, _kept(delta, a, cut), reverse=True)
        (_, added), grads = lax.scan(gather, (ends, rows), moves, reverse=True)
        return (adjoint, da + jnp.sum(added, axis=0)), grads

    inputs = (*(plan.split(value) for value in (x, delta, b, c, cut, dy)), starts)
    (dinitial, da), grads = lax.scan(block, (dfinal, jnp.zeros_like(a)), inputs, reverse=True)
    dx, ddelta, db, dc = (plan.join(value, batch, length) for value in grads)
    return dx, ddelta, da, db, dc, dinitial, None if cut is None else jnp.zeros_like(cut)


_scan.defvjp(_scan_fwd, _scan_bwd)
