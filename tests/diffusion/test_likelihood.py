"""Estimates of the NELBO against its exact value on an enumerable source, and conditional likelihoods against Bayes."""

from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.model import Output
from ruvjax.diffusion import likelihood
from ruvjax.diffusion.likelihood import (
    block_nelbo_samples,
    exact_block_nelbo,
    exact_nelbo,
    nelbo_estimate,
    nelbo_samples,
    prefix_log_likelihood,
)
from ruvjax.diffusion.markov import MarkovSource
from ruvjax.diffusion.schedule import Schedule
from ruvjax.errors import ConfigError, InputError

KEY = jax.random.key(11)
SOURCE = MarkovSource.draw(3, 5, seed=4)
MASK = SOURCE.vocab


@pytest.fixture(scope="module")
def table():
    """A denoiser that is not the source's own: its conditionals belong to no joint law."""
    noise = np.random.default_rng(0).dirichlet(np.full(3, 2.0), size=SOURCE.conditional.shape[:2])
    return 0.5 * SOURCE.conditional + 0.5 * noise


def rows(count):
    return jnp.asarray(SOURCE.rows[np.linspace(0, len(SOURCE.rows) - 1, count).astype(int)], jnp.int32)


def brute_force(table, row, fixed):
    """The mean over orders of the free tokens of -sum log p(token | those before): the NELBO by permutations."""
    free = [i for i in range(SOURCE.length) if not fixed[i]]
    totals = []
    for order in permutations(free):
        noisy = np.where(fixed, row, MASK)
        total = 0.0
        for i in order:
            total -= np.log(table[noisy @ SOURCE.digits, i, row[i]])
            noisy[i] = row[i]
        totals.append(total)
    return np.mean(totals)


def test_exact_nelbo_is_the_mean_over_orders(table):
    tokens = rows(6)
    fixed = np.zeros(tokens.shape, bool)
    fixed[1, :2], fixed[2, [0, 3]], fixed[3, 4], fixed[4] = True, True, True, True
    with jax.enable_x64(True):
        exact = partial(exact_nelbo, SOURCE.forward, mask_id=MASK)
        ours = np.asarray(jax.jit(exact)(jnp.asarray(table), tokens, fixed=jnp.asarray(fixed)))
    expected = [brute_force(table, row, held) for row, held in zip(np.asarray(tokens), fixed)]
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)
    assert ours[4] == 0  # nothing is free


def test_exact_nelbo_bounds_the_likelihood(table):
    """With conditionals of no joint law the bound, averaged over the source, exceeds its entropy."""
    with jax.enable_x64(True):
        exact = jax.jit(partial(exact_nelbo, SOURCE.forward, mask_id=MASK))
        nelbo = np.asarray(exact(jnp.asarray(table), jnp.asarray(SOURCE.rows)))
    entropy = -np.sum(SOURCE.probability * np.log(SOURCE.probability))
    assert np.sum(SOURCE.probability * nelbo) > entropy + 0.05


@pytest.mark.parametrize("method", ["exact_k", "continuous"])
def test_estimates_are_unbiased(method, table):
    tokens = jnp.tile(rows(4), (500, 1))
    fixed = jnp.zeros(tokens.shape, bool).at[::4, 1].set(True)
    schedule = Schedule("cosine")
    with jax.enable_x64(True):
        exact = partial(exact_nelbo, SOURCE.forward, mask_id=MASK)
        truth = np.asarray(jax.jit(exact)(jnp.asarray(table), tokens[:4], fixed=fixed[:4]))
    estimate = partial(
        nelbo_samples, SOURCE.forward, mask_id=MASK, samples=4, fixed=fixed, schedule=schedule, method=method
    )
    draws = np.asarray(jax.jit(estimate)(jnp.asarray(table, jnp.float32), tokens, KEY)).reshape(4, 500, 4)
    mean, error = draws.mean(axis=(0, 1)), draws.mean(axis=0).std(axis=0) / np.sqrt(500)
    assert np.all(np.abs(mean - truth) < 4.5 * error), (mean, truth, error)
    assert np.any(np.abs(0.9 * mean - truth) > 4.5 * error)  # a weight wrong by a tenth would show


