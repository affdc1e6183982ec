"""Continuous batching: requests of different lengths get what they get alone; a callback; what goes wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Mask
from ruvjax.core.params import init, unstack
from ruvjax.decoding.autoregressive import PADDING, Decoding, generate
from ruvjax.decoding.batching import Request, decode, stream
from ruvjax.errors import ConfigError, InputError, RunError
from ruvjax.models.mamba import Mamba
from ruvjax.models.transformer import Transformer

VOCAB, CAPACITY = 24, 40
MODELS = {
    "transformer": Transformer(vocab_size=VOCAB, layers=2, width=16, heads=2, mlp_width=24, max_length=CAPACITY),
    "mamba": Mamba(vocab_size=VOCAB, layers=1, width=16, state=4),
}
SAMPLED = Decoding(temperature=1.0, top_k=12, top_p=0.95, repetition_penalty=1.2, eos_id=3, end_ids=(5,))
GREEDY = Decoding(temperature=0.0)


@functools.cache
def forward_of(name):
    model = MODELS[name]

    def forward(params, tokens, time, carry):
        segments, tokens = (tokens >= 0).astype(jnp.int32), jnp.maximum(tokens, 0)
        place = {"mask": Mask(causal=True, segments=segments)} if name == "transformer" else {"segments": segments}
        output = model.apply(params, tokens, cache=carry, **place)
        return output, output.aux["cache"]

    return forward


@functools.cache
def drawn(name):
    params = init(MODELS[name], jax.random.key(0))
    return unstack(jax.tree.map(lambda x: x * 3 if x.ndim == 3 else x, params), MODELS[name].layers)


def empty(name):
    return lambda rows: MODELS[name].empty_cache(rows, *((CAPACITY,) if name == "transformer" else ()))


def requests():
    rng = np.random.default_rng(0)
    sizes = [(5, 9), (12, 3), (1, 14), (7, 1), (9, 12), (3, 0)]
    return [Request(rng.integers(6, VOCAB, size), new, index) for index, (size, new) in enumerate(sizes)]


def run(name, settings, asked, on_token=None, **options):
    options = {"slots": 3, "chunk": 4, "burst": 3} | options
    told = stream(
        settings,
        forward_of(name),
        drawn(name),
        asked,
        jax.random.key(7),
        empty=empty(name),
        vocabulary=VOCAB,
        capacity=CAPACITY,
        **options,
    )
    return decode(told, on_token)


START, LENGTH = 12, 26  # one compiled shape for every request


def alone(name, settings, request):
    """The same request by `generate`, its prompt padded on the left and read in one pass."""
    canvas = np.full((1, LENGTH), PADDING, np.int32)
    canvas[0, START - len(request.tokens) : START] = request.tokens
    free = np.arange(LENGTH)[None] >= START
    found = _generate(
        settings,
        forward_of(name),
        drawn(name),
        np.where(free, 0, canvas),
        free,
        jax.random.key(7),
        start=START,
        carry=empty(name)(1),
        index=jnp.array([request.index]),
    )
    tokens = found.tokens[0, START : START + request.new_tokens].tolist()
    ends = [i for i, token in enumerate(tokens) if token in settings.ends]
    return tokens[: ends[0] + 1] if ends else tokens


_generate = jax.jit(generate, static_argnums=(0, 1), static_argnames=("start", "chunk"))


@pytest.mark.parametrize("name", MODELS)
def test_requests_get_what_they_get_alone(name):
    found = run(name, SAMPLED, requests())
    assert [answer.tokens for answer in found] == [
        alone(name, SAMPLED, request) if request.new_tokens else [] for request in requests()
    ]
    reasons = {answer.reason for answer in found}
    assert reasons == {"end", "length"}, "both ways of ending must occur, else choose another seed"


def test_slots_neighbours_and_bursts_change_no_bit():
    asked = requests()
    whole = run("transformer", SAMPLED, asked)
    turned = run("transformer", SAMPLED, asked[::-1], burst=5)[::-1]
    few = run("transformer", SAMPLED, [*asked[4:], *[asked[0]] * 3])
    for one, other in [*zip(whole, turned), *zip(whole[4:], few), (whole[0], few[3])]:
        assert one.tokens == other.tokens and one.probabilities == other.probabilities
    moved = [Request(request.tokens, request.new_tokens, request.index + 1) for request in asked]
    assert [a.tokens for a in run("transformer", SAMPLED, moved)] != [a.tokens for a in whole]  # another number


def test_a_batch_of_generate_read_in_chunks_equals_its_rows():
    first, second = requests()[0], requests()[4]
    canvas = np.full((2, LENGTH), PADDING, np.int32)
    for row, request in enumerate((first, second)):
        canvas[row, START - len(request.tokens) : START] = request.tokens
    free = np.broadcast_to(np.arange(LENGTH) >= START, canvas.shape)
    found = _generate(
        GREEDY,
        forward_of("transformer"),
        drawn("transformer"),
        np.where(free, 0, canvas),
        free,
        jax.random.key(7),
        start=START,
        carry=empty("transformer")(2),
        index=jnp.array([first.index, second.index]),
        chunk=5,
    )
    for row, request in enumerate((first, second)):
        asked = Request(request.tokens, LENGTH - START, request.index)
        assert found.tokens[row, START:].tolist() == alone("transformer", GREEDY, asked)


def test_a_callback_sees_every_token_and_can_stop():
    told = {}

    def on_token(number, token, probability):
        told.setdefault(number, []).append(token)
        return number == 0 and len(told[0]) == 2

    found = run("transformer", GREEDY, requests(), on_token=on_token)
    plain = run("transformer", GREEDY, requests())
    assert found[0].reason == "stopped" and found[0].tokens == plain[0].tokens[:2] == told[0]
    for number in (1, 2, 4):
        assert found[number].tokens == plain[number].tokens == told[number]


def test_errors():
    long = Request(np.arange(6, 20), 30)
    for asked, message in (
        ([long], "14 prompt tokens and 30 new ones exceed the context of 40"),
        ([Request([], 3)], "the prompt is empty"),
        ([Request([VOCAB], 3)], "outside the vocabulary"),
        ([Request([1], -3)], "new_tokens=-3"),
    ):
        with pytest.raises(InputError, match=message):
            run("transformer", GREEDY, asked)
    with pytest.raises(ConfigError, match="slots=0"):
        run("transformer", GREEDY, requests(), slots=0)

    def broken(number, token, probability):
        raise ValueError("no more paper")

    with pytest.raises(RunError, match="callback of request 0 raised ValueError: no more paper"):
        run("transformer", GREEDY, requests(), on_token=broken)
    forward = forward_of("transformer")
    bad = drawn("transformer")
    bad = bad.replace(final_norm=bad.final_norm.at[0].set(jnp.nan))
    with pytest.raises(RunError, match="logits are not finite after 5 tokens"):
        sizes = {"empty": empty("transformer"), "vocabulary": VOCAB, "chunk": 4}
        decode(stream(GREEDY, forward, bad, requests(), jax.random.key(0), **sizes))
    with pytest.raises(ConfigError, match="end_ids"):
        Decoding(end_ids=(-2,))
