"""TwoTierKvCache of RuvLLM: one sequence, one layer, over `kernels_pallas.kv_attention`.

New tokens lie in the tail as they came; the oldest move to a quantized store in whole pages; beyond `max_tokens` the
oldest of the store are dropped. A rollback changes tables alone: it is refused where it would have to read the store.
"""

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kernels_pallas.kv_attention import (
    Migration,
    PagedTiers,
    Pages,
    Tail,
    append,
    check,
    dense,
    empty_pages,
    empty_tiers,
    evict,
    hadamard,
    kv_attention,
    migrate,
    quantize_pages,
    release,
    rollback,
    usage,
)
from kernels_pallas.kv_attention.tiers import fetch, to_bits
from ruvjax.api.ruvllm_precision import Precision
from ruvjax.errors import ConfigError, InputError

TAIL_PRECISIONS = ("float32", "bfloat16", "float16")
_STORES = {Precision.Q8: "INT8", Precision.Q4: "INT4", Precision.Q4K: "INT4"}


class CacheQuantization(Enum):
    """What the store holds: codes of 8 or of 4 bits, and of the latter also with keys in a rotated basis, which spreads
    outlier channels. Keys share a scale by channel of a page, values by token (Liu et al. 2024, KIVI)."""

    INT8 = "int8"
    INT4 = "int4"
    INT4_ROTATED = "int4_rotated"

    @property
    def bits(self) -> int:
        return 8 if self is CacheQuantization.INT8 else 4


@dataclass(frozen=True)
class KvCacheConfig:
    """Sizes in tokens. Raises ConfigError.

    tail_length: how many of the newest tokens always stay as they came. tail_precision: or its name, "bfloat16".
    store_precision: a Precision of 8 or 4 bits means that CacheQuantization, unrotated. migration_batch: tokens that
    move to the store together, an even number that shares its scales. max_tokens: kept in both tiers; older ones are
    dropped in batches.
    """

    tail_length: int = 256
    tail_precision: str | Precision = "bfloat16"
    store_precision: CacheQuantization | Precision = CacheQuantization.INT8
    max_tokens: int = 4096
    num_kv_heads: int = 8
    head_dim: int = 128
    migration_batch: int = 64

    def __post_init__(self):
        if isinstance(self.tail_precision, Precision):
            object.__setattr__(self, "tail_precision", self.tail_precision.value)
        if isinstance(self.store_precision, Precision) and self.store_precision in _STORES:
            object.__setattr__(self, "store_precision", CacheQuantization[_STORES[self.store_precision]])
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"KvCacheConfig.{field.name}={value!r} must be a whole number of at least 1")
        if self.migration_batch % 2:
            raise ConfigError(f"KvCacheConfig.migration_batch={self.migration_batch} must be even", "such as 64")
        if self.tail_precision not in TAIL_PRECISIONS:
            known = ", ".join(TAIL_PRECISIONS)
            raise ConfigError(f"KvCacheConfig.tail_precision={self.tail_precision!r} is not known", f"one of {known}")
        _check_policy(self.store_precision, self.head_dim)
        if self.max_tokens < self.tail_length + self.migration_batch:
            raise ConfigError(
                f"KvCacheConfig.max_tokens={self.max_tokens} is below tail_length + migration_batch",
                f"at least {self.tail_length + self.migration_batch}",
            )

    @property
    def store(self) -> CacheQuantization:
        """`store_precision`, however it was given."""
        assert isinstance(self.store_precision, CacheQuantization)
        return self.store_precision

    @property
    def tail_dtype(self) -> str:
        """`tail_precision`, however it was given."""
        assert isinstance(self.tail_precision, str)
        return self.tail_precision


@dataclass(frozen=True)
class KvCacheStats:
    """Tokens, and bytes that are really taken: whole pages, codes with their scales.

    compression_ratio: what the tokens would take in the tail's precision without pages, over what they take; 0 where
    nothing is cached.
    """

    total_tokens: int
    tail_tokens: int
    store_tokens: int
    tail_bytes: int
    store_bytes: int
    compression_ratio: float