def test_stratified_samples_vary_less(table):
    """As many samples as tokens visit every mask size: what is left is which tokens are hidden."""
    tokens = jnp.tile(rows(1), (400, 1))
    estimate = jax.jit(partial(nelbo_samples, SOURCE.forward, mask_id=MASK, samples=5))
    draws = np.asarray(estimate(jnp.asarray(table, jnp.float32), tokens, KEY))
    assert draws.mean(axis=0).var() < 0.9 * draws.var() / 5


def test_antithetic_and_exact_k_vary_less_than_bernoulli(table):
    tokens = jnp.tile(rows(1), (2000, 1))
    spread = {}
    for method in ("exact_k", "continuous"):
        estimate = jax.jit(partial(nelbo_samples, SOURCE.forward, mask_id=MASK, samples=1, method=method))
        spread[method] = np.asarray(estimate(jnp.asarray(table, jnp.float32), tokens, KEY)).var()
    assert spread["exact_k"] < 0.5 * spread["continuous"]


def test_estimates_belong_to_samples(table):
    tokens, index = rows(8), jnp.asarray([5, 900, 2, 77, 31, 4, 8, 16], jnp.int32)
    estimate = jax.jit(partial(nelbo_estimate, SOURCE.forward, mask_id=MASK, samples=3))
    table = jnp.asarray(table, jnp.float32)
    whole = np.asarray(estimate(table, tokens, KEY, index=index))
    halves = [estimate(table, tokens[part], KEY, index=index[part]) for part in (slice(4, 8), slice(0, 4))]
    np.testing.assert_allclose(np.concatenate(halves[::-1]), whole, rtol=1e-6)
    assert not np.allclose(estimate(table, tokens, KEY, index=index + 1), whole)


def test_prefix_conditional_likelihood_is_bayes():
    """log p(answer | prompt) = log p(prompt, answer) - log p(prompt): with exact conditionals the bound is tight."""
    with jax.enable_x64(True):
        tokens, fixed = rows(30), np.zeros((30, 5), bool)
        fixed[:, :2] = True
        exact = partial(exact_nelbo, SOURCE.forward, mask_id=MASK)
        nelbo = np.asarray(jax.jit(exact)(jnp.asarray(SOURCE.conditional), tokens, fixed=jnp.asarray(fixed)))
        whole = {tuple(row): p for row, p in zip(SOURCE.rows, SOURCE.probability)}
        prompt = {}
        for row, p in zip(SOURCE.rows, SOURCE.probability):
            prompt[tuple(row[:2])] = prompt.get(tuple(row[:2]), 0) + p
        for row, value in zip(np.asarray(tokens), nelbo):
            assert value == pytest.approx(-np.log(whole[tuple(row)] / prompt[tuple(row[:2])]), abs=1e-10)
        two, five = jnp.full(30, 2, jnp.int32), jnp.full(30, 5, jnp.int32)
        sampled = partial(prefix_log_likelihood, SOURCE.forward, mask_id=MASK, samples=300)
        bound = np.asarray(jax.jit(sampled)(jnp.asarray(SOURCE.conditional), tokens, two, five, KEY))
    np.testing.assert_allclose(-bound, nelbo, rtol=0.06)


def test_prefix_likelihood_counts_only_the_answer(table):
    tokens, seen = rows(3), []

    def forward(params, tokens, time, carry):
        seen.append(carry)
        return SOURCE.forward(params, tokens, time, carry)

    prefix, length = jnp.asarray([0, 2, 3], jnp.int32), jnp.asarray([5, 4, 3], jnp.int32)
    score = prefix_log_likelihood(
        forward, jnp.asarray(table, jnp.float32), tokens, prefix, length, KEY, mask_id=MASK, samples=2, carry=prefix
    )
    assert score[0] < score[1] < 0 and score[2] == 0  # the third has no answer
    assert seen and all(carry is prefix for carry in seen)


