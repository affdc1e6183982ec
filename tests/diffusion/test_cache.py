"""Samplers with kept keys and values: exact where they must be, and an honest meter where they cannot be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import wiring
from experiments.wiring import Loaded
from kernels_pallas.attention import Mask
from ruvjax.core.params import init
from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.diffusion.cache import divergence
from ruvjax.diffusion.sampler import Sampler, init_state, run, sample
from ruvjax.errors import ConfigError
from ruvjax.models.transformer import Transformer

MASK, LENGTH, BLOCK = 1, 22, 4
NETWORK = Transformer(vocab_size=24, layers=2, width=16, heads=2, mlp_width=32, max_length=32, tied_head=False)
PARAMS = jax.tree.map(lambda x: 2 * x, init(NETWORK, jax.random.key(3)))
GREEDY = Sampler(order="confidence", steps=24, block_size=BLOCK, temperature=0.0)
TOKENIZER = train_tokenizer(TokenizerConfig("bytes"), [])


def canvas(*prompts, length=LENGTH):
    tokens = np.full((len(prompts), length), MASK)
    for row, prompt in zip(tokens, prompts):
        row[:prompt] = np.random.default_rng(prompt).integers(2, 24, prompt)
    return tokens


def both(sampler, network=NETWORK, tokens=None, segments=None, block_size=0, key=0):
    """The states of a sampler with its cache, and of the same one without."""
    tokens = canvas(3, 5, 9) if tokens is None else tokens
    loaded = Loaded(network, PARAMS, TOKENIZER, block_size=block_size)
    found = []
    for one in (sampler, dataclasses.replace(sampler, cache="none", refresh_every=0, refresh_kl=0.0, meter=False)):
        rows = len(tokens) * (2 if sampler.guidance else 1)
        both = segments if segments is None or not sampler.guidance else np.concatenate([segments] * 2)
        forward, carry = loaded.denoiser(one, rows, tokens.shape[1], both)
        found.append(sample(one, forward, PARAMS, tokens, jax.random.key(key), mask_id=MASK, carry=carry))
    return found


def same(one, other, tolerance=1e-5):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.reveal_step, other.reveal_step)
    np.testing.assert_allclose(one.confidence, other.confidence, atol=tolerance)


SHIFTED = dataclasses.replace(NETWORK, shift=True)
PADDED = np.where(np.arange(LENGTH) < 19, 1, 0)[None].repeat(3, 0)


def padded():
    tokens = canvas(3, 5, 9)
    tokens[:, 19:] = 0
    return tokens


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@pytest.mark.parametrize(
    "change, network",
    [
        ({}, SHIFTED),
        pytest.param({}, NETWORK, marks=pytest.mark.slow),
        pytest.param(
            {"guidance": 0.5, "temperature": 1.0, "order": "ancestral"},
            dataclasses.replace(NETWORK, unroll=False),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_refresh_at_every_step_is_no_cache_and_the_meter_says_so(kind, change, network):
    sampler = dataclasses.replace(GREEDY, cache=kind, refresh_every=1, meter=True, **change)
    cached, plain = both(sampler, network, padded(), PADDED)
    same(cached, plain)
    assert float(cached.carry.kl.max()) < 1e-6 and int(cached.carry.metered.sum()) == int(plain.step.sum()) * (
        2 if sampler.guidance else 1
    )


@pytest.mark.parametrize("kind", ["dual", pytest.param("prefix", marks=pytest.mark.slow)])
def test_a_stale_cache_is_measured_and_computes_less(kind):
    sampler = dataclasses.replace(GREEDY, cache=kind, steps=20, meter=True)
    cached, plain = both(sampler)
    meter = np.asarray(cached.carry.kl_per_block())
    stale = np.asarray(cached.carry.metered) > 1  # the first step of a block is a whole pass
    assert (meter[stale] > 1e-6).all() and meter.max() > 1e-2 and (meter[~stale] < 1e-6).all()
    unmetered, _ = both(dataclasses.replace(sampler, meter=False))
    same(unmetered, cached)
    assert (np.asarray(unmetered.carry.computed) < 0.9 * LENGTH * np.asarray(plain.step)).all()


def test_one_stale_step_is_a_pass_over_the_block_with_the_keys_that_were_held():
    """What dual and prefix mean, written out with dense attention masks: the rest of the row is frozen as it was."""
    tokens = canvas(5, length=13)
    for kind in ("dual", "prefix"):
        sampler = dataclasses.replace(GREEDY, cache=kind, tokens_per_step=1, steps=1)
        loaded = Loaded(NETWORK, PARAMS, TOKENIZER)
        forward, carry = loaded.denoiser(sampler, 1, 13, None)
        start = init_state(sampler, tokens, jax.random.key(0), mask_id=MASK, carry=carry)
        state = run(sampler, forward, PARAMS, start, 1)
        after, _ = forward(
            PARAMS,
            state.tokens,
            state.time,
            state.carry.replace(
                view=state.carry.view.replace(entering=jnp.array([False])),
            ),
        )
        # Old rows of the batch beside new ones: a query of the new half sees the new block and the old rest.
        twice = jnp.concatenate([jnp.asarray(tokens, jnp.int32), state.tokens], axis=1)
        renewed = np.zeros(13, bool)
        renewed[5 : 5 + BLOCK if kind == "dual" else 13] = True
        allowed = np.zeros((26, 26), bool)
        allowed[:13, :13] = True
        allowed[13:, :13], allowed[13:, 13:] = ~renewed, renewed
        positions = jnp.tile(jnp.arange(13), 2)[None]
        mask = Mask(dense=jnp.asarray(allowed)[None])
        whole = NETWORK.apply(PARAMS, twice, mask=mask, positions=positions).logits
        assert whole is not None and after.logits is not None
        np.testing.assert_allclose(after.logits[0], whole[0, 13 + 5 : 13 + 5 + BLOCK], atol=1e-4)


def test_the_error_sets_how_often_the_cache_is_renewed():
    sampler = dataclasses.replace(GREEDY, cache="dual", block_size=16, tokens_per_step=1)
    strict, plain = both(dataclasses.replace(sampler, refresh_kl=1e-9))
    loose, _ = both(dataclasses.replace(sampler, refresh_kl=100.0))
    assert int(strict.carry.interval.max()) < 4 < int(loose.carry.interval.min())
    assert float(strict.carry.drift.max()) > 1e-9
    never, _ = both(sampler)
    costs = [int(state.carry.computed.sum()) for state in (never, loose, strict)]
    assert costs[0] < costs[1] < costs[2] and int(plain.step.max()) > 8
    assert float(never.carry.drift.max()) == 0  # nobody measured


@pytest.mark.parametrize(
    "order, network",
    [
        ("confidence", NETWORK),
        ("first_hitting", SHIFTED),
        pytest.param(
            "confidence", dataclasses.replace(NETWORK, unroll=False, window=6), marks=pytest.mark.slow, id="window"
        ),
    ],
)
def test_the_block_cache_is_exact(order, network):
    temperature = 0.0 if order == "confidence" else 1.0
    sampler = Sampler(order=order, steps=24, block_size=BLOCK, block_origin="canvas", temperature=temperature)
    sampler = dataclasses.replace(sampler, cache="block")
    tokens = canvas(1, 5, 9, 2)  # not 0: where all is masked, positions tie
    tokens[3, 6:17] = 7  # whole blocks that are given, between two that are not
    cached, plain = both(sampler, network, tokens, block_size=BLOCK)
    same(cached, plain)
    assert (np.asarray(cached.carry.computed) < 0.7 * LENGTH * np.asarray(plain.step)).all()


@pytest.mark.slow
def test_a_block_cache_of_a_model_that_looks_to_the_right_is_not_exact():
    sampler = dataclasses.replace(GREEDY, block_origin="canvas", cache="block", meter=True)
    cached, _ = both(sampler, block_size=0)
    assert float(cached.carry.kl.max()) > 1e-3
    exact, _ = both(sampler, block_size=BLOCK)
    assert float(exact.carry.kl.max()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dual", "prefix", "block"])
def test_a_row_does_not_depend_on_its_neighbours(kind):
    origin = "canvas" if kind == "block" else "prompt"
    sampler = Sampler(order="confidence", threshold=0.5, block_size=BLOCK, block_origin=origin, cache=kind)
    size = BLOCK if kind == "block" else 0
    one, _ = both(sampler, tokens=canvas(3, 5, 9), block_size=size)
    other, _ = both(sampler, tokens=canvas(3, 17, 12), block_size=size)
    np.testing.assert_array_equal(one.tokens[0], other.tokens[0])
    np.testing.assert_array_equal(one.reveal_step[0], other.reveal_step[0])
    np.testing.assert_array_equal(one.carry.computed[0], other.carry.computed[0])


def test_the_divergence_is_the_textbook_one_over_masked_positions():
    random = np.random.default_rng(0)
    p, q = random.normal(size=(2, 2, 3, 5)).astype(np.float32)
    masked = jnp.array([[True, False, True], [False, False, False]])
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (p[0], q[0]))
    each = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    found = divergence(jnp.asarray(p), jnp.asarray(q), masked)
    np.testing.assert_allclose(found, [(each[0] + each[2]) / 2, 0.0], rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "dual"},
        {"cache": "block", "block_size": 4},
        {"cache": "block", "block_size": 4, "block_origin": "canvas", "refresh_every": 2},
        {"refresh_kl": 0.1},
        {"meter": True},
    ],
)
def test_settings_that_do_not_go_together(settings):
    with pytest.raises(ConfigError):
        Sampler(**settings)


def test_caches_that_a_model_cannot_have():
    timed = dataclasses.replace(NETWORK, time="adaln")
    block = dataclasses.replace(GREEDY, cache="block", block_origin="canvas")
    with pytest.raises(ConfigError, match="time=adaln"):
        wiring.finish_sampler(block, Loaded(timed, PARAMS, TOKENIZER, block_size=BLOCK), print)
    with pytest.raises(ConfigError, match="trained with objective=block"):
        wiring.finish_sampler(block, Loaded(NETWORK, PARAMS, TOKENIZER), print)
    with pytest.raises(ConfigError, match="carry"):
        init_state(dataclasses.replace(GREEDY, cache="dual"), canvas(3), jax.random.key(0), mask_id=MASK)
