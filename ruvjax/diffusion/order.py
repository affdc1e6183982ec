"""Which masked positions a step commits: ranked by how sure the model is, then by count, threshold or factor."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def ranks(score: Float[Array, "batch length"], candidates: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Each position's place, from 0, by falling score; candidates come first, ties go to the left position."""
    # A NaN score must still rank among the candidates, or a row could wait for ever for a position to commit.
    score = jnp.where(candidates, jnp.nan_to_num(score, nan=-1e30), -jnp.inf)
    return jnp.argsort(jnp.argsort(-score, axis=-1, stable=True), axis=-1)


def top(
    score: Float[Array, "batch length"], candidates: Bool[Array, "batch length"], count: Int[Array, " batch"]
) -> Bool[Array, "batch length"]:
    """The `count` best candidates of each row (all of them where there are fewer)."""
    return candidates & (ranks(score, candidates) < count[:, None])


def over_threshold(
    score: Float[Array, "batch length"], candidates: Bool[Array, "batch length"], threshold: float
) -> Bool[Array, "batch length"]:
    """Every candidate whose score is over the threshold, and always the best one (Wu et al. 2025, Fast-dLLM)."""
    return candidates & ((score > threshold) | (ranks(score, candidates) == 0))


def within_factor(
    confidence: Float[Array, "batch length"], candidates: Bool[Array, "batch length"], factor: float
) -> Bool[Array, "batch length"]:
    """The n most confident candidates, n the largest with (n + 1)(1 - c_(n)) < factor, where c_(1) >= c_(2) >= ...;
    at least one.

    With factor 1 and every c_i > 1 - e the rule says (n + 1) e <= 1: then the tokens that are likeliest one by one are
    also the likeliest jointly (Wu et al. 2025, theorem 1).
    """
    place = ranks(confidence, candidates)
    # (n + 1)(1 - c_(n)) grows with n, so a position belongs to the n first exactly when its own rank passes.
    passes = (place + 2) * (1.0 - confidence) < factor
    return candidates & (passes | (place == 0))


def even_count(remaining: Int[Array, " batch"], steps_left: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """How many of `remaining` positions to commit now, so that all are committed in `steps_left` equal steps; the
    earlier steps take what does not divide. At least one."""
    left = jnp.maximum(steps_left, 1)
    return jnp.maximum((remaining + left - 1) // left, 1)


def cosine_count(
    remaining: Int[Array, " batch"],
    total: Int[Array, " batch"],
    step: Int[Array, " batch"],
    steps: Int[Array, " batch"],
) -> Int[Array, " batch"]:
    """How many to commit in step `step` (from 0) of `steps`, so that floor(total cos(pi/2 (step+1)/steps)) stay masked
    (Chang et al. 2022, MaskGIT). At least one."""
    # The small term keeps float32's cosine of a third of pi from falling short of a half.
    stay = jnp.floor(total * jnp.cos(0.5 * jnp.pi * (step + 1) / steps) + 1e-3).astype(jnp.int32)
    return jnp.maximum(remaining - jnp.maximum(stay, 0), 1)


def dream_count(
    remaining: Int[Array, " batch"], step: Int[Array, " batch"], steps: Int[Array, " batch"]
) -> Int[Array, " batch"]:
    """How many to commit in step `step` (from 0) of `steps` by Dream's published rule (Ye et al. 2025): of the masks
    the share 1 - s/t, rounded down and possibly none, for times evenly from 1 to 0.001; in the last step all."""
    t, s = (1.0 - (step + k).astype(jnp.float32) * (jnp.float32(0.999) / steps) for k in (0, 1))
    count = jnp.floor(remaining.astype(jnp.float32) * (1.0 - s / t)).astype(jnp.int32)
    return jnp.where(step + 1 >= steps, remaining, count)
