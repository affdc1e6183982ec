"""Left-to-right decoding: against a plain loop, cached and not, with a toy model whose law is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.model import Output
from ruvjax.decoding.autoregressive import PADDING, Decoding, generate
from ruvjax.errors import ConfigError

VOCAB = 7


def table(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * 2, jnp.float32)


def bigram(params, tokens, time, carry):
    """Next-token logits depend on the last token read; padding is passed over. The carry is that token."""
    last = carry if carry is not None else jnp.zeros((tokens.shape[0],), jnp.int32)

    def read(last, column):
        last = jnp.where(column == PADDING, last, column)
        return last, last

    final, states = jax.lax.scan(read, last, tokens.T)
    logits = params[states.T]
    return Output(logits, logits), final if carry is not None else None


def canvas(rows, length, start, seed=0):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (rows, length)).astype(np.int32)
    free = np.broadcast_to(np.arange(length) >= start, (rows, length))
    return jnp.asarray(tokens), jnp.asarray(free)


def run(settings, params, tokens, free, key=0, start=2, carry=True, **options):
    empty = jnp.zeros((tokens.shape[0],), jnp.int32) if carry else None
    step = jax.jit(generate, static_argnames=("settings", "forward", "start", "start_id", "suppressed"))
    return step(settings, bigram, params, tokens, free, jax.random.key(key), start=start, carry=empty, **options)


def test_greedy_equals_a_plain_loop_and_keeps_what_is_given():
    params = table()
    tokens, free = canvas(3, 9, 2)
    free = free.at[1, 5].set(False)
    found = np.asarray(run(Decoding(temperature=0.0), params, tokens, free).tokens)
    expected = np.array(tokens)
    for row in range(3):
        for i in range(2, 9):
            if free[row, i]:
                expected[row, i] = int(np.argmax(params[expected[row, i - 1]]))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("start_id", [-1, 3])
def test_cached_and_uncached_agree(start_id):
    tokens, free = canvas(4, 10, 2)
    settings = Decoding(temperature=0.8, top_k=4, top_p=0.9, repetition_penalty=1.3)
    one = run(settings, table(), tokens, free, start_id=start_id)
    two = run(settings, table(), tokens, free, carry=False, start_id=start_id)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_allclose(one.probability, two.probability, atol=1e-6)


def test_samples_follow_the_models_law():
    """First-order transition counts of many rows against the softmax; a wrong temperature must fail the same test."""
    params, rows = table(1), 4000
    tokens = jnp.full((rows, 2), 2, jnp.int32)
    free = jnp.broadcast_to(jnp.arange(2) >= 1, (rows, 2))

    def distance(temperature):
        drawn = run(Decoding(temperature=temperature), params, tokens, free, start=1).tokens[:, 1]
        counts = np.bincount(np.asarray(drawn), minlength=VOCAB)
        expected = rows * np.asarray(jax.nn.softmax(params[2]))
        return float(np.sum((counts - expected) ** 2 / expected))

    assert distance(1.0) < 22.5  # chi-square with 6 degrees of freedom, p = 0.001
    assert distance(0.7) > 22.5


def test_a_row_does_not_depend_on_its_neighbours():
    tokens, free = canvas(5, 12, 2)
    settings = Decoding()
    whole = run(settings, table(), tokens, free)
    other = run(settings, table(), tokens.at[2:].set(0), free)
    np.testing.assert_array_equal(whole.tokens[:2], other.tokens[:2])


def test_the_end_token_ends_a_row_and_padding_fills_it():
    params = jnp.full((VOCAB, VOCAB), -9.0).at[:, 5].set(0.0).at[0, 5].set(-9.0).at[0, 0].set(0.0)
    tokens, free = canvas(2, 8, 1)
    tokens = tokens.at[0, 0].set(1).at[1, 0].set(0)
    found = run(Decoding(temperature=0.0, eos_id=5, pad_id=6), params, tokens, free, start=1)
    np.testing.assert_array_equal(found.tokens[0], [1, 5, 6, 6, 6, 6, 6, 6])
    np.testing.assert_array_equal(found.tokens[1], np.zeros(8))
    assert found.probability[0, 2:].max() == 0
    ended = run(Decoding(temperature=0.0, eos_id=5, pad_id=6), params, tokens.at[1, 0].set(1), free, start=1)
    np.testing.assert_array_equal(ended.tokens[:, 2:], 6)  # the loop stops early, and what is left is padding


def test_left_padding_takes_no_part():
    params = table()
    tokens, free = canvas(2, 9, 4)
    padded = tokens.at[1, :2].set(PADDING)
    settings = Decoding(temperature=0.0, repetition_penalty=1.5)
    short = run(settings, params, tokens[1:, 2:], free[1:, 2:], start=2)
    whole = run(settings, params, padded, free, start=4)
    np.testing.assert_array_equal(whole.tokens[1, 4:], short.tokens[0, 2:])


def test_suppressed_tokens_never_come():
    params = jnp.zeros((VOCAB, VOCAB)).at[:, 4].set(8.0)
    tokens, free = canvas(8, 40, 2)
    found = run(Decoding(), params, tokens, free, suppressed=(4,))
    assert not bool(jnp.any(found.tokens[:, 2:] == 4))
    assert bool(jnp.any(run(Decoding(), params, tokens, free).tokens[:, 2:] == 4))


def test_errors():
    tokens, free = canvas(1, 4, 0)
    with pytest.raises(ConfigError, match="nothing before it"):
        run(Decoding(), table(), tokens, free, start=0)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"cache": 1}, {"repetition_penalty": 0.0}):
        with pytest.raises(ConfigError, match="sampler"):
            Decoding(**wrong)
