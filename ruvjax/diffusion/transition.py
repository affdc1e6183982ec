"""One step of the sampler's state machine: what a row looks at, when it runs the model, what it commits and takes back.

`sampler` and `state` are the `Sampler` and the `SamplerState` of `ruvjax.diffusion.sampler`, which drives this.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.unmask import LOG_ZERO, Unmasked, draw_noise, unmask
from ruvjax.core.logits import draw_floor, repetition_penalty, seen_tokens, suppress
from ruvjax.diffusion import order as ordering
from ruvjax.diffusion import remask as remasking
from ruvjax.diffusion.cache import View


def _origin(sampler, free):
    """Where block 0 begins, int32 [B]."""
    first = jnp.argmax(free, axis=-1).astype(jnp.int32)
    return first if sampler.block_origin == "prompt" else jnp.zeros_like(first)


def block_of(sampler, free):
    """The block of each position, int32 [B, L] (negative before the origin)."""
    position = jnp.arange(free.shape[1], dtype=jnp.int32)[None]
    if not sampler.block_size:
        return jnp.zeros(free.shape, jnp.int32)
    return (position - _origin(sampler, free)[:, None]) // sampler.block_size


def first_block(sampler, state):
    """The block of each row's first mask, int32 [B]."""
    masked = state.free & (state.tokens == state.mask_id)
    return jnp.take_along_axis(block_of(sampler, state.free), jnp.argmax(masked, axis=-1)[:, None], axis=-1)[:, 0]


def _block_steps(sampler, free, blocks):
    """How many of `sampler.steps` each block of a row gets, int32 [B]."""
    length = free.shape[1]
    first, last = jnp.argmax(free, axis=-1), length - 1 - jnp.argmax(free[:, ::-1], axis=-1)
    ends = jnp.take_along_axis(blocks, jnp.stack([first, last], axis=-1), axis=-1)
    count = ends[:, 1] - ends[:, 0] + 1
    return (sampler.steps + count - 1) // count


def _grid_time(sampler, step, steps):
    """The sampled time after `step` of `steps` steps, float32 [B]: 1 before the first and 0 after the last."""
    if sampler.grid == "uniform":
        time = (steps - step) / steps
    else:
        time = jnp.where(step >= steps, 0.0, jnp.cos(0.5 * jnp.pi * step / steps))
    return time.astype(jnp.float32)


def advance(sampler, forward, params, state):
    mask_id, length = state.mask_id, state.tokens.shape[1]
    active = ~state.finished
    blocks = block_of(sampler, state.free)
    member = state.free & (blocks == state.block[:, None])
    if 0 < sampler.block_size < length:
        # Only the current block's logits are looked at: a window that holds it, of one width for all rows.
        start = _origin(sampler, state.free) + state.block * sampler.block_size
        window = jnp.clip(start, 0, length - sampler.block_size)[:, None] + jnp.arange(sampler.block_size)[None]
    else:
        window = None

    def look(array):
        if window is None:
            return array
        return jnp.take_along_axis(array, window.reshape(window.shape + (1,) * (array.ndim - 2)), axis=1)

    def put(array, values):
        values = jnp.where(active[:, None], values, look(array))
        return values if window is None else jax.vmap(lambda a, w, v: a.at[w].set(v))(array, window, values)

    tokens, member = look(state.tokens), look(member)
    masked = member & (tokens == mask_id)
    keys = jax.vmap(jax.random.fold_in)(state.key, state.step)
    now = _Now(
        masked=masked,
        visible=member & ~masked,
        member=member,
        confidence=look(state.confidence),
        steps=_block_steps(sampler, state.free, blocks),
        step=state.block_step,
        time=state.time,
        key=lambda use: jax.vmap(lambda key: jax.random.fold_in(key, use))(keys),
    )
    time, choose = _CLOCKS.get(sampler.order, _ranked)(sampler, now)
    # A finished row still goes through the forward; time 1 keeps its share of it finite.
    time = jnp.where(active, jnp.clip(time, 1e-6, 1.0), 1.0)
    if sampler.cache != "none":
        start = jnp.zeros_like(state.block) if window is None else window[:, 0]
        view = View(start, masked, state.block, state.block_step == 0, active)
        view = jax.tree.map(lambda x: jnp.concatenate([x, x]), view) if sampler.guidance else view
        state = state.replace(carry=state.carry.replace(view=view))
    # A cached forward gives the logits of the window alone.
    logits, carry = _logits(sampler, forward, params, state, time, look if sampler.cache == "none" else lambda x: x)
    drawn = _draw(sampler, now, logits, mask_id)
    commit, back = choose(drawn)

    tokens = jnp.where(commit, drawn.token, jnp.where(back, mask_id, tokens))
    probability = jnp.where(commit, jnp.exp(drawn.log_prob), jnp.where(back, 0.0, now.confidence))
    reveal = jnp.where(commit, state.step[:, None], jnp.where(back, -1, look(state.reveal_step)))
    block_done = ~jnp.any(member & (tokens == mask_id), axis=-1)
    if sampler.remask != "none":
        block_done &= now.step + 1 >= now.steps
    state = state.replace(
        tokens=put(state.tokens, tokens),
        reveal_step=put(state.reveal_step, reveal),
        confidence=put(state.confidence, probability.astype(jnp.float32)),
        step=state.step + active,
        nfe=state.nfe + active * (2 if sampler.guidance else 1),
        carry=carry,
    )
    block_done &= active
    row_done = block_done & ~jnp.any(state.free & (state.tokens == mask_id), axis=-1)
    return _stop_at_end(
        sampler,
        state.replace(
            time=jnp.where(active, jnp.where(block_done & ~row_done, 1.0, time), state.time),
            block=jnp.where(block_done, first_block(sampler, state), state.block),
            block_step=jnp.where(block_done, 0, state.block_step + active),
            finished=state.finished | row_done,
        ),
        active,
    )


