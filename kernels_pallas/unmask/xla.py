"""The unmask ops in plain XLA: the product path on CPU and Metal, and the fallback elsewhere."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Stands for log 0: finite, so that differences and products of it never make a NaN.
LOG_ZERO = -1e30
# What the last group holds past the end of the vocabulary: below LOG_ZERO, so that it is not drawn even where every
# token has probability 0.
PAST = 10 * LOG_ZERO
# Numbers that `unmask` looks at together. XLA:CPU writes the exponentials of a sum out: this many stay in its cache,
# all of them would be copies of the logits.
BLOCK = 1 << 18


def _at_least_float32(logits):
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _iota(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def _without(logits, exclude):
    x = _at_least_float32(logits)
    return x if exclude < 0 else jnp.where(_iota(x) == exclude, LOG_ZERO, x)


def _valid(targets, vocabulary, exclude):
    return (targets >= 0) & (targets < vocabulary) & (targets != exclude)


def cross_entropy(logits, targets, exclude):
    """The loss of each row and, for `cross_entropy_backward`, its log-sum-exp."""
    return loss(logits, targets, _log_sum_exp(logits, exclude), exclude)


def loss(logits, targets, lse, exclude):
    valid = _valid(targets, logits.shape[-1], exclude)
    picked = _entry(logits, jnp.where(valid, targets, 0))
    return jnp.where(valid, lse - picked, 0.0), lse


def _entry(logits, index):
    # As bits: to pick from bfloat16, XLA:CPU widens all of it first, and writes that out for every other reader too.
    one = jnp.take_along_axis(_bits(logits), index[..., None], axis=-1)[..., 0]
    return _at_least_float32(jax.lax.bitcast_convert_type(one, logits.dtype))


def _bits(logits):
    return jax.lax.bitcast_convert_type(logits, f"uint{8 * logits.dtype.itemsize}")


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


def cross_entropy_backward(logits, targets, lse, cotangent, exclude):
    """The gradient of the logits: one pass that reads them and writes it, on every device."""
    x = _without(logits, exclude)
    hot = _iota(x) == targets[..., None]
    gradient = (jnp.exp(x - lse[..., None]) - hot) * cotangent[..., None]
    # `where`, not a zero factor: a row without a target may hold anything, and 0 * inf is NaN.
    return jnp.where(_valid(targets, x.shape[-1], exclude)[..., None], gradient, 0.0).astype(logits.dtype)


def counted(targets, vocabulary, exclude):
    """The targets, with -1 for every one that costs nothing."""
    return jnp.where(_valid(targets, vocabulary, exclude), targets, -1).astype(jnp.int32)


class Groups(NamedTuple):
    """What one pass over the vocabulary leaves behind, a number for each group of tokens: [*rows, groups]."""

    peak: jax.Array  # the largest logit
    total: jax.Array  # sum of exp(x - peak)
    spread: jax.Array  # sum of exp(x - peak) (x - peak)
    # sum of exp((x - peak) / temperature) over what may be drawn (None: `total`), or how many tokens tie with the peak
    drawn: jax.Array | None


def groups(logits, floor, temperature, group, ties=False) -> Groups:
    """The pass of `unmask` over the vocabulary, in XLA. `floor` is None or [*rows]; `ties` says what `drawn` holds."""
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    rows = math.prod(shape)
    together = max(1, BLOCK // vocabulary)
    if jax.default_backend() != "cpu" or rows <= together:
        return _groups_of(logits, floor, temperature, group, ties)
    # As bits: XLA:CPU would widen all of the bfloat16 logits before the loop.
    flat = _bits(logits).reshape(rows, vocabulary)
    floors = None if floor is None else floor.reshape(rows)

    def block(i, found):
        start = jnp.minimum(i * together, rows - together)  # the last block may take up rows of the one before it
        part, floor = (x if x is None else jax.lax.dynamic_slice_in_dim(x, start, together) for x in (flat, floors))
        assert part is not None
        one = _groups_of(jax.lax.bitcast_convert_type(part, logits.dtype), floor, temperature, group, ties)
        return jax.tree.map(lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, start, 0), found, one)

    found = jax.eval_shape(lambda: _groups_of(logits, floor, temperature, group, ties))
    empty = jax.tree.map(lambda x: jnp.zeros((rows, x.shape[-1]), x.dtype), found)
    found = jax.lax.fori_loop(0, -(-rows // together), block, empty)
    return jax.tree.map(lambda x: x.reshape(*shape, -1), found)


def _groups_of(logits, floor, temperature, group, ties) -> Groups:
    whole = logits.shape[-1] // group * group
    # The last, shorter group apart: padding would copy the logits.
    parts = [logits[..., :whole].reshape(*logits.shape[:-1], whole // group, group), logits[..., None, whole:]]
    found = [group_part(part, floor, temperature, ties) for part in parts if part.shape[-1] and part.shape[-2]]
    joined: list[Any] = [None if one[0] is None else jnp.concatenate(one, axis=-1) for one in zip(*found)]
    return Groups(*joined)


def log_sum_exp_of(found: Groups):
    """Of whole rows."""
    peak = jnp.max(found.peak, axis=-1)
    return peak + jnp.log(jnp.sum(found.total * jnp.exp(found.peak - peak[..., None]), axis=-1))


def group_part(x, floor, temperature, ties):
    # The peak in the dtype of the logits: see `_log_sum_exp`.
    peak = jnp.maximum(_at_least_float32(jnp.max(x, axis=-1)), LOG_ZERO)
    wide = _at_least_float32(x)
    below = jnp.maximum(wide, LOG_ZERO) - peak[..., None]
    weight = jnp.exp(below)
    # Below -200 the weight is 0 in float32; the clip keeps 0 times LOG_ZERO out of the sum.
    spread = jnp.sum(weight * jnp.maximum(below, -200.0), axis=-1)
    drawn = jnp.sum((below >= 0).astype(below.dtype), axis=-1) if ties else None
    if not ties and temperature != 0 and (temperature != 1 or floor is not None):
        drawn = weight if temperature == 1 else jnp.exp(below / temperature)
        drawn = drawn if floor is None else jnp.where(wide >= floor[..., None, None], drawn, 0.0)
        drawn = jnp.sum(drawn, axis=-1)
    return peak, jnp.sum(weight, axis=-1), spread, drawn


def unmask(logits, noise, floor, temperature, group, top_k, read: Callable[..., Groups] = groups):
    """Token, log-probability, confidence, entropy and margin; see `kernels_pallas.unmask.unmask`.

    `read` makes the pass over the vocabulary; after it, whole groups of each row are read again: that of the likeliest
    token, the drawn one, and with top-k the k groups that hold the k largest logits.
    """
    found = read(logits, None, 0, group, ties=True) if top_k else read(logits, floor, temperature, group)
    peak, likeliest = jnp.max(found.peak, axis=-1), _first_largest(found.peak)
    below = found.peak - peak[..., None]
    scale = jnp.exp(below)
    total = jnp.sum(found.total * scale, axis=-1)
    log_total = jnp.log(total)  # apart from the peak, which would swallow it where it is `LOG_ZERO`
    spread = jnp.sum(scale * (found.spread + jnp.maximum(below, -200.0) * found.total), axis=-1)
    entropy = log_total - spread / total
    inside = _group_at(logits, likeliest, group)
    best = _first_largest(inside)
    others = jnp.max(jnp.where(_iota(below) == likeliest[..., None], LOG_ZERO, found.peak), axis=-1)
    second = jnp.maximum(others, jnp.max(jnp.where(_iota(inside) == best[..., None], LOG_ZERO, inside), axis=-1))
    confidence = jnp.exp(-log_total)
    margin = confidence - jnp.exp(second - peak - log_total)
    if temperature == 0:
        return likeliest * group + best, -log_total, confidence, entropy, margin
    # A group of the vocabulary by its total mass, then a token inside it, each by Gumbel-max: the same law as one draw
    # over the whole vocabulary, at about 2 sqrt(V) random numbers in place of V.
    if top_k:
        floor, mass = _largest(found, logits, floor, temperature, group, top_k)
    else:
        mass = found.total if found.drawn is None else found.drawn
    mass = jnp.where(mass == 0, LOG_ZERO, below / temperature + jnp.log(mass))
    chosen = _first_largest(mass + noise[..., : mass.shape[-1]])
    inside = _group_at(logits, chosen, group)
    y = (inside - peak[..., None]) / temperature
    if floor is not None:
        y = jnp.where(inside >= floor[..., None], y, LOG_ZERO)
    token = _first_largest(y + noise[..., mass.shape[-1] :])
    log_prob = jnp.take_along_axis(inside, token[..., None], axis=-1)[..., 0] - peak - log_total
    return chosen * group + token, log_prob, confidence, entropy, margin


def _largest(found, logits, floor, temperature, group, k):
    """The k-th largest logit, or `floor` where that is higher, and what each group holds above it, as `Groups.drawn`.

    The k groups with the largest peaks hold the k largest logits. Any other group has at most ties with the k-th, and
    then its own peak is one of them.
    """
    shape, count = found.peak.shape[:-1], found.peak.shape[-1]
    rows, kept = math.prod(shape), min(k, count)
    peak, index = jax.lax.top_k(found.peak.reshape(rows, count), kept)
    inside = _groups_at(logits.reshape(rows, logits.shape[-1]), index, group)
    # Their minimum, not the last of them: XLA:CPU answers a slice of the k largest by sorting all.
    lowest = jnp.min(jax.lax.top_k(inside.reshape(rows, kept * group), k)[0], axis=-1)
    floor = lowest if floor is None else jnp.maximum(lowest, floor.astype(lowest.dtype).reshape(rows))
    weight = jnp.exp((inside - peak[..., None]) / temperature)
    above = jnp.sum(jnp.where(inside >= floor[:, None, None], weight, 0.0), axis=-1)
    tied = jnp.where(found.peak.reshape(rows, count) >= floor[:, None], found.drawn.reshape(rows, count), 0.0)
    mass = tied.at[jnp.arange(rows)[:, None], index].set(above)
    return floor.reshape(shape), mass.reshape(*shape, count)


def _first_largest(x):
    return jnp.argmax(x, axis=-1).astype(jnp.int32)


def _group_at(logits, index, group):
    """One group of each row, [*rows, group], with `PAST` past the end of the vocabulary."""
    return _groups_at(logits, index[..., None], group)[..., 0, :]


def _groups_at(logits, index, group):
    """Groups `index` [*rows, n] of each row, [*rows, n, group], with `PAST` past the end of the vocabulary."""
    token = index[..., None] * group + jax.lax.broadcasted_iota(jnp.int32, (*index.shape, group), index.ndim)
    flat = jnp.minimum(token, logits.shape[-1] - 1).reshape(*index.shape[:-1], index.shape[-1] * group)
    taken = jnp.take_along_axis(_bits(logits), flat, axis=-1).reshape(token.shape)  # see `_entry`
    taken = _at_least_float32(jax.lax.bitcast_convert_type(taken, logits.dtype))
    return jnp.where(token < logits.shape[-1], jnp.maximum(taken, LOG_ZERO), PAST)
