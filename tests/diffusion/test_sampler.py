"""The sampler's rules: what may change, in which order, when rows end, and that batches and streams do not matter."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvjax.core.events import Kind, replay
from ruvjax.core.model import Output
from ruvjax.diffusion.order import within_factor
from ruvjax.diffusion.sampler import Sampler, SamplerState, done, final_prefix, init_state, run, sample, step, stream
from ruvjax.diffusion.schedule import Schedule
from ruvjax.errors import ConfigError

VOCAB, LENGTH, MASK, EOS, PAD = 7, 12, 7, 1, 5
PARAMS = {
    "left": np.random.default_rng(0).normal(size=(VOCAB + 1, VOCAB + 1)).astype(np.float32) * 2,
    "right": np.random.default_rng(1).normal(size=(VOCAB + 1, VOCAB + 1)).astype(np.float32),
    "place": np.random.default_rng(2).normal(size=(LENGTH, VOCAB + 1)).astype(np.float32),
}
# The mask's own logit is the largest: it must never come out.
PARAMS["place"][:, MASK] = 9.0


def toy(params, tokens, time, carry):
    """Logits from both neighbours, the position and the time; the carry counts passes."""
    logits = params["left"][jnp.roll(tokens, 1, 1)] + params["right"][jnp.roll(tokens, -1, 1)]
    logits = logits + params["place"][None] * (1 + time[:, None, None])
    return Output(logits, logits), None if carry is None else carry + 1


def canvas(*rows):
    """Rows of LENGTH tokens from {position: token}; all other positions are masks."""
    tokens = np.full((len(rows), LENGTH), MASK)
    for tokens_of_row, fixed in zip(tokens, rows):
        for position, token in fixed.items():
            tokens_of_row[position] = token
    return tokens


START = canvas({}, dict.fromkeys(range(5), 2), dict.fromkeys(range(LENGTH), 3), {7: 0, 2: 4})
VARIANTS = {
    "ancestral": Sampler(steps=6),
    "first_hitting": Sampler(order="first_hitting"),
    "confidence_blocks": Sampler(order="confidence", steps=6, block_size=5, temperature=0.0),
    "remask_blocks": Sampler(remask="rescale", eta=0.5, steps=9, block_size=4, block_origin="canvas", grid="cosine"),
    "stop": Sampler(order="margin", threshold=0.2, eos_id=EOS, eos_handling="stop", pad_id=PAD),
    "everything": Sampler(guidance=0.5, top_k=4, top_p=0.9, min_p=0.01, repetition_penalty=1.2, steps=5, remask="cap"),
}


def same(a: SamplerState, b: SamplerState):
    for x, y in zip(jax.tree.leaves(a.replace(key=None)), jax.tree.leaves(b.replace(key=None)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", VARIANTS)
def test_stream_ends_where_sample_ends(name):
    """And its events replay to the tokens, its text prefix only grows, and every step does something or waits."""
    sampler, key = VARIANTS[name], jax.random.key(0)
    result = sample(sampler, toy, PARAMS, START, key, mask_id=MASK)
    prefix, tokens, events = np.zeros(4, int), START, []
    for state, happened in stream(sampler, toy, PARAMS, START, key, mask_id=MASK):
        shown = np.asarray(final_prefix(sampler, state))
        assert (shown >= prefix).all()
        for row, (before, now) in enumerate(zip(prefix, shown)):
            np.testing.assert_array_equal(state.tokens[row, before:now], result.tokens[row, before:now])
        prefix, events = shown, events + happened
        np.testing.assert_array_equal(replay(tokens, happened, MASK), state.tokens)
        tokens = np.asarray(state.tokens)
    same(state, result)
    assert prefix.tolist() == [LENGTH] * 4 and done(result).all() and not (result.tokens == MASK).any()
    np.testing.assert_array_equal(replay(START, events, MASK), result.tokens)
    np.testing.assert_array_equal(result.tokens[START != MASK], START[START != MASK])
    np.testing.assert_array_equal(result.reveal_step >= 0, START == MASK)
    np.testing.assert_array_equal(result.nfe, result.step * (2 if sampler.guidance else 1))
    if sampler.remask != "none":
        assert Kind.REMASK in {event.kind for event in events}
    with pytest.raises(ValueError, match="does not fit"):
        replay(START, events + [event for event in events if event.kind == Kind.COMMIT][-1:], MASK)


@pytest.mark.parametrize("name", ["ancestral", "remask_blocks", "everything"])
def test_a_row_does_not_depend_on_its_slot_its_neighbours_or_the_chunks(name):
    sampler, key = VARIANTS[name], jax.random.key(1)
    result = sample(sampler, toy, PARAMS, START, key, mask_id=MASK)
    other = START.copy()
    other[0, :3] = 6
    order, index = [3, 1, 0, 2], np.array([3, 1, 9, 2])
    moved = sample(sampler, toy, PARAMS, other[order], key, mask_id=MASK, row_index=index)
    for slot in (0, 1, 3):
        for field in ("tokens", "reveal_step", "confidence", "step"):
            np.testing.assert_array_equal(getattr(moved, field)[slot], getattr(result, field)[order[slot]])
    assert (moved.tokens[2] != result.tokens[0]).any()

    state = init_state(sampler, START, key, mask_id=MASK)
    for limit in (2, 1, 3, 99):
        state = run(sampler, toy, PARAMS, state, limit)
    same(state, result)

    again = sample(sampler, toy, PARAMS, START, jax.random.key(2), mask_id=MASK)
    assert (again.tokens != result.tokens).any()


@settings(max_examples=40)
@given(rows=st.lists(st.dictionaries(st.integers(0, LENGTH - 1), st.integers(0, VOCAB - 1)), min_size=4, max_size=4))
@pytest.mark.parametrize("name", ["first_hitting", "stop", "everything"])
def test_fixed_tokens_are_never_altered(name, rows):
    tokens = canvas(*rows)
    result = sample(VARIANTS[name], toy, PARAMS, tokens, jax.random.key(3), mask_id=MASK)
    np.testing.assert_array_equal(np.asarray(result.tokens)[tokens != MASK], tokens[tokens != MASK])
    assert result.finished.all() and not (result.tokens == MASK).any()


def test_finished_rows_are_frozen_and_empty_rows_never_run():
    sampler = Sampler(order="confidence", tokens_per_step=3)
    result = sample(sampler, toy, PARAMS, START, jax.random.key(0), mask_id=MASK, carry=jnp.int32(0))
    assert result.nfe.tolist() == [4, 3, 0, 4] and int(result.carry) == 4
    once_more, events = jax.jit(partial(step, sampler, toy))(PARAMS, result)
    same(once_more.replace(carry=result.carry), result)
    assert not events.kind.any()
    assert list(stream(sampler, toy, PARAMS, START[2:3], jax.random.key(0), mask_id=MASK)) == []


def test_parameters_keys_and_tokens_are_data_to_the_compiled_program():
    sampler = Sampler(steps=4, temperature=0.0)
    sample(sampler, toy, PARAMS, START, jax.random.key(0), mask_id=MASK)
    before = run._cache_size()
    changed = {**PARAMS, "left": -PARAMS["left"]}
    a = sample(Sampler(steps=4, temperature=0.0), toy, changed, START, jax.random.key(5), mask_id=MASK)
    b = sample(sampler, toy, PARAMS, START[::-1].copy(), jax.random.key(5), mask_id=MASK)
    list(stream(sampler, toy, PARAMS, START, jax.random.key(0), mask_id=MASK))
    assert run._cache_size() == before and (a.tokens != b.tokens).any()


def test_sample_works_inside_a_jitted_function():
    sampler = VARIANTS["ancestral"]
    inner = jax.jit(partial(sample, sampler, toy, mask_id=MASK))(PARAMS, START, jax.random.key(0))
    np.testing.assert_array_equal(
        inner.tokens, sample(sampler, toy, PARAMS, START, jax.random.key(0), mask_id=MASK).tokens
    )


# A slow sampler in numpy, float64, one row at a time: greedy, by confidence, entropy or margin.


def slow_logits(tokens, time):
    logits = PARAMS["left"][np.roll(tokens, 1)].astype(np.float64) + PARAMS["right"][np.roll(tokens, -1)]
    logits = logits + PARAMS["place"] * (1 + time)
    logits[:, MASK] = -np.inf
    return logits


def slow_scores(logits, order):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    best = np.sort(p, -1)[:, ::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(p * np.log(p), -1)
    return {"confidence": best[:, 0], "entropy": -entropy, "margin": best[:, 0] - best[:, 1]}[order]


def slow_greedy(start, order, choose, block_size=LENGTH):
    """`choose(falling scores of the block's masks, steps made in it)` says how many of them are committed."""
    tokens, free, passes = start.copy(), np.flatnonzero(start == MASK), 0
    for left in range(free[0] if len(free) else LENGTH, LENGTH, block_size):
        block = [p for p in free if left <= p < left + block_size]
        made = 0
        while any(tokens[block] == MASK):
            masked = np.array([p for p in block if tokens[p] == MASK])
            logits = slow_logits(tokens, len(masked) / len(block))
            ranked = masked[np.argsort(-slow_scores(logits, order)[masked], kind="stable")]
            count = choose(slow_scores(logits, order)[ranked], made)
            tokens[ranked[:count]] = logits.argmax(-1)[ranked[:count]]
            made, passes = made + 1, passes + 1
    return tokens, passes


def slow_factor(scores, factor):
    best = 1
    for n in range(1, len(scores) + 1):
        if (n + 1) * (1 - scores[n - 1]) < factor:
            best = n
    return best


@pytest.mark.parametrize(
    ("sampler", "choose"),
    [
        (Sampler(order="confidence", threshold=0.6), lambda c, made: max(1, (c > 0.6).sum())),
        (Sampler(order="entropy", threshold=1.0), lambda c, made: max(1, (-c < 1.0).sum())),
        (Sampler(order="margin", threshold=0.3), lambda c, made: max(1, (c > 0.3).sum())),
        (Sampler(order="confidence", factor=1.0), lambda c, made: slow_factor(c, 1.0)),
        (Sampler(order="confidence", factor=2.5), lambda c, made: slow_factor(c, 2.5)),
        (Sampler(order="margin", tokens_per_step=4), lambda c, made: 4),
        # The published loop of LLaDA: what a block holds, split evenly over its steps, the first ones taking the rest.
        (Sampler(order="confidence", steps=5), lambda c, made: -(-len(c) // (5 - made))),
        (Sampler(order="confidence", steps=9, block_size=4), None),
    ],
)
def test_ranked_orders_match_the_slow_sampler(sampler, choose):
    sampler = Sampler(**{**vars(sampler), "temperature": 0.0})
    result = sample(sampler, toy, PARAMS, START, jax.random.key(0), mask_id=MASK)
    for row, start in enumerate(START):
        free = np.flatnonzero(start == MASK)
        rule = choose
        if rule is None:  # blocks share the steps
            blocks = (free[-1] - free[0]) // 4 + 1 if len(free) else 1
            steps = -(-9 // blocks)
            rule = lambda c, made, steps=steps: -(-len(c) // (steps - made))  # noqa: E731
        tokens, passes = slow_greedy(start, sampler.order, rule, sampler.block_size or LENGTH)
        np.testing.assert_array_equal(result.tokens[row], tokens)
        assert result.nfe[row] == passes


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9), factor=st.floats(0.05, 4.0), sure=st.sampled_from([0.0, 0.9])
)
def test_factor_counts_as_the_formula_says(seed, n, factor, sure):
    """Up to the last rank: the loop that stops at the first failure commits one too many or too few there."""
    scores = np.float32(sure + (1 - sure) * np.random.default_rng(seed).random(9))
    candidates = np.arange(9) < n
    chosen = np.asarray(within_factor(jnp.asarray(scores[None]), jnp.asarray(candidates[None]), factor))[0]
    expected = slow_factor(np.sort(scores[:n])[::-1], np.float32(factor))
    assert chosen.sum() == expected and set(np.flatnonzero(chosen)) <= set(np.argsort(-scores[:n])[:expected])


def test_blocks_are_filled_from_left_to_right():
    for origin, first in (("prompt", 5), ("canvas", 4)):
        sampler = Sampler(steps=8, block_size=4, block_origin=origin)
        result = sample(sampler, toy, PARAMS, START, jax.random.key(0), mask_id=MASK)
        reveal = np.asarray(result.reveal_step)
        for row, left in ((0, 0), (1, first)):
            steps = [reveal[row, p : p + 4][START[row, p : p + 4] == MASK] for p in range(left, LENGTH, 4)]
            assert all(a.max() < b.min() for a, b in itertools.pairwise(steps))
    whole = np.asarray(sample(Sampler(steps=8), toy, PARAMS, START, jax.random.key(0), mask_id=MASK).reveal_step)
    assert whole[0, :4].max() > whole[0, 8:].min()


def test_cosine_grid_commits_few_tokens_early():
    sampler = Sampler(order="random", steps=6, grid="cosine")
    result = sample(sampler, toy, PARAMS, START, jax.random.key(0), mask_id=MASK)
    counts = np.bincount(result.reveal_step[0], minlength=6)
    stay = [int(LENGTH * np.cos(np.pi / 2 * k / 6) + 1e-6) for k in range(7)]
    assert counts.tolist() == [a - b for a, b in itertools.pairwise(stay)]


def test_guidance_follows_its_formula():
    """Against one greedy pass in numpy, with the fixed tokens masked for the unconditional half."""
    tokens = canvas({3: 2, 4: 0})
    for weight in (0.0, 1.5):
        sampler = Sampler(order="confidence", tokens_per_step=LENGTH, temperature=0.0, guidance=weight)
        result = sample(sampler, toy, PARAMS, tokens, jax.random.key(0), mask_id=MASK)
        conditional, blind = (slow_logits(x, 1.0)[:, :VOCAB] for x in (tokens[0], np.full(LENGTH, MASK)))
        guided = blind + (weight + 1) * (conditional - blind)
        expected = np.where(tokens[0] == MASK, guided.argmax(-1), tokens[0])
        np.testing.assert_array_equal(result.tokens[0], expected)
        assert int(result.nfe[0]) == (2 if weight else 1)
        p = np.exp(guided - guided.max(-1, keepdims=True))
        confidence = (p / p.sum(-1, keepdims=True)).max(-1)
        np.testing.assert_allclose(result.confidence[0], np.where(tokens[0] == MASK, confidence, 0), rtol=1e-4)


def fond_of_the_end(params, tokens, time, carry):
    """The end token is almost certain everywhere."""
    logits = jnp.zeros((*tokens.shape, VOCAB + 1)).at[:, :, EOS].set(8.0) + params["place"][None] * 0.1
    return Output(logits, logits), carry


def test_suppressed_end_token_leaves_draws_and_ranking():
    kept = Sampler(order="confidence", threshold=0.9, eos_id=EOS)
    state = sample(kept, fond_of_the_end, PARAMS, START, jax.random.key(0), mask_id=MASK)
    assert state.nfe[0] == 1 and (state.tokens[0] == EOS).mean() > 0.9
    out = Sampler(order="confidence", threshold=0.9, eos_id=EOS, eos_handling="suppress")
    state = sample(out, fond_of_the_end, PARAMS, START, jax.random.key(0), mask_id=MASK)
    # With its mass gone no other token is likely: one position a step.
    assert state.nfe[0] == LENGTH and not (state.tokens[0] == EOS).any() and (state.confidence[0] < 0.9).all()


def test_stop_waits_for_all_to_the_left_and_pads_the_rest():
    sampler = Sampler(
        order="confidence", tokens_per_step=1, temperature=0.0, eos_id=EOS, eos_handling="stop", pad_id=PAD
    )
    # The end is the surest token, at position 6; then positions from right to left.
    place = np.zeros((LENGTH, VOCAB + 1), np.float32)
    place[np.arange(LENGTH), 2] = 3 + 0.1 * np.arange(LENGTH)
    place[6, EOS] = 9
    params = {"place": place}

    def certain(params, tokens, time, carry):
        logits = jnp.broadcast_to(params["place"][None], (*tokens.shape, VOCAB + 1))
        return Output(logits, logits), carry

    tokens = canvas({}, dict.fromkeys(range(6), 0), {9: 4})
    state, events = None, []
    for after, happened in stream(sampler, certain, params, tokens, jax.random.key(0), mask_id=MASK):
        state, events = after, events + happened
    head, tail = [2] * 6 + [EOS], [PAD] * 5
    assert state.tokens.tolist() == [head + tail, [0] * 6 + [EOS] + tail, head + [PAD, PAD, 4, PAD, PAD]]
    # Row 0 commits 6, then 11..7, then 5..0 before it may stop; row 1 has nothing to wait for.
    assert state.nfe.tolist() == [12, 1, 11]
    assert sum(e.kind == Kind.EDIT for e in events if e.row == 0) == 5
    assert sum(e.kind == Kind.EDIT for e in events if e.row == 1) == 0
    np.testing.assert_array_equal(replay(tokens, events, MASK), state.tokens)


def broken(params, tokens, time, carry):
    logits = jnp.full((*tokens.shape, VOCAB + 1), params)
    return Output(logits, logits), carry


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("name", ["ancestral", "stop", "everything"])
def test_broken_logits_neither_hang_nor_emit_the_mask(name, bad):
    result = sample(VARIANTS[name], broken, np.float32(bad), START, jax.random.key(0), mask_id=MASK)
    assert result.finished.all() and not (result.tokens == MASK).any()
    assert result.tokens.min() >= 0 and result.tokens.max() < VOCAB


def heard_time(params, tokens, time, carry):
    output, _ = toy(params, tokens, time, None)
    return output, time


def test_the_forward_is_told_the_time_of_its_order():
    def times(sampler, steps):
        state = init_state(sampler, START[:1], jax.random.key(0), mask_id=MASK, carry=jnp.zeros(1))
        heard = []
        for _ in range(steps):
            state = run(sampler, heard_time, PARAMS, state, 1)
            heard.append(float(state.carry[0]))
        return heard

    np.testing.assert_allclose(times(Sampler(steps=4), 3), [1, 0.75, 0.5])
    np.testing.assert_allclose(times(Sampler(order="random", tokens_per_step=3), 3), [1, 0.75, 0.5], rtol=1e-6)
    # A schedule whose half-way share of masks comes at another time than 1/2.
    late = Schedule("polynomial", power=2.0)
    np.testing.assert_allclose(times(Sampler(order="random", steps=2, schedule=late), 2), [1, 0.5**0.5], rtol=1e-6)
    falling = times(Sampler(order="first_hitting"), 3)
    assert 1 > falling[0] > falling[1] > falling[2] > 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"order": "sideways"}, r"sampler.order='sideways'.*ancestral"),
        ({"steps": 0}, r"sampler.steps=0"),
        ({"steps": 2.0}, r"sampler.steps=2.0"),
        ({"steps": True}, r"sampler.steps=True"),
        ({"temperature": "hot"}, r"sampler.temperature='hot'"),
        ({"top_p": 0.0}, r"sampler.top_p=0.0"),
        ({"schedule": "linear"}, r"sampler.schedule='linear'"),
        ({"threshold": 0.9}, r"sampler.threshold=0.9.*order=ancestral"),
        ({"order": "margin", "factor": 1.0}, r"sampler.factor=1.0"),
        ({"order": "confidence", "factor": 1.0, "threshold": 0.9}, r"exclude each other"),
        ({"order": "first_hitting", "tokens_per_step": 2}, r"sampler.tokens_per_step=2"),
        ({"order": "random", "remask": "cap"}, r"sampler.remask='cap'"),
        ({"remask": "loop", "t_on": 0.1, "t_off": 0.2}, r"0 < t_off < t_on"),
        ({"remask": "loop", "loop_alpha": 1.0}, r"sampler.loop_alpha"),
        ({"grid": "dream"}, r"sampler.grid='dream'.*order=ancestral"),
        ({"grid": "dream", "order": "margin", "threshold": 0.9}, r"threshold=0.9 and grid=dream.*\(grid=uniform, or"),
        ({"grid": "dream", "order": "confidence", "factor": 1.0}, r"factor=1.0 and grid=dream"),
        ({"grid": "dream", "order": "random", "tokens_per_step": 2}, r"tokens_per_step=2 and grid=dream"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(wrong, says):
    with pytest.raises(ConfigError) as error:
        Sampler(**wrong)
    assert re.search(says, error.value.line())


def test_the_mask_may_not_serve_as_padding_nor_an_end_token_be_missing():
    with pytest.raises(ConfigError, match="needs an end token"):
        init_state(Sampler(eos_handling="stop"), START, jax.random.key(0), mask_id=MASK)
    with pytest.raises(ConfigError, match="end_ids"):
        init_state(Sampler(eos_id=1, end_ids=(MASK,)), START, jax.random.key(0), mask_id=MASK)
    with pytest.raises(ConfigError, match="pad_id"):
        init_state(Sampler(eos_id=1, eos_handling="stop", pad_id=MASK), START, jax.random.key(0), mask_id=MASK)
