"""The approximate index against the exact search, and a clear error where faiss is missing."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.errors import BackendError, ConfigError
from ruvjax.lora import ann
from ruvjax.lora import bank as banking


def bank_of(count, capacity=0, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, 12))
    keys = (centres[rng.integers(0, 20, count)] + 0.3 * rng.normal(size=(count, 12))).astype(np.float32)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((count, 12, 1), (count, 1, 12)))
    return banking.filled(keys, a, b, capacity=capacity), keys


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(BackendError, match="faiss") as caught:
        ann.build(bank_of(5)[0])
    assert "ruvjax[ann]" in caught.value.hint


class Exact:
    """An index with the interface of faiss's that looks at every key, and can be told to miss some."""

    def __init__(self, keys, slots, missed=()):
        self.keys, self.slots, self.missed = keys, slots, missed

    def search(self, queries, k):
        scores = queries @ self.keys.T
        scores[:, list(self.missed)] = -np.inf
        order = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1), self.slots[order].astype(np.int64)


def test_recall_counts_what_is_missed_and_what_left_the_bank_is_not_returned():
    bank, keys = bank_of(40, capacity=48)
    unit = np.asarray(bank.keys.values[:40])
    index = ann.Index(Exact(unit, np.arange(40)), 48, 1, 1)
    look = jax.jit(index.search, static_argnums=2)
    found = look(bank, jnp.asarray(keys[:6]), 5)
    exact = banking.retrieve(bank, jnp.asarray(keys[:6]), 5)
    np.testing.assert_array_equal(found[0], exact[0])
    np.testing.assert_allclose(found[1], exact[1], atol=1e-6)
    assert ann.recall(index, bank, jnp.asarray(keys), 5) == 1.0
    best = np.asarray(banking.retrieve(bank, jnp.asarray(keys[:1]), 5)[0][0])
    missing = ann.Index(Exact(unit, np.arange(40), missed=best[1:3]), 48, 1, 1)
    assert ann.recall(missing, bank, jnp.asarray(keys[:1]), 5) == pytest.approx(0.6)
    # What was removed, and a slot that holds another adapter by now.
    less, _ = banking.remove(bank, int(best[0]))
    less, _ = banking.remove(less, int(best[1]))
    key, a, b = -jnp.asarray(keys[0]), jnp.ones((12, 1)), jnp.ones((1, 12))
    filled = less
    for _ in range(2):
        filled, _ = jax.jit(banking.store)(filled, key, a, b)
    assert int(banking.size(filled)) == 40 and (np.asarray(filled.ids[40:]) == -1).all()
    for changed in (less, filled):
        slots = np.asarray(look(changed, jnp.asarray(keys[:1]), 5)[0][0])
        assert slots[:3].tolist() == best[2:].tolist() and (slots[3:] == -1).all()
    assert (np.asarray(look(bank, jnp.zeros((1, 12)), 5)[0]) == -1).all()
    with pytest.raises(ConfigError, match="an index of a bank of 48"):
        index.search(bank_of(5)[0], jnp.zeros((1, 12)), 5)


def test_the_inverted_lists_of_faiss_find_nearly_all():
    pytest.importorskip("faiss", reason="install the extra `ann`")
    importlib.invalidate_caches()
    bank, keys = bank_of(3000, capacity=4000)
    queries = jnp.asarray(keys[:50] + 0.05)
    wide = ann.build(bank, lists=16, probes=16)
    assert ann.recall(wide, bank, queries, 8) == 1.0
    assert 0.8 < ann.recall(ann.build(bank, lists=64, probes=8), bank, queries, 8) <= 1.0
    assert ann.recall(ann.build(bank, lists=64, probes=1), bank, queries, 8) < 1.0  # what the figure is for
    with pytest.raises(ConfigError, match="probes"):
        ann.build(bank, lists=4, probes=5)
    with pytest.raises(ConfigError, match="empty"):
        ann.build(banking.empty(4, 1, 12))
