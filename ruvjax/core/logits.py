"""What decoders do to logits before a token is drawn.

Top-k, top-p and min-p are one thing, a floor under which no token is drawn; each function here gives that floor in the
units of the logits, so that nothing the size of the vocabulary is sorted or copied.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.unmask import LOG_ZERO


def suppress(logits: Float[Array, "*rows vocab"], tokens: Sequence[int]) -> Float[Array, "*rows vocab"]:
    """Give the listed tokens probability 0, by a large finite negative logit."""
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    for token in tokens:
        logits = jnp.where(index == token, LOG_ZERO, logits)
    return logits


def seen_tokens(
    tokens: Int[Array, "batch length"], counted: Bool[Array, "batch length"], vocabulary: int
) -> Bool[Array, "batch vocab"]:
    """Which tokens occur in each row, at the positions that are `counted`."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    # A position that does not count writes past the end, which "drop" ignores.
    none = jnp.zeros((tokens.shape[0], vocabulary), bool)
    return none.at[rows, jnp.where(counted, tokens, vocabulary)].set(True, mode="drop")


def repetition_penalty(
    logits: Float[Array, "*rows vocab"], seen: Bool[Array, "*#rows vocab"], penalty: float
) -> Float[Array, "*rows vocab"]:
    """Divide the positive logits of seen tokens by `penalty`, multiply the negative ones by it (Keskar et al. 2019)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k_floor(logits: Float[Array, "*rows vocab"], k: int) -> Float[Array, "*rows"]:
    """The k-th largest logit; tokens tied with it stay."""
    k = min(k, logits.shape[-1])
    return _largest_floor(logits, lambda kept: jnp.sum(kept, axis=-1) >= k)


def top_p_floor(logits: Float[Array, "*rows vocab"], p: float, temperature: float = 1.0) -> Float[Array, "*rows"]:
    """The smallest logit of the nucleus: the fewest likely tokens whose probabilities, at this temperature, sum to at
    least `p` (Holtzman et al. 2020); tokens tied with the last stay."""
    weight = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature)
    target = p * jnp.sum(weight, axis=-1)
    return _largest_floor(logits, lambda kept: jnp.sum(jnp.where(kept, weight, 0.0), axis=-1) >= target)


def min_p_floor(logits: Float[Array, "*rows vocab"], p: float, temperature: float = 1.0) -> Float[Array, "*rows"]:
    """The logit whose probability is `p` times the largest, at this temperature (Nguyen et al. 2024)."""
    return jnp.max(logits, axis=-1) + temperature * jnp.log(p)


def draw_floor(
    logits: Float[Array, "*rows vocab"], *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "*rows"] | None:
    """One floor for top-k, then top-p among what top-k left, then min-p; None where all three are off (0, 1, 0)."""
    floor = None
    if top_k:
        floor = top_k_floor(logits, top_k)
    if top_p < 1.0:
        floor = top_p_floor(above(logits, floor), top_p, temperature)
    if min_p:
        lowest = min_p_floor(logits, min_p, temperature)
        floor = lowest if floor is None else jnp.maximum(floor, lowest)
    return floor


def above(logits: Float[Array, "*rows vocab"], floor: Float[Array, "*rows"] | None) -> Float[Array, "*rows vocab"]:
    """The logits with probability 0 for all that lies below `floor` (None: no floor)."""
    return logits if floor is None else jnp.where(logits >= floor[..., None], logits, LOG_ZERO)


def _largest_floor(logits, enough):
    """The largest logit l such that `enough(logits >= l)`, by bisection over the bits of float32.

    32 passes over the vocabulary, each a fused compare and sum: exact, and cheaper than a sort on every device.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Negative floats order backwards: flip all their bits, set the sign bit of the others, and unsigned order is right.
    keys = jnp.where(bits >= sign, ~bits, bits | sign)

    def narrow(step, lowest):
        candidate = lowest | (sign >> step.astype(jnp.uint32))
        return jnp.where(enough(keys >= candidate[..., None]), candidate, lowest)

    found = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(logits.shape[:-1], jnp.uint32))
    return jax.lax.bitcast_convert_type(jnp.where(found >= sign, found ^ sign, ~found), jnp.float32)
