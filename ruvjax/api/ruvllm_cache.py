"""The documented PagedKvCache of RuvLLM: keys and values in blocks of tokens, which sequences take from one pool."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.kv_attention import CacheError, PagedTiers, Pages, append, empty_pages, empty_tiers, release
from ruvjax.api.ruvllm_errors import RuvLLMError


class PagedKvCache:
    """A pool of `max_blocks` blocks of `block_size` tokens (an even number) for `sequences` sequences.

    Keys and values are kept in `dtype`, each with all its num_kv_heads heads of head_dim channels. Raises
    RuvLLMError.KvCache for sizes that make no cache.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_blocks: int,
        block_size: int = 16,
        sequences: int = 1,
        dtype: Any = jnp.float32,
    ):
        sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_blocks": max_blocks, "sequences": sequences}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise RuvLLMError.KvCache(f"{name}={size!r}", "a whole number above 0")
        self.num_kv_heads, self.head_dim, self.block_size = num_kv_heads, head_dim, block_size
        try:
            self._pages = empty_pages(sequences, page=block_size, tail_slots=max_blocks, tail_pages=max_blocks)
        except CacheError as error:
            raise RuvLLMError.KvCache(str(error), f"block_size={block_size} must be even") from None
        self._tiers = empty_tiers(self._pages, num_kv_heads, head_dim, dtype=dtype)

    def append(self, keys: Any, values: Any, sequence: int = 0) -> None:
        """Add tokens to a sequence: keys, as they enter the dot product, and values [tokens, num_kv_heads, head_dim].

        Raises RuvLLMError.KvCache where shapes do not fit or no block is free; the cache is then as it was.
        """
        row = self._row(sequence)
        keys, values = floats("keys", keys, 3), floats("values", values, 3)
        if keys.shape != values.shape or keys.shape[1:] != (self.num_kv_heads, self.head_dim):
            raise RuvLLMError.KvCache(
                f"keys have shape {keys.shape}, values {values.shape}",
                f"both [tokens, {self.num_kv_heads}, {self.head_dim}]",
            )
        pages, tiers = _append(self._pages, self._tiers, keys, values, jnp.int32(row))
        if np.asarray(pages.failed)[row]:
            free = int(np.sum(np.asarray(self._pages.tail_users) == 0))
            raise RuvLLMError.KvCache(
                f"{keys.shape[0]} tokens do not fit into {free} free blocks of {self.block_size}",
                "clear a sequence, or build the cache with more max_blocks",
            )
        self._pages, self._tiers = pages, tiers

    def num_tokens(self, sequence: int = 0) -> int:
        """Tokens of a sequence."""
        return int(np.asarray(self._pages.lengths)[self._row(sequence)])

    def block_tables(self, sequence: int = 0) -> list[int]:
        """The blocks of a sequence, in order; all but the last are full."""
        blocks = -(-self.num_tokens(sequence) // self.block_size)
        return np.asarray(self._pages.tail_table)[sequence, :blocks].tolist()

    def clear(self, sequence: int = 0) -> None:
        """Forget a sequence; its blocks are free again."""
        which = np.arange(self._pages.lengths.shape[0]) == self._row(sequence)
        self._pages = _release(self._pages, jnp.asarray(which))

    def view(self, block_tables: Sequence[int]) -> tuple[Pages, PagedTiers]:
        """Tables of one sequence that consists of these blocks, and the pool. Raises RuvLLMError.PagedAttention."""
        blocks = [int(block) for block in np.asarray(block_tables).reshape(-1)]
        filled = self._filled()
        if not blocks or len(set(blocks)) != len(blocks):
            raise RuvLLMError.PagedAttention(f"block_tables={blocks}", "one block or more, each once")
        if unknown := [block for block in blocks if block not in filled]:
            raise RuvLLMError.PagedAttention(f"blocks {unknown} hold no tokens", f"blocks in use: {sorted(filled)}")
        if begun := [block for block in blocks[:-1] if filled[block] < self.block_size]:
            raise RuvLLMError.PagedAttention(
                f"blocks {begun} are not full", "a block that is not full must be the last"
            )
        table = np.zeros((1, self._pages.tail_table.shape[1]), np.int32)
        table[0, : len(blocks)] = blocks
        first, none = jnp.asarray([sum(filled[block] for block in blocks)], jnp.int32), jnp.zeros(1, jnp.int32)
        view = replace(
            self._pages,
            lengths=first,
            stored=none,
            evicted=none,
            tail_table=jnp.asarray(table),
            store_table=jnp.zeros((1, 0), jnp.int32),
            failed=jnp.zeros(1, bool),
        )
        return view, self._tiers

    def _filled(self) -> dict[int, int]:
        """Tokens of each block in use."""
        found: dict[int, int] = {}
        for sequence in range(self._pages.lengths.shape[0]):
            left = self.num_tokens(sequence)
            for block in self.block_tables(sequence):
                found[block] = min(left, self.block_size)
                left -= self.block_size
        return found

    def _row(self, sequence: int) -> int:
        count = self._pages.lengths.shape[0]
        if not isinstance(sequence, int) or not 0 <= sequence < count:
            raise RuvLLMError.KvCache(f"sequence={sequence!r}", f"this cache has the sequences 0 to {count - 1}")
        return sequence


@jax.jit
def _append(pages: Pages, tiers: PagedTiers, keys, values, row: jax.Array) -> tuple[Pages, PagedTiers]:
    batch, count = pages.lengths.shape[0], keys.shape[0]
    k, v = (jnp.zeros((batch, *x.shape), x.dtype).at[row].set(x) for x in (keys, values))
    return append(pages, tiers, k, v, jnp.zeros(batch, jnp.int32).at[row].set(count))


_release = jax.jit(release)


def floats(name: str, value: Any, *dims: int) -> jax.Array:
    """`value` as an array of floating-point numbers with one of `dims` axes. Raises RuvLLMError.InvalidOperation."""
    try:
        found = jnp.asarray(value)
    except (TypeError, ValueError):
        raise RuvLLMError.InvalidOperation(f"{name} is no array of numbers", "numbers of one shape") from None
    if found.ndim not in dims or found.size == 0 and found.ndim and 0 in found.shape[1:]:
        axes = " or ".join(map(str, dims))
        raise RuvLLMError.InvalidOperation(f"{name} has shape {found.shape}", f"{axes} axes, none of them empty")
    return found if jnp.issubdtype(found.dtype, jnp.floating) else found.astype(jnp.float32)
