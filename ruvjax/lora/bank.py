"""A bank of tiny adapters: a fixed number of slots, each an adapter and the vector that it is found by.

A bank is a pytree, and what is done to it are pure functions. Its capacity is the shape of its arrays; which slots are
taken is data, so that a growing bank runs the programs that were compiled for it when it was empty. Everything that
changes a bank returns the changed one: under `jax.jit` with the bank donated that is in place.
"""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import retrieve as search
from kernels_pallas.retrieve import Keys
from ruvjax.errors import ConfigError, InputError

Eviction = Literal["lru", "success"]
NONE = -1  # the id of a free slot, and the slot of a hit that is none
SMALLEST = 1e-12  # a key of a smaller norm has no direction


@struct.dataclass
class Bank:
    """keys      of Euclidean norm 1, so that their products with a query of norm 1 are cosines.
    a, b         [capacity, rows, rank] and [capacity, rank, columns]. At the residual stream rows and columns are its
                 width, and an adapter adds (x @ a) @ b; `lora.layout` says what they are over several sites.
    ids          int32 [capacity], the number an adapter was stored under, never used again; -1 where the slot is free.
    success, trials  float32 and int32 [capacity]: the sum of the outcomes that were recorded, and how many.
    uses, last_used  int32 [capacity]: how often it was touched, and when last, by `clock`.
    clock, next_id   int32: ticks with everything stored or touched; the id of the next adapter.
    """

    keys: Keys
    a: Float[Array, "capacity rows rank"]
    b: Float[Array, "capacity rank columns"]
    ids: Int[Array, "capacity"]
    success: Float[Array, "capacity"]
    trials: Int[Array, "capacity"]
    uses: Int[Array, "capacity"]
    last_used: Int[Array, "capacity"]
    clock: Int[Array, ""]
    next_id: Int[Array, ""]

    @property
    def capacity(self) -> int:
        return self.ids.shape[0]

    @property
    def rows(self) -> int:
        return self.a.shape[1]

    @property
    def columns(self) -> int:
        return self.b.shape[2]

    @property
    def rank(self) -> int:
        return self.a.shape[2]

    @property
    def live(self) -> Bool[Array, "capacity"]:
        return self.ids != NONE

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, keys included."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


@struct.dataclass
class Stored:
    """What `store` did: the id that the adapter has now (-1: refused), its slot, the id that made room (-1: none)."""

    id: Int[Array, ""]
    slot: Int[Array, ""]
    evicted: Int[Array, ""]


def empty(
    capacity: int, rank: int, rows: int, key_dim: int = 0, dtype: Any = jnp.bfloat16, *, columns: int = 0
) -> Bank:
    """A bank without adapters. key_dim 0, columns 0: as many as `rows`. Raises ConfigError for sizes below 1."""
    for name, value in (("capacity", capacity), ("rank", rank), ("rows", rows)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"a bank of {name}={value!r}", "sizes are whole numbers from 1 on")
    return _bank(
        search.keys_of(jnp.zeros((capacity, key_dim or rows), jnp.float32)),
        jnp.zeros((capacity, rows, rank), dtype),
        jnp.zeros((capacity, rank, columns or rows), dtype),
        0,
    )


def filled(
    keys: Float[Array | np.ndarray, "count key_dim"],
    a: Float[Array | np.ndarray, "count rows rank"],
    b: Float[Array | np.ndarray, "count rank columns"],
    capacity: int = 0,
    dtype: Any = jnp.bfloat16,
) -> Bank:
    """A bank whose first slots hold these adapters, with the ids 0, 1, ...; capacity 0: as many as there are.

    Raises ConfigError where shapes do not fit, InputError for a key or an adapter that is not finite.
    """
    count = keys.shape[0]
    capacity = capacity or count
    if a.shape[0] != count or b.shape[:2] != (count, a.shape[2]) or not 0 < count <= capacity:
        raise ConfigError(f"keys {keys.shape}, a {a.shape} and b {b.shape} make no bank of capacity {capacity}")
    keys, a, b = jnp.asarray(keys, jnp.float32), jnp.asarray(a), jnp.asarray(b)
    norms = jnp.linalg.norm(keys, axis=1)
    sound = jnp.isfinite(norms) & (norms > SMALLEST) & _finite(a, (1, 2)) & _finite(b, (1, 2))
    if not bool(jnp.all(sound)):
        raise InputError(f"adapter {int(jnp.argmin(sound))} or its key is not finite, or its key is zero")
    room = ((0, capacity - count), (0, 0))
    unit = jnp.pad(keys / norms[:, None], room)
    a, b = (jnp.pad(part.astype(dtype), (*room, (0, 0))) for part in (a, b))
    return _bank(search.keys_of(unit), a, b, count)


