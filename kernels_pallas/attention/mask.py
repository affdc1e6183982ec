"""Who may attend to whom, as data."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Mask:
    """Attention is allowed where every condition that is set holds. The default is bidirectional.

    causal:   key position <= query position.
    block:    block-causal: key's block of this many positions <= query's block (0: off). Bidirectional inside a block.
    window:   |query - key| < window (0: off).
    segments: int32 [batch, length]; attention stays inside equal segments; 0 is padding, which attends to nothing.
    dense:    bool [batch or 1, queries, keys], anything else.
    """

    causal: bool = struct.field(pytree_node=False, default=False)
    block: int = struct.field(pytree_node=False, default=0)
    window: int = struct.field(pytree_node=False, default=0)
    segments: jax.Array | None = None
    dense: jax.Array | None = None

    def allowed(self, length: int) -> jax.Array | None:
        """bool [batch or 1, length, length], or None where everything is allowed."""
        return self._at(jnp.arange(length)[None, :], self.segments, length)

    def rows(self, positions: jax.Array, length: int) -> "Mask":
        """The mask of the queries that stand at `positions` [batch or 1, queries] among `length` keys, as a dense one.

        What is dense in this mask already must be of those queries.
        """
        segments = self.segments
        if segments is not None:
            segments = jnp.take_along_axis(
                segments, jnp.broadcast_to(positions, (len(segments), positions.shape[1])), 1
            )
        return Mask(dense=self._at(positions, segments, length))

    def _at(self, positions: jax.Array, segments: jax.Array | None, length: int) -> jax.Array | None:
        conditions = []
        query, key = positions[:, :, None], jnp.arange(length)[None, None, :]
        if self.causal:
            conditions.append(key <= query)
        if self.block:
            conditions.append(key // self.block <= query // self.block)
        if self.window:
            conditions.append(jnp.abs(query - key) < self.window)
        if self.segments is not None and segments is not None:
            same = segments[:, :, None] == self.segments[:, None, :]
            conditions.append(same & (segments != 0)[:, :, None])
        if self.dense is not None:
            conditions.append(self.dense)
        if not conditions:
            return None
        allowed = conditions[0]
        for condition in conditions[1:]:
            allowed = allowed & condition
        return allowed
