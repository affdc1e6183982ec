"""Weights with a low-rank update beside them, as pytrees that stand where a weight stands.

`core.linear.linear` multiplies by an `Adapted` as it does by an array, so that any linear site of any model is adapted
by replacing that leaf of its parameters. Every leaf of these trees carries the stacked `layers` axis first where the
weight does: `lax.scan` over layers, `core.params.unstack` and `jax.tree.map` take them apart as they do any weight.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.lora_bank import lora_bank
from kernels_pallas.quant_matmul import QuantizedWeight
from ruvjax.core.product import product
from ruvjax.errors import ConfigError


@struct.dataclass
class Lora:
    """One low-rank update, `scale * a @ b` (Hu et al. 2021, arXiv:2106.09685). `*`: the layers axis, or nothing.

    a          [*, inner, rank].
    b          [*, rank, outer].
    scale      float32 [*], alpha / rank or what else the recipe says: a constant that no gradient reaches. Where it
               is 0 the layer is not adapted, and its `magnitude` has no effect.
    magnitude  [*, outer], the length of every column of the adapted weight (DoRA, Liu et al. 2024, arXiv:2402.09353);
               None: columns are as long as they come.
    """

    a: Any
    b: Any
    scale: Any
    magnitude: Any = None


@struct.dataclass
class Selected:
    """Updates out of a bank, chosen for each sequence or for each position, as `kernels_pallas.lora_bank` sums them.

    a        [*, bank, inner, rank].
    b        [*, bank, rank, outer].
    ids      int32 [*, batch, k] or [*, batch, length, k]; an id outside the bank, such as -1, selects nothing.
    weights  float32, of the shape of `ids`: what each selected update counts.
    """

    a: Any
    b: Any
    ids: Any
    weights: Any


@struct.dataclass
class Adapted:
    """A weight [*, inner, outer], an array or a `QuantizedWeight`, and the update beside it."""

    weight: Any
    update: Lora | Selected


def low_rank(x: Float[Array, "*batch inner"], update: Lora | Selected) -> Float[Array, "*batch outer"]:
    """What `update`, of one layer, adds to the product of `x` with the weight it stands beside; in the dtype of `x`.

    Raises ConfigError for a `Lora` with a magnitude, which scales the weight's own product too (`linear` applies it),
    and for a `Selected` where `x` is not the [batch, length, inner] that its ids choose for.
    """
    if isinstance(update, Selected):
        return _selected(x, update)
    if update.magnitude is not None:
        raise ConfigError("a DoRA update is no sum with the weight's product", "put it at a linear site")
    return product(product(x, update.a) * lax.stop_gradient(update.scale).astype(x.dtype), update.b)


def _selected(x: jax.Array, update: Selected) -> jax.Array:
    ids = update.ids
    if x.ndim != 3 or ids.shape[:-1] not in (x.shape[:1], x.shape[:2]):
        raise ConfigError(
            f"adapters chosen by ids of shape {ids.shape} cannot be applied to activations of shape {x.shape}",
            "they want whole rows, [batch, length, width]: choose one adapter for all where positions are picked out",
        )
    return lora_bank(x, update.a, update.b, ids, update.weights)


def delta(update: Lora) -> Float[Array, "*layers inner outer"]:
    """`scale * a @ b` as a dense matrix, in float32 (float64 where the factors are)."""
    wide = jnp.promote_types(update.a.dtype, jnp.float32)
    scale = jnp.asarray(update.scale, wide)[..., None, None]
    return scale * jnp.matmul(update.a.astype(wide), update.b.astype(wide), precision="highest")


def column_norms(weight: Any, update: Lora | None = None) -> Float[Array, "*layers outer"]:
    """The Euclidean length of every column of `weight`, or of the weight and `update` together, over the inputs."""
    dense = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
    dense = dense.astype(jnp.promote_types(dense.dtype, jnp.float32))
    if update is not None:
        dense = dense + delta(update)
    return jnp.sqrt(jnp.sum(jnp.square(dense), axis=-2))


def column_factors(weight: Any, update: Lora) -> Float[Array, "*layers outer"]:
    """What DoRA multiplies every column of `weight + scale * a @ b` by: magnitude / length (equation 5).

    The length is a constant to the gradient (section 4.3 of the paper, and PEFT). 1 where a layer is not adapted.
    """
    norms = lax.stop_gradient(column_norms(weight, update))
    factors = update.magnitude.astype(norms.dtype) / jnp.where(norms > 0, norms, 1)
    return jnp.where(jnp.asarray(update.scale)[..., None] != 0, factors, 1)


def merged(weight: Float[Array, "*layers inner outer"], update: Lora) -> Float[Array, "*layers inner outer"]:
    """The one dense weight, in the dtype of `weight`, that multiplies as `Adapted(weight, update)` does."""
    plain = replace(update, magnitude=None)
    total = weight.astype(jnp.promote_types(weight.dtype, jnp.float32)) + delta(plain)
    if update.magnitude is not None:
        total = total * column_factors(weight, update)[..., None, :]
    return total.astype(weight.dtype)