def _bank(keys: Keys, a: jax.Array, b: jax.Array, count: int) -> Bank:
    slots = jnp.arange(keys.capacity, dtype=jnp.int32)
    # Arrays of their own: a bank may be donated.
    trials, uses, last_used = (jnp.zeros(keys.capacity, jnp.int32) for _ in range(3))
    return Bank(
        keys=keys,
        a=a,
        b=b,
        ids=jnp.where(slots < count, slots, NONE),
        success=jnp.zeros(keys.capacity, jnp.float32),
        trials=trials,
        uses=uses,
        last_used=last_used,
        clock=jnp.int32(0),
        next_id=jnp.int32(count),
    )


def size(bank: Bank) -> Int[Array, ""]:
    """How many slots are taken."""
    return jnp.sum(bank.live, dtype=jnp.int32)


def check(bank: Bank, key: Any, a: Any, b: Any) -> None:
    """What `store` cannot say under `jax.jit`. Raises InputError for an adapter or a key of another shape than the
    bank's, one that is not finite, and a key of norm 0, which has no direction."""
    wanted = {
        "key": (key, (bank.keys.dim,)),
        "a": (a, (bank.rows, bank.rank)),
        "b": (b, (bank.rank, bank.columns)),
    }
    for name, (array, shape) in wanted.items():
        array = np.asarray(array)
        if array.shape != shape:
            raise InputError(f"{name} has shape {array.shape}, this bank holds {shape}")
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"{name} is not finite: the adapter is not stored")
    if not np.linalg.norm(np.asarray(key, np.float32)) > SMALLEST:
        raise InputError("the key is zero: nothing is similar to it", "give the hidden state the adapter is for")


def store(
    bank: Bank,
    key: Float[Array, "key_dim"],
    a: Float[Array, "rows rank"],
    b: Float[Array, "rank columns"],
    eviction: Eviction = "lru",
) -> tuple[Bank, Stored]:
    """Put an adapter into a free slot or, where there is none, into that of an adapter that has to leave: of the one
    least recently used ("lru"), or of the lowest share of successes, (success + 1) / (trials + 2), among equals the
    least recently used ("success").

    A key or an adapter that is not finite, and a key of norm 0, leave the bank as it is; `check` says why beforehand.
    """
    key = key.astype(jnp.float32)
    norm = jnp.linalg.norm(key)
    sound = jnp.isfinite(norm) & (norm > SMALLEST) & _finite(a, None) & _finite(b, None)
    free = ~bank.live
    full = ~jnp.any(free)
    slot = jnp.where(full, _weakest(bank, eviction), jnp.argmax(free)).astype(jnp.int32)
    at = jnp.where(sound, slot, bank.capacity)  # a slot outside is not written

    def put(held: jax.Array, value: Any) -> jax.Array:
        return held.at[at].set(value, mode="drop")

    def put_matrix(held: jax.Array, value: jax.Array) -> jax.Array:
        # Not a scatter, which XLA:CPU makes of bfloat16 by way of a whole bank in float32.
        place = (slot, jnp.int32(0), jnp.int32(0))
        old = lax.dynamic_slice(held, place, (1, *value.shape))
        return lax.dynamic_update_slice(held, jnp.where(sound, value.astype(held.dtype)[None], old), place)

    stored = Stored(
        id=jnp.where(sound, bank.next_id, NONE),
        slot=jnp.where(sound, slot, NONE),
        evicted=jnp.where(sound & full, bank.ids[slot], NONE),
    )
    tick = sound.astype(jnp.int32)
    made = replace(
        bank,
        keys=search.put(bank.keys, at, key / jnp.where(sound, norm, 1)),
        a=put_matrix(bank.a, a),
        b=put_matrix(bank.b, b),
        ids=put(bank.ids, bank.next_id),
        success=put(bank.success, 0),
        trials=put(bank.trials, 0),
        uses=put(bank.uses, 0),
        last_used=put(bank.last_used, bank.clock + 1),
        clock=bank.clock + tick,
        next_id=bank.next_id + tick,
    )
    return made, stored


