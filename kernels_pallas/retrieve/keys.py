"""Vectors to search among: in float32, and as bytes with the bounds that make a search by bytes exact."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

LANES = 16  # keys whose bytes lie side by side, four of each in turn: what one AVX-512 instruction multiplies


@struct.dataclass
class Keys:
    """A fixed number of vectors; a slot that was never written holds zeros.

    values  float32 [capacity, dim].
    codes   uint8 [ceil(capacity / 16), ceil(dim / 4), 16, 4]: round(value / scale) + 128; 128 where there is no value.
    scale   float32 [capacity]: the largest absolute value of the key, over 127.
    norm    float32 [capacity]: at least the Euclidean norm of the key, and of its codes times scale.
    error   float32 [capacity]: at least the norm of their difference.
    """

    values: jax.Array
    codes: jax.Array
    scale: jax.Array
    norm: jax.Array
    error: jax.Array

    @property
    def capacity(self) -> int:
        return self.values.shape[0]

    @property
    def dim(self) -> int:
        return self.values.shape[1]


def keys_of(values: Float[Array | np.ndarray, "capacity dim"]) -> Keys:
    """Keys with these vectors, each in the slot of its row."""
    capacity, dim = values.shape
    values = jnp.asarray(values, jnp.float32)
    codes, scale, norm, error = _quantized(values)
    padded = jnp.pad(codes, ((0, -capacity % LANES), (0, -dim % 4)), constant_values=128)
    groups = padded.reshape(-1, LANES, padded.shape[1] // 4, 4).swapaxes(1, 2)
    return Keys(values, groups, scale, norm, error)


def put(keys: Keys, slot: Int[Array, ""], value: Float[Array, "dim"]) -> Keys:
    """`keys` with the vector in `slot` replaced. A slot outside changes nothing."""
    value = value.astype(jnp.float32)
    codes, scale, norm, error = _quantized(value[None])
    lanes = jnp.pad(codes[0], (0, -keys.dim % 4), constant_values=128).reshape(-1, 4)
    inside = (slot >= 0) & (slot < keys.capacity)
    at = jnp.where(inside, slot, 0)

    def written(held: jax.Array, new: jax.Array, *where: jax.Array) -> jax.Array:
        place = (*where, *(jnp.int32(0),) * (held.ndim - len(where)))
        old = lax.dynamic_slice(held, place, new.shape)
        return lax.dynamic_update_slice(held, jnp.where(inside, new, old), place)

    return Keys(
        written(keys.values, value[None], at),
        written(keys.codes, lanes[None, :, None, :], at // LANES, jnp.int32(0), at % LANES),
        written(keys.scale, scale, at),
        written(keys.norm, norm, at),
        written(keys.error, error, at),
    )


def _quantized(values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Codes [n, dim], scale, norm and error [n] of vectors [n, dim]. Norm and error are rounded up by more than
    float32 sums can lose."""
    scale = jnp.max(jnp.abs(values), axis=1, initial=0) / 127
    codes = jnp.clip(jnp.round(values / jnp.where(scale > 0, scale, 1)[:, None]), -127, 127)
    decoded = codes * scale[:, None]
    norm = jnp.maximum(jnp.linalg.norm(values, axis=1), jnp.linalg.norm(decoded, axis=1)) * 1.001
    error = jnp.linalg.norm(values - decoded, axis=1) * 1.001 + 1e-6 * norm
    return (codes + 128).astype(jnp.uint8), scale, norm, error
