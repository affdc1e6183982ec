"""Certificates of the samplers' distributions, each with a control that the same check must reject.

Exact laws are enumerated in float64 for a Markov source of 3 tokens and 3 positions, whose exact conditionals are the
model: a table from the partly masked sequence to each position's distribution.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ruvjax.core.model import Output
from ruvjax.diffusion import remask
from ruvjax.diffusion.sampler import Sampler, init_state, run, sample, step
from ruvjax.diffusion.schedule import Schedule

VOCAB, LENGTH, MASK = 3, 3, 3
PLACES = (VOCAB + 1) ** np.arange(LENGTH)[::-1]
ACCEPT, REJECT = 1e-3, 1e-8


def source():
    """p(x) of a sharp Markov chain, float64 [27] in the order of itertools.product."""
    generator = np.random.default_rng(5)
    start, move = generator.dirichlet(np.full(3, 0.6)), generator.dirichlet(np.full(3, 0.25), size=3)
    return np.array([start[a] * move[a, b] * move[b, c] for a, b, c in itertools.product(range(3), repeat=3)])


TEXTS = list(itertools.product(range(VOCAB), repeat=LENGTH))
PARTIAL = list(itertools.product(range(VOCAB + 1), repeat=LENGTH))


def conditionals(p):
    """p(x_i | what is visible) for every partly masked sequence, float64 [4^3, position, token]."""
    table = np.full((len(PARTIAL), LENGTH, VOCAB), 1 / VOCAB)
    for row, seen in enumerate(PARTIAL):
        fits = np.array([all(s in (MASK, x) for s, x in zip(seen, text)) for text in TEXTS])
        for i, token in itertools.product(range(LENGTH), range(VOCAB)):
            table[row, i, token] = p[fits & np.array([text[i] == token for text in TEXTS])].sum() / p[fits].sum()
    return table


def ancestral_law(table, mask_probability):
    """The exact law of ancestral sampling along mask probabilities 1 = m_0 > ... > m_T = 0, float64 [27]."""
    law = {(MASK,) * LENGTH: 1.0}
    for m_t, m_s in itertools.pairwise(mask_probability):
        stay, after = m_s / m_t, {}
        for seen, mass in law.items():
            p = table[np.dot(seen, PLACES)]
            choices = [
                [(s, 1.0)] if s != MASK else [(MASK, stay), *((v, (1 - stay) * p[i, v]) for v in range(VOCAB))]
                for i, s in enumerate(seen)
            ]
            for combination in itertools.product(*choices):
                to = tuple(token for token, _ in combination)
                after[to] = after.get(to, 0.0) + mass * np.prod([q for _, q in combination])
        law = after
    return np.array([law.get(text, 0.0) for text in TEXTS])


def read_table(params, tokens, time, carry):
    """The forward: logits of the real tokens from the table, and a large one for the mask, which must be ignored."""
    logits = params[jnp.sum(tokens * jnp.asarray(PLACES)[None], axis=-1)]
    return Output(jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=5.0), logits), carry


def draws(sampler, rows=20_000, seed=0):
    log_p = jnp.log(jnp.asarray(conditionals(source()), jnp.float32))
    state = sample(sampler, read_table, log_p, np.full((rows, LENGTH), MASK), jax.random.key(seed), mask_id=MASK)
    return state, np.bincount(np.asarray(state.tokens) @ (3 ** np.arange(3)[::-1]), minlength=27)


def p_value(counts, law):
    """Chi-square, with the cells of fewer than 5 expected counts joined."""
    order = np.argsort(law)
    expected, counts = law[order] * counts.sum(), counts[order]
    small = max(int(np.searchsorted(np.cumsum(expected), 5.0)) + 1, 1)
    expected, counts = (np.concatenate([[x[:small].sum()], x[small:]]) for x in (expected, counts))
    return stats.chisquare(counts, expected).pvalue


def grid(steps, alpha=lambda t: 1 - t):
    return [1 - alpha(1 - k / steps) if k < steps else 0.0 for k in range(steps + 1)]


@pytest.mark.parametrize("kind", ["linear", "squared_cosine"])
def test_ancestral_sampling_follows_its_exact_law(kind):
    """4 steps: far enough from the source that the check tells the two apart."""
    alpha = (lambda t: 1 - t) if kind == "linear" else (lambda t: np.cos(np.pi / 2 * t) ** 2)
    law = ancestral_law(conditionals(source()), grid(4, alpha))
    np.testing.assert_allclose(law.sum(), 1.0, rtol=1e-12)
    _, counts = draws(Sampler(steps=4, schedule=Schedule(kind)))
    assert p_value(counts, law) > ACCEPT
    assert p_value(counts, source()) < REJECT


def test_first_hitting_draws_from_the_source_itself():
    state, counts = draws(Sampler(order="first_hitting", schedule=Schedule("cosine")))
    assert p_value(counts, source()) > ACCEPT
    assert p_value(counts, ancestral_law(conditionals(source()), grid(4))) < REJECT
    np.testing.assert_array_equal(state.nfe, LENGTH)


def test_first_hitting_times_follow_their_law():
    """The first of n crossings lies at mask probability u^(1/n)."""
    schedule = Schedule("cosine")
    sampler = Sampler(order="first_hitting", schedule=schedule)
    state = init_state(sampler, np.full((4000, LENGTH), MASK), jax.random.key(1), mask_id=MASK)
    state = run(sampler, read_table, jnp.zeros((4**LENGTH, LENGTH, VOCAB)), state, 1)
    crossed = np.asarray(schedule.mask_probability(state.time), np.float64)
    assert stats.kstest(crossed**LENGTH, "uniform").pvalue > ACCEPT
    assert stats.kstest(crossed, "uniform").pvalue < REJECT


# At mask mass 1 - 1/1024, a draw over the tokens and the mask together needs noise of about ln(1024 / p) for a token of
# probability p. The 2044 rare tokens have p = 7e-5, just beyond what noise made of 23 random bits can reach.
MANY = 2048
RARE = 7e-5 * (MANY - 4)
PASSES, BATCH, WIDTH = 36, 32, 256


def rare_table(params, tokens, time, carry):
    logits = jnp.broadcast_to(params, (*tokens.shape, MANY + 1))
    return Output(logits, logits), carry


def rare_p_value(likely, rare):
    """Chi-square of how many positions became one of the 4 likely tokens, or a rare one, or stayed masked."""
    positions = PASSES * BATCH * WIDTH
    expected = np.array([(1 - RARE) / 1024, RARE / 1024, 1023 / 1024]) * positions
    return stats.chisquare([likely, rare, positions - likely - rare], expected).pvalue


def one_stage(bits):
    """The control: Gumbel-max over tokens and mask in one float32 draw whose uniforms have so many bits.

    Of n equally likely tokens the largest uniform wins, and the largest of n uniforms is one uniform to the power 1/n.
    """
    generator, positions = np.random.default_rng(0), PASSES * BATCH * WIDTH
    sizes = np.array([4, MANY - 4, 1])
    each = np.array([(1 - RARE) / 4096, RARE / (MANY - 4) / 1024, 1023 / 1024])
    largest = generator.random((positions, 3)) ** (1 / sizes)[None]
    lattice = np.floor(largest * 2.0**bits) * 2.0**-bits
    with np.errstate(divide="ignore"):
        noise = -np.log(-np.log(np.maximum(lattice, np.finfo(np.float32).tiny)))
    winner = np.argmax((np.log(each)[None] + noise).astype(np.float32), axis=-1)
    return (winner == 0).sum(), (winner == 1).sum()


def test_rare_unmasking_keeps_rare_tokens():
    table = np.concatenate([np.full(4, (1 - RARE) / 4), np.full(MANY - 4, RARE / (MANY - 4)), [1e-3]])
    sampler, log_p = Sampler(steps=1024), jnp.log(jnp.asarray(table, jnp.float32))
    likely = rare = 0
    for n in range(PASSES):
        index = np.arange(BATCH) + BATCH * n
        masks = np.full((BATCH, WIDTH), MANY)
        state = init_state(sampler, masks, jax.random.key(2), mask_id=MANY, row_index=index)
        tokens = np.asarray(run(sampler, rare_table, log_p, state, 1).tokens)
        likely, rare = likely + (tokens < 4).sum(), rare + ((tokens >= 4) & (tokens < MANY)).sum()
    assert rare_p_value(likely, rare) > ACCEPT
    assert rare_p_value(*one_stage(bits=48)) > ACCEPT
    assert rare_p_value(*one_stage(bits=23)) < ACCEPT


# ReMDM on a source of independent tokens: after any step a position is masked with probability m_s, and holds a token
# with the source's probabilities if it is not.
INDEPENDENT = np.array([0.6, 0.3, 0.1])


def independent(params, tokens, time, carry):
    logits = jnp.broadcast_to(params, (*tokens.shape, VOCAB + 1))
    return Output(logits, logits), carry


def remasked(sampler, steps_made, rows=300, length=40):
    log_p = jnp.log(jnp.append(jnp.asarray(INDEPENDENT, jnp.float32), 0.5))
    state = init_state(sampler, np.full((rows, length), MASK), jax.random.key(4), mask_id=MASK)
    tokens = np.asarray(run(sampler, independent, log_p, state, steps_made).tokens).ravel()
    return np.bincount(tokens, minlength=VOCAB + 1)


def marginal_p_value(counts, masked):
    return stats.chisquare(counts, np.append(INDEPENDENT * (1 - masked), masked) * counts.sum()).pvalue


@pytest.mark.parametrize(
    ("remasking", "masked_after"),
    [
        ({"remask": "cap", "eta": 0.2}, 1 - 6 / 8),
        ({"remask": "rescale", "eta": 0.7}, 1 - 6 / 8),
        ({"remask": "conf"}, 1 - 6 / 8),
        # Time falls to 3/8 in 5 steps, inside the loop, where the visible share is held.
        ({"remask": "loop", "eta": 0.2, "t_on": 0.7, "t_off": 0.2, "loop_alpha": 0.6}, 1 - 0.6),
    ],
)
def test_remasking_keeps_the_marginals(remasking, masked_after):
    sampler = Sampler(steps=8, **remasking)
    counts = remasked(sampler, 5 if sampler.remask == "loop" else 6)
    assert marginal_p_value(counts, masked_after) > ACCEPT
    assert marginal_p_value(counts, masked_after + 0.05) < REJECT


def test_remasking_without_its_unmasking_probability_loses_the_marginals(monkeypatch):
    plain = remask.unmask_probability
    monkeypatch.setattr(remask, "unmask_probability", lambda m_t, m_s, sigma: plain(m_t, m_s))
    # An eta of its own, so that no program compiled before is run.
    assert marginal_p_value(remasked(Sampler(steps=8, remask="cap", eta=0.2000001), 6), 1 - 6 / 8) < REJECT


def test_confidence_remasking_takes_back_the_unsure_tokens():
    sampler = Sampler(steps=4, remask="conf")
    state = init_state(sampler, np.full((2000, 2), MASK), jax.random.key(5), mask_id=MASK)
    # Halfway, both committed; one of them was sure and one was not.
    state = state.replace(
        tokens=jnp.zeros_like(state.tokens),
        confidence=jnp.tile(jnp.array([[0.9, 0.1]]), (2000, 1)),
        block_step=jnp.full(2000, 2),
    )
    after, _ = jax.jit(lambda state: step(sampler, independent, jnp.zeros(VOCAB + 1), state))(state)
    taken = np.asarray(after.tokens == MASK).sum(0)
    # sigma at most (1/4) / (1/2), shared out by softmax(-confidence).
    expected = 0.5 / (1 + np.exp([0.8, -0.8])) * 2000
    assert stats.chisquare([*taken, 4000 - taken.sum()], [*expected, 4000 - expected.sum()]).pvalue > ACCEPT
    assert stats.chisquare([*taken, 4000 - taken.sum()], [*expected[::-1], 4000 - expected.sum()]).pvalue < REJECT
