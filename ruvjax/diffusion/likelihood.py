"""Likelihood of text under a masked diffusion model: bounds by sampling, and exactly by enumeration, in nats per row.

A bound is the NELBO, an upper bound of -log p, equal to it for a model whose conditionals belong to one joint law.
Every function is pure and may be jitted with its callables and whole numbers held static. Padding is told by `fixed`,
like
a prompt: what is fixed stays visible and is not counted.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from kernels_pallas.attention import Mask
from kernels_pallas.unmask import masked_cross_entropy
from ruvjax.core.model import Output
from ruvjax.diffusion.corrupt import exact_count, mask_exact, mask_tokens, stratified_time
from ruvjax.diffusion.loss import Encode, Project, block_count, block_index
from ruvjax.diffusion.schedule import Schedule
from ruvjax.errors import ConfigError, InputError

# (params, tokens [batch, length], time [batch], carry) -> (Output with logits, carry)
Forward = Callable[[Any, jax.Array, jax.Array, Any], tuple[Output, Any]]

ENUMERABLE = 16  # positions: 65,536 masks


def nelbo_samples(
    forward: Forward,
    params: Any,
    tokens: Int[Array, "batch length"],
    key: Key[Array, ""],
    *,
    mask_id: int,
    samples: int,
    fixed: Bool[Array, "batch length"] | None = None,
    index: Int[Array, " batch"] | None = None,
    carry: Any = None,
    schedule: Schedule | None = None,
    method: Literal["exact_k", "continuous"] = "exact_k",
) -> Float[Array, "samples batch"]:
    """`samples` unbiased estimates of each row's NELBO, in nats.

    exact_k masks exactly k of the row's n free tokens, k uniform in 1..n, and weighs by n / k (Nie et al. 2025);
    continuous draws a time, and lacks `schedule.missing()`. The samples of one row are stratified: their times are
    evenly spaced from one random offset, so their mean varies much less than that of independent ones (and the spread
    between them says little about it; take intervals over rows). Randomness is folded by `index` (default 0, 1, ...).
    `carry` goes to every pass, and what the passes return of it is dropped. `schedule` (default linear) tells the time
    of a mask share.
    """
    if method not in ("exact_k", "continuous"):
        raise ConfigError(f"method={method!r} is not known", "one of exact_k, continuous")
    if samples < 1:
        raise ConfigError(f"samples={samples!r} must be a whole number of at least 1")
    schedule = Schedule() if schedule is None else schedule
    index, fixed = _defaults(tokens, index, fixed)
    offset_key, mask_key = jax.random.split(key)
    n = jnp.sum(~fixed, axis=1)

    def draw(number):
        t = stratified_time(offset_key, index, number, samples)
        noise_key = jax.random.fold_in(mask_key, number)
        if method == "exact_k":
            count = exact_count(t, n)
            noisy, masked = mask_exact(noise_key, tokens, index, count, mask_id, fixed)
            t, weight = schedule.time_of(1 - count / jnp.maximum(n, 1)), n / count
        else:
            noisy, masked = mask_tokens(noise_key, tokens, index, schedule.mask_probability(t), mask_id, fixed)
            weight = schedule.weight(t)
        output, _ = forward(params, noisy, t, carry)
        return weight * jnp.sum(_nll(output, tokens, masked, mask_id), axis=1)

    return lax.map(draw, jnp.arange(samples))


def nelbo_estimate(
    forward: Forward,
    params: Any,
    tokens: Int[Array, "batch length"],
    key: Key[Array, ""],
    *,
    mask_id: int,
    samples: int,
    fixed: Bool[Array, "batch length"] | None = None,
    index: Int[Array, " batch"] | None = None,
    carry: Any = None,
    schedule: Schedule | None = None,
    method: Literal["exact_k", "continuous"] = "exact_k",
) -> Float[Array, " batch"]:
    """Each row's NELBO in nats: the mean of `nelbo_samples`, whose arguments it takes."""
    estimates = nelbo_samples(
        forward,
        params,
        tokens,
        key,
        mask_id=mask_id,
        samples=samples,
        fixed=fixed,
        index=index,
        carry=carry,
        schedule=schedule,
        method=method,
    )
    return jnp.mean(estimates, axis=0)


