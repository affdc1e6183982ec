"""Intervals: exact small cases, and coverage on synthetic documents with estimators that must fail beside it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.errors import InputError
from ruvjax.training.evaluate import bits_per_byte, of_this_text, perplexity, ratio, score

RUNS, DOCUMENTS = 2000, 30
RATE = 1.5  # nats per byte, the truth
# Coverage of a true 95% interval over 2000 runs has standard error 0.5%.


def corpora(seed):
    """Per run: documents of 1 to 8 rows of 50 to 400 bytes; a document's rows share its difficulty."""
    draw = np.random.default_rng(seed)
    for _ in range(RUNS):
        rows = draw.integers(1, 9, DOCUMENTS)
        documents = np.repeat(np.arange(DOCUMENTS), rows)
        size = draw.integers(50, 401, len(documents))
        difficulty = RATE + draw.normal(0, 0.3, DOCUMENTS)[documents]
        nats = size * difficulty + draw.normal(0, 10, len(documents))
        yield nats, size, documents


def coverage(interval):
    hits = [i.low <= RATE <= i.high for i in (interval(*corpus) for corpus in corpora(0))]
    return float(np.mean(hits))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    assert 0.93 < coverage(ratio) < 0.97
    assert 0.475 < coverage(lambda *corpus: ratio(*corpus, confidence=0.5)) < 0.525 + 0.02


def test_ignoring_that_rows_share_a_document_covers_too_seldom():
    assert coverage(lambda nats, size, documents: ratio(nats, size)) < 0.85


def test_the_mean_of_ratios_would_weigh_bytes_wrongly():
    nats, size = np.array([10.0, 1000.0]), np.array([10, 500])
    assert ratio(nats, size).mean == pytest.approx(1010 / 510)
    assert np.mean(nats / size) != pytest.approx(1010 / 510)


def test_equal_denominators_give_the_t_interval_of_the_mean():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    interval = ratio(values, np.ones(4))
    half = 3.182446 * values.std(ddof=1) / 2  # the 97.5% point of Student's t with 3 degrees of freedom
    assert (interval.mean, interval.n) == (4.0, 4)
    assert interval.high - 4.0 == pytest.approx(half, rel=1e-6) == 4.0 - interval.low


def test_clusters_count_once_whatever_their_labels():
    nats, size = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2, 2, 1, 3, 4])
    merged = ratio(np.array([4.0, 6.0, 5.0]), np.array([3, 5, 4]))
    assert ratio(nats, size, np.array([7, 900, 7, 900, 3])) == merged


def test_bits_and_perplexity_are_the_same_numbers_in_other_units():
    nats, size = np.array([100.0, 250.0, 80.0]), np.array([60, 110, 50])
    plain, bits, exponential = ratio(nats, size), bits_per_byte(nats, size), perplexity(nats, size)
    for name in ("mean", "low", "high"):
        assert getattr(bits, name) == pytest.approx(getattr(plain, name) / math.log(2))
        assert getattr(exponential, name) == pytest.approx(math.exp(getattr(plain, name)))
    assert bits.n == exponential.n == 3


def test_unusable_scores_are_refused():
    with pytest.raises(InputError, match="at least two documents"):
        ratio(np.array([1.0, 2.0]), np.array([1, 1]), np.array([0, 0]))
    with pytest.raises(InputError, match="not finite"):
        ratio(np.array([1.0, np.nan]), np.array([1, 1]))
    with pytest.raises(InputError, match="cover no text"):
        ratio(np.array([1.0, 1.0]), np.array([0, 0]))


def test_score_keeps_the_order_of_rows_and_the_key():
    batches = [np.arange(3), np.arange(3, 6)]
    key = jax.random.key(4)

    def estimate(batch, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch)
        return batch.astype(jnp.float32) + jax.vmap(jax.random.uniform)(keys)

    rows = score(estimate, iter(batches), key)
    expected = [i + float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(6)]
    assert rows.dtype == np.float64
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    np.testing.assert_array_equal(
        score(lambda b, k: jnp.stack([b, b], 1), batches, key), np.stack([np.arange(6)] * 2, 1)
    )
    with pytest.raises(InputError, match="nothing to evaluate"):
        score(estimate, [], key)


def test_the_interval_of_this_text_covers_the_draws_and_not_the_choice_of_text():
    draw = np.random.default_rng(5)
    rows, count = 40, 4
    size = draw.integers(50, 401, rows)
    truth = size * (RATE + draw.normal(0, 0.5, rows))  # of this text; documents differ widely
    covered, wide = [], []
    for _ in range(RUNS):
        found = of_this_text(truth[:, None] + draw.normal(0, 20, (rows, count)), size)
        covered.append(found.low <= truth.sum() / size.sum() <= found.high)
        wide.append(found.low <= RATE <= found.high)
    assert 0.935 < np.mean(covered) < 0.965
    assert np.mean(wide) < 0.5  # it says nothing of text in general


def test_one_draw_has_no_error_of_its_own():
    with pytest.raises(InputError, match="two draws"):
        of_this_text(np.ones((3, 1)), np.ones(3, int))
