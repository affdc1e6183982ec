"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys, in the half-split layout."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the pairs (x[i], x[i + dim/2]) of x [batch, length, heads, dim] by the angles of their positions.

    `rotation` is (cos, sin), float32 [batch or 1, length, dim / 2].
    """
    cos, sin = (r[:, :, None, :] for r in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