@dataclass(frozen=True)
class _Now:
    """The current block of every row, as the rules below see it: [B, W] arrays over its window, [B] over rows."""

    masked: jax.Array
    visible: jax.Array
    member: jax.Array
    confidence: jax.Array
    steps: jax.Array
    step: jax.Array
    time: jax.Array
    # Row keys of this step by use: 0 tokens, 1 which to commit, 2 which to take back, 3 when.
    key: Callable[[int], jax.Array]

    def uniform(self, use: int) -> jax.Array:
        """float32 [B, W] in [0, 1)."""
        return jax.vmap(lambda key: jax.random.uniform(key, self.masked.shape[1:]))(self.key(use))


# A clock says when the forward runs, and hands back the rule that picks what to commit and what to take back once the
# tokens are drawn: (sampler, now) -> (time [B], drawn -> (commit [B, W], remask [B, W])).


def _ancestral(sampler, now):
    t, s = (_grid_time(sampler, now.step + k, now.steps) for k in (0, 1))
    looping = (t <= sampler.t_on) & (s >= sampler.t_off)
    if sampler.remask == "loop":
        held = sampler.schedule.time_of(jnp.float32(sampler.loop_alpha))
        t, s = (remasking.pause(x, sampler.t_on, sampler.t_off, held) for x in (t, s))
    m_t, m_s = sampler.schedule.mask_probability(t), sampler.schedule.mask_probability(s)
    last = now.step + 1 >= now.steps
    # A schedule may stop short of alpha = 1 at time 0; the last step fills what is left all the same.
    m_s = jnp.where(last, 0.0, m_s)
    limit = remasking.largest_sigma(m_t, m_s)
    if sampler.remask == "conf":
        sigma, mean = remasking.by_confidence(limit, now.confidence, now.visible)
    else:
        match sampler.remask:
            case "cap":
                mean = jnp.minimum(sampler.eta, limit)
            case "rescale":
                mean = sampler.eta * limit
            case "loop":
                mean = jnp.where(looping, jnp.minimum(sampler.eta, limit), 0.0)
            case _:
                mean = jnp.zeros_like(limit)
        sigma = mean[:, None]
    commit = now.masked & (last[:, None] | (now.uniform(1) < remasking.unmask_probability(m_t, m_s, mean)[:, None]))
    back = jnp.zeros_like(commit) if sampler.remask == "none" else now.visible & (now.uniform(2) < sigma)
    return t, lambda drawn: (commit, back)


def _first_hitting(sampler, now):
    count = jnp.maximum(jnp.sum(now.masked, axis=-1), 1)
    u = 1.0 - jax.vmap(jax.random.uniform)(now.key(3))
    # The largest of `count` evenly drawn mask probabilities below the present one is the next to be crossed.
    hit = sampler.schedule.mask_probability(now.time) * u ** (1.0 / count)
    commit = ordering.top(now.uniform(1), now.masked, jnp.ones_like(count))
    return sampler.schedule.time_of(1.0 - hit), lambda drawn: (commit, jnp.zeros_like(commit))


