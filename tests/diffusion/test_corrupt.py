"""Times and masks: their laws, with a control each, and that they belong to samples and not to places in a batch."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ruvjax.diffusion import corrupt
from ruvjax.diffusion.corrupt import TimeSampling, draw_time, infill_context, mask_exact, mask_tokens, truncate
from ruvjax.errors import ConfigError

KEY = jax.random.key(7)
MASK = 9


def chi_square(counts, expected):
    """The statistic in standard deviations above its mean."""
    degrees = len(counts) - 1
    return (np.sum((np.asarray(counts) - expected) ** 2 / expected) - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("method", get_args(TimeSampling))
def test_times_are_uniform_on_the_half_open_interval(method):
    index = jnp.arange(20_000, dtype=jnp.int32)
    t = np.asarray(jax.jit(draw_time, static_argnums=(2, 3))(KEY, index, 10, method))
    assert t.min() > 0 and t.max() <= 1
    counts = np.histogram(t, bins=25, range=(0, 1))[0]
    assert chi_square(counts, 800) < 5
    assert chi_square(np.histogram(t**1.1, bins=25, range=(0, 1))[0], 800) > 5  # the check can fail


@given(st.sampled_from([1, 2, 7, 96, 300]), st.integers(0, 10_000))
def test_low_discrepancy_has_one_time_in_each_stratum(batch, step):
    index = jnp.asarray(np.arange(batch) + step * batch, jnp.int32)
    t = jax.jit(draw_time, static_argnums=(2, 3))(KEY, index, batch, "low_discrepancy")
    t = np.sort(np.asarray(t, np.float64))
    np.testing.assert_allclose(np.diff(t), 1 / batch, atol=3e-7)
    assert t.sum() <= (batch + 1) / 2 + 1e-4  # so exact_k masks at most about half of a batch


def test_low_discrepancy_spreads_every_micro_batch():
    t = np.asarray(draw_time(KEY, jnp.arange(64, dtype=jnp.int32), 64, "low_discrepancy"))
    for micro in (*t.reshape(8, 8), *t.reshape(8, 8).T):  # neighbours, as over hosts, and strides, as in accumulation
        assert np.max(np.diff(np.sort(micro))) < 0.3
    assert np.max(np.diff(np.sort(np.sort(t)[:8]), prepend=0, append=1)) > 0.8  # neighbours in time would not


def test_antithetic_pairs_mirror():
    t = np.asarray(draw_time(KEY, jnp.arange(64, dtype=jnp.int32), 64, "antithetic"))
    np.testing.assert_allclose(t[::2] + t[1::2], 1, atol=3e-7)
    assert len(np.unique(t[::2])) == 32


def test_a_lattice_factor_is_coprime_and_fits():
    for n in (1, 2, 3, 12, 96, 1000, 46_341, 131_072, 10_000_019):
        factor = corrupt._lattice(n)
        assert np.gcd(factor, n) == 1 and factor * (n - 1) < 2**31


def test_unknown_time_sampling():
    with pytest.raises(ConfigError, match="sobol"):
        draw_time.__wrapped__(KEY, jnp.arange(2), 2, "sobol")  # past the type check


def test_mask_tokens_masks_each_with_its_probability():
    tokens = jnp.tile(jnp.arange(8, dtype=jnp.int32)[None], (4000, 1))
    p = jnp.linspace(0.1, 0.9, 4000)
    noisy, masked = jax.jit(partial(mask_tokens, mask_id=MASK))(KEY, tokens, jnp.arange(4000, dtype=jnp.int32), p)
    assert np.array_equal(noisy, np.where(masked, MASK, tokens))
    spread = np.sqrt(np.sum(p * (1 - p)))
    sums = np.asarray(masked).sum(axis=0)
    assert np.all(np.abs(sums - np.sum(p)) < 4.5 * spread)
    pairs = np.corrcoef(np.asarray(masked, float) - np.asarray(p)[:, None], rowvar=False)
    assert np.max(np.abs(pairs - np.eye(8))) < 0.09  # independent given the probability
    assert np.max(np.abs(np.corrcoef(np.asarray(masked, float), rowvar=False) - np.eye(8))) > 0.09  # not without


def test_masking_at_the_ends():
    tokens, index = jnp.zeros((3, 50), jnp.int32), jnp.arange(3, dtype=jnp.int32)
    _, masked = mask_tokens(KEY, tokens, index, jnp.asarray([0.0, 1.0, 1.0]), MASK)
    assert np.asarray(masked).sum(axis=1).tolist() == [0, 50, 50]


@given(st.integers(0, 2**31 - 1), st.integers(0, 15), st.lists(st.booleans(), min_size=12, max_size=12))
def test_mask_exact_masks_exactly_so_many_of_the_free(sample, count, held):
    fixed, index = jnp.asarray(np.array([held])), jnp.asarray(np.array([sample], np.int32))
    wanted = jnp.asarray(np.array([count], np.int32))
    exact = jax.jit(mask_exact, static_argnums=4)
    noisy, masked = map(np.asarray, exact(KEY, jnp.zeros((1, 12), jnp.int32), index, wanted, MASK, fixed))
    assert np.sum(masked) == min(count, held.count(False))
    assert not np.any(masked & np.array([held]))
    assert np.array_equal(noisy == MASK, masked)


def test_mask_exact_draws_every_set_equally_often():
    rows = 20_000
    tokens, index = jnp.zeros((rows, 6), jnp.int32), jnp.arange(rows, dtype=jnp.int32)
    fixed = jnp.zeros((rows, 6), bool).at[:, 2].set(True)
    _, masked = mask_exact(KEY, tokens, index, jnp.full(rows, 2, jnp.int32), MASK, fixed)
    codes = np.asarray(masked) @ (1 << np.arange(6))
    counts = np.bincount(codes)
    assert np.count_nonzero(counts) == 10  # pairs of the five free positions
    assert chi_square(counts[counts > 0], rows / 10) < 5
    # the control: two draws with replacement, redrawn to the next position on a collision
    first, second = np.random.default_rng(0).integers(5, size=(2, rows))
    second = np.where(first == second, (second + 1) % 5, second)
    biased = np.bincount((1 << first) + (1 << second))
    assert chi_square(biased[biased > 0], rows / 10) > 5


def draws(index, tokens, fixed):
    times = [draw_time(KEY, index, 16, method) for method in get_args(TimeSampling)]
    count = 1 + index % 7
    return [
        *times,
        *(mask_tokens(KEY, tokens, index, t, MASK, fixed)[0] for t in times),
        mask_exact(KEY, tokens, index, count, MASK, fixed)[0],
        truncate(KEY, index, jnp.ones(tokens.shape, jnp.int32), 0.5),
        infill_context(KEY, index, tokens.shape[1], 0.5),
    ]


def test_draws_are_bit_equal_on_eight_devices():
    assert jax.device_count() == 8
    index = jnp.arange(16, dtype=jnp.int32) + 1000
    tokens = jax.random.randint(KEY, (16, 24), 0, MASK)
    fixed = jax.random.bernoulli(KEY, 0.2, (16, 24))
    one = jax.jit(draws)(index, tokens, fixed)
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    many = jax.jit(draws)(*(jax.device_put(x, rows) for x in (index, tokens, fixed)))
    assert len(many[0].sharding.device_set) == 8
    for a, b in zip(one, many):
        assert np.array_equal(a, b)
    order = np.random.default_rng(0).permutation(16)
    for a, b in zip(one, jax.jit(draws)(index[order], tokens[order], fixed[order])):
        assert np.array_equal(np.asarray(a)[order], b)


def test_truncation_keeps_the_beginning_and_every_length_alike():
    rows, length = 6000, 10
    segments = jnp.where(jnp.arange(length)[None, :] < 6, jnp.asarray([1, 1, 1, 2, 2, 2, 0, 0, 0, 0])[None, :], 0)
    segments = jnp.tile(segments, (rows, 1))
    cut = np.asarray(jax.jit(partial(truncate, probability=0.25))(KEY, jnp.arange(rows, dtype=jnp.int32), segments))
    kept = (cut != 0).sum(axis=1)
    assert np.all(cut == np.where(np.arange(length)[None] < kept[:, None], segments, 0))
    counts = np.bincount(kept, minlength=7)
    assert counts[0] == 0  # a row is never emptied
    expected = rows * np.array([0.25 / 6] * 5 + [0.75 + 0.25 / 6])
    assert chi_square(counts[1:], expected) < 5
    assert chi_square(counts[1:], rows / 6) > 5


def test_infill_hides_one_gap_between_two_spans():
    rows, length = 6000, 7
    visible = np.asarray(infill_context(KEY, jnp.arange(rows, dtype=jnp.int32), length, 0.5))
    chosen = visible.any(axis=1)
    whole_gap = 0.5 / (length * (length + 1) / 2)  # also chosen, though nothing is visible
    assert abs(chosen.mean() - (0.5 - whole_gap)) < 4.5 * np.sqrt(0.25 / rows)
    hidden = ~visible[chosen]
    edges = np.abs(np.diff(hidden.astype(int), axis=1, prepend=0, append=0)).sum(axis=1)
    assert np.all(edges == 2)  # one gap, never empty
    start, end = hidden.argmax(axis=1), length - hidden[:, ::-1].argmax(axis=1)
    counts = np.bincount(start * (length + 1) + end)
    counts = counts[counts > 0]
    assert len(counts) == length * (length + 1) // 2 - 1
    assert chi_square(counts, counts.sum() / len(counts)) < 5