def prefix_log_likelihood(
    forward: Forward,
    params: Any,
    tokens: Int[Array, "batch length"],
    prefix: Int[Array, " batch"],
    length: Int[Array, " batch"],
    key: Key[Array, ""],
    *,
    mask_id: int,
    samples: int,
    index: Int[Array, " batch"] | None = None,
    carry: Any = None,
) -> Float[Array, " batch"]:
    """A lower bound, estimated, of log p(answer | prompt) in nats: the prompt is the first `prefix` tokens of a row,
    the answer those from there to `length`, and the rest is padding (the forward must keep it out of attention)."""
    position = jnp.arange(tokens.shape[1])[None, :]
    fixed = (position < prefix[:, None]) | (position >= length[:, None])
    return -nelbo_estimate(
        forward, params, tokens, key, mask_id=mask_id, samples=samples, fixed=fixed, index=index, carry=carry
    )


def exact_nelbo(
    forward: Forward,
    params: Any,
    tokens: Int[Array, "batch length"],
    *,
    mask_id: int,
    fixed: Bool[Array, "batch length"] | None = None,
    carry: Any = None,
    schedule: Schedule | None = None,
) -> Float[Array, " batch"]:
    """Each row's NELBO in nats by enumeration of all 2^length masks M of its n free tokens:
    sum over M of (|M| - 1)! (n - |M|)! / n! * sum over i in M of -log p(x_i | x outside M).

    This is the expectation of the exact_k estimator. A model that is told the time gets that of the mask share |M| / n.
    Summed in float64 where jax has it enabled. Raises InputError for rows longer than `ENUMERABLE`.
    """
    schedule = Schedule() if schedule is None else schedule
    _, fixed = _defaults(tokens, None, fixed)
    n = jnp.sum(~fixed, axis=1)

    def term(pattern):
        masked = pattern[None, :] & ~fixed
        count = jnp.sum(masked, axis=1)
        # with fixed positions several patterns hide the same tokens: count the one that names no fixed position
        weight = jnp.where(jnp.any(pattern[None, :] & fixed, axis=1), 0, mask_weight(count, n))
        time = schedule.time_of(1 - count / jnp.maximum(n, 1))
        output, _ = forward(params, jnp.where(masked, mask_id, tokens), time, carry)
        return weight * jnp.sum(_nll(output, tokens, masked, mask_id), axis=1)

    return jnp.sum(lax.map(term, _patterns(tokens.shape[1])), axis=0)


def block_nelbo_samples(
    encode: Encode,
    project: Project,
    params: Any,
    tokens: Int[Array, "batch length"],
    key: Key[Array, ""],
    *,
    block_size: int,
    mask_id: int,
    samples: int,
    fixed: Bool[Array, "batch length"] | None = None,
    index: Int[Array, " batch"] | None = None,
    segments: Int[Array, "batch length"] | None = None,
) -> Float[Array, "samples batch"]:
    """`samples` unbiased estimates of each row's NELBO in nats under a model that is autoregressive over blocks
    (Arriola et al. 2025): exactly k of a block's n free tokens masked, given the clean blocks before it. Stratified
    like `nelbo_samples`. `encode` and `project` are those of the training objective. Block size 1 gives -log p without
    noise."""
    batch, length = tokens.shape
    blocks = block_count(length, block_size)
    index, fixed = _defaults(tokens, index, fixed)
    rows, held = (x.reshape(batch * blocks, block_size) for x in (tokens, fixed))
    number_of_block = block_index(index, blocks)
    offset_key, mask_key = jax.random.split(key)
    n = jnp.sum(~held, axis=1)

    def draw(number):
        count = exact_count(stratified_time(offset_key, number_of_block, number, samples), n)
        noise_key = jax.random.fold_in(mask_key, number)
        noisy, masked = mask_exact(noise_key, rows, number_of_block, count, mask_id, held)
        noisy, masked = noisy.reshape(batch, length), masked.reshape(batch, length)
        nll = _block_nll(encode, project, params, tokens, noisy, masked, segments, block_size, mask_id)
        return jnp.sum((n / count).reshape(batch, blocks) * nll, axis=1)

    return lax.map(draw, jnp.arange(samples))


