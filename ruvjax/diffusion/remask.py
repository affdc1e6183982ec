"""Remasking: a sampler step that takes tokens back and keeps the marginals (Wang et al. 2025, ReMDM).

With m_t the probability of a mask at time t, a step from t to s < t masks each visible token with probability sigma and
unmasks each masked one with probability (m_t - m_s + sigma (1 - m_t)) / m_t, so that the probability at s is still m_s.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def largest_sigma(m_t: Float[Array, " batch"], m_s: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """min(1, m_s / (1 - m_t)): above it the unmasking probability would pass 1."""
    visible = 1.0 - m_t
    return jnp.where(visible > 0, jnp.minimum(1.0, m_s / jnp.where(visible > 0, visible, 1.0)), 1.0)


def by_confidence(
    limit: Float[Array, " batch"], confidence: Float[Array, "batch length"], visible: Bool[Array, "batch length"]
) -> tuple[Float[Array, "batch length"], Float[Array, " batch"]]:
    """Sigma at each visible position, `limit` times softmax(-confidence at reveal) over the visible ones; and its mean
    over them, which the masked positions go by so that the expected number of masks stays what the schedule says."""
    share = jax.nn.softmax(jnp.where(visible, -confidence, -1e30), axis=-1)
    sigma = jnp.where(visible, limit[:, None] * share, 0.0)
    return sigma, jnp.sum(sigma, axis=-1) / jnp.maximum(jnp.sum(visible, axis=-1), 1)


def unmask_probability(
    m_t: Float[Array, " batch"], m_s: Float[Array, " batch"], sigma: Float[Array, " batch"] | float = 0.0
) -> Float[Array, " batch"]:
    """(m_t - m_s + sigma (1 - m_t)) / m_t; with sigma 0 the posterior of plain masked diffusion."""
    return jnp.clip((m_t - m_s + sigma * (1.0 - m_t)) / jnp.where(m_t > 0, m_t, 1.0), 0.0, 1.0)


def pause(time: Float[Array, " batch"], t_on: float, t_off: float, held: Float[Array, ""]) -> Float[Array, " batch"]:
    """The loop's clock: from 1 to `held` while time falls from 1 to t_on, still until t_off, then on to 0."""
    before = held + (1.0 - held) * (time - t_on) / (1.0 - t_on)
    after = held * time / t_off
    return jnp.where(time > t_on, before, jnp.where(time >= t_off, held, after))
