"""Oracles of the unmask ops, written for reading; `xla.py` holds what runs."""

import jax
import jax.numpy as jnp


def _at_least_float32(logits):
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def masked_cross_entropy(logits, targets, exclude):
    """-log softmax(logits)[target] by `log_softmax` and autodiff; see `kernels_pallas.unmask.masked_cross_entropy`."""
    x, vocabulary = _at_least_float32(logits), logits.shape[-1]
    if exclude >= 0:
        x = jnp.where(jnp.arange(vocabulary) == exclude, -1e30, x)
    valid = (targets >= 0) & (targets < vocabulary) & (targets != exclude)
    picked = jnp.take_along_axis(jax.nn.log_softmax(x), jnp.where(valid, targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(valid, -picked, 0.0)


def unmask(logits, noise, floor, temperature, group, top_k):
    """Token, log-probability, confidence, entropy and margin; see `kernels_pallas.unmask.unmask`."""
    x = _at_least_float32(logits)
    x = jnp.where(x < -1e30, -1e30, x)
    log_p = jax.nn.log_softmax(x)
    p = jnp.exp(log_p)
    best, second = jnp.moveaxis(jax.lax.top_k(p, 2)[0], -1, 0)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
    if temperature == 0:
        token = jnp.argmax(x, axis=-1)
    else:
        kept = jnp.full(x.shape, True) if floor is None else x >= floor[..., None]
        if top_k:
            kept &= x >= jax.lax.top_k(x, top_k)[0][..., -1:]
        y = jnp.where(kept, (x - jnp.max(x, axis=-1, keepdims=True)) / temperature, -1e30)
        groups = -(-x.shape[-1] // group)
        padding = [(0, 0)] * (x.ndim - 1) + [(0, groups * group - x.shape[-1])]
        y = jnp.pad(y, padding, constant_values=-1e31).reshape(*x.shape[:-1], groups, group)
        chosen = jnp.argmax(jax.nn.logsumexp(y, axis=-1) + noise[..., :groups], axis=-1)
        inside = jnp.take_along_axis(y, chosen[..., None, None], axis=-2)[..., 0, :] + noise[..., groups:]
        token = chosen * group + jnp.argmax(inside, axis=-1)
    log_prob = jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]
    return token.astype(jnp.int32), log_prob, best, entropy, best - second