def _ranked(sampler, now):
    remaining, total = jnp.sum(now.masked, axis=-1), jnp.sum(now.member, axis=-1)
    share = (remaining / jnp.maximum(total, 1)).astype(jnp.float32)

    def choose(drawn):
        match sampler.order:
            case "confidence":
                score = jnp.exp(drawn.log_prob)
            case "entropy":
                score = -drawn.entropy
            case "margin":
                score = drawn.margin
            case _:
                score = now.uniform(1)
        if sampler.threshold:
            bar = -sampler.threshold if sampler.order == "entropy" else sampler.threshold
            commit = ordering.over_threshold(score, now.masked, bar)
        elif sampler.factor:
            commit = ordering.within_factor(score, now.masked, sampler.factor)
        else:
            if sampler.tokens_per_step:
                count = jnp.full_like(remaining, sampler.tokens_per_step)
            elif sampler.grid == "dream":
                count = ordering.dream_count(remaining, now.step, now.steps)
            elif sampler.grid == "uniform":
                count = ordering.even_count(remaining, now.steps - now.step)
            else:
                count = ordering.cosine_count(remaining, total, now.step, now.steps)
            commit = ordering.top(score, now.masked, count)
        return commit, jnp.zeros_like(commit)

    return sampler.schedule.time_of(1.0 - share), choose


_CLOCKS = {"ancestral": _ancestral, "first_hitting": _first_hitting}


def _logits(sampler, forward, params, state, time, look):
    """The window's logits [B, W, V] in float32, guided, penalised and with the forbidden tokens out; and the carry."""
    tokens = state.tokens
    if sampler.guidance:
        blind = jnp.where(state.free, tokens, state.mask_id)
        both = jnp.concatenate([tokens, blind]), jnp.concatenate([time, time])
        output, carry = forward(params, *both, state.carry)
        conditional, blind = (_finite(look(half)) for half in jnp.split(output.logits, 2))
        logits = blind + (sampler.guidance + 1.0) * (conditional - blind)
    else:
        output, carry = forward(params, tokens, time, state.carry)
        logits = _finite(look(output.logits))
    if sampler.repetition_penalty != 1.0:
        seen = seen_tokens(tokens, tokens != state.mask_id, logits.shape[-1])
        logits = repetition_penalty(logits, seen[:, None, :], sampler.repetition_penalty)
    forbidden = [state.mask_id]
    if sampler.eos_handling == "suppress":
        forbidden += [sampler.eos_id, *sampler.end_ids]
    if 0 < sampler.vocabulary < logits.shape[-1]:
        known = jnp.arange(logits.shape[-1]) < sampler.vocabulary
        logits = jnp.where(known, logits, LOG_ZERO)
    return suppress(logits, forbidden), carry


def _finite(logits):
    return jnp.maximum(logits.astype(jnp.float32), LOG_ZERO)


def _draw(sampler, now, logits, mask_id) -> Unmasked:
    width, vocabulary = logits.shape[1:]
    noise = floor = None
    # Top-p counts among what top-k leaves, and needs its floor; without it the draw finds the k largest on its own.
    top_k = 0 if sampler.top_p < 1.0 else sampler.top_k
    if sampler.temperature:
        noise = jax.vmap(lambda key: draw_noise(key, (width,), vocabulary))(now.key(0))
        limits = {"top_k": sampler.top_k - top_k, "top_p": sampler.top_p, "min_p": sampler.min_p}
        floor = draw_floor(logits, temperature=sampler.temperature, **limits)
    drawn = unmask(logits, noise, floor=floor, temperature=sampler.temperature, top_k=top_k)
    # Only NaN logits, or probability 0 for every token, can lead to the mask; it must not come out even then.
    return drawn._replace(token=jnp.where(drawn.token == mask_id, 0 if mask_id else 1, drawn.token))


def _stop_at_end(sampler, state, active):
    """End the rows that hold an end token with nothing masked before it; what is free behind it becomes padding."""
    if sampler.eos_handling != "stop":
        return state
    position = jnp.arange(state.tokens.shape[1])[None]
    length = state.tokens.shape[1]

    def first(where):
        return jnp.where(jnp.any(where, axis=-1), jnp.argmax(where, axis=-1), length)[:, None]

    end = first(state.free & jnp.isin(state.tokens, jnp.array([sampler.eos_id, *sampler.end_ids])))
    stop = (end < length) & (end < first(state.free & (state.tokens == state.mask_id))) & active[:, None]
    pad = stop & state.free & (position > end)
    return state.replace(
        tokens=jnp.where(pad, sampler.eos_id if sampler.pad_id < 0 else sampler.pad_id, state.tokens),
        reveal_step=jnp.where(pad, state.step[:, None] - 1, state.reveal_step),
        confidence=jnp.where(pad, 0.0, state.confidence),
        finished=state.finished | stop[:, 0],
    )
