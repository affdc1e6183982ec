"""The search against numpy in float64: ties, dead slots, few live keys, odd shapes, and keys that defeat the bounds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import native
from kernels_pallas.dispatch import ImplError
from kernels_pallas.retrieve import cpu, keys_of, put, reference, retrieve, xla

ROOT = Path(__file__).resolve().parents[2]
missing = native.unavailable(cpu.SOURCE, cpu.TARGETS)
needs_compiler = pytest.mark.skipif(bool(missing), reason=f"no native search: {missing}")
BODIES = {"native": cpu.retrieve, "xla": xla.retrieve, "reference": reference.retrieve}
BODIES = {name: jax.jit(body, static_argnums=3) for name, body in BODIES.items()}
each = pytest.mark.parametrize("body", [pytest.param("native", marks=needs_compiler), "xla", "reference"])


def units(rng, count, dim):
    keys = rng.normal(size=(count, dim))
    return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)


def expected(values, live, queries, k):
    """The columns of the k largest products in float64, and all products."""
    scores = np.where(live, queries.astype(np.float64) @ values.astype(np.float64).T, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k], scores


def agrees(found, values, live, queries, k):
    """As numpy says, but for keys whose products differ by less than float32 rounds."""
    slots, similarity = (np.asarray(part) for part in found)
    order, scores = expected(values, live, queries, k)
    for row, (mine, wanted) in enumerate(zip(slots, order)):
        count = min(k, int(live.sum()))
        assert (mine[count:] == -1).all() and (similarity[row, count:] == -np.inf).all()
        assert len(set(mine[:count])) == count and live[mine[:count]].all()
        np.testing.assert_allclose(scores[row, mine[:count]], scores[row, wanted[:count]], atol=2e-6)
        np.testing.assert_allclose(similarity[row, :count], scores[row, mine[:count]], atol=2e-6)
        assert (np.diff(similarity[row, :count]) <= 0).all()


@each
@settings(max_examples=12)
@given(st.integers(0, 2**31), st.sampled_from([(1, 1, 1), (37, 7, 3), (700, 64, 8), (1100, 20, 40)]))
def test_the_k_largest_are_those_of_numpy(body, seed, shape):
    count, dim, k = shape
    rng = np.random.default_rng(seed)
    values, queries = units(rng, count, dim), units(rng, 3, dim)
    live = rng.random(count) < rng.choice([0.02, 0.5, 1.0])
    agrees(BODIES[body](keys_of(values), jnp.asarray(live), jnp.asarray(queries), k), values, live, queries, k)


@each
def test_keys_that_hardly_differ_are_told_apart(body):
    """All bounds overlap here: the second pass has to multiply every key."""
    rng = np.random.default_rng(1)
    values = units(rng, 1, 48) + 1e-4 * rng.normal(size=(600, 48)).astype(np.float32)
    live, queries = np.ones(600, bool), units(rng, 2, 48)
    agrees(BODIES[body](keys_of(values), jnp.asarray(live), jnp.asarray(queries), 5), values, live, queries, 5)


@each
def test_of_equal_keys_the_lower_slot_comes_first(body):
    rng = np.random.default_rng(2)
    values = np.repeat(units(rng, 4, 16), 50, axis=0)
    live = np.ones(200, bool)
    live[[0, 3]] = False
    slots, _ = BODIES[body](keys_of(values), jnp.asarray(live), jnp.asarray(values[:1]), 6)
    assert slots[0].tolist() == [1, 2, 4, 5, 6, 7]


@each
def test_a_key_of_another_size_and_a_zero_query_are_no_exception(body):
    rng = np.random.default_rng(3)
    values = units(rng, 40, 12) * np.exp(rng.normal(size=(40, 1)) * 3).astype(np.float32)
    values[7] = 0
    live, queries = np.ones(40, bool), np.concatenate([units(rng, 2, 12) * 5, np.zeros((1, 12), np.float32)])
    slots, similarity = BODIES[body](keys_of(values), jnp.asarray(live), jnp.asarray(queries), 4)
    order, scores = expected(values, live, queries, 4)
    assert np.array_equal(slots[:2], order[:2]) and np.array_equal(slots[2], [0, 1, 2, 3])
    np.testing.assert_allclose(similarity, np.take_along_axis(scores, order, axis=1), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_more_queries_than_are_held_at_once():
    rng = np.random.default_rng(4)
    values, queries = units(rng, 300, 16), units(rng, 2 * cpu.BATCH + 5, 16)
    live = np.ones(300, bool)
    agrees(BODIES["native"](keys_of(values), jnp.asarray(live), jnp.asarray(queries), 3), values, live, queries, 3)


def test_the_bounds_hold_what_rounding_leaves_out():
    rng = np.random.default_rng(5)
    values = units(rng, 500, 33) * np.exp(rng.normal(size=(500, 1))).astype(np.float32)
    keys = keys_of(values)
    codes = np.asarray(keys.codes).swapaxes(1, 2).reshape(-1, 36)[:500, :33].astype(np.float64) - 128
    decoded = codes * np.asarray(keys.scale, np.float64)[:, None]
    assert (np.linalg.norm(values - decoded, axis=1) <= np.asarray(keys.error)).all()
    assert (np.linalg.norm(values, axis=1) <= np.asarray(keys.norm)).all()
    assert (np.linalg.norm(decoded, axis=1) <= np.asarray(keys.norm)).all()
    assert np.mean(keys.error) < 0.02 * np.mean(keys.norm)  # a bound that says something


def test_putting_a_key_is_building_with_it():
    rng = np.random.default_rng(6)
    values, new = units(rng, 35, 10), units(rng, 1, 10)[0]
    write = jax.jit(put)
    for slot in (0, 17, 34):
        values[slot] = new
        made = write(keys_of(values * (np.arange(35) != slot)[:, None]), slot, new)
        for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(keys_of(values)), strict=True):
            np.testing.assert_array_equal(one, other)
    for slot in (-1, 35):
        for one, other in zip(jax.tree.leaves(write(keys_of(values), slot, new)), jax.tree.leaves(keys_of(values))):
            np.testing.assert_array_equal(one, other)


def test_the_op_names_what_does_not_fit():
    keys, live = keys_of(jnp.eye(4)), jnp.ones(4, bool)
    for queries, k, message in (
        (jnp.ones((1, 3)), 1, "queries"),
        (jnp.ones((1, 4)), 5, "k=5"),
        (jnp.ones((1, 4)), 0, "k=0"),
    ):
        with pytest.raises(ValueError, match=message):
            retrieve(keys, live, queries, k)
    with pytest.raises(ImplError, match="not written"):
        retrieve(keys, live, jnp.ones((1, 4)), 1, impl="pallas_gpu")
    slots, _ = retrieve(keys, live, jnp.zeros((0, 4)), 2)
    assert slots.shape == (0, 2)
    assert jax.grad(lambda q: retrieve(keys, live, q, 1)[1].sum())(jnp.ones((1, 4))).sum() == 0


def test_split_arrays_and_vmap_give_the_same(caplog):
    rng = np.random.default_rng(7)
    values, queries = units(rng, 64, 8), units(rng, 6, 8)
    keys, live = keys_of(values), jnp.ones(64, bool)
    plain = retrieve(keys, live, jnp.asarray(queries), 3)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    split = jax.device_put(queries, NamedSharding(mesh, PartitionSpec("x")))
    spread = jax.device_put((keys, live), NamedSharding(mesh, PartitionSpec()))
    found = jax.jit(lambda keys, live, q: retrieve(keys, live, q, 3))(*spread, split)
    np.testing.assert_array_equal(found[0], plain[0])
    mapped = jax.vmap(lambda q: retrieve(keys, live, q[None], 3)[0][0])(jnp.asarray(queries))
    np.testing.assert_array_equal(mapped, plain[0])


OTHER_CODE = """
import json, sys
import numpy as np
from kernels_pallas import native
from kernels_pallas.retrieve import cpu, keys_of
import jax.numpy as jnp
assert not native.unavailable(cpu.SOURCE, cpu.TARGETS), native.unavailable(cpu.SOURCE, cpu.TARGETS)
rng = np.random.default_rng(8)
values, queries = (rng.normal(size=(n, 30)).astype(np.float32) for n in (900, 14))
slots, _ = cpu.retrieve(keys_of(values), jnp.ones(900, bool), jnp.asarray(queries), 6)
order = np.argsort(-(queries.astype(np.float64) @ values.T.astype(np.float64)), axis=1)[:, :6]
print(json.dumps(bool(np.array_equal(slots, order))))
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-avx"])
def test_processors_with_less_run_the_same_search(flags, tmp_path):
    """The code for AVX2, and that for any processor, compiled by switching off what this machine may have beyond it."""
    environment = os.environ | {"CXX": f"g++ {flags}", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) is True
