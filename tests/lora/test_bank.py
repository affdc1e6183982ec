"""Banks of adapters: what is stored is found, who leaves a full one, and that growing compiles nothing anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.errors import ConfigError, InputError
from ruvjax.lora import bank as banking

HIDDEN, RANK, CAPACITY = 12, 2, 8
store = jax.jit(banking.store, static_argnames="eviction")
retrieve = jax.jit(banking.retrieve, static_argnums=2)


def adapters(count, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((count, HIDDEN), (count, HIDDEN, RANK), (count, RANK, HIDDEN))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.fixture(scope="module")
def half():
    """A bank with four of eight slots taken, stored one by one."""
    bank = banking.empty(CAPACITY, RANK, HIDDEN, dtype=jnp.float32)
    for key, a, b in zip(*adapters(4)):
        bank, _ = store(bank, key, a, b)
    return bank


def same(one, other):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_what_is_stored_is_found_by_its_cosine(half):
    keys, a, b = adapters(4)
    queries = np.random.default_rng(1).normal(size=(5, HIDDEN)).astype(np.float32) * 7
    slots, similarity = retrieve(half, queries, 6)
    cosine = (queries @ keys.T) / (np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(keys, axis=1)[None])
    order = np.argsort(-cosine, axis=1)
    np.testing.assert_array_equal(slots[:, :4], order)
    np.testing.assert_allclose(similarity[:, :4], np.take_along_axis(cosine, order, axis=1), atol=1e-6)
    assert (np.asarray(slots[:, 4:]) == -1).all() and (np.asarray(similarity[:, 4:]) == 0).all()
    np.testing.assert_array_equal(half.a[:4], a)
    np.testing.assert_array_equal(half.b[:4], b)
    assert int(banking.size(half)) == 4 and int(half.next_id) == 4


def test_storing_one_by_one_is_building_at_once(half):
    at_once = banking.filled(*adapters(4), capacity=CAPACITY, dtype=jnp.float32)
    for name in ("a", "b", "ids", "next_id"):
        np.testing.assert_array_equal(getattr(half, name), getattr(at_once, name))
    np.testing.assert_allclose(half.keys.values, at_once.keys.values, atol=1e-7)
    assert banking.empty(4, RANK, HIDDEN).a.dtype == jnp.bfloat16
    for broken in ((0, np.nan), (2, np.inf)):
        parts = [part.copy() for part in adapters(3)]
        parts[broken[0]][1] = broken[1]
        with pytest.raises(InputError, match="adapter 1"):
            banking.filled(*parts)
    with pytest.raises(ConfigError, match="make no bank"):
        banking.filled(*adapters(3), capacity=2)


def test_a_removed_adapter_is_never_returned_and_its_slot_is_taken_again(half):
    keys, a, b = adapters(4)
    remove = jax.jit(banking.remove)
    less, slot = remove(half, 2)
    assert int(slot) == 2 and int(banking.size(less)) == 3
    slots, _ = retrieve(less, keys, 6)
    assert 2 not in np.asarray(slots) and set(np.asarray(slots[:, :3]).ravel()) == {0, 1, 3}
    for unknown in (2, 99, -1):
        again, slot = remove(less, unknown)
        assert int(slot) == -1 and same(again, less)
    full, stored = store(less, keys[2], a[2], b[2])
    assert (int(stored.slot), int(stored.id), int(stored.evicted)) == (2, 4, -1)
    assert int(banking.slot_of(full, 4)) == 2 and int(banking.slot_of(full, 2)) == -1


def full_bank():
    return banking.filled(*adapters(CAPACITY), dtype=jnp.float32)


def test_the_least_recently_used_leaves_a_full_bank():
    keys, a, b = adapters(1, seed=5)
    bank = full_bank()
    for slots in ([[0, 1], [2, -1]], [[5, 6], [7, 3]]):
        bank = jax.jit(banking.touch)(bank, np.int32(slots))
    assert np.asarray(bank.uses).tolist() == [1, 1, 1, 1, 0, 1, 1, 1]
    bank, stored = store(bank, keys[0], a[0], b[0])
    assert (int(stored.slot), int(stored.evicted), int(stored.id)) == (4, 4, 8)
    bank, stored = store(bank, keys[0], a[0], b[0])
    assert int(stored.slot) == 0  # of three touched in the first call


def test_the_least_successful_leaves_a_full_bank():
    keys, a, b = adapters(1, seed=5)
    record = jax.jit(banking.record)
    bank = record(full_bank(), np.int32([1, 3, 3, 6, -1]), np.float32([0.9, 0.0, 0.1, 0.0, 0.0]))
    bank = record(bank, np.int32([0]), np.float32([np.nan]))
    assert np.asarray(bank.trials).tolist() == [0, 1, 0, 2, 0, 0, 1, 0]
    np.testing.assert_allclose(bank.success, [0, 0.9, 0, 0.1, 0, 0, 0, 0], atol=1e-7)
    _, stored = store(bank, keys[0], a[0], b[0], eviction="success")
    assert int(stored.slot) == 3  # (0.1 + 1) / 4 is below (0 + 1) / 3
    _, stored = store(bank, keys[0], a[0], b[0], eviction="lru")
    assert int(stored.slot) == 0


def test_what_is_not_sound_leaves_the_bank_as_it_is(half):
    key, a, b = (part[0] for part in adapters(1, seed=2))
    bad = a.copy()
    bad[3, 1] = np.nan
    for parts, message in (
        ((key * np.nan, a, b), "key is not finite"),
        ((key * 0, a, b), "key is zero"),
        ((key, bad, b), "a is not finite"),
        ((key, a, b * np.inf), "b is not finite"),
    ):
        with pytest.raises(InputError, match=message):
            banking.check(half, *parts)
        after, stored = store(half, *parts)
        assert same(after, half) and int(stored.id) == int(stored.slot) == -1
    for parts in ((key[:3], a, b), (key, a[:, :1], b), (key, a, b[:, :5])):
        with pytest.raises(InputError, match="has shape"):
            banking.check(half, *parts)
    banking.check(half, key, a, b)


def test_queries_that_ask_for_nothing(half):
    queries = np.stack([np.zeros(HIDDEN), np.full(HIDDEN, np.nan), np.ones(HIDDEN)]).astype(np.float32)
    slots, similarity = retrieve(half, queries, 2)
    assert (np.asarray(slots[:2]) == -1).all() and (np.asarray(similarity[:2]) == 0).all()
    assert (np.asarray(slots[2]) >= 0).all()
    slots, _ = retrieve(banking.empty(CAPACITY, RANK, HIDDEN), queries, 2)
    assert (np.asarray(slots) == -1).all()
    for wrong, k, message in ((queries[:, :4], 2, "width 4"), (queries, 9, "top_k=9"), (queries, 0, "top_k=0")):
        with pytest.raises(ConfigError, match=message):
            banking.retrieve(half, jnp.asarray(wrong), k)
    for sizes in ((0, 1, 4), (4, 0, 4), (4, 1, 0), (True, 1, 4)):
        with pytest.raises(ConfigError, match="a bank of"):
            banking.empty(*sizes)


def test_a_growing_bank_is_never_traced_anew():
    traces = []

    @jax.jit
    def grow(bank, key, a, b):
        traces.append("store")
        return banking.store(bank, key, a, b)

    @jax.jit
    def look(bank, queries):
        traces.append("retrieve")
        return banking.retrieve(bank, queries, 3)

    bank = banking.empty(CAPACITY, RANK, HIDDEN)
    for number, (key, a, b) in enumerate(zip(*adapters(CAPACITY + 4))):
        bank, stored = grow(bank, key, a, b)
        slots, _ = look(bank, key[None])
        assert int(slots[0, 0]) == int(stored.slot) and int(banking.size(bank)) == min(number + 1, CAPACITY)
    assert traces == ["store", "retrieve"]
