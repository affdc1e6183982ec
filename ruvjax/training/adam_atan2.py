"""Adam without epsilon, and the sign rule for tables of which a batch touches a few rows, as optax transformations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdamAtan2State(NamedTuple):
    """done: int32[], updates so far; first, second: moments, shaped like the parameters."""

    done: jax.Array
    first: Any
    second: Any


def scale_by_adam_atan2(b1: float = 0.9, b2: float = 0.95) -> optax.GradientTransformation:
    """Adam-atan2 (Everett et al. 2024, arXiv:2407.05872): atan2(m, sqrt(v / (1 - b2^t))) / (1 - b1^t).

    Nothing to tune against a zero denominator, and invariant to the scale of the gradient. The first moment's bias is
    corrected outside the arc tangent, as the published TRM and HRM runs have it; an update is at most pi / 2 in size
    from the moment on that 1 - b1^t is near 1. Where the gradient has always been zero, so is the update.
    """

    def init(params: Any) -> AdamAtan2State:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamAtan2State(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        done = state.done + 1
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, updates)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, updates)
        correct1, correct2 = 1 - b1**done, 1 - b2**done
        change = jax.tree.map(
            lambda m, v: (jnp.arctan2(m, jnp.sqrt(v / correct2)) / correct1).astype(m.dtype), first, second
        )
        return change, AdamAtan2State(done, first, second)

    return optax.GradientTransformation(init, update)


def sign_of_touched_rows(weight_decay: float, rate: float = 1.0) -> optax.GradientTransformation:
    """Sign descent with decoupled decay for a table [rows, width]; rows without a gradient stay as they are.

    Adam becomes this where a row is met so rarely that its moments are forgotten in between. `rate` multiplies the
    learning rate; the decay of a touched row is `rate * weight_decay`. Updates are for a learning rate of 1.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def row(g: jax.Array, p: jax.Array) -> jax.Array:
            touched = jnp.any(g != 0, axis=-1, keepdims=True)
            return -rate * (jnp.sign(g) + jnp.where(touched, weight_decay * p, 0.0))

        return jax.tree.map(row, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
