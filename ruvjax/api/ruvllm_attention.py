"""The documented attention functions of RuvLLM: decoding attention, for one query or for the last few of a sequence.

They run on the processor or accelerator that JAX has; the `_neon` names are the same functions, kept because they are
documented. Keys and values are read in blocks with a running softmax (Dao 2023, arXiv:2307.08691), so that no more than
a block of scores is held. No gradient is defined: training uses `kernels_pallas.attention`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.kv_attention import append, empty_pages, empty_tiers, kv_attention
from ruvjax.api.ruvllm_cache import PagedKvCache, floats
from ruvjax.api.ruvllm_errors import RuvLLMError

BLOCK = 64  # keys that are read at a time


@dataclass(frozen=True)
class AttentionConfig:
    """num_heads query heads share num_kv_heads key heads evenly; head_dim channels each.

    causal: the queries are the last positions of the keys, and see none after their own. scale: of the scores, None for
    1/sqrt(head_dim). Raises RuvLLMError.Config.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True
    scale: float | None = None

    def __post_init__(self):
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RuvLLMError.Config(f"{name}={value!r}", "a whole number above 0")
        if self.num_heads % self.num_kv_heads:
            raise RuvLLMError.Config(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}",
                "each key head serves the same number of query heads",
            )
        if self.scale is not None:
            _scale(self.scale, RuvLLMError.Config)

    def gqa_ratio(self) -> int:
        """Query heads for each key head."""
        return self.num_heads // self.num_kv_heads

    def effective_scale(self) -> float:
        """`scale`, or 1/sqrt(head_dim)."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale


def flash_attention(query: Any, key: Any, value: Any, scale: float, causal: bool) -> jax.Array:
    """softmax(scale * query key^T) value of one head.

    query is [head_dim], or [queries, head_dim] for the last positions of the sequence; key and value are
    [kv_len, head_dim]. With `causal` a query sees no key after its own position; a single one stands at the last and
    sees all. The result has the shape of query. Raises RuvLLMError.InvalidOperation where shapes do not fit.
    """
    query, key, value = floats("query", query, 1, 2), floats("key", key, 2), floats("value", value, 2)
    _fit(query.shape[-1], key.shape[-1:], ("head_dim",), "key")
    _same(key, value)
    rows = query[None] if query.ndim == 1 else query
    found = _attend(rows[:, None], key[:, None], value[:, None], _scale(scale), causal)
    return found.reshape(query.shape)


def grouped_query_attention(queries: Any, keys: Any, values: Any, config: AttentionConfig) -> jax.Array:
    """Attention of num_heads query heads, of which `config.gqa_ratio()` in a row share a key head (Ainslie et al. 2023,
    arXiv:2305.13245).

    queries are [num_heads, head_dim], or [queries, num_heads, head_dim] for the last positions; keys and values are
    [kv_len, num_kv_heads, head_dim]. The result has the shape of queries. Raises RuvLLMError.InvalidOperation.
    """
    queries, keys, values = floats("queries", queries, 2, 3), floats("keys", keys, 3), floats("values", values, 3)
    _fit((config.num_heads, config.head_dim), queries.shape[-2:], ("num_heads", "head_dim"), "queries")
    _fit((config.num_kv_heads, config.head_dim), keys.shape[-2:], ("num_kv_heads", "head_dim"), "keys")
    _same(keys, values)
    rows = queries[None] if queries.ndim == 2 else queries
    return _attend(rows, keys, values, config.effective_scale(), config.causal).reshape(queries.shape)


def multi_query_attention(queries: Any, key: Any, value: Any, config: AttentionConfig) -> jax.Array:
    """Attention of num_heads query heads over one key head (Shazeer 2019, arXiv:1911.02150).

    queries as in `grouped_query_attention`; key and value are [kv_len, head_dim]; `config.num_kv_heads` is 1. Raises
    RuvLLMError.InvalidOperation.
    """
    if config.num_kv_heads != 1:
        raise RuvLLMError.InvalidOperation(
            f"multi_query_attention with num_kv_heads={config.num_kv_heads}", "1, or grouped_query_attention"
        )
    key, value = floats("key", key, 2), floats("value", value, 2)
    return grouped_query_attention(queries, key[:, None], value[:, None], config)


def paged_attention(query: Any, kv_cache: PagedKvCache, block_tables: Sequence[int], scale: float) -> jax.Array:
    """Attention of one query over the tokens that the blocks `block_tables` of a cache hold, in that order.

    query is [num_heads, head_dim], num_heads a multiple of the cache's num_kv_heads; the result has its shape. Every
    block but the last must be full. `kv_cache.block_tables(sequence)` is the whole sequence, its beginning is a prefix.
    Raises RuvLLMError.PagedAttention for a table that names no such sequence, RuvLLMError.InvalidOperation where
    shapes do not fit.
    """
    query = floats("query", query, 2)
    heads, dim = query.shape
    if heads % kv_cache.num_kv_heads or dim != kv_cache.head_dim:
        raise RuvLLMError.InvalidOperation(
            f"query has shape {query.shape}, the cache {kv_cache.num_kv_heads} heads of {kv_cache.head_dim}",
            "[num_heads, head_dim] with num_heads a multiple of num_kv_heads",
        )
    pages, tiers = kv_cache.view(block_tables)
    return _paged(query[None, None], tiers, pages, _scale(scale))[0, 0]


_paged = jax.jit(lambda q, tiers, pages, scale: kv_attention(q, tiers, pages, scale=scale), static_argnums=(3,))


@partial(jax.jit, static_argnums=(3, 4))
def _attend(q, k, v, scale: float, causal: bool) -> jax.Array:
    """q [queries, heads, dim] over k and v [kv_len, kv_heads, dim]: a cache that is filled and read once."""
    length = k.shape[0]
    pages = empty_pages(1, page=min(BLOCK, length + length % 2), tail_slots=-(-length // BLOCK))
    tiers = empty_tiers(pages, k.shape[1], k.shape[2], dtype=k.dtype)
    pages, tiers = append(pages, tiers, k[None], v[None])
    positions = None if causal else jnp.full((1, q.shape[0]), length - 1, jnp.int32)
    return kv_attention(q[None], tiers, pages, positions, scale=scale)[0]


def _scale(scale: Any, error: type[RuvLLMError] = RuvLLMError.InvalidOperation) -> float:
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        raise error(f"scale={scale!r}", "a finite number, usually 1/sqrt(head_dim)")
    return float(scale)


def _fit(wanted: Any, found: Any, axes: tuple[str, ...], name: str) -> None:
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    if tuple(found) != wanted:
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(axes, wanted))
        raise RuvLLMError.InvalidOperation(f"{name} end in {list(found)}", f"expected {sizes}")


def _same(key: jax.Array, value: jax.Array) -> None:
    if key.shape != value.shape or key.shape[0] == 0:
        raise RuvLLMError.InvalidOperation(
            f"keys have shape {key.shape}, values {value.shape}", "the same shape, of one token or more"
        )


flash_attention_neon = flash_attention
grouped_query_attention_neon = grouped_query_attention
multi_query_attention_neon = multi_query_attention
paged_attention_neon = paged_attention
