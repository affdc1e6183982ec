"""A mask as the flash kernels take it: intervals of keys for every query, and which blocks have to be visited.

Every condition on positions leaves a query one interval of keys, or with block diffusion one in each half of the row.
The intervals are made here, by XLA, so that a kernel compares integers and never divides.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.mask import Mask

BIG = 2**30


class Seen(NamedTuple):
    """first, end: int32 [batch or 1, parts, filled]; a query sees the keys first <= key < end of any part, (0, 0) where
    that is none. segments: int32 [batch, filled], or None. Positions from the length of the row on see nothing."""

    first: jax.Array
    end: jax.Array
    segments: jax.Array | None


def seen(mask: Mask, length: int, filled: int) -> Seen:
    """The conditions of `mask`, without `dense`, for rows of `length` filled up to `filled` positions."""
    index = jnp.arange(filled, dtype=jnp.int32)[None]
    text = mask.text_length(length)
    position = index % text
    first, end = jnp.zeros_like(index), jnp.where(index < length, text, 0)
    if mask.causal:
        end = jnp.minimum(end, position + 1)
    if mask.block:
        end = jnp.minimum(end, (position // mask.block + 1) * mask.block)
    if mask.window:
        first, end = position - mask.window + 1, jnp.minimum(end, position + mask.window)
    if mask.lengths is not None:
        lengths = mask.lengths.astype(jnp.int32)[:, None]
        end = jnp.where(position < lengths, jnp.minimum(end, lengths), 0)
    segments = mask.segments
    if segments is not None:
        segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, filled - length)))
        end = jnp.where(segments != 0, end, 0)
    first = jnp.broadcast_to(jnp.maximum(first, 0), end.shape)
    parts = [(first, end)]
    if mask.diffusion:
        start, clean = position // mask.diffusion * mask.diffusion, index >= text
        own = jnp.where(clean, 0, jnp.minimum(end, start + mask.diffusion))
        before = jnp.minimum(end, jnp.where(clean, start + mask.diffusion, start))
        parts = [(jnp.maximum(first, start), own), (first + text, before + text)]
    first, end = (jnp.stack(bounds, axis=1) for bounds in zip(*parts))
    some = first < end
    return Seen(jnp.where(some, first, 0), jnp.where(some, end, 0), segments)


def needed(seen: Seen, query: int, key: int) -> jax.Array:
    """bool [batch or 1, query blocks, key blocks]: False only where no query of the block sees a key of the block.

    `query` and `key` are block sizes that divide the filled length. Segments are judged by their smallest and largest
    number in a block.
    """
    rows, parts, filled = seen.first.shape
    first, end = (x.reshape(rows, parts, filled // query, query) for x in (seen.first, seen.end))
    first, end = jnp.min(jnp.where(first < end, first, BIG), axis=-1)[..., None], jnp.max(end, axis=-1)[..., None]
    start = jnp.arange(filled // key, dtype=jnp.int32)[None, None, None] * key
    found = jnp.any((first < start + key) & (end > start), axis=1)
    if seen.segments is None:
        return found
    (low, high), (key_low, key_high) = (_extremes(seen.segments, size) for size in (query, key))
    touch = (low[:, :, None] <= key_high[:, None, :]) & (key_low[:, None, :] <= high[:, :, None])
    return found & touch


def _extremes(segments, size):
    """The smallest and the largest number but 0 in each block of `size` positions."""
    blocks = segments.reshape(segments.shape[0], -1, size)
    return jnp.min(jnp.where(blocks == 0, BIG, blocks), axis=-1), jnp.max(blocks, axis=-1)


def visits(needed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For bool [rows, n, m]: int32 [rows, n, m], the needed ones of the m first and in order, then the last of them
    again and again; int32 [rows, n], how many are needed."""
    count = jnp.sum(needed, axis=-1, dtype=jnp.int32)
    order = jnp.argsort(~needed, axis=-1, stable=True).astype(jnp.int32)
    turn = jnp.minimum(jnp.arange(needed.shape[-1], dtype=jnp.int32)[None, None], jnp.maximum(count - 1, 0)[..., None])
    return jnp.take_along_axis(order, turn, axis=-1), count


def real(mask: Mask, length: int) -> jax.Array | None:
    """bool [batch, length], False at padding; None where the mask knows of none."""
    found = None if mask.segments is None else mask.segments != 0
    if mask.lengths is not None:
        position = jnp.arange(length)[None] % max(mask.text_length(length), 1)
        inside = position < mask.lengths[:, None]
        found = inside if found is None else found & inside
    return found


def without_padding(mask: Mask, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [batch, length, heads, dim] with zeros at padding: a weight of 0 does not stop NaN in a product."""
    keep = real(mask, arrays[0].shape[1])
    return arrays if keep is None else tuple(jnp.where(keep[:, :, None, None], x, 0) for x in arrays)
