"""Which banks a timestep reads, what each hit counts, and that a bank that no row needs is not read."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.residual import Residual, enter
from ruvjax.errors import ConfigError
from ruvjax.lora import bank as banking
from ruvjax.lora import talora
from ruvjax.lora.talora import TALoRA

HIDDEN = 8
CONFIG = TALoRA(HIDDEN, banks=((6, 3), (5, 2), (7, 1)), k=3)
TIMES = (1000.0, 751.0, 750.0, 725.0, 700.0, 660.0, 650.0, 500.0, 330.0, 300.0, 250.0, 1.0, 0.0)


def bank_of(capacity, rank, count, seed):
    rng = np.random.default_rng(seed)
    shapes = ((count, HIDDEN), (count, HIDDEN, rank), (count, rank, HIDDEN))
    parts = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return banking.filled(*parts, capacity=capacity, dtype=jnp.float32)


BANKS = tuple(bank_of(capacity, rank, 4, rank) for capacity, rank in CONFIG.banks)


def chosen(config, banks, query, t, searches=()):
    hits = talora.retrieve(config, banks, query[:, None], t, config.k, searches=searches)
    return Residual(talora.updates(config, banks, hits, config.k), config.layer)


select = jax.jit(chosen, static_argnums=0)


def shares(t, boundaries=(700, 300), width=50):
    """Which bank counts how much at timestep t, by the definition, one boundary after the other."""
    for number, boundary in enumerate(boundaries):
        if t >= boundary + width:
            return {number: 1.0}
        if t > boundary - width:
            lower = (boundary + width - t) / (2 * width)
            return {number: 1 - lower, number + 1: lower}
    return {len(boundaries): 1.0}


def test_the_shares_of_the_banks():
    found = np.asarray(talora.blend(CONFIG, jnp.asarray(TIMES)))
    for t, column in zip(TIMES, found.T):
        wanted = [shares(t).get(number, 0.0) for number in range(3)]
        np.testing.assert_allclose(column, wanted, atol=1e-6)
    assert [CONFIG.bank_of(t) for t in (701, 700, 301, 300, 0)] == [0, 1, 1, 2, 2]
    hard = TALoRA(HIDDEN, banks=((4, 1), (4, 1)), boundaries=(400,), width=0, k=1)
    np.testing.assert_array_equal(talora.blend(hard, jnp.asarray([401.0, 400.0])), [[1, 0], [0, 1]])
    one = TALoRA(HIDDEN, banks=((4, 1),), boundaries=(), k=1)
    np.testing.assert_array_equal(talora.blend(one, jnp.asarray(TIMES)), np.ones((1, len(TIMES))))
    five = TALoRA(HIDDEN, banks=((4, 1),) * 5, boundaries=(800, 600, 400, 200), k=1)
    np.testing.assert_allclose(np.asarray(talora.blend(five, jnp.linspace(0, 1000, 101))).sum(axis=0), 1, atol=1e-6)


@pytest.mark.parametrize("weighting", ["similarity", "softmax"])
def test_the_update_is_the_weighted_sum_over_the_banks(weighting):
    config = TALoRA(HIDDEN, banks=CONFIG.banks, k=3, weighting=weighting, temperature=0.3)
    rng = np.random.default_rng(0)
    queries, x = rng.normal(size=(len(TIMES), HIDDEN)), rng.normal(size=(len(TIMES), 2, HIDDEN))
    residual = select(config, BANKS, jnp.asarray(queries, jnp.float32), jnp.asarray(TIMES))
    found = enter(residual, 0, jnp.asarray(x, jnp.float32))
    for row, t in enumerate(TIMES):
        total = x[row].copy()
        for number, share in shares(t).items():
            bank = BANKS[number]
            keys = np.asarray(bank.keys.values[:4], np.float64)
            cosine = keys @ queries[row] / np.linalg.norm(queries[row])
            best = np.argsort(-cosine)[:3]
            counts = np.maximum(cosine[best], 0)
            if weighting == "softmax":
                counts = np.exp(cosine[best] / 0.3) / np.exp(cosine[best] / 0.3).sum()
            for slot, count in zip(best, counts):
                a, b = np.asarray(bank.a[slot], np.float64), np.asarray(bank.b[slot], np.float64)
                total += share * count * (x[row] @ a @ b)
        np.testing.assert_allclose(found[row], total, atol=2e-5)


def test_a_bank_that_no_row_needs_is_not_read():
    read = []

    def watched(number):
        def search(bank, queries, k):
            jax.debug.callback(lambda: read.append(number))
            return banking.retrieve(bank, queries, k)

        return search

    watching = tuple(watched(number) for number in range(3))
    run = jax.jit(lambda query, t: chosen(CONFIG, BANKS, query, t, searches=watching))
    query = jnp.ones((2, HIDDEN))
    for times, wanted in (((900, 800), {0}), ((500, 500), {1}), ((100, 720), {0, 1, 2}), ((690, 680), {0, 1})):
        read.clear()
        jax.block_until_ready(run(query, jnp.asarray(times, jnp.float32)))
        jax.effects_barrier()
        assert set(read) == wanted
    found = run(query, jnp.asarray([100.0, 900.0]))
    assert (np.asarray(found.update[0].ids[0]) == -1).all() and (np.asarray(found.update[0].ids[1]) >= 0).all()


def test_nothing_is_selected_for_no_query_and_from_empty_banks():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, HIDDEN)), jnp.float32)
    for banks, query in ((BANKS, jnp.zeros((1, HIDDEN))), (talora.empty_banks(CONFIG), jnp.ones((1, HIDDEN)))):
        residual = select(CONFIG, banks, query, jnp.asarray([680.0]))
        assert isinstance(residual, Residual) and all((np.asarray(part.ids) == -1).all() for part in residual.update)
        np.testing.assert_array_equal(enter(residual, 0, x), x)


def test_empty_banks_are_told_once_and_others_are_refused(caplog):
    talora._said.clear()
    with caplog.at_level(logging.WARNING, "ruvjax.lora.talora"):
        for _ in range(2):
            talora.check(CONFIG, talora.empty_banks(CONFIG))
        talora.check(CONFIG, BANKS)
    assert [record.message for record in caplog.records] == [
        "all banks are empty: the model runs without adapters until some are stored"
    ]
    for banks in (BANKS[:2], BANKS[::-1]):
        with pytest.raises(ConfigError, match=r"banks of \(capacity, rank\)"):
            talora.check(CONFIG, banks)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hidden": 0}, "hidden"),
        ({"layer": -1}, "layer"),
        ({"k": 7}, "k=7"),
        ({"k": 0}, "k"),
        ({"banks": ((4, 1), (4, 0), (4, 1))}, "banks"),
        ({"banks": ()}, "banks"),
        ({"boundaries": (700,)}, "boundaries"),
        ({"boundaries": (300, 700)}, "boundaries"),
        ({"boundaries": (1000, 300)}, "boundaries"),
        ({"boundaries": (360, 300)}, "overlap"),
        ({"width": -1}, "width"),
        ({"weighting": "best"}, "weighting"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TALoRA(**{"hidden": HIDDEN, "banks": ((4, 1),) * 3, "k": 2, **settings})
    assert caught.value.line()
