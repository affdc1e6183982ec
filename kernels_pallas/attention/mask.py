"""Who may attend to whom, as data."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Mask:
    """Attention is allowed where every condition that is set holds. The default is bidirectional.

    causal:    key position <= query position.
    block:     block-causal: key's block of this many positions <= query's block (0: off). Bidirectional inside a block.
    window:    |query - key| < window (0: off).
    diffusion: block diffusion (Arriola et al. 2025, arXiv:2503.09573) over rows that hold a noisy text and then, of the
               same length, the clean one, in blocks of this many positions (0: off). A noisy token sees its own noisy
               block and the clean blocks before it; a clean token sees the clean blocks up to its own.
    lengths:   int32 [batch]; positions from a row's length on are padding, which attends to nothing and is not seen.
    segments:  int32 [batch, length]; attention stays inside equal segments; 0 is padding, as above.
    dense:     bool [batch or 1, queries, keys], anything else.

    With `diffusion` the conditions `causal`, `block`, `window` and `lengths` count positions in the text, not the row.
    """

    causal: bool = struct.field(pytree_node=False, default=False)
    block: int = struct.field(pytree_node=False, default=0)
    window: int = struct.field(pytree_node=False, default=0)
    diffusion: int = struct.field(pytree_node=False, default=0)
    lengths: jax.Array | None = None
    segments: jax.Array | None = None
    dense: jax.Array | None = None

    def restricts(self) -> bool:
        """Whether any condition is set."""
        return bool(self.causal or self.block or self.window or self.diffusion or jax.tree.leaves(self))

    def text_length(self, length: int) -> int:
        """The positions of the text in a row of `length`. Raises ValueError where `diffusion` cannot halve the row."""
        if self.diffusion and length % 2:
            raise ValueError(f"attention: a row of {length} does not hold a noisy and a clean text of one length")
        return length // 2 if self.diffusion else length

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
        text, keys = self.text_length(length), jnp.arange(length)
        query, key = (positions % max(text, 1))[:, :, None], (keys % max(text, 1))[None, None, :]
        if self.causal:
            conditions.append(key <= query)
        if self.block:
            conditions.append(key // self.block <= query // self.block)
        if self.window:
            conditions.append(jnp.abs(query - key) < self.window)
        if self.diffusion:
            clean = (positions >= text)[:, :, None]
            of_query, of_key = query // self.diffusion, key // self.diffusion
            sees_clean = jnp.where(clean, of_key <= of_query, of_key < of_query)
            sees_noisy = ~clean & (of_key == of_query)
            conditions.append(jnp.where((keys >= text)[None, None, :], sees_clean, sees_noisy))
        if self.lengths is not None:
            ends = self.lengths[:, None, None]
            conditions.append((query < ends) & (key < ends))
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
