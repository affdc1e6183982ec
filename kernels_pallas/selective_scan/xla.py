"""The selective scan for XLA: position by position, states kept at the starts of chunks and recomputed in the backward.

The width lies last, so that every operation of a step is a vector operation over [state, width], and one row is scanned
without its batch axis: XLA:CPU takes ten times as long over [1, state, width] (108 ms against 11, length 2048, width
512, 16 states). On a CPU this beats `lax.associative_scan`, which multiplies the work by log(length) and writes all
states out (figures: experiments/bench), and it beats running chunks side by side, which costs every exponential twice.
"""

import jax.numpy as jnp
from jax import lax

from kernels_pallas.layout import contract
from kernels_pallas.selective_scan import chunk


def single(x, delta, a, b, c, d, initial, reset):
    """`forward` for a sequence of one position, without the saved states: what a decoding step computes."""
    dtype = a.dtype
    wide, delta, b, c = (value[:, 0].astype(dtype) for value in (x, delta, b, c))
    state = _advance(initial, delta, delta * wide, b, None if reset is None else reset[:, 0], a[None])
    y = jnp.sum(c[:, :, None] * state, axis=1) + d[None] * wide
    return y[:, None].astype(x.dtype), state


def _decay(state, delta, cut, a):
    """What a position leaves of the state before it: nothing, whatever it holds, where it is reset."""
    left = jnp.exp(delta[..., None, :] * a) * state
    return left if cut is None else jnp.where(cut[..., None, None], 0, left)


def _advance(state, delta, u, b, cut, a):
    return _decay(state, delta, cut, a) + b[..., :, None] * u[..., None, :]


def _split(value, dtype=None):
    """[batch, length, ...] to [chunks, steps, batch, ...], without the batch where it is 1.

    Zeros fill the last chunk up: they change no state.
    """
    if value is None:
        return None
    value = value if dtype is None else value.astype(dtype)
    batch, length = value.shape[:2]
    chunks, steps = chunk.cut(length)
    if chunks * steps != length:
        value = jnp.pad(value, ((0, 0), (0, chunks * steps - length), *((0, 0),) * (value.ndim - 2)))
    value = value.reshape(batch, chunks, steps, *value.shape[2:])
    return value[0] if batch == 1 else jnp.moveaxis(value, 0, 2)


def _join(value, shape, dtype):
    """Back to [batch, length, ...]."""
    batch, length, size = shape
    value = value[None] if batch == 1 else jnp.moveaxis(value, 2, 0)
    return value.reshape(batch, -1, size)[:, :length].astype(dtype)


def forward(x, delta, a, b, c, d, initial, reset):
    """y, the final state [batch, state, width] and the states before the chunks, [chunks, batch, state, width].

    a is [state, width] and `initial` [batch, state, width]; both and d have the dtype that is computed in.
    """
    dtype, batch = a.dtype, x.shape[0]
    inputs = tuple(_split(value, dtype) for value in (x, delta, b, c))
    a, d = (a, d) if batch == 1 else (a[None], d[None])

    def step(state, now):
        (x, delta, b, c), cut = now
        state = _advance(state, delta, delta * x, b, cut, a)
        return state, jnp.sum(c[..., :, None] * state, axis=-2) + d * x

    def block(state, now):
        end, y = lax.scan(step, state, now)
        return end, (y, state)

    start = initial[0] if batch == 1 else initial
    final, (y, starts) = lax.scan(block, start, (inputs, _split(reset)))
    y = _join(y, x.shape, x.dtype)
    return (y, final[None], starts[:, None]) if batch == 1 else (y, final, starts)


def backward(x, delta, a, b, c, d, reset, starts, dy, dfinal):
    """The gradients of x, delta, a, b, c, d and the initial state, in the dtypes of the operands."""
    dtype, batch = a.dtype, x.shape[0]
    operands = (x, delta, b, c)
    inputs = tuple(_split(value, dtype) for value in (*operands, dy))
    starts, adjoint = (starts[:, 0], dfinal[0]) if batch == 1 else (starts, dfinal)
    a, d = (a, d) if batch == 1 else (a[None], d[None])

    def again(state, now):
        delta, u, b, cut = now
        left = _decay(state, delta, cut, a)
        return left + b[..., :, None] * u[..., None, :], left

    def over_width(states, values):
        last = states.ndim - 1
        return contract(states, values[..., None], last, last - 1)[..., 0]

    def gather(carry, now):
        adjoint, da = carry
        (x, delta, b, c, dy), cut, left = now
        u = delta * x
        g = adjoint + c[..., :, None] * dy[..., None, :]
        moved = g * left  # d loss / d (delta a)
        arrived = jnp.sum(g * b[..., :, None], axis=-2)  # d loss / d (delta x)
        dx = arrived * delta + d * dy
        ddelta = jnp.sum(moved * a, axis=-2) + arrived * x
        db = over_width(g, u)
        dc = over_width(left + b[..., :, None] * u[..., None, :], dy)
        return (_decay(g, delta, cut, a), da + moved * delta[..., None, :]), (dx, ddelta, db, dc)

    def block(carry, now):
        values, cut, start = now
        x, delta, b, *_ = values
        _, left = lax.scan(again, start, (delta, delta * x, b, cut))
        return lax.scan(gather, carry, (values, cut, left), reverse=True)

    carry = (adjoint, jnp.zeros_like(adjoint))
    (dinitial, da), grads = lax.scan(block, carry, (inputs, _split(reset), starts), reverse=True)
    dx, ddelta, db, dc = (_join(g, value.shape, value.dtype) for g, value in zip(grads, operands))
    dd = jnp.sum(dy.astype(dtype) * x.astype(dtype), axis=(0, 1))
    if batch == 1:
        return dx, ddelta, da, db, dc, dd, dinitial[None]
    return dx, ddelta, jnp.sum(da, axis=0), db, dc, dd, dinitial
