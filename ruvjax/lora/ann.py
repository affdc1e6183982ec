"""Approximate search of banks too large to multiply with every key: faiss's inverted lists (the extra `ann`).

Up to `talora.EXACT` adapters the exact search is as fast, and finds what there is; of an approximate one, always ask
`recall` on the very bank it serves.
"""

import importlib
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ruvjax.errors import BackendError, ConfigError
from ruvjax.lora import bank as banking
from ruvjax.lora.bank import NONE, Bank, normalised


@dataclass(frozen=True, eq=False)
class Index:
    """Lists of the keys of one bank as it was when the index was built; hashed by identity. `lists` of them are there,
    of which a query reads `probes`."""

    faiss: Any
    capacity: int
    lists: int
    probes: int

    def search(self, bank: Bank, queries: Float[Array, "queries key_dim"], k: int) -> tuple[jax.Array, jax.Array]:
        """As `bank.retrieve`, approximately; jitted programs call back to the host for it. What left the bank since
        the index was built is not found, and leaves its place among the k empty; what was stored since is not found
        either. Raises ConfigError for a bank of another capacity."""
        if bank.capacity != self.capacity:
            raise ConfigError(f"an index of a bank of {self.capacity} for one of {bank.capacity}", "build it again")
        shape = (queries.shape[0], k)
        shapes = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32))
        unit = normalised(queries)
        slots, similarity = jax.pure_callback(self._look, shapes, unit, k, vmap_method="sequential")
        # A slot may hold another adapter by now: its similarity is that of the key it holds.
        inside = jnp.where(slots < 0, 0, slots)
        now = jnp.einsum("qd,qkd->qk", unit, bank.keys.values[inside], precision="highest")
        there = (
            (slots >= 0) & bank.live[inside] & (jnp.abs(now - similarity) < 1e-3) & jnp.any(unit != 0, axis=1)[:, None]
        )
        order = jnp.argsort(jnp.where(there, -now, jnp.inf), axis=1, stable=True)
        slots, now, there = (jnp.take_along_axis(part, order, axis=1) for part in (slots, now, there))
        return jnp.where(there, slots, NONE), jnp.where(there, now, 0.0)

    def _look(self, queries: Any, k: Any) -> tuple[np.ndarray, np.ndarray]:
        similarity, slots = self.faiss.search(np.ascontiguousarray(queries, np.float32), int(k))
        return slots.astype(np.int32), similarity.astype(np.float32)


def build(bank: Bank, *, lists: int = 0, probes: int = 0, seed: int = 0) -> Index:
    """An index of the adapters that are in `bank` now. lists 0: 4 sqrt(adapters); probes 0: an eighth of the lists.

    Raises BackendError where faiss is not installed, ConfigError for an empty bank and for numbers that do not fit.
    """
    faiss = _faiss()
    slots = np.flatnonzero(np.asarray(bank.ids) != NONE)
    if not slots.size:
        raise ConfigError("an empty bank has nothing to index", "store adapters first")
    lists = lists or max(1, min(slots.size, int(4 * math.sqrt(slots.size))))
    probes = probes or max(1, lists // 8)
    if not 1 <= probes <= lists <= slots.size:
        raise ConfigError(f"lists={lists} and probes={probes} for {slots.size} adapters", "probes <= lists <= adapters")
    keys = np.ascontiguousarray(np.asarray(bank.keys.values)[slots])
    coarse = faiss.IndexFlatIP(keys.shape[1])
    made = faiss.IndexIVFFlat(coarse, keys.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    made.cp.seed = seed
    made.cp.min_points_per_centroid = 1  # it would warn of small banks
    made.train(keys)
    made.add_with_ids(keys, slots.astype(np.int64))
    made.nprobe = probes
    return Index(made, bank.capacity, lists, probes)


def recall(index: Index, bank: Bank, queries: Float[Array, "queries key_dim"], k: int) -> float:
    """The share of the k adapters that the exact search of `bank` finds for `queries` which the index finds too."""
    searches = (jax.jit(search, static_argnums=2) for search in (banking.retrieve, index.search))
    exact, found = (np.asarray(search(bank, queries, k)[0]) for search in searches)
    wanted = exact != NONE
    if not wanted.any():
        raise ConfigError("there is nothing to find: the bank or the queries are empty")
    hit = (exact[:, :, None] == found[:, None, :]).any(axis=2)
    return float(hit[wanted].mean())


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise BackendError(
            f"an approximate index needs faiss, which cannot be imported ({error})",
            "install the extra: pip install 'ruvjax[ann]'",
        ) from error