def exact_block_nelbo(
    encode: Encode,
    project: Project,
    params: Any,
    tokens: Int[Array, "batch length"],
    *,
    block_size: int,
    mask_id: int,
    segments: Int[Array, "batch length"] | None = None,
) -> Float[Array, " batch"]:
    """Each row's block NELBO in nats by enumeration of the 2^block_size masks of a block: blocks do not see each
    other's noise, so one pass serves a mask in all of them. Raises InputError for blocks longer than `ENUMERABLE`."""
    blocks = block_count(tokens.shape[1], block_size)

    def term(pattern):
        masked = jnp.broadcast_to(jnp.tile(pattern, blocks)[None, :], tokens.shape)
        noisy = jnp.where(masked, mask_id, tokens)
        nll = _block_nll(encode, project, params, tokens, noisy, masked, segments, block_size, mask_id)
        return mask_weight(jnp.sum(pattern), jnp.asarray(block_size)) * jnp.sum(nll, axis=1)

    return jnp.sum(lax.map(term, _patterns(block_size)), axis=0)


def mask_weight(count: Int[Array, "*batch"], n: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """(k - 1)! (n - k)! / n!, what a mask of k of n tokens weighs in the NELBO (0 for k = 0), for n up to `ENUMERABLE`.

    It is the integral of t^(k-1) (1-t)^(n-k): every schedule that runs from 1 to 0 leads to it.
    """
    factorial = jnp.asarray(np.cumprod([1.0, *range(1, ENUMERABLE + 1)]))
    return jnp.where(count > 0, factorial[jnp.maximum(count - 1, 0)] * factorial[n - count] / factorial[n], 0)


def _defaults(tokens, index, fixed):
    index = jnp.arange(tokens.shape[0], dtype=jnp.int32) if index is None else index
    return index, jnp.zeros(tokens.shape, bool) if fixed is None else fixed


def _nll(output: Output, tokens, masked, mask_id: int):
    """-log p of masked tokens under SUBS (Sahoo et al. 2024): the mask has probability 0, what is visible costs 0."""
    assert output.logits is not None, "a likelihood needs a forward that returns logits"
    return masked_cross_entropy(output.logits, jnp.where(masked, tokens, -1), mask_id)


def _block_nll(encode, project, params, tokens, noisy, masked, segments, block_size: int, mask_id: int):
    """The summed -log p of the masked tokens of each block, [batch, blocks], from one pass over [noisy; clean]."""
    batch, length = tokens.shape
    doubled = None if segments is None else jnp.concatenate([segments, segments], axis=1)
    mask = Mask(segments=doubled, diffusion=block_size)
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), 2)[None]
    hidden = encode(params, jnp.concatenate([noisy, tokens], axis=1), None, mask, positions)
    logits = project(params, jax.tree.map(lambda h: h[:, :length].reshape(batch * length, *h.shape[2:]), hidden))
    nll = masked_cross_entropy(logits, jnp.where(masked, tokens, -1).reshape(-1), mask_id)
    return jnp.sum(nll.reshape(batch, -1, block_size), axis=2)


def _patterns(length: int) -> jax.Array:
    """All masks of `length` positions, bool [2^length, length]."""
    if length > ENUMERABLE:
        raise InputError(f"{length} positions have too many masks to enumerate", f"at most {ENUMERABLE}")
    return (jnp.arange(2**length)[:, None] >> jnp.arange(length)[None, :]) & 1 == 1