def test_time_follows_the_mask_share():
    def forward(params, tokens, time, carry):
        logits = jnp.zeros((*tokens.shape, 4)).at[..., 0].set(jnp.where(tokens == MASK, time[:, None], 0.0))
        return Output(logits, logits), carry

    tokens, schedule = jnp.zeros((1, 4), jnp.int32), Schedule("polynomial", power=2.0)
    with jax.enable_x64(True):
        ours = float(exact_nelbo(forward, None, tokens, mask_id=MASK, schedule=schedule)[0])
    # token 0 of 3, whose logit is the time sqrt(k / 4) at which k of 4 tokens are masked
    expected = sum(np.log(np.exp(np.sqrt(k / 4)) + 2) - np.sqrt(k / 4) for k in (1, 2, 3, 4))
    assert ours == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def network(tiny_model, tiny_params):
    def encode(params, tokens, time, mask, positions):
        return tiny_model.apply(params, tokens, mask=mask, positions=positions, time=time, logits=False).hidden

    return encode, tiny_model.head, tiny_params


def test_block_estimates_are_unbiased(network):
    tokens = jnp.tile(jax.random.randint(KEY, (1, 8), 0, 31), (300, 1))
    encode, project, params = network
    common = {"block_size": 4, "mask_id": 31}
    truth = jax.jit(partial(exact_block_nelbo, encode, project, **common))(params, tokens[:1])[0]
    estimate = partial(block_nelbo_samples, encode, project, samples=2, **common)
    draws = np.asarray(jax.jit(estimate)(params, tokens, KEY)).mean(axis=0)
    assert abs(draws.mean() - truth) < 4.5 * draws.std() / np.sqrt(300)
    assert draws.std() > 0


def test_block_of_one_is_autoregressive_whatever_the_key(network):
    encode, project, params = network
    tokens = jax.random.randint(KEY, (3, 8), 0, 31)
    estimate = jax.jit(partial(block_nelbo_samples, encode, project, block_size=1, mask_id=31, samples=1))
    exact = jax.jit(partial(exact_block_nelbo, encode, project, block_size=1, mask_id=31))(params, tokens)
    for seed in range(2):
        np.testing.assert_allclose(estimate(params, tokens, jax.random.key(seed))[0], exact, rtol=1e-6)


def test_padding_does_not_count(network):
    encode, project, params = network
    tokens = jax.random.randint(KEY, (2, 8), 0, 31)
    segments = jnp.ones((2, 8), jnp.int32).at[:, 5:].set(0)
    estimate = partial(block_nelbo_samples, encode, project, block_size=4, mask_id=31, samples=2)
    padded = jax.jit(estimate)(params, tokens, KEY, fixed=segments == 0, segments=segments)
    other = jax.jit(estimate)(params, tokens.at[:, 5:].set(7), KEY, fixed=segments == 0, segments=segments)
    np.testing.assert_allclose(padded, other, rtol=1e-6)


def test_errors():
    tokens = jnp.zeros((1, 17), jnp.int32)
    with pytest.raises(InputError, match="17 positions"):
        exact_nelbo(SOURCE.forward, None, tokens, mask_id=MASK)
    with pytest.raises(ConfigError, match="samples=0"):
        nelbo_samples(SOURCE.forward, None, tokens, KEY, mask_id=MASK, samples=0)
    with pytest.raises(ConfigError, match="block_size=5"):
        block_nelbo_samples(lambda *_: None, lambda *_: None, None, tokens, KEY, block_size=5, mask_id=MASK, samples=1)


def test_mask_weight_is_its_integral():
    with jax.enable_x64(True):
        t, w = np.polynomial.legendre.leggauss(20)
        t, w = (t + 1) / 2, w / 2
        for n in (1, 5, 16):
            for k in range(1, n + 1):
                ours = float(likelihood.mask_weight(jnp.asarray(k), jnp.asarray(n)))
                assert ours == pytest.approx(w @ (t ** (k - 1) * (1 - t) ** (n - k)), rel=1e-9)
        assert likelihood.mask_weight(jnp.asarray(0), jnp.asarray(3)) == 0
