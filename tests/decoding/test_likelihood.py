"""The autoregressive loss and likelihood, against plain sums in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from ruvjax.decoding import likelihood
from ruvjax.decoding.likelihood import NextToken, nll, objective, shift_right
from ruvjax.errors import ConfigError

VOCAB, START = 6, 5


@struct.dataclass
class Rows:
    tokens: jax.Array
    segments: jax.Array
    fixed: jax.Array


def rows(seed=0):
    random = np.random.default_rng(seed)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1] * 7, [0] * 7], np.int32)
    tokens = random.integers(0, VOCAB - 1, segments.shape).astype(np.int32)
    return Rows(jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(random.random(segments.shape) < 0.3))


def encode(params, inputs, segments):
    return params[inputs]


def project(params, hidden):
    return hidden


def plain(params, batch, given):
    """-log p of every counted token, one at a time."""
    log_p = np.asarray(jax.nn.log_softmax(params, axis=-1), np.float64)
    total, count = np.zeros(len(batch.tokens)), 0
    for row in range(len(batch.tokens)):
        for i in range(batch.tokens.shape[1]):
            if batch.segments[row, i] == 0 or (given and batch.fixed[row, i]):
                continue
            starts = i == 0 or batch.segments[row, i] != batch.segments[row, i - 1]
            before = START if starts else int(batch.tokens[row, i - 1])
            total[row] -= log_p[before, int(batch.tokens[row, i])]
            count += 1
    return total, count


@pytest.mark.parametrize("conditional", [False, True])
def test_loss_and_likelihood_are_the_plain_sums(conditional):
    params, batch = jnp.asarray(np.random.default_rng(1).normal(size=(VOCAB, VOCAB)), jnp.float32), rows()
    total, count = plain(params, batch, conditional)
    run = objective(NextToken(conditional=conditional), encode, project, start_id=START)
    value, (_, metrics) = run(params, None, batch, jax.random.key(0))
    np.testing.assert_allclose(value, total.sum() / count, rtol=1e-5)
    assert int(metrics["tokens"]) == count
    if conditional:
        found = nll(encode, project, params, batch, start_id=START)
        np.testing.assert_allclose(found, total, rtol=1e-5)


def test_a_head_run_in_parts_changes_neither_loss_nor_gradient(monkeypatch):
    params, batch = jnp.asarray(np.random.default_rng(1).normal(size=(VOCAB, VOCAB)), jnp.float32), rows()
    run = objective(NextToken(), encode, project, start_id=START)

    def loss(params):
        return run(params, None, batch, jax.random.key(0))[0]

    whole = jax.value_and_grad(loss)(params)
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 4 * VOCAB)  # parts of 4 tokens; 21 tokens are no whole number
    parts = jax.value_and_grad(loss)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), parts, whole)
    assert "scan" in str(jax.make_jaxpr(loss)(params))


def test_shift_right_starts_each_document_anew():
    tokens = jnp.array([[1, 2, 3, 4]], jnp.int32)
    segments = jnp.array([[1, 1, 2, 0]], jnp.int32)
    np.testing.assert_array_equal(shift_right(tokens, segments, 9), [[9, 1, 9, 9]])


def test_the_mask_token_has_no_probability():
    """Over all tokens but the mask the probabilities sum to 1, and they do not where nothing is left out."""
    params = jnp.asarray(np.random.default_rng(2).normal(size=(VOCAB, VOCAB)), jnp.float32)
    each = jnp.arange(VOCAB - 1, dtype=jnp.int32)[:, None]
    batch = Rows(each, jnp.ones_like(each), jnp.zeros(each.shape, bool))
    for mask_id, whole in ((VOCAB - 1, True), (-1, False)):
        mass = float(jnp.sum(jnp.exp(-nll(encode, project, params, batch, start_id=START, mask_id=mask_id))))
        assert (abs(mass - 1) < 1e-5) == whole


def test_errors():
    with pytest.raises(ConfigError, match="attend"):
        NextToken(attend="nothing")  # pyright: ignore[reportArgumentType]
