"""The unmask ops against numpy in float64 and against their own reference bodies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kernels_pallas.dispatch import ImplError
from kernels_pallas.unmask import LOG_ZERO, draw_noise, group_size, masked_cross_entropy, unmask

noise_of = jax.jit(draw_noise, static_argnums=(1, 2))
judged = jax.jit(unmask, static_argnames=("temperature", "top_k", "impl"))


def log_softmax(logits):
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    return generator.normal(size=(50, 37)) * 4, generator.integers(0, 37, 50), generator.normal(size=50)


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("exclude", [-1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_cross_entropy_and_its_gradient(rows, impl, exclude, dtype, tolerance):
    logits, targets, cotangent = rows
    logits = jnp.asarray(logits, dtype)
    x = np.asarray(logits, np.float64)
    if exclude >= 0:
        x[:, exclude] = -np.inf
    counted = targets != exclude
    expected = np.where(counted, -np.take_along_axis(log_softmax(x), targets[:, None], 1)[:, 0], 0)
    gradient = (np.exp(log_softmax(x)) - np.eye(37)[targets]) * (cotangent * counted)[:, None]

    nll, pull = jax.vjp(lambda x: masked_cross_entropy(x, jnp.asarray(targets), exclude, impl=impl), logits)
    got = pull(jnp.asarray(cotangent, jnp.float32))[0]

    assert nll.dtype == jnp.float32 and got.dtype == dtype
    np.testing.assert_allclose(nll, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.asarray(got, np.float64), gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("excess", [-20.0, 0.0, 30.0, 200.0])
def test_an_excluded_token_leaves_no_trace_however_likely_it_is(rows, excess):
    logits, targets, _ = rows
    without = masked_cross_entropy(jnp.asarray(logits[:, 1:], jnp.float32), jnp.asarray(targets) - 1)
    logits = logits.copy()
    logits[::7, 0] = logits.max() + excess
    nll = masked_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets), 0)
    np.testing.assert_allclose(nll, without, rtol=1e-5, atol=1e-5)


def test_float64_logits_keep_their_precision(rows):
    logits, targets, _ = rows
    with jax.enable_x64(True):
        nll = masked_cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
        np.testing.assert_allclose(nll, -np.take_along_axis(log_softmax(logits), targets[:, None], 1)[:, 0], rtol=1e-13)


def test_rows_without_a_target_cost_nothing_whatever_they_hold():
    logits = jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [jnp.inf, 1.0], [-jnp.inf, 0.0]])
    targets = jnp.array([0, -1, 2, 1])
    value, gradient = jax.value_and_grad(lambda x: masked_cross_entropy(x, targets).sum())(logits)
    np.testing.assert_allclose(value, np.log1p(np.e), rtol=1e-6)
    np.testing.assert_array_equal(gradient[1:], np.zeros((3, 2)))
    assert np.abs(gradient[0]).min() > 0.1


def test_cross_entropy_of_no_rows_and_under_vmap(rows):
    logits, targets, _ = rows
    assert masked_cross_entropy(jnp.zeros((0, 37)), jnp.zeros(0, jnp.int32)).shape == (0,)
    split = jnp.asarray(logits, jnp.float32).reshape(5, 10, 37), jnp.asarray(targets).reshape(5, 10)

    def total(logits, targets):
        return masked_cross_entropy(logits, targets).sum()

    whole = jax.jit(jax.grad(total))(*split)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(total)))(*split), whole)


def test_backward_keeps_the_logits_and_one_number_a_row(rows):
    logits, targets = jnp.asarray(rows[0], jnp.bfloat16), jnp.asarray(rows[1])
    kept = [x.shape for x in jax.tree.leaves(jax.vjp(lambda x: masked_cross_entropy(x, targets), logits)[1])]
    assert sorted(kept) == [(50,), (50,), (50, 37)]
    control = [x.shape for x in jax.tree.leaves(jax.vjp(lambda x: -jax.nn.log_softmax(x)[:, 0], logits)[1])]
    assert sorted(control) != sorted(kept)


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_statistics_are_of_the_undistorted_distribution(rows, impl):
    logits = rows[0].copy()
    logits[:, 3] = LOG_ZERO
    log_p = log_softmax(logits)
    p = np.exp(log_p)
    best = np.sort(p, -1)[:, ::-1]
    x = jnp.asarray(logits, jnp.float32)
    noise = noise_of(jax.random.key(1), (50,), 37)
    for temperature in (0.0, 0.7):
        drawn = judged(x, noise, temperature=temperature, impl=impl)
        token = np.asarray(drawn.token)
        if not temperature:
            np.testing.assert_array_equal(token, p.argmax(-1))
        np.testing.assert_allclose(drawn.log_prob, log_p[np.arange(50), token], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(drawn.confidence, best[:, 0], rtol=1e-5)
        np.testing.assert_allclose(drawn.margin, best[:, 0] - best[:, 1], rtol=1e-4, atol=1e-6)
        entropy = -np.sum(np.where(p > 0, p * np.where(p > 0, log_p, 0), 0), -1)
        np.testing.assert_allclose(drawn.entropy, entropy, rtol=1e-4, atol=1e-5)


def test_reference_and_xla_draw_the_same_tokens(rows):
    logits, noise = jnp.asarray(rows[0], jnp.float32), noise_of(jax.random.key(2), (50,), 37)
    floor = jnp.sort(logits, axis=-1)[:, -5]
    draw = {i: judged(logits, noise, floor=floor, temperature=1.3, impl=i).token for i in ("reference", "xla")}
    np.testing.assert_array_equal(draw["reference"], draw["xla"])
    assert len(set(np.asarray(draw["xla"] - jnp.argmax(logits, -1)))) > 1


@pytest.mark.parametrize("vocabulary", [2, 37, 300])
def test_two_level_draw_follows_the_softmax(vocabulary):
    """37 and 300 do not divide into groups; the control is the law at another temperature."""
    logits = jnp.asarray(np.random.default_rng(3).normal(size=vocabulary), jnp.float32).at[1 % vocabulary].add(0.5)
    noise = noise_of(jax.random.key(4), (20_000,), vocabulary)
    token = judged(jnp.broadcast_to(logits, (20_000, vocabulary)), noise, temperature=0.8).token
    counts = np.bincount(token, minlength=vocabulary)

    def p_value(temperature):
        return stats.chisquare(counts, 20_000 * np.exp(log_softmax(np.asarray(logits) / temperature))).pvalue

    assert p_value(0.8) > 1e-3
    assert p_value(1.0) < 1e-6


def test_what_has_no_probability_is_never_drawn():
    """Also not where a whole group of the vocabulary is out, and not with the padding of the last group."""
    vocabulary, group = 37, group_size(37)
    logits = jnp.full((4000, vocabulary), LOG_ZERO).at[:, group + 1].set(-50.0).at[:, 36].set(-51.0)
    token = judged(logits, noise_of(jax.random.key(5), (4000,), vocabulary), temperature=2.0).token
    assert set(np.asarray(token)) == {group + 1, 36}
    under = judged(logits, noise_of(jax.random.key(5), (4000,), vocabulary), floor=jnp.full(4000, -50.5)).token
    assert set(np.asarray(under)) == {group + 1}


@pytest.mark.parametrize(("dtype", "top_k"), [(jnp.float32, 1), (jnp.bfloat16, 11), (jnp.float32, 300)])
def test_top_k_is_the_floor_of_the_kth_largest_logit_and_leaves_the_statistics_alone(dtype, top_k):
    """Logits on a grid of 30 values, so that many tie with the k-th, in groups of the k largest and in others."""
    generator = np.random.default_rng(7)
    logits = jnp.asarray(generator.integers(0, 30, (64, 300)) / 4, dtype)
    noise = noise_of(jax.random.key(8), (64,), 300)
    lowest = jnp.sort(logits.astype(jnp.float32), axis=-1)[:, -top_k]
    whole = judged(logits, noise, temperature=1.4)
    for floor in (None, jnp.full(64, 6.0)):
        both = lowest if floor is None else jnp.maximum(lowest, floor)
        cut = judged(logits, noise, floor=both, temperature=1.4, impl="reference")
        for impl in ("reference", "xla"):
            drawn = judged(logits, noise, floor=floor, temperature=1.4, top_k=top_k, impl=impl)
            np.testing.assert_array_equal(drawn.token, cut.token)
            for name in ("confidence", "entropy", "margin"):
                np.testing.assert_allclose(getattr(drawn, name), getattr(whole, name), rtol=1e-4, atol=1e-5)
            expected = log_softmax(logits)[np.arange(64), np.asarray(drawn.token)]
            np.testing.assert_allclose(drawn.log_prob, expected, rtol=1e-5, atol=1e-5)
    below = np.asarray(logits.astype(jnp.float32))[np.arange(64), np.asarray(whole.token)] < np.asarray(lowest)
    assert below.any() == (top_k < 100), "without top-k the same noise draws what top-k forbids"


def test_top_k_follows_the_renormalised_softmax():
    """The control is the law without top-k."""
    logits = np.random.default_rng(3).normal(size=300)
    kept = logits >= np.sort(logits)[-40]
    noise = noise_of(jax.random.key(4), (20_000,), 300)
    token = judged(jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (20_000, 300)), noise, top_k=40).token
    counts = np.bincount(token, minlength=300)
    p = np.where(kept, np.exp(logits), 0)
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], 20_000 * p[kept] / p.sum()).pvalue > 1e-3
    p = np.exp(logits)
    assert stats.chisquare(counts, 20_000 * p / p.sum()).pvalue < 1e-6


def test_noise_reaches_far_and_stays_finite():
    noise = np.asarray(noise_of(jax.random.key(6), (1000,), 1000))
    assert noise.shape == (1000, 32 + 32) and np.isfinite(noise).all()
    # 64,000 draws of a Gumbel: Kolmogorov-Smirnov against its law.
    assert stats.kstest(noise.ravel(), stats.gumbel_r.cdf).pvalue > 1e-3


def test_the_noise_of_a_row_does_not_depend_on_the_rows_around_it():
    key = jax.random.key(9)
    whole = np.asarray(noise_of(key, (6, 4), 37))
    for shape in ((24,), (2, 4), (3,), (1, 1)):
        rows = int(np.prod(shape))
        part = np.asarray(noise_of(key, shape, 37))
        np.testing.assert_array_equal(part.reshape(rows, -1), whole.reshape(24, -1)[:rows])
    assert (whole[0] != whole[1]).all(), "and no two rows share it"


def test_an_implementation_that_is_not_there_is_refused():
    logits, targets = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ImplError, match=r"masked_cross_entropy.*pallas_gpu.*cannot run here.*fewer than 16 bytes"):
        masked_cross_entropy(logits, targets, impl="pallas_gpu")
    with pytest.raises(ImplError, match=r"unmask.*cuda.*not known.*interpret"):
        unmask(logits, temperature=0.0, impl="cuda")
    with pytest.raises(ValueError, match="needs noise"):
        unmask(logits)
    with pytest.raises(ValueError, match="top_k -1 is negative"):
        unmask(logits, temperature=0.0, top_k=-1)
