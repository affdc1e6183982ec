"""Stable-max, the softmax substitute of Prieto et al. 2025 (arXiv:2501.04697), in log space.

stablemax(x)_i = s(x_i) / sum_j s(x_j) with s(x) = x + 1 for x >= 0 and 1 / (1 - x) below. Its logarithm is
log s(x) = sign(x) log(1 + |x|), so one log-sum-exp gives in float32 what the quotient needs float64 for.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def log_stablemax(logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """Log-probabilities over the last axis, in float32 (float64 where the logits are)."""
    x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Each branch sees its own half only: at 0 the slope is 1 from both sides, which |x| or max(x, 0) would lose.
    above = jnp.log1p(jnp.where(x >= 0, x, 0.0))
    below = -jnp.log1p(jnp.where(x < 0, -x, 0.0))
    log_s = jnp.where(x >= 0, above, below)
    return log_s - jax.nn.logsumexp(log_s, axis=-1, keepdims=True)


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], stablemax: bool = True
) -> Float[Array, "*batch"]:
    """Nats of each label under stable-max (or softmax) of the logits. The labels must be classes: mask the others."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_probs = log_stablemax(wide) if stablemax else jax.nn.log_softmax(wide, axis=-1)
    return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
