"""Entropy from one exponential a logit: ln(sum of e^d) - (sum of e^d d) / (sum of e^d), d the distance to the peak."""

import jax
import jax.numpy as jnp


def entropy(logits: jax.Array) -> jax.Array:
    """logits [rows, vocabulary] -> nats [rows]. See `kernels_pallas.entropy.entropy`."""
    # Below -200 the exponential is 0 in float32; the clip keeps 0 times -inf out of the sum.
    below = jnp.maximum(logits - jnp.max(logits, axis=-1, keepdims=True), -200.0)
    power = jnp.exp(below)
    total = jnp.sum(power, axis=-1)
    return jnp.log(total) - jnp.sum(power * below, axis=-1) / total
