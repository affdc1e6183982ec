"""Attention for XLA: heads folded into the batch, the four backward dots written by hand.

Keeping the probabilities (in the inputs' dtype) costs batch x heads x length^2, and on a CPU makes the backward pass
about three times faster than autodiff's through an einsum. Taking a few heads at a time and computing the probabilities
again, which stores nothing of that size, was measured a quarter slower in float32.
"""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention import blocks
from kernels_pallas.attention.mask import Mask
from kernels_pallas.layout import contract, contract_leading


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """Same contract as the reference; q [batch, length, heads, dim], k and v [batch, length, kv_heads, dim]."""
    q, k, v = blocks.without_padding(mask, q, k, v)
    out = attend(q, k, v, mask.allowed(q.shape[1]), scale)
    return blocks.without_padding(mask, out)[0]  # so that the gradient of padding is not read either


def attend(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None, scale: float) -> jax.Array:
    """The same with the mask as bool [batch or 1, queries, keys], or None where everything is allowed; there may be
    another number of keys than of queries."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # Query heads that share a key head stand one below the other: one dot a key head, keys never repeated.
    folded_q = q.reshape(batch, length, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    folded_q = folded_q.reshape(batch * kv_heads, group * length, dim)
    folded_k, folded_v = (x.transpose(0, 2, 1, 3).reshape(batch * kv_heads, k.shape[1], dim) for x in (k, v))
    out = cast(jax.Array, _attend(folded_q, folded_k, folded_v, allowed, scale))
    out = out.reshape(batch, kv_heads, group, length, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, dim)


def forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> tuple[jax.Array, jax.Array]:
    """In the place of a flash kernel, whose second result it leaves at 0: `backward` does not need it."""
    return attention(q, k, v, mask, scale), jnp.zeros((q.shape[0], q.shape[2], 1, q.shape[1]), jnp.float32)


def backward(q, k, v, mask: Mask, out, lse, dout, scale: float):
    """In the place of a flash kernel: the gradients of q, k and v, from the operands."""
    del out, lse
    return jax.vjp(lambda q, k, v: attention(q, k, v, mask, scale), q, k, v)[1](dout)


def _probabilities(q, k, allowed, scale):
    scores = contract(q, k, 2, 2) * scale
    if allowed is None:
        return jax.nn.softmax(scores, axis=-1)
    queries = allowed.shape[1]
    shaped = scores.reshape(allowed.shape[0], -1, q.shape[1] // queries, queries, k.shape[1])
    keep = allowed[:, None, None]
    shaped = jnp.where(keep, shaped, -1e30)
    weights = jnp.where(keep, jnp.exp(shaped - shaped.max(axis=-1, keepdims=True)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return (weights / jnp.where(total == 0, 1.0, total)).reshape(scores.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, allowed, scale):
    return _attend_fwd(q, k, v, allowed, scale)[0]


def _attend_fwd(q, k, v, allowed, scale):
    probs = lax.optimization_barrier(_probabilities(q, k, allowed, scale).astype(q.dtype))
    out = contract(probs, v, 2, 1).astype(q.dtype)
    return out, (q, k, v, probs, out)


def _attend_bwd(scale, saved, dout):
    q, k, v, probs, out = saved
    dout = lax.optimization_barrier(dout)
    dv = contract_leading(probs, dout).astype(v.dtype)
    dprobs = contract(dout, v, 2, 2)
    # sum_m dP * P = dO . O for each query, so the softmax backward needs no second pass over the probabilities.
    inner = jnp.sum((dout * out).astype(jnp.float32), axis=-1, keepdims=True)
    dscores = (probs * (dprobs - inner) * scale).astype(q.dtype)
    dscores = lax.optimization_barrier(dscores)
    dq = contract(dscores, k, 2, 1).astype(q.dtype)
    dk = contract_leading(dscores, q).astype(k.dtype)
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)
