"""Means with confidence intervals over held-out documents, for any estimator of nats."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtrit

from ruvjax.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its confidence interval, from `n` independent documents (or rows)."""

    mean: float
    low: float
    high: float
    n: int


def ratio(
    numerators: Float[np.ndarray, " n"],
    denominators: Float[np.ndarray, " n"] | Int[np.ndarray, " n"],
    clusters: Int[np.ndarray, " n"] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Sum of numerators over sum of denominators, with the delta-method interval (Student t with n - 1 degrees).

    Entries of one cluster (rows of one document, draws of one row) may depend on each other; clusters must not. None
    makes each entry a cluster. The numerators' own sampling noise is part of their spread, so it is in the interval.
    Raises InputError for values that are not finite, a denominator that does not sum to more than 0, or fewer than two
    clusters.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if clusters is not None:
        labels, member = np.unique(np.asarray(clusters), return_inverse=True)
        top = np.bincount(member, weights=top, minlength=len(labels))
        bottom = np.bincount(member, weights=bottom, minlength=len(labels))
    n = len(top)
    if n < 2:
        raise InputError(f"an interval needs at least two documents; there is {n}", "evaluate on more text")
    if not np.isfinite(top).all() or not bottom.sum() > 0:
        raise InputError("held-out scores are not finite, or cover no text", "look at the model and the held-out split")
    mean = top.sum() / bottom.sum()
    residuals = top - mean * bottom
    error = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(bottom.sum())
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * error
    return Interval(float(mean), float(mean - half), float(mean + half), n)


def of_this_text(
    draws: Float[np.ndarray, "rows draws"], size: Int[np.ndarray, " rows"], confidence: float = 0.95
) -> Interval:
    """The total of the rows' expected draws over the total `size`: how well the estimate is known *for this very text*.

    Only the draws are random, not which text was held out: this is the interval to set beside a figure that another
    model reaches on the same bytes. Draws of a row that are stratified or antithetic only make it too wide.
    Raises InputError for fewer than two draws a row, values that are not finite, or a size that does not sum above 0.
    """
    rows, count = draws.shape
    if count < 2:
        raise InputError("the error of an estimate needs at least two draws a row", "raise evaluation.samples")
    total = float(np.sum(size))
    if not np.isfinite(draws).all() or not total > 0:
        raise InputError("held-out scores are not finite, or cover no text", "look at the model and the held-out split")
    mean = float(draws.mean(axis=1).sum()) / total
    error = math.sqrt(float(draws.var(axis=1, ddof=1).sum()) / count) / total
    half = float(stdtrit(rows * (count - 1), 0.5 + confidence / 2)) * error
    return Interval(mean, mean - half, mean + half, rows * count)


def bits_per_byte(
    nats: Float[np.ndarray, " n"], size: Int[np.ndarray, " n"], documents: Int[np.ndarray, " n"] | None = None
) -> Interval:
    """Total nats of all entries over their total `size` in bytes, in bits. `documents`: as `clusters` of `ratio`."""
    return ratio(np.asarray(nats, np.float64) / math.log(2), size, documents)


def perplexity(
    nats: Float[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], documents: Int[np.ndarray, " n"] | None = None
) -> Interval:
    """exp of nats per token; the interval is that of the exponent, so it is not symmetric about the mean."""
    exponent = ratio(nats, tokens, documents)
    return Interval(math.exp(exponent.mean), math.exp(exponent.low), math.exp(exponent.high), exponent.n)


def score(
    estimate: Callable[[Any, jax.Array], jax.Array], batches: Iterable[Any], key: jax.Array
) -> Float[np.ndarray, "rows *draws"]:
    """`estimate(batch, key)`, float [batch] or [batch, draws], over all batches: float64 [rows] or [rows, draws].

    Every batch gets the same key, because estimators fold it by sample index. The next batch is dispatched before the
    last one's result is fetched. Rows that only fill up the last batch are the caller's to drop.
    """
    results, last = [], None
    for batch in batches:
        current = estimate(jax.device_put(batch), key)
        if last is not None:
            results.append(np.asarray(last, np.float64))
        last = current
    if last is None:
        raise InputError("nothing to evaluate: the held-out split is empty", "evaluate on more text")
    return np.concatenate([*results, np.asarray(last, np.float64)])
