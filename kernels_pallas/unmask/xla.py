"""The unmask ops in plain XLA: the product path on CPU and Metal, and the fallback elsewhere."""

from functools import partial

import jax
import jax.numpy as jnp

# Stands for log 0: finite, so that differences and products of it never make a NaN.
LOG_ZERO = -1e30


def _at_least_float32(logits):
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _iota(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def _without(logits, exclude):
    x = _at_least_float32(logits)
    return x if exclude < 0 else jnp.where(_iota(x) == exclude, LOG_ZERO, x)


def _valid(targets, vocabulary, exclude):
    return (targets >= 0) & (targets < vocabulary) & (targets != exclude)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def masked_cross_entropy(logits, targets, exclude):
    """See `kernels_pallas.unmask.masked_cross_entropy`."""
    return _forward(logits, targets, exclude)[0]


def _forward(logits, targets, exclude):
    lse = _log_sum_exp(logits, exclude)
    valid = _valid(targets, logits.shape[-1], exclude)
    picked = _entry(logits, jnp.where(valid, targets, 0))
    return jnp.where(valid, lse - picked, 0.0), (logits, targets, lse)


def _entry(logits, index):
    # As bits: to pick from bfloat16, XLA:CPU widens all of it first, and writes that out for every other reader too.
    bits = jax.lax.bitcast_convert_type(logits, f"uint{8 * logits.dtype.itemsize}")
    one = jnp.take_along_axis(bits, index[..., None], axis=-1)[..., 0]
    return _at_least_float32(jax.lax.bitcast_convert_type(one, logits.dtype))


def _log_sum_exp(logits, exclude):
    # The peak is taken in the dtype of the logits, and the excluded token is subtracted from the sum instead of being
    # overwritten: XLA:CPU then fuses all into two reductions. Else it writes out a float32 copy of the logits first, at
    # three to five times the cost.
    peak = _at_least_float32(jnp.max(logits, axis=-1))
    total = jnp.sum(jnp.exp(_at_least_float32(logits) - peak[..., None]), axis=-1)
    if exclude < 0:
        return peak + jnp.log(total)
    out = jnp.exp(_entry(logits, jnp.full(peak.shape, exclude)) - peak)

    def overwritten():
        x = _without(logits, exclude)
        peak = jnp.max(x, axis=-1)
        return peak + jnp.log(jnp.sum(jnp.exp(x - peak[..., None]), axis=-1))

    # A sum that is mostly the excluded token would leave nothing but rounding behind.
    return jax.lax.cond(jnp.all(2.0 * out < total), lambda: peak + jnp.log(total - out), overwritten)


def _backward(exclude, saved, cotangent):
    logits, targets, lse = saved
    x = _without(logits, exclude)
    hot = _iota(x) == targets[..., None]
    gradient = (jnp.exp(x - lse[..., None]) - hot) * cotangent[..., None]
    # `where`, not a zero factor: a row without a target may hold anything, and 0 * inf is NaN.
    gradient = jnp.where(_valid(targets, x.shape[-1], exclude)[..., None], gradient, 0.0)
    return gradient.astype(logits.dtype), None


masked_cross_entropy.defvjp(_forward, _backward)


def unmask(logits, noise, floor, temperature, group):
    """Token, log-probability, confidence, entropy and margin; see `kernels_pallas.unmask.unmask`."""
    x = jnp.maximum(_at_least_float32(logits), LOG_ZERO)
    peak, best = jnp.max(x, axis=-1), jnp.argmax(x, axis=-1).astype(jnp.int32)
    below = x - peak[..., None]
    weight = jnp.exp(below)
    total = jnp.sum(weight, axis=-1)
    lse = peak + jnp.log(total)
    # Below -200 the weight is 0 in float32; the clip keeps 0 times LOG_ZERO out of the sum.
    entropy = jnp.log(total) - jnp.sum(weight * jnp.maximum(below, -200.0), axis=-1) / total
    second = jnp.max(jnp.where(_iota(x) == best[..., None], LOG_ZERO, x), axis=-1)
    confidence = jnp.exp(peak - lse)
    margin = confidence - jnp.exp(second - lse)
    token = best if temperature == 0 else _draw(x, noise, floor, temperature, group)
    log_prob = jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0] - lse
    return token, log_prob, confidence, entropy, margin


def _draw(x, noise, floor, temperature, group):
    """A group of the vocabulary by its total mass, then a token inside it, each by Gumbel-max: the same law as one draw
    over the whole vocabulary, at about 2 sqrt(V) random numbers in place of V."""
    y = x / temperature
    if floor is not None:
        y = jnp.where(x >= floor[..., None], y, LOG_ZERO)
    groups = -(-x.shape[-1] // group)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, groups * group - x.shape[-1])]
    y = jnp.pad(y, padding, constant_values=LOG_ZERO).reshape(*x.shape[:-1], groups, group)
    peak = jnp.max(y, axis=-1)
    mass = peak + jnp.log(jnp.sum(jnp.exp(y - peak[..., None]), axis=-1))
    chosen = jnp.argmax(mass + noise[..., :groups], axis=-1).astype(jnp.int32)
    inside = jnp.take_along_axis(y, chosen[..., None, None], axis=-2)[..., 0, :]
    return chosen * group + jnp.argmax(inside + noise[..., groups:], axis=-1).astype(jnp.int32)
