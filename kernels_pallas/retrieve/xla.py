"""One product with all keys, then the largest in two steps: sorting is what `lax.top_k` over all of them would cost.

The k largest lie in the k blocks of the largest maxima: a block outside has k maxima above all that it holds.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.retrieve.keys import Keys

BLOCK = 64


def retrieve(keys: Keys, live: jax.Array, queries: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.retrieve.retrieve`."""
    scores = lax.dot_general(queries, keys.values, (((1,), (1,)), ((), ())), precision="highest")
    return largest(jnp.where(live[None, :], scores, -jnp.inf), k)


def largest(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The columns and values of the k largest of each row of [rows, n], the lower column first among equal ones;
    column -1 for -inf."""
    rows, count = scores.shape
    blocks = jnp.pad(scores, ((0, 0), (0, -count % BLOCK)), constant_values=-jnp.inf).reshape(rows, -1, BLOCK)
    chosen = min(k, blocks.shape[1])
    # In order of the blocks, so that columns ascend and top_k, which is stable, prefers the lower one.
    best = jnp.sort(lax.top_k(jnp.max(blocks, axis=2), chosen)[1], axis=1)
    values = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(rows, chosen * BLOCK)
    columns = (best[:, :, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None, None, :]).reshape(values.shape)
    found, place = lax.top_k(values, k)
    columns = jnp.take_along_axis(columns, place, axis=1).astype(jnp.int32)
    return jnp.where(found > -jnp.inf, columns, -1), found