def _weakest(bank: Bank, eviction: Eviction) -> jax.Array:
    if eviction == "lru":
        return jnp.argmin(bank.last_used)
    share = (bank.success + 1) / (bank.trials + 2)
    lowest = share == jnp.min(share)
    return jnp.argmin(jnp.where(lowest, bank.last_used, jnp.iinfo(jnp.int32).max))


def slot_of(bank: Bank, id: Int[Array, ""] | int) -> Int[Array, ""]:
    """The slot of the adapter with this id, -1 where there is none."""
    here = bank.ids == id
    return jnp.where((id != NONE) & jnp.any(here), jnp.argmax(here), NONE).astype(jnp.int32)


def remove(bank: Bank, id: Int[Array, ""] | int) -> tuple[Bank, Int[Array, ""]]:
    """Free the slot of the adapter with this id; the slot, -1 for an id that is not there. What the slot holds stays
    until it is written again."""
    slot = slot_of(bank, id)
    return replace(bank, ids=bank.ids.at[_inside(bank, slot)].set(NONE, mode="drop")), slot


def retrieve(
    bank: Bank, queries: Float[Array, "queries key_dim"], k: int, *, impl: str | None = None
) -> tuple[Int[Array, "queries k"], Float[Array, "queries k"]]:
    """The slots of the k adapters whose keys are the most similar to each query, and the cosines, the largest first;
    exact. What is beyond the adapters there are is slot -1 and similarity 0, and so is all for a query that is zero or
    not finite.

    Raises ConfigError for a query of another width and a k outside 1 to the capacity.
    """
    if queries.shape[1] != bank.keys.dim:
        raise ConfigError(f"queries of width {queries.shape[1]}, the keys of this bank have {bank.keys.dim}")
    if not 1 <= k <= bank.capacity:
        raise ConfigError(f"top_k={k} of a bank of {bank.capacity}", "1 to the capacity")
    unit = normalised(queries)
    slots, similarity = search.retrieve(bank.keys, bank.live, unit, k, impl=impl)
    there = (slots != NONE) & jnp.any(unit != 0, axis=1)[:, None]
    return jnp.where(there, slots, NONE), jnp.where(there, similarity, 0.0)


def normalised(queries: Float[Array, "queries key_dim"]) -> Float[Array, "queries key_dim"]:
    """float32 queries of norm 1; zero where a query has no direction."""
    wide = lax.stop_gradient(queries).astype(jnp.float32)
    norm = jnp.linalg.norm(wide, axis=1, keepdims=True)
    sound = jnp.isfinite(norm) & (norm > SMALLEST)
    return jnp.where(sound, wide / jnp.where(sound, norm, 1), 0)


def touch(bank: Bank, slots: Int[Array, "*hits"]) -> Bank:
    """Note that the adapters in `slots` (-1: none) were used now."""
    at, clock = _inside(bank, slots).ravel(), bank.clock + 1
    return replace(
        bank,
        uses=bank.uses.at[at].add(1, mode="drop"),
        last_used=bank.last_used.at[at].set(clock, mode="drop"),
        clock=clock,
    )


def record(bank: Bank, slots: Int[Array, "*hits"], outcome: Float[Array, "*hits"]) -> Bank:
    """Note how well the adapters in `slots` (-1: none) served, from 0 to 1; what "success" evicts by. An outcome that
    is not finite is not counted."""
    heard = jnp.isfinite(outcome)
    at = jnp.where(heard, _inside(bank, slots), bank.capacity).ravel()
    gained = jnp.clip(jnp.where(heard, outcome, 0), 0, 1).astype(jnp.float32).ravel()
    return replace(
        bank, success=bank.success.at[at].add(gained, mode="drop"), trials=bank.trials.at[at].add(1, mode="drop")
    )


def _inside(bank: Bank, slots: jax.Array) -> jax.Array:
    """-1 as a slot that a scatter drops: it would count from the end."""
    return jnp.where(slots < 0, bank.capacity, slots)


def _finite(array: jax.Array, axis: tuple[int, ...] | None) -> jax.Array:
    return jnp.all(jnp.isfinite(array), axis=axis)
