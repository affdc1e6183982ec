"""Drawing times and masks. Every draw is folded by the global sample index, never by the place in a batch, so it is
bit-equal whatever the batch size, the accumulation or the number of devices."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from ruvjax.errors import ConfigError

TimeSampling = Literal["iid", "antithetic", "low_discrepancy"]


def row_keys(key: Key[Array, ""], index: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """One key per row, by its global sample index."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def _uniform(key: jax.Array, index: jax.Array) -> jax.Array:
    """One float32 in [0, 1) per index, a multiple of 2^-23."""
    return jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(row_keys(key, index))


def draw_time(
    key: Key[Array, ""], index: Int[Array, " batch"], global_batch: int, method: TimeSampling
) -> Float[Array, " batch"]:
    """A time in (0, 1] per row, uniform for every method.

    iid:             independent.
    antithetic:      samples 2i and 2i+1 get t and 1 - t (to 2^-23).
    low_discrepancy: one offset per `global_batch` samples, plus a multiple of 1 / global_batch (Kingma et al. 2021).
                     The multiples follow a rank-1 lattice, so any run of neighbours (a micro-batch) is spread out too.
    """
    match method:
        case "iid":
            u = _uniform(key, index)
        case "antithetic":
            u = _uniform(key, index // 2)
            u = jnp.where(index % 2 == 0, u, 1 - 2.0**-23 - u)  # the largest draw is 1 - 2^-23: both stay in [0, 1)
        case "low_discrepancy":
            place = index % global_batch * _lattice(global_batch) % global_batch
            u = _uniform(key, index // global_batch) + place.astype(jnp.float32) / global_batch
            u = u - jnp.floor(u)
        case _:
            raise ConfigError(f"time_sampling={method!r} is not known", "one of iid, antithetic, low_discrepancy")
    return 1 - u


def stratified_time(
    key: Key[Array, ""], index: Int[Array, " batch"], number: Int[Array, ""], samples: int
) -> Float[Array, " batch"]:
    """The time in (0, 1] of sample `number` of `samples`: evenly spaced from one uniform offset per row."""
    u = _uniform(key, index) + jnp.float32(number) / samples
    return 1 - (u - jnp.floor(u))


def exact_count(t: Float[Array, " batch"], n: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """How many of n tokens to mask: uniform in 1..n for uniform t (and 1 where n = 0, so that n / k is 0)."""
    return jnp.clip(jnp.ceil(t * n), 1, jnp.maximum(n, 1)).astype(jnp.int32)


def _lattice(n: int) -> int:
    """A factor coprime to n, near n / golden ratio, whose products with numbers below n fit an int32."""
    factor = max(1, min(round(n * (math.sqrt(5) - 1) / 2), (2**31 - 1) // n))
    while math.gcd(factor, n) != 1:
        factor -= 1
    return factor


def mask_tokens(
    key: Key[Array, ""],
    tokens: Int[Array, "batch length"],
    index: Int[Array, " batch"],
    p_mask: Float[Array, " batch"],
    mask_id: int,
    fixed: Bool[Array, "batch length"] | None = None,
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """Mask every token that is not fixed with probability `p_mask`, independently. Returns (noisy tokens, masked)."""
    keys = row_keys(key, index)
    noise = jax.vmap(lambda k: jax.random.uniform(k, tokens.shape[1:], p_mask.dtype))(keys)
    masked = noise < p_mask[:, None]
    if fixed is not None:
        masked = masked & ~fixed
    return jnp.where(masked, mask_id, tokens), masked


def mask_exact(
    key: Key[Array, ""],
    tokens: Int[Array, "batch length"],
    index: Int[Array, " batch"],
    count: Int[Array, " batch"],
    mask_id: int,
    fixed: Bool[Array, "batch length"] | None = None,
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """Mask exactly `count` of the tokens that are not fixed (all where there are fewer), every set equally likely."""
    keys = row_keys(key, index)
    noise = jax.vmap(lambda k: jax.random.bits(k, tokens.shape[1:], jnp.uint32))(keys) >> 1
    if fixed is not None:
        noise = jnp.where(fixed, jnp.uint32(0xFFFFFFFF), noise)
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    masked = rank < count[:, None]
    if fixed is not None:
        masked = masked & ~fixed
    return jnp.where(masked, mask_id, tokens), masked


def truncate(
    key: Key[Array, ""], index: Int[Array, " batch"], segments: Int[Array, "batch length"], probability: float
) -> Int[Array, "batch length"]:
    """Random-length training: with `probability`, keep only the first n real tokens of a row, n uniform, and turn the
    rest into padding (segment 0). Returns the new segments."""

    def row(key, segments):
        chosen, share = jax.random.uniform(key, (2,))
        real = segments != 0
        kept = 1 + jnp.floor(share * jnp.sum(real)).astype(jnp.int32)
        return jnp.where((chosen < probability) & (jnp.cumsum(real) > kept), 0, segments)

    return jax.vmap(row)(row_keys(key, index), segments)


def infill_context(
    key: Key[Array, ""], index: Int[Array, " batch"], length: int, probability: float
) -> Bool[Array, "batch length"]:
    """Infill training: with `probability`, a row keeps a visible beginning and a visible end (two random spans, either
    may be empty) around one hidden gap, whose two ends are a uniform pair. Returns the visible positions."""

    def row(key):
        chosen_key, first_key, second_key = jax.random.split(key, 3)
        a = jax.random.randint(first_key, (), 0, length + 1)
        b = jax.random.randint(second_key, (), 0, length)
        b = jnp.where(b >= a, b + 1, b)  # uniform over the ends different from a: the gap is never empty
        position = lax.iota(jnp.int32, length)
        gap = (position >= jnp.minimum(a, b)) & (position < jnp.maximum(a, b))
        return (jax.random.uniform(chosen_key) < probability) & ~gap

    return jax.vmap(row)(row_keys(key, index))
