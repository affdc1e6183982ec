"""A matrix multiply from the left: mixes the leading axis of an array and leaves the others alone."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.layout import contract
from ruvjax.core.adapted import Adapted, Selected, column_factors
from ruvjax.errors import ConfigError


def mix(x: Float[Array, "inner *rest"], w: Float[Array, "inner outer"] | Adapted) -> Float[Array, "outer *rest"]:
    """`w.T @ x` over the first axis, in the dtype of `x`, accumulated in float32.

    Where positions stand first, [length, batch, width], mixing them is one 2-D dot like any other: no transposed copy
    of the activations, forward or backward. The gradient of `w` keeps the dtype of `w`. Raises ConfigError for adapters
    that are chosen row by row.
    """
    return _adapted(x, w) if isinstance(w, Adapted) else _mix(x, w)


def _adapted(x, w: Adapted):
    update = w.update
    if isinstance(update, Selected):
        raise ConfigError("a layer that mixes positions cannot choose adapters row by row", "give all rows one adapter")
    scale = lax.stop_gradient(update.scale).astype(x.dtype)
    y = _mix(x, w.weight) + _mix(_mix(x, update.a) * scale, update.b)
    if update.magnitude is None:
        return y
    factors = jnp.expand_dims(column_factors(w.weight, update), tuple(range(1, y.ndim)))
    return (y * factors).astype(x.dtype)


@jax.custom_vjp
def _mix(x, w):
    return _forward(x, w)


def _forward(x, w):
    flat = x.reshape(x.shape[0], -1)
    return contract(_turned(w, x.dtype), flat, 1, 0).astype(x.dtype).reshape(w.shape[1], *x.shape[1:])


def _turned(w, dtype):
    """`w.T` as a real row-major copy; it is small beside the activations."""
    return lax.optimization_barrier(jnp.swapaxes(w.astype(dtype), 0, 1))


def _mix_fwd(x, w):
    return _forward(x, w), (x, w)


def _mix_bwd(saved, dy):
    x, w = saved
    flat = x.reshape(x.shape[0], -1)
    dy = lax.optimization_barrier(dy.reshape(dy.shape[0], -1))
    dx = contract(w.astype(dy.dtype), dy, 1, 0).astype(x.dtype)
    dw = contract(flat, dy, 1, 1).astype(w.dtype)
    return dx.reshape(x.shape), dw


_mix.defvjp(_mix_fwd, _mix_bwd)
