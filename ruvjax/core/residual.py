"""Low-rank updates of the residual stream before one layer: the site at which the adapters of a bank act."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from ruvjax.core.adapted import Lora, Selected, low_rank
from ruvjax.errors import ConfigError


@struct.dataclass
class Spots:
    """Adapters at a few distinct positions of each row, which cost what these positions cost.

    positions int32 [batch, spots]; `update` selects for each of them, ids and weights [batch, spots, k].
    """

    positions: Int[Array, "batch spots"]
    update: Selected


@struct.dataclass
class Residual:
    """x + the sum of what the updates make of x, where x is the residual stream before layer `layer`.

    Positions, of `Spots` and of a `Selected` that has ids for each, count the tokens that `apply` is given.
    """

    update: Lora | Selected | Spots | tuple[Lora | Selected | Spots, ...]
    layer: int = struct.field(pytree_node=False, default=0)


def enter(
    residual: Residual | None, layer: int, x: Float[Array, "batch length width"]
) -> Float[Array, "batch length width"]:
    """The residual stream as layer `layer` reads it."""
    return x if residual is None or layer != residual.layer else _updated(residual, x)


def scan_layers(block: Callable[..., Any], x: Any, layers: Any, residual: Residual | None) -> tuple[Any, Any]:
    """`lax.scan(block, x, layers)` over a tree of stacked layers, with the updates at their layer."""
    if residual is None:
        return lax.scan(block, x, layers)

    def numbered(x: Any, layer: tuple[Any, Any]):
        here = layer[0] == residual.layer
        return block(lax.cond(here, lambda x: _updated(residual, x), lambda x: x, x), layer[1])

    count = jax.tree.leaves(layers)[0].shape[0]
    return lax.scan(numbered, x, (jnp.arange(count), layers))


def check(residual: Residual | None, layers: int) -> None:
    """Raises ConfigError for an update at a layer that a model of `layers` layers does not have."""
    if residual is not None and not 0 <= residual.layer < layers:
        raise ConfigError(f"adapters at layer {residual.layer} of a model that has {layers}", "a layer from 0 on")


def reordered(
    residual: Residual | None, source: Int[Array, "batch length"] | None, place: Int[Array, "batch length"] | None
) -> Residual | None:
    """For tokens in another order: the one now at i stood at source[i], and the one that stood at i is at place[i]."""
    if residual is None or source is None or place is None:
        return residual

    def one(update: Any) -> Any:
        if isinstance(update, Spots):
            return replace(update, positions=jnp.take_along_axis(place, update.positions, axis=1))
        if isinstance(update, Selected) and update.ids.ndim == 3:
            ids, weights = (jnp.take_along_axis(v, source[:, :, None], axis=1) for v in (update.ids, update.weights))
            return replace(update, ids=ids, weights=weights)
        return update

    updates = residual.update
    return replace(residual, update=tuple(map(one, updates)) if isinstance(updates, tuple) else one(updates))


def _updated(residual: Residual, x: jax.Array) -> jax.Array:
    updates = residual.update if isinstance(residual.update, tuple) else (residual.update,)
    made = x
    for update in updates:
        if isinstance(update, Lora):
            made = made + low_rank(x, update)
        else:
            # A bank that selects nothing costs nothing and leaves every bit as it is.
            ids = update.update.ids if isinstance(update, Spots) else update.ids
            made = lax.cond(jnp.any(ids >= 0), _added, lambda made, x, update: made, made, x, update)
    return made


def _added(made: jax.Array, x: jax.Array, update: Selected | Spots) -> jax.Array:
    if isinstance(update, Selected):
        return made + low_rank(x, update)
    line = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return made.at[line, update.positions].add(low_rank(x[line, update.positions], update.update))
