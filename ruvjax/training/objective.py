"""What a training loss looks like to the step, and its gradient over one batch or over micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (params, carry, batch, key) -> (loss, (carry, metrics)). `loss` is a mean per token; `metrics` is a flat dict of
# scalars that holds "loss_sum" (float32) and "tokens" (how many tokens `loss` averages over) among others.
# `carry` is None, or a pytree whose leaves have the batch axis first, like those of `batch`.
Objective = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]
# The same arguments -> (gradient, (carry, metrics)), with metrics["loss"] added.
Gradient = Callable[[Any, Any, Any, jax.Array], tuple[Any, tuple[Any, dict[str, jax.Array]]]]


def gradient_of(objective: Objective, accumulation: int = 1) -> Gradient:
    """The gradient of `objective`, computed over `accumulation` micro-batches one after the other.

    Equal to the gradient of the whole batch also where micro-batches hold different numbers of tokens: each counts by
    its tokens. Every micro-batch gets the same key, because objectives fold keys by global sample index. Metrics
    "loss_sum" and "tokens" are added up; the others are averaged by tokens. Raises ValueError (at trace time) where
    the batch does not divide by `accumulation`.
    """

    def whole(params: Any, carry: Any, batch: Any, key: jax.Array) -> tuple[Any, tuple[Any, dict[str, jax.Array]]]:
        (loss, (carry, metrics)), gradient = jax.value_and_grad(objective, has_aux=True)(params, carry, batch, key)
        return gradient, (carry, {"loss": loss, **metrics})

    if accumulation == 1:
        return whole

    def accumulated(params, carry, batch, key):
        def add(totals, micro):
            carry, batch = micro
            gradient, (carry, metrics) = whole(params, carry, batch, key)
            tokens = metrics["tokens"].astype(jnp.float32)
            totals = jax.tree.map(
                lambda total, x: (total + tokens * x).astype(total.dtype), totals, (gradient, _means(metrics))
            )
            return totals, (carry, {name: metrics[name] for name in ("loss_sum", "tokens")})

        micros = jax.tree.map(lambda x: _split(x, accumulation), (carry, batch))
        first = jax.tree.map(lambda x: x[0], micros)
        _, (_, names) = jax.eval_shape(whole, params, first[0], first[1], key)
        zeros = jax.tree.map(jnp.zeros_like, params), {name: jnp.zeros((), jnp.float32) for name in _means(names)}
        (gradient, means), (carries, sums) = jax.lax.scan(add, zeros, micros)
        sums = {name: jnp.sum(values) for name, values in sums.items()}
        share = 1.0 / jnp.maximum(sums["tokens"].astype(jnp.float32), 1.0)
        gradient, means = jax.tree.map(lambda total: (total * share).astype(total.dtype), (gradient, means))
        return gradient, (jax.tree.map(_join, carries), {**means, **sums})

    return accumulated


def _means(metrics):
    return {name: value for name, value in metrics.items() if name not in ("loss_sum", "tokens")}


def _split(x, parts: int):
    """[parts * n, ...] -> [parts, n, ...] by strides: a batch axis sharded over devices stays where it is."""
    if x.shape[0] % parts:
        raise ValueError(f"a batch of {x.shape[0]} rows does not divide into {parts} micro-batches")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _join(x):
    """The inverse of `_split`."""
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