class TwoTierKvCache:
    """Keys and values of one sequence. Positions count from 0 and survive the dropping of old tokens."""

    def __init__(self, config: KvCacheConfig):
        self._config = config
        self._policy = config.store
        page = config.migration_batch
        tail, store = -(-config.tail_length // page) + 2, -(-config.max_tokens // page) + 1
        self._pages: Pages = empty_pages(1, page=page, tail_slots=tail, store_slots=store)
        self._tiers: PagedTiers = self._empty(self._policy)

    @classmethod
    def new(cls, config: KvCacheConfig) -> "TwoTierKvCache":
        """The documented constructor."""
        return cls(config)

    def append(self, keys: Any, values: Any) -> None:
        """Add tokens: [tokens, num_kv_heads, head_dim], or flat as documented. Keys as they enter the dot product.

        What exceeds the tail moves to the store, what exceeds `max_tokens` is dropped. Raises InputError for other
        shapes and numbers that are not finite; then nothing has changed.
        """
        k, v = self._shaped(keys, "keys"), self._shaped(values, "values")
        if k.shape != v.shape:
            raise InputError(f"{len(k)} keys and {len(v)} values", "give one of each a token")
        page, pages, tiers = self._config.migration_batch, self._pages, self._tiers
        for start in range(0, len(k), page):  # a page at a time: the tail has room for one more
            counts = jnp.array([min(page, len(k) - start)], jnp.int32)
            chunk = (np.zeros((1, page, *k.shape[1:]), np.float32) for _ in range(2))
            both = [_filled(empty, x[start : start + page]) for empty, x in zip(chunk, (k, v))]
            pages, tiers = _append(pages, tiers, *both, counts, self._config.tail_length, self._config.max_tokens)
        check(pages)
        self._pages, self._tiers = pages, tiers

    def rollback(self, length: int) -> None:
        """Forget the tokens from position `length` on, which must lie in the tail: the store is never read. At least
        the last `tail_length` tokens do; an `append` in between may have moved older ones to the store.

        Raises InputError for one in the store or past the end; then nothing has changed.
        """
        stored, end = int(self._pages.stored[0]), int(self._pages.lengths[0])
        if isinstance(length, bool) or not isinstance(length, int) or not stored <= length <= end:
            hint = f"from {stored}, where the tail begins, to {end}; a longer tail_length keeps more"
            raise InputError(f"a rollback to position {length!r} is not possible", hint)
        self._pages = rollback(self._pages, jnp.array([length], jnp.int32))

    def get_all_kv(self) -> tuple[Float[np.ndarray, "tokens kv_heads dim"], Float[np.ndarray, "tokens kv_heads dim"]]:
        """(keys, values) in float32 in the order of their positions, the store dequantized."""
        k, v, position, valid = (np.asarray(x[0]) for x in dense(self._tiers, self._pages))
        order = np.argsort(np.where(valid, position, np.iinfo(np.int32).max), kind="stable")[: int(valid.sum())]
        return k[order], v[order]

    def attend(self, query: Any, scale: float) -> Float[np.ndarray, "heads dim"]:
        """softmax(scale * q k^T) v of one query [heads, head_dim] (or flat) over all that is cached; zeros where
        nothing is. heads is a multiple of num_kv_heads. Raises InputError for other shapes."""
        q = np.asarray(query, np.float32)
        dim, kv_heads = self._config.head_dim, self._config.num_kv_heads
        if q.size == 0 or q.size % (dim * kv_heads) or (q.ndim > 1 and q.shape[-1] != dim):
            raise InputError(f"a query of shape {q.shape}", f"[heads, {dim}] with heads a multiple of {kv_heads}")
        if not np.isfinite(scale):
            raise InputError(f"scale={scale} is not finite", "such as head_dim ** -0.5")
        out = _attend(jnp.asarray(q.reshape(1, 1, -1, dim)), self._tiers, self._pages, float(scale))
        return np.asarray(out)[0, 0]

    def stats(self) -> KvCacheStats:
        """What is held now."""
        held = usage(self._pages, self._tiers)
        tail, store = int(held.tail_tokens), int(held.store_tokens)
        taken = int(held.tail_bytes) + int(held.store_bytes)
        ratio = int(held.dense_bytes) / taken if taken else 0.0
        return KvCacheStats(tail + store, tail, store, int(held.tail_bytes), int(held.store_bytes), ratio)

    def clear(self) -> None:
        """Forget everything; positions begin at 0 again."""
        self._pages = release(self._pages, jnp.ones(1, bool))

    def update_policy(self, policy: CacheQuantization) -> None:
        """Quantize as `policy` says from now on. What the store holds already is quantized again, which loses what the
        old policy had lost and what the new one loses. Raises ConfigError."""
        _check_policy(policy, self._config.head_dim)
        if policy is self._policy:
            return
        self._tiers = _requantized(self._tiers, self._empty(policy))
        self._policy = policy

    def _empty(self, policy: CacheQuantization) -> PagedTiers:
        config = self._config
        return empty_tiers(
            self._pages,
            config.num_kv_heads,
            config.head_dim,
            dtype=jnp.dtype(config.tail_dtype),
            key_bits=policy.bits,
            value_bits=policy.bits,
            rotated=policy is CacheQuantization.INT4_ROTATED,
        )

    def _shaped(self, tokens: Any, name: str) -> np.ndarray:
        array = np.asarray(tokens, np.float32)
        each = (self._config.num_kv_heads, self._config.head_dim)
        if array.size % (each[0] * each[1]) or (array.ndim != 1 and array.shape[1:] != each):
            raise InputError(f"{name} of shape {array.shape}", f"[tokens, {each[0]}, {each[1]}], or flat")
        if not np.isfinite(array).all():
            raise InputError(f"{name} hold numbers that are not finite", "look at the model that made them")
        return array.reshape(-1, *each)


def _check_policy(policy: Any, dim: int) -> None:
    if not isinstance(policy, CacheQuantization):
        known = ", ".join(kind.name for kind in CacheQuantization)
        raise ConfigError(f"store_precision={policy!r} is no CacheQuantization", f"one of {known}")
    if policy is CacheQuantization.INT4_ROTATED and dim % 2:
        raise ConfigError(f"store_precision=INT4_ROTATED needs an even head_dim, not {dim}", "INT4")


def _filled(empty: np.ndarray, tokens: np.ndarray) -> jax.Array:
    empty[0, : len(tokens)] = tokens
    return jnp.asarray(empty)


def _append_page(pages, tiers, k, v, counts, tail_length, max_tokens):
    pages, tiers = append(pages, tiers, k, v, counts)
    pages, tiers = migrate(pages, tiers, keep=tail_length)
    return evict(pages, max_tokens), tiers


_append = jax.jit(_append_page, static_argnums=(5, 6))
_attend = jax.jit(lambda q, tiers, pages, scale: kv_attention(q, tiers, pages, scale=scale), static_argnums=3)


@jax.jit
def _requantized(tiers: PagedTiers, empty: PagedTiers) -> PagedTiers:
    """The tail of `tiers`, and its store as `empty` has one; every page goes through a tail of its own."""
    ids = jnp.arange(tiers.store_k.codes.shape[0])
    k, v = (fetch(store, ids) for store in (tiers.store_k, tiers.store_v))
    k = hadamard.rotate(k) if tiers.rotated else k
    wide = replace(empty, tail_k=Tail(to_bits(k), k.dtype.name), tail_v=Tail(to_bits(v), v.dtype.name))
    return replace(quantize_pages(wide, Migration(ids, ids)), tail_k=tiers.tail_k, tail_v=tiers.tail_v)
