"""A key-value cache in two tiers for every layer of a transformer: the newest tokens as they are, older ones quantized.

Each row owns its pages, so that a row can be replaced alone (continuous batching); `kernels_pallas.kv_attention` holds
the formats and the op. `experiments.evaluate quality=true` measures what it costs in accuracy.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kernels_pallas.kv_attention import (
    PagedTiers,
    Pages,
    Reservation,
    empty_pages,
    empty_tiers,
    kv_attention,
    migrate,
    reserve,
    write,
)
from ruvjax.core.cache import Chunk
from ruvjax.errors import ConfigError

KINDS = ("int8", "int4", "int4_rotated")


@dataclass(frozen=True)
class Tiers:
    """How a cache is split. Raises ConfigError.

    store: "int8", "int4" or "int4_rotated" (keys in a Hadamard basis); keys share a scale by channel of a page, values
    by token (Liu et al. 2024). tail: tokens that stay as they are, at least. page: tokens that move to the store
    together, an even number. key_scales: "token" shares the scales of keys by token as well, which outlier channels
    spoil: to compare with.
    """

    store: str = "int8"
    tail: int = 128
    page: int = 32
    key_scales: str = "channel"

    def __post_init__(self):
        if self.store not in KINDS:
            raise ConfigError(f"store={self.store!r} is not known", f"one of {', '.join(KINDS)}")
        if self.key_scales not in ("channel", "token"):
            raise ConfigError(f"key_scales={self.key_scales!r} is not known", "channel or token")
        for name in ("tail", "page"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
        if self.page % 2:
            raise ConfigError(f"page={self.page} must be even", "such as 32")


class Room(NamedTuple):
    """Pages with a chunk's tokens counted in, where these are to be written, and which places they take."""

    pages: Pages
    reservation: Reservation
    places: Int[Array, "batch length"]


@struct.dataclass
class TieredCache:
    """The tokens that rows have read so far: every leaf has the batch axis first, and each row is the cache of one
    sequence. tiers: of each layer. keep: tokens that never leave the tail."""

    pages: Pages
    tiers: tuple[PagedTiers, ...]
    keep: int = struct.field(pytree_node=False)

    @property
    def length(self) -> jax.Array:
        """int32 [batch]: tokens each row holds."""
        return self.pages.lengths[:, 0]

    @property
    def capacity(self) -> int:
        """Tokens that a chunk may have at most: what the tail has room for beyond what it keeps."""
        return (self.pages.tail_table.shape[2] - 2) * self.pages.page - self.keep

    def begin(self, chunk: Chunk, places: Int[Array, "batch length"]) -> Room:
        """Make room for a chunk in every row. Raises ConfigError for a mask that is not causal alone."""
        mask = chunk.mask
        if not mask.causal or mask.window or mask.block:
            raise ConfigError("a cache in two tiers takes causal attention without windows or blocks", "a plain cache")
        most = places.shape[1]
        return Room(*jax.vmap(lambda pages, count: reserve(pages, count[None], most))(self.pages, chunk.added), places)

    def attend(
        self, layer: int, room: Room, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[Float[Array, "batch length heads dim"], PagedTiers]:
        """Attention of a chunk over all that `layer` holds with the chunk's own keys and values; the layer after it."""
        new = jax.vmap(write)(self.tiers[layer], room.pages, room.reservation, k[:, None], v[:, None])
        return kv_attention(q, _pooled(new), _tables(room.pages), room.places), new

    def end(self, room: Room, layers: list[PagedTiers]) -> "TieredCache":
        """The cache after a chunk: what exceeds the tail moves to the store."""
        pages, moved = jax.vmap(lambda pages, tiers: migrate(pages, tiers, keep=self.keep))(room.pages, tuple(layers))
        return replace(self, pages=pages, tiers=moved)


def empty_tiered_cache(
    settings: Tiers, layers: int, batch: int, kv_heads: int, capacity: int, dim: int, dtype: jnp.dtype, chunk: int
) -> TieredCache:
    """A cache of `batch` rows of up to `capacity` tokens before their first, read in chunks of at most `chunk` tokens.

    Raises ConfigError for a rotation of an odd `dim`."""
    if settings.store == "int4_rotated" and dim % 2:
        raise ConfigError(f"store='int4_rotated' needs an even head dimension, not {dim}", "store='int4'")
    page = settings.page
    tail = -(-(settings.tail + chunk) // page) + 2
    pages = empty_pages(1, page=page, tail_slots=tail, store_slots=-(-capacity // page) + 1)
    bits = 8 if settings.store == "int8" else 4
    rotated = settings.store == "int4_rotated"
    one = empty_tiers(
        pages,
        kv_heads,
        dim,
        dtype=dtype,
        key_bits=bits,
        value_bits=bits,
        key_scales=settings.key_scales,
        rotated=rotated,
    )

    def rows(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros((batch, *x.shape), x.dtype), tree)

    return TieredCache(rows(pages), tuple(rows(one) for _ in range(layers)), settings.tail)


def _pooled(tiers: PagedTiers) -> PagedTiers:
    """The pools of all rows one after the other."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tiers)


def _tables(pages: Pages) -> Pages:
    """Tables of all rows into `_pooled` pools."""
    tail, store = (users.shape[1] for users in (pages.tail_users, pages.store_users))
    row = jnp.arange(pages.lengths.shape[0], dtype=jnp.int32)[:, None]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pages)
    return replace(flat, tail_table=flat.tail_table + row * tail, store_table=flat.store_table + row * store)
