"""Logit processors against sort-based numpy versions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.unmask import LOG_ZERO
from ruvjax.core.logits import (
    above,
    draw_floor,
    min_p_floor,
    repetition_penalty,
    seen_tokens,
    suppress,
    top_k_floor,
    top_p_floor,
)


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def slow_keep(x, temperature, top_k, top_p, min_p):
    """Which tokens stay, one row, by sorting; without ties the answer is unique."""
    order = np.argsort(-x)
    keep = np.ones(len(x), bool)
    if top_k:
        keep[order[top_k:]] = False
    if top_p < 1:
        p = softmax(np.where(keep, x, -np.inf) / temperature)
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= top_p]] = False
    if min_p:
        p = softmax(x / temperature)
        keep &= p >= min_p * p.max()
    return keep


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 3, 1.0, 0.0), (0.5, 100, 0.9, 0.0), (2.0, 0, 0.5, 0.0), (0.5, 0, 1.0, 0.05), (2.0, 5, 0.9, 0.2)],
)
def test_floor_keeps_what_sorting_keeps(temperature, top_k, top_p, min_p):
    x = np.random.default_rng(0).normal(size=(100, 17)).astype(np.float32) * 3
    limits = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    kept = jax.jit(lambda x: above(x, draw_floor(x, temperature=temperature, **limits)) > LOG_ZERO)(x)
    expected = np.stack([slow_keep(row.astype(np.float64), temperature, top_k, top_p, min_p) for row in x])
    np.testing.assert_array_equal(kept, expected)
    assert expected.sum(-1).min() < 17


def test_floors_are_logits_of_the_row():
    x = jnp.asarray([[-3.0, 0.5, 2.0, -0.25], [1.0, 1.0, -1e30, 0.0]])
    np.testing.assert_array_equal(top_k_floor(x, 2), [0.5, 1.0])
    np.testing.assert_array_equal(top_k_floor(x, 99), np.float32([-3.0, -1e30]))
    np.testing.assert_array_equal(top_p_floor(x, 0.1), [2.0, 1.0])
    np.testing.assert_allclose(min_p_floor(x, np.exp(-1.0)), [1.0, 0.0], atol=1e-6)
    assert draw_floor(x, temperature=1.0) is None
    np.testing.assert_array_equal(above(x, None), x)


def test_ties_with_the_last_kept_token_stay():
    x = jnp.asarray([[1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(above(x, top_k_floor(x, 1))[0] > LOG_ZERO, [True, True, True, False])


def test_repetition_penalty_and_seen_tokens():
    tokens, counted = jnp.asarray([[0, 2, 4], [3, 3, 1]]), jnp.asarray([[True, True, False], [True, True, True]])
    seen = seen_tokens(tokens, counted, 5)
    np.testing.assert_array_equal(seen, [[True, False, True, False, False], [False, True, False, True, False]])
    x = jnp.asarray([[2.0, 2.0, -2.0, -2.0, 1.0]] * 2)
    expected = [[1.0, 2.0, -4.0, -2.0, 1.0], [2.0, 1.0, -2.0, -4.0, 1.0]]
    np.testing.assert_array_equal(repetition_penalty(x, seen, 2.0), expected)


def test_suppress_leaves_the_rest():
    x = jnp.asarray([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(suppress(x, (2, 0)), np.float32([[LOG_ZERO, 2.0, LOG_ZERO]]))
