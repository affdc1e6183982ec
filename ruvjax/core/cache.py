"""The key-value cache of a transformer, an argument and a result of its forward pass, and attention over it.

Keys and values stand as [batch, kv_heads, capacity, dim], the order in which a dot reads them without a copy, and one
array a layer, so that a compiled loop writes every token in place.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import Mask
from kernels_pallas.layout import contract
from ruvjax.errors import ConfigError


@struct.dataclass
class KVCache:
    """The tokens that rows have read so far; every leaf has the batch axis first.

    keys, values: of each layer, [batch, kv_heads, capacity, dim], in the order of the text; keys are rotated already.
    length: int32 [batch], how many tokens each row holds. What lies behind them has no meaning, so that going back is
    `replace(cache, length=...)`.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def begin(self, chunk: "Chunk", places: Int[Array, "batch length"]) -> "Chunk":
        """What `attend` and `end` need to know of a chunk whose positions stand at `places`."""
        del places  # of a row they count on from `length`
        return chunk

    def attend(
        self, layer: int, chunk: "Chunk", q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[Float[Array, "batch length heads dim"], tuple[jax.Array, jax.Array]]:
        """Attention of a chunk over all that `layer` holds with the chunk's own keys and values, and both after it."""
        keys, values = append(self.keys[layer], k, self.length), append(self.values[layer], v, self.length)
        return cached_attention(q, keys, values, self.length, chunk), (keys, values)

    def end(self, chunk: "Chunk", layers: list[tuple[jax.Array, jax.Array]]) -> "KVCache":
        """The cache after a chunk, given what `attend` returned for every layer."""
        keys, values = zip(*layers)
        return dataclasses.replace(self, keys=keys, values=values, length=self.length + chunk.added)


def empty_kv_cache(layers: int, batch: int, kv_heads: int, capacity: int, dim: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `batch` rows before their first token."""

    def blank() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros((batch, kv_heads, capacity, dim), dtype) for _ in range(layers))

    return KVCache(blank(), blank(), jnp.zeros((batch,), jnp.int32))


class Chunk(NamedTuple):
    """The tokens that a pass adds to a cache, those that are real before the padding.

    order: int32 [batch, length], which position of the chunk stands at each place, or None where nothing moves; place:
    the way back. added: int32 [batch], real tokens. mask: its `causal`, `block` and `window` count places in the text.
    """

    mask: Mask
    added: Int[Array, "batch"]
    order: Int[Array, "batch length"] | None = None
    place: Int[Array, "batch length"] | None = None


def arrange(cache: Any, mask: Mask, batch: int, length: int) -> Chunk:
    """How a chunk of `length` positions joins `cache`, of either kind: segment 0 of `mask` is padding and may stand
    anywhere.

    Raises ConfigError where the chunk exceeds the capacity, or where the mask holds what a cache cannot express.
    """
    if mask.dense is not None or mask.lengths is not None or mask.diffusion:
        hint = "causal, block, window, segments"
        raise ConfigError("a mask with dense, lengths or diffusion does not go with a cache", hint)
    if batch != cache.length.shape[0]:
        raise ConfigError(f"the cache holds {cache.length.shape[0]} rows, the tokens {batch}")
    if length > cache.capacity:
        raise ConfigError(f"a chunk of {length} tokens is longer than the cache's capacity of {cache.capacity}")
    if mask.segments is None:
        return Chunk(mask, jnp.full((batch,), length, jnp.int32))
    real = mask.segments != 0
    count = jnp.sum(real, axis=1, dtype=jnp.int32)
    if length == 1:  # padding is written behind the text, where the next token replaces it
        return Chunk(mask, count)
    order = jnp.argsort(~real, axis=1, stable=True).astype(jnp.int32)
    return Chunk(mask, count, order, jnp.argsort(order, axis=1).astype(jnp.int32))


def moved(x: jax.Array, order: jax.Array | None) -> jax.Array:
    """`x` [batch, length, ...] with its positions in another order (None: the same)."""
    if order is None:
        return x
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def append(held: Float[Array, "batch kv_heads capacity dim"], new: jax.Array, start: Int[Array, "batch"]) -> jax.Array:
    """`held` with `new` [batch, length, kv_heads, dim] written from place `start` of each row on.

    A chunk that would pass the end is moved back to end there, so callers keep room for whole chunks.
    """
    new = new.astype(held.dtype).transpose(0, 2, 1, 3)
    if held.shape[0] == 1:
        return lax.dynamic_update_slice(held, new, (0, 0, start[0], 0))
    return jax.vmap(lambda row, part, at: lax.dynamic_update_slice(row, part, (0, at, 0)))(held, new, start)


def cached_attention(
    q: Float[Array, "batch length heads dim"],
    keys: Float[Array, "batch kv_heads capacity dim"],
    values: Float[Array, "batch kv_heads capacity dim"],
    start: Int[Array, "batch"],
    chunk: Chunk,
) -> Float[Array, "batch length heads dim"]:
    """softmax(q k^T / sqrt(dim)) v over what each row holds, the chunk whose first token stands at `start` included.

    Scores and their sum are float32. Padding yields numbers without a meaning, but finite ones.
    """
    batch, length, heads, dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    group = heads // kv_heads
    folded = q.reshape(batch, length, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(batch * kv_heads, group * length, dim).astype(keys.dtype)
    scores = contract(folded, keys.reshape(batch * kv_heads, capacity, dim), 2, 2) / math.sqrt(dim)
    scores = scores.reshape(batch, kv_heads, group, length, capacity)
    keep = _allowed(start, chunk, length, capacity)[:, None, None]
    scores = jnp.where(keep, scores, -1e30)
    weights = jnp.where(keep, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
    weights = weights.reshape(batch * kv_heads, group * length, capacity).astype(values.dtype)
    out = contract(weights, values.reshape(batch * kv_heads, capacity, dim), 2, 1).astype(q.dtype)
    out = out.reshape(batch, kv_heads, group, length, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, dim)


def _allowed(start: jax.Array, chunk: Chunk, length: int, capacity: int) -> jax.Array:
    """bool [batch, length, capacity]."""
    places = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    held = jnp.arange(capacity)[None, None, :] < (start + chunk.added)[:, None, None]
    seen = dataclasses.replace(chunk.mask, segments=None).rows(places, capacity).dense
    return jnp.broadcast_to(held if seen is None else held & seen, (start.shape[0], length, capacity))
