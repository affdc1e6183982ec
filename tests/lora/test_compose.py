"""Composition against its dense definition, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.adapted import Lora, delta
from ruvjax.errors import ConfigError
from ruvjax.lora.compose import (
    add,
    compress,
    dare,
    decompress,
    factor,
    similarity_softmax,
    ties,
    truncate,
)

LAYERS, INNER, OUTER = 2, 10, 7
RANKS, SCALES = (3, 1, 4), (0.5, 2.0, -1.0)
WEIGHTS = np.array([1.0, -0.5, 2.0])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def updates(lead=(LAYERS,)):
    """Of ranks 3, 1 and 4, each with its own scale in each layer."""
    random = np.random.default_rng(0)
    return [
        Lora(
            jnp.asarray(random.normal(size=(*lead, INNER, rank))),
            jnp.asarray(random.normal(size=(*lead, rank, OUTER))),
            jnp.asarray(scale * (1 + np.arange(np.prod(lead, dtype=int)).reshape(lead)), jnp.float32),
        )
        for rank, scale in zip(RANKS, SCALES)
    ]


def dense(update):
    scale = np.asarray(update.scale, np.float64)[..., None, None]
    return scale * (np.asarray(update.a, np.float64) @ np.asarray(update.b, np.float64))


@pytest.mark.parametrize("lead", [(), (LAYERS,)])
def test_add_is_the_weighted_sum_of_deltas_of_any_rank(lead):
    given = updates(lead)
    found = add(given, jnp.asarray(WEIGHTS))
    assert found.a.shape == (*lead, INNER, sum(RANKS)) and found.scale.shape == lead
    np.testing.assert_allclose(dense(found), sum(w * dense(u) for w, u in zip(WEIGHTS, given)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dense(add(given)), sum(dense(u) for u in given), rtol=1e-12, atol=1e-12)


def test_adding_factors_instead_would_be_another_update():
    one, other = updates()[0], updates()[0].replace(b=updates()[0].b[..., ::-1])
    averaged = Lora(one.a + other.a, one.b + other.b, one.scale)
    assert np.abs(dense(averaged) - dense(add([one, other]))).max() > 1.0


def test_similarity_softmax_weighs_by_temperature():
    similarity = np.array([0.9, 0.2, -0.4])
    shares = np.exp(similarity / 0.3) / np.exp(similarity / 0.3).sum()
    found = similarity_softmax(updates(), jnp.asarray(similarity), 0.3)
    expected = sum(w * dense(u) for w, u in zip(shares, updates()))
    np.testing.assert_allclose(dense(found), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match="temperature"):
        similarity_softmax(updates(), jnp.asarray(similarity), 0.0)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncate_is_the_truncated_svd_of_the_delta(rank):
    whole = add(updates())
    u, s, v = np.linalg.svd(dense(whole), full_matrices=False)
    expected = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    found = truncate(whole, rank)
    assert found.a.shape == (LAYERS, INNER, rank) and found.b.shape == (LAYERS, rank, OUTER)
    np.testing.assert_allclose(dense(found), expected, atol=1e-10)


def test_truncate_makes_no_dense_delta():
    size = 96
    wide = Lora(jnp.ones((size, 4)), jnp.ones((4, size)), jnp.float32(1))
    program = str(jax.make_jaxpr(lambda update: truncate(update, 2))(wide))
    assert f"{size},{size}]" not in program and f"{size},4]" in program
    assert f"{size},{size}]" in str(jax.make_jaxpr(lambda update: factor(delta(update), 2))(wide))


def test_truncating_to_a_rank_beyond_the_matrix_pads_with_zeros():
    whole = add(updates() + updates())  # rank 16 at a site of 10 x 7
    found = truncate(whole, 12)
    assert found.a.shape == (LAYERS, INNER, 12)
    np.testing.assert_allclose(dense(found), dense(whole), atol=1e-10)
    for rank in (0, 17):
        with pytest.raises(ConfigError, match=f"rank {rank}"):
            truncate(whole, rank)


def test_factor_is_the_truncated_svd_too():
    matrix = dense(add(updates()))
    np.testing.assert_allclose(dense(factor(jnp.asarray(matrix), 2)), dense(truncate(add(updates()), 2)), atol=1e-10)
    with pytest.raises(ConfigError, match="rank 8"):
        factor(jnp.asarray(matrix), 8)


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_ties_is_trim_elect_and_disjoint_mean(density, weights):
    given = updates()
    expected = np.zeros((LAYERS, INNER, OUTER))
    for layer in range(LAYERS):
        kept = []
        for update, weight in zip(given, np.ones(3) if weights is None else weights):
            matrix = dense(update)[layer]
            order = np.argsort(-np.abs(matrix).ravel())[: int(density * matrix.size)]
            trimmed = np.zeros(matrix.size)
            trimmed[order] = matrix.ravel()[order]
            kept.append(weight * trimmed.reshape(matrix.shape))
        for place in np.ndindex(INNER, OUTER):
            values = [matrix[place] for matrix in kept]
            elected = np.sign(sum(values))
            agreeing = [value for value in values if value and np.sign(value) == elected]
            expected[layer][place] = np.mean(agreeing) if agreeing else 0.0
    found = ties(given, density, None if weights is None else jnp.asarray(weights))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_dare_drops_and_rescales_what_its_key_says():
    given, key, drop = updates(), jax.random.key(7), 0.4
    expected = 0
    for i, (update, weight) in enumerate(zip(given, WEIGHTS)):
        keep = np.asarray(jax.random.bernoulli(jax.random.fold_in(key, i), 1 - drop, (LAYERS, INNER, OUTER)))
        expected = expected + weight * np.where(keep, dense(update) / (1 - drop), 0)
    np.testing.assert_allclose(dare(given, drop, key, jnp.asarray(WEIGHTS)), expected, atol=1e-12)
    np.testing.assert_allclose(dare(given, 0.0, key), sum(dense(u) for u in given), atol=1e-12)


def test_dare_keeps_the_expectation():
    """The mean over 4000 keys within five standard errors; without the division it would be far outside."""
    given, drop, count = updates(())[:1], 0.6, 4000
    keys = jax.random.split(jax.random.key(0), count)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: dare(given, drop, key)))(keys))
    truth = dense(given[0])
    error = np.abs(truth) * np.sqrt(drop / (1 - drop) / count)  # of the mean of truth * keep / (1 - drop)
    assert np.all(np.abs(draws.mean(0) - truth) < 5 * error)
    assert not np.all(np.abs(draws.mean(0) * (1 - drop) - truth) < 5 * error)
    assert (draws == 0).mean() == pytest.approx(drop, abs=0.01)


@pytest.mark.parametrize("lead", [(), (LAYERS,)])
def test_eight_bits_keep_the_delta_within_the_stated_bound(lead):
    update = updates(lead)[2]
    held = compress(update)
    layers = int(np.prod(lead, dtype=int))
    assert held.nbytes == layers * ((INNER + OUTER + 8) * 4 + 4)
    assert held.a.dtype == held.b.dtype == jnp.int8
    back = decompress(held)
    a, b = np.abs(np.asarray(update.a)), np.abs(np.asarray(update.b))
    steps_a, steps_b = np.asarray(held.a_step, np.float64), np.asarray(held.b_step, np.float64)
    slack = 1 + 1e-5  # the steps are rounded to float32
    assert np.all(np.abs(np.asarray(back.a) - update.a) <= slack * steps_a[..., None, :] / 2)
    assert np.all(np.abs(np.asarray(back.b) - update.b) <= slack * steps_b[..., :, None] / 2)
    bound = a @ (steps_b[..., :, None] / 2 * np.ones(OUTER)) + (steps_a[..., None, :] / 2) @ b
    bound = np.abs(np.asarray(update.scale))[..., None, None] * (
        bound + ((steps_a * steps_b).sum(-1) / 4)[..., None, None]
    )
    wrong = np.abs(dense(back) - dense(update))
    assert np.all(wrong <= slack * bound)
    assert wrong.max() > 0.02 * bound.max()  # the bound says something


def test_eight_bits_of_nothing_are_nothing():
    update = Lora(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1), jnp.ones(3))
    back = decompress(compress(update))
    np.testing.assert_array_equal(back.b, np.zeros((2, 3)))
    np.testing.assert_array_equal(back.magnitude, update.magnitude)


def test_what_cannot_be_composed_is_refused():
    one = updates(())[0]
    with pytest.raises(ConfigError, match="no update to compose"):
        add([])
    with pytest.raises(ConfigError, match="different sites"):
        add([one, one.replace(a=one.a[:-1])])
    with pytest.raises(ConfigError, match="DoRA"):
        ties([one.replace(magnitude=jnp.ones(OUTER))], 0.5)
    for density in (0.0, 1.5):
        with pytest.raises(ConfigError, match="density"):
            ties([one], density)
    with pytest.raises(ConfigError, match="drop"):
        dare([one], 1.0, jax.random.key(0))
