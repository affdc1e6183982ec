"""The denoising step with adapters, against the same steps taken one by one with everything formed densely."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Mask
from ruvjax.core.params import init
from ruvjax.diffusion.sampler import Sampler, sample
from ruvjax.errors import ConfigError
from ruvjax.lora import bank as banking
from ruvjax.lora import denoise, guided, talora
from ruvjax.lora.guided import DGR
from ruvjax.lora.talora import TALoRA
from ruvjax.models.mamba import Mamba
from ruvjax.models.transformer import Transformer

WIDTH, VOCABULARY, MASK, LENGTH = 16, 24, 23, 10
MODEL = Transformer(vocab_size=VOCABULARY, layers=2, width=WIDTH, heads=2, mlp_width=32, max_length=LENGTH)
CONFIG = TALoRA(WIDTH, banks=((20, 3), (20, 2), (20, 1)), k=2, layer=0)
GUIDE = DGR(threshold=0.0, max_retrievals=3, top_k=2)


def bank_of(capacity, rank, count=15):
    rng = np.random.default_rng(rank)
    shapes = ((count, WIDTH), (count, WIDTH, rank), (count, rank, WIDTH))
    parts = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return banking.filled(*parts, capacity=capacity, dtype=jnp.float32)


BANKS = tuple(bank_of(capacity, rank) for capacity, rank in CONFIG.banks)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 4 * x, init(MODEL, jax.random.key(0)))  # peaked, so that entropies differ


def base(params, tokens, time, carry):
    return MODEL.apply(params, tokens, mask=Mask(segments=carry), time=time), carry


def base_counted(params, tokens, time, carry):
    """The same, and the carry counts the calls."""
    return MODEL.apply(params, tokens), carry + 1


FORWARDS = {
    guide: jax.jit(denoise.forward(CONFIG, base, mask_id=MASK, timeless=False, guide=guide)) for guide in (None, GUIDE)
}


def dense_of(bank, query, t_share, k):
    """The weighted sum of the products a @ b of the k most similar adapters, in float64."""
    if not t_share:
        return np.zeros((WIDTH, WIDTH))
    cosine = np.asarray(bank.keys.values[:15], np.float64) @ query / np.linalg.norm(query)
    best = np.argsort(-cosine)[:k]
    a, b = np.asarray(bank.a, np.float64), np.asarray(bank.b, np.float64)
    return t_share * sum(max(cosine[slot], 0) * a[slot] @ b[slot] for slot in best)


def whole(query, t, k):
    shares = np.asarray(talora.blend(CONFIG, jnp.asarray([t], jnp.float32)))[:, 0]
    return sum(dense_of(bank, query, share, k) for bank, share in zip(BANKS, shares))


def run_dense(params, tokens, matrices):
    """The model with x @ matrices[row, position] added to the embedding x of each position: what layer 0 reads, given
    to it as a table in which every position is a token of its own."""
    x = params.embedding[tokens]
    table = (x + jnp.einsum("bli,blio->blo", x, jnp.asarray(matrices, jnp.float32))).reshape(-1, WIDTH)
    model = dataclasses.replace(MODEL, vocab_size=table.shape[0], tied_head=False)
    ids = jnp.arange(table.shape[0], dtype=jnp.int32).reshape(tokens.shape)
    return model.apply(dataclasses.replace(params, embedding=table, head=params.embedding), ids)


@pytest.mark.parametrize("guide", [None, GUIDE], ids=["talora", "dgr"])
def test_each_step_uses_what_the_step_before_left(params, guide):
    rng = np.random.default_rng(3)
    rows = rng.integers(0, VOCABULARY - 1, (2, LENGTH)).astype(np.int32)
    order = rng.permutation(LENGTH)
    memory = denoise.begin(CONFIG, 2, LENGTH, None, guide=guide)
    query = hidden = unsure = None
    given = denoise.Params(params, BANKS)
    for step, time in enumerate((1.0, 0.69, 0.5, 0.28)):
        tokens = rows.copy()
        tokens[:, order[2 * step :]] = MASK
        output, memory = FORWARDS[guide](given, jnp.asarray(tokens), jnp.full(2, time), memory)
        matrices = np.zeros((2, LENGTH, WIDTH, WIDTH))
        if query is not None:
            for row in range(2):
                matrices[row] += whole(query[row], 1000 * time, CONFIG.k)
                if guide is None:
                    continue
                scores = np.minimum(unsure[row] / np.sqrt(time), 1)
                able = [i for i in np.argsort(-scores, kind="stable") if tokens[row, i] == MASK and scores[i] > 0]
                assert len(able) > guide.max_retrievals
                for place in able[: guide.max_retrievals]:
                    matrices[row, place] += whole(hidden[row, place], 1000 * time, guide.top_k)
        wanted = run_dense(params, jnp.asarray(tokens), matrices)
        np.testing.assert_allclose(output.hidden, wanted.hidden, atol=1e-3)
        np.testing.assert_allclose(output.logits, wanted.logits, atol=1e-2)
        hidden = np.asarray(output.hidden, np.float64)
        query = hidden.mean(axis=1)
        unsure = np.asarray(guided.uncertainty(GUIDE, output.logits))
    plain = jax.jit(base)(params, jnp.asarray(tokens), jnp.ones(2), None)[0]
    assert np.abs(np.asarray(plain.hidden) - hidden).max() > 0.05  # the adapters did something


def test_the_first_step_and_empty_banks_are_the_model_alone(params):
    tokens = jnp.full((1, LENGTH), MASK)
    alone = jax.jit(base)(params, tokens, jnp.ones(1), None)[0]
    for guide, run in FORWARDS.items():
        for banks in (BANKS, talora.empty_banks(CONFIG)):
            given, memory = denoise.Params(params, banks), denoise.begin(CONFIG, 1, LENGTH, None, guide=guide)
            output, memory = run(given, tokens, jnp.ones(1), memory)
            np.testing.assert_array_equal(output.logits, alone.logits)
            again, _ = run(given, tokens, jnp.ones(1), memory)
            assert np.array_equal(again.logits, alone.logits) == (banks is not BANKS)


def test_in_the_sampler_a_step_is_one_pass_and_growing_banks_run_the_same_program(params):
    traces = []

    def counted(params, tokens, time, carry):
        traces.append(1)
        return base_counted(params, tokens, time, carry)

    forward = denoise.forward(CONFIG, counted, mask_id=MASK, timeless=True, guide=GUIDE)
    sampler = Sampler(order="confidence", steps=5, temperature=0.0)
    tokens = np.full((2, LENGTH), MASK, np.int32)
    tokens[:, 0] = 5
    found = []
    for banks in (talora.empty_banks(CONFIG), tuple(bank_of(c, r, 3) for c, r in CONFIG.banks), BANKS):
        banks = tuple(dataclasses.replace(b, a=b.a.astype(jnp.float32), b=b.b.astype(jnp.float32)) for b in banks)
        carry = denoise.begin(CONFIG, 2, LENGTH, jnp.int32(0), guide=GUIDE)
        state = sample(
            sampler, forward, denoise.Params(params, banks), tokens, jax.random.key(0), mask_id=MASK, carry=carry
        )
        assert int(state.carry.inner) == int(state.nfe[0]) == 5 and (np.asarray(state.tokens) != MASK).all()
        assert (np.asarray(state.tokens[:, 0]) == 5).all()
        found.append(np.asarray(state.tokens))
        if len(traces) and len(found) == 1:
            first = len(traces)
    assert len(traces) == first  # the same program for all three
    assert (found[0] != found[2]).any()


def test_without_time_the_share_of_masks_stands_for_it(params):
    """The same tokens with half of the first masks left read the bank for 500, whatever time is given."""
    forward = jax.jit(denoise.forward(CONFIG, base, mask_id=MASK, timeless=True))
    timed = FORWARDS[None]
    given, memory = denoise.Params(params, BANKS), denoise.begin(CONFIG, 1, LENGTH, None)
    tokens = np.full((1, LENGTH), MASK, np.int32)
    tokens[0, :2] = 1  # a prompt
    _, one = forward(given, jnp.asarray(tokens), jnp.asarray([0.01]), memory)
    _, other = timed(given, jnp.asarray(tokens), jnp.asarray([1.0]), memory)
    tokens[0, 2:6] = 3
    mine, _ = forward(given, jnp.asarray(tokens), jnp.asarray([0.99]), one)
    its, _ = timed(given, jnp.asarray(tokens), jnp.asarray([0.5]), other)
    np.testing.assert_array_equal(mine.logits, its.logits)


def test_padding_is_no_part_of_the_query(params):
    segments = jnp.asarray([[1] * 6 + [0] * 4], jnp.int32)
    memory = denoise.begin(CONFIG, 1, LENGTH, segments, guide=GUIDE, segments=segments)
    tokens = jnp.full((1, LENGTH), MASK)
    output, memory = FORWARDS[GUIDE](denoise.Params(params, BANKS), tokens, jnp.ones(1), memory)
    np.testing.assert_allclose(memory.query[0], np.asarray(output.hidden)[0, :6].mean(axis=0), atol=1e-6)


def test_a_forward_without_every_hidden_state_is_refused(params):
    def window(params, tokens, time, carry):
        output = MODEL.apply(params, tokens)
        return dataclasses.replace(output, hidden=output.hidden[:, :4]), carry

    forward = denoise.forward(CONFIG, window, mask_id=MASK, timeless=True)
    with pytest.raises(ConfigError, match="hidden states"):
        forward(
            denoise.Params(params, BANKS),
            jnp.full((1, LENGTH), MASK),
            jnp.ones(1),
            denoise.begin(CONFIG, 1, LENGTH, None),
        )


def test_mamba_denoises_with_the_same_banks():
    model = Mamba(vocab_size=VOCABULARY, layers=2, width=WIDTH, state=4, direction="both")
    weights = init(model, jax.random.key(1))

    def plain(params, tokens, time, carry):
        return model.apply(params, tokens), carry

    forward = denoise.forward(CONFIG, plain, mask_id=MASK, timeless=True, guide=GUIDE)
    carry = denoise.begin(CONFIG, 1, LENGTH, None, guide=GUIDE)
    state = sample(
        Sampler(order="confidence", steps=3, temperature=0.0),
        forward,
        denoise.Params(weights, BANKS),
        np.full((1, LENGTH), MASK, np.int32),
        jax.random.key(0),
        mask_id=MASK,
        carry=carry,
    )
    assert (np.asarray(state.tokens) != MASK).all() and np.asarray(state.carry.query).any()
