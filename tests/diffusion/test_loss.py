"""Training losses: unbiased for the exact NELBO, equal however head and batch are laid out, blind to padding."""

import dataclasses
from functools import partial
from typing import get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.attention import Mask
from ruvjax.diffusion.corrupt import TimeSampling
from ruvjax.diffusion.likelihood import exact_block_nelbo, exact_nelbo
from ruvjax.diffusion.loss import DiffusionLoss, LossKind, corrupt, gather_rows, objective
from ruvjax.diffusion.markov import MarkovSource
from ruvjax.diffusion.schedule import Schedule
from ruvjax.errors import ConfigError
from ruvjax.training.objective import gradient_of

KEY = jax.random.key(5)
SOURCE = MarkovSource.draw(3, 4, seed=4, repeats=False)
KINDS = get_args(LossKind)
MASK = 31


@flax.struct.dataclass
class Batch:
    tokens: jax.Array
    segments: jax.Array
    fixed: jax.Array
    index: jax.Array


def make_batch(rows, length=16, first=0, vocab=MASK):
    tokens = jax.random.randint(jax.random.fold_in(KEY, rows), (rows, length), 0, vocab, jnp.int32)
    segments, fixed = jnp.ones((rows, length), jnp.int32), jnp.zeros((rows, length), bool)
    return Batch(tokens, segments, fixed, first + jnp.arange(rows, dtype=jnp.int32))


def table_encode(params, tokens, time, mask, positions):
    """The "hidden" states of a table model are its logits."""
    return SOURCE.forward(params, tokens, time, None)[0].logits


def identity(params, hidden):
    return hidden


@pytest.fixture(scope="module")
def network(tiny_model, tiny_params):
    def encode(params, tokens, time, mask, positions):
        return tiny_model.apply(params, tokens, mask=mask, positions=positions, time=time, logits=False).hidden

    return encode, tiny_model.head, tiny_params


def small_encode(params, tokens, time, mask, positions):
    """A network that compiles fast: every position sees its token and the mean of what its mask allows."""
    x = params["embedding"][tokens]
    allowed = mask.allowed(tokens.shape[1]).astype(x.dtype)
    return jnp.tanh(x + allowed @ x / tokens.shape[1])


def small_project(params, hidden):
    return hidden @ params["head"]


@pytest.fixture(scope="module")
def small():
    keys = jax.random.split(KEY)
    params = {"embedding": jax.random.normal(keys[0], (32, 8)), "head": jax.random.normal(keys[1], (8, 32))}
    return small_encode, small_project, params


def per_token(loss, rows, batch_size=0):
    """The loss of a table model on `rows` copies of one row, and the exact NELBO of that row per token."""
    table = jnp.asarray(SOURCE.conditional, jnp.float32)
    batch = make_batch(rows, SOURCE.length)
    batch = batch.replace(tokens=jnp.tile(jnp.asarray([[0, 2, 1, 0]], jnp.int32), (rows, 1)))
    run = jax.jit(objective(loss, table_encode, identity, mask_id=3, batch_size=batch_size or rows))
    truth = exact_nelbo(SOURCE.forward, table, batch.tokens[:1], mask_id=3)[0] / SOURCE.length
    return partial(run, table, None, batch), float(truth)


def t_step_excess(steps):
    """T-step bound minus NELBO, per token of the row of `per_token`, linear schedule: by enumeration."""
    sums = SOURCE.masked_nll(np.array([0, 2, 1, 0]))
    k = np.arange(1, 5)
    p = np.arange(1, steps + 1)[:, None] / steps
    discrete = np.sum(sums[1:] * p ** (k - 1) * (1 - p) ** (4 - k)) / steps
    t, w = np.polynomial.legendre.leggauss(10)
    t = (t[:, None] + 1) / 2
    return (discrete - np.sum(w[:, None] / 2 * sums[1:] * t ** (k - 1) * (1 - t) ** (4 - k))) / 4


@pytest.mark.parametrize("sampling", get_args(TimeSampling))
@pytest.mark.parametrize(
    "loss",
    [
        DiffusionLoss("continuous", t_min=0.0),
        DiffusionLoss("continuous", schedule=Schedule("cosine"), t_min=0.0),
        DiffusionLoss("t_step", steps=3),
        DiffusionLoss("exact_k", schedule=Schedule("polynomial")),
    ],
    ids=lambda loss: f"{loss.kind}-{loss.schedule.kind}",
)
def test_losses_are_unbiased(loss, sampling):
    run, truth = per_token(dataclasses.replace(loss, time_sampling=sampling), 128)
    if loss.kind == "t_step":
        excess = t_step_excess(loss.steps)
        assert excess > 0.05  # the discrete bound is looser
        truth += excess
    values = np.array([run(jax.random.fold_in(KEY, i))[0] for i in range(60)])
    error = values.std() / np.sqrt(60)
    assert abs(values.mean() - truth) < 4.5 * error, (values.mean(), truth, error)
    assert abs(1.15 * values.mean() - truth) > 4.5 * error  # a weight wrong by 15% would show


def test_clipped_times_lack_what_the_schedule_says():
    loss = DiffusionLoss("continuous", t_min=0.2, t_max=0.9)
    run, _ = per_token(loss, 256)
    sums, k = SOURCE.masked_nll(np.array([0, 2, 1, 0]))[1:], np.arange(1, 5)
    t, w = np.polynomial.legendre.leggauss(10)
    below, above = loss.schedule.missing(loss.t_min, loss.t_max)
    t, w = below + (1 - above - below) * (t[:, None] + 1) / 2, (1 - above - below) * w[:, None] / 2
    truth = np.sum(w * sums * t ** (k - 1) * (1 - t) ** (4 - k)) / 4
    values = np.array([run(jax.random.fold_in(KEY, i))[0] for i in range(60)])
    assert abs(values.mean() - truth) < 4.5 * values.std() / np.sqrt(60)


def test_exact_counts_vary_less_than_bernoulli_masks():
    def spread(kind):
        run, _ = per_token(DiffusionLoss(kind, time_sampling="iid"), 16)
        return np.var([run(jax.random.fold_in(KEY, i))[0] for i in range(200)])

    assert spread("exact_k") < 0.6 * spread("continuous")


def test_dependent_times_vary_less():
    """Where the loss depends on how many tokens are masked alone, dependent times take nearly all of its variance."""
    batch = make_batch(16).replace(tokens=jnp.zeros((16, 16), jnp.int32))

    def encode(params, tokens, time, mask, positions):
        share = jnp.mean(tokens != MASK, axis=1, keepdims=True)
        return jnp.zeros((16, 16, MASK + 1)).at[..., 0].set(jnp.tile(6 * share, (1, 16)))

    def spread(sampling):
        run = jax.jit(objective(DiffusionLoss(time_sampling=sampling), encode, identity, mask_id=MASK, batch_size=16))
        return np.var([run(None, None, batch, jax.random.fold_in(KEY, i))[0] for i in range(100)])

    independent = spread("iid")
    assert spread("antithetic") < 0.3 * independent
    assert spread("low_discrepancy") < 0.02 * independent


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_change_nothing(kind, small):
    encode, project, params = small
    batch = make_batch(4)

    def run(share):
        loss = DiffusionLoss(kind, block_size=4, masked_rows=share)
        run = objective(loss, encode, project, mask_id=MASK, batch_size=4)
        return jax.jit(gradient_of(run))(params, None, batch, KEY)

    expected, (_, plain) = run(0.0)
    masked = round(float(plain["masked_share"]) * 64)
    assert plain["overflow"] == 0 and masked > 16
    for share in (0.02, 0.6, 0.99):
        gradient, (_, metrics) = run(share)
        assert metrics["overflow"] == (masked > -(-int(share * 64 + 1) // 8) * 8)
        assert share > 0.02 or metrics["overflow"] == 1
        for name in ("loss", "masked_nll", "tokens", "masked_share"):
            np.testing.assert_allclose(metrics[name], plain[name], rtol=2e-6)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_head_runs_only_where_it_must(small):
    encode, project, params = small
    seen = []

    def spy(params, hidden):
        seen.append(hidden.shape[0])
        return project(params, hidden)

    loss = DiffusionLoss("exact_k", masked_rows=0.5)
    jax.eval_shape(objective(loss, encode, spy, mask_id=MASK, batch_size=4), params, None, make_batch(4), KEY)
    assert sorted(set(seen) - {64}) == [24, 40]  # of 64: half and one, in eights; the rest under a condition


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_masked_counted_or_seen(kind, network):
    encode, project, params = network
    batch = make_batch(4)
    segments = batch.segments.at[0, 9:].set(0).at[1, 5:].set(2).at[3].set(0)
    batch = batch.replace(segments=segments)
    loss = DiffusionLoss(kind, block_size=4)
    run = jax.jit(objective(loss, encode, project, mask_id=MASK, batch_size=4))
    value, (_, metrics) = run(params, None, batch, KEY)
    other = batch.replace(tokens=jnp.where(segments == 0, (batch.tokens + 1) % MASK, batch.tokens))
    assert metrics["tokens"] == 9 + 16 + 16
    np.testing.assert_allclose(run(params, None, other, KEY)[0], value, rtol=1e-6)
    changed = batch.replace(tokens=jnp.where(segments == 1, (batch.tokens + 1) % MASK, batch.tokens))
    assert abs(run(params, None, changed, KEY)[0] - value) > 1e-4
    drawn = corrupt(loss, KEY, batch.tokens, batch.index, segments != 0, MASK, 4)
    assert not np.any(drawn.masked & (segments == 0))


def test_a_batch_of_padding_costs_nothing(small):
    encode, project, params = small
    batch = make_batch(2).replace(segments=jnp.zeros((2, 16), jnp.int32))
    loss = objective(DiffusionLoss(), encode, project, mask_id=MASK, batch_size=2)
    gradient, (_, metrics) = jax.jit(gradient_of(loss))(params, None, batch, KEY)
    assert metrics["loss"] == 0 and metrics["tokens"] == 0
    assert all(np.all(g == 0) for g in jax.tree.leaves(gradient))


def spying(loss, batch):
    """What the network is shown, and the metrics."""
    shown = {}

    def encode(params, tokens, time, mask, positions):
        shown.update(tokens=tokens, time=time, mask=mask, positions=positions)
        return jax.nn.one_hot(tokens, MASK + 1)

    _, (_, metrics) = objective(loss, encode, identity, mask_id=MASK, batch_size=len(batch.index))(None, 3, batch, KEY)
    return shown, metrics


@pytest.mark.parametrize("kind", KINDS)
def test_conditional_keeps_the_prompt(kind):
    batch = make_batch(32)
    batch = batch.replace(fixed=batch.fixed.at[:, :5].set(True))
    shown, metrics = spying(DiffusionLoss(kind, block_size=4, conditional=True), batch)
    assert np.array_equal(shown["tokens"][:, :5], batch.tokens[:, :5])
    assert metrics["tokens"] == 32 * 11
    masked = np.sum(shown["tokens"] == MASK)
    assert metrics["masked_share"] == pytest.approx(masked / (32 * 11))
    free, _ = spying(DiffusionLoss(kind, block_size=4), batch)
    assert np.any(free["tokens"][:, :5] == MASK)


def test_infill_and_random_length():
    batch = make_batch(64)
    _, metrics = spying(DiffusionLoss(infill=1.0), batch)
    assert 0.15 < metrics["tokens"] / (64 * 16) < 0.6  # a gap is about a third of the row
    shown, metrics = spying(DiffusionLoss(random_length=1.0), batch)
    lengths = np.sum(shown["mask"].segments, axis=1)
    assert metrics["tokens"] == lengths.sum()
    assert len(np.unique(lengths)) > 8 and lengths.min() >= 1
    tail = np.arange(16)[None] >= lengths[:, None]
    assert np.all(np.asarray(shown["tokens"])[tail] == MASK)  # nothing of the cut-off text is shown
    _, metrics = spying(DiffusionLoss(random_length=0.01), batch)
    assert metrics["tokens"] > 0.9 * 64 * 16


def test_attend_row_leaves_the_mask_out():
    batch = make_batch(4)
    batch = batch.replace(segments=batch.segments.at[:, 8:].set(2))
    assert spying(DiffusionLoss(), batch)[0]["mask"].segments is batch.segments
    assert spying(DiffusionLoss(attend="row"), batch)[0]["mask"] is None
    cut = spying(DiffusionLoss(attend="row", random_length=1.0), batch)[0]["mask"].segments
    assert set(np.unique(cut)) <= {0, 1}
    block = spying(DiffusionLoss("block", block_size=4, attend="row"), batch)[0]["mask"]
    assert block == Mask(diffusion=4)


def test_the_network_is_told_the_time_of_its_masks():
    schedule = Schedule("cosine")
    shown, _ = spying(DiffusionLoss("exact_k", schedule=schedule), make_batch(8))
    share = np.mean(shown["tokens"] == MASK, axis=1)
    np.testing.assert_allclose(schedule.mask_probability(shown["time"]), share, rtol=1e-4)
    shown, _ = spying(DiffusionLoss("t_step", steps=5), make_batch(8))
    np.testing.assert_allclose(shown["time"] * 5, np.round(shown["time"] * 5), rtol=1e-6)


def test_block_mask_of_two_blocks():
    picture = """
    11.. ....
    11.. ....
    ..11 11..
    ..11 11..
    .... 11..
    .... 11..
    .... 1111
    .... 1111"""
    expected = [[c == "1" for c in line.replace(" ", "")] for line in picture.split("\n")[1:]]
    assert np.array_equal(Mask(diffusion=2).allowed(8)[0], expected)


def test_block_of_one_is_the_autoregressive_nll(network, tiny_model):
    """Against a causal run of the same network for each prefix, the last token a mask; whatever the key."""
    encode, project, params = network
    batch = make_batch(3, 8)
    run = jax.jit(objective(DiffusionLoss("block", block_size=1), encode, project, mask_id=MASK, batch_size=3))
    apply, total = jax.jit(lambda tokens: tiny_model.apply(params, tokens, mask=Mask(causal=True)).logits), 0.0
    for i in range(8):
        prefix = batch.tokens.at[:, i].set(MASK)
        log_p = jax.nn.log_softmax(apply(prefix)[:, i, :MASK])
        total -= np.sum(np.take_along_axis(np.asarray(log_p), np.asarray(batch.tokens[:, i : i + 1]), axis=1))
    for seed in range(3):
        assert run(params, None, batch, jax.random.key(seed))[0] == pytest.approx(total / 24, rel=1e-6)
    two = jax.jit(objective(DiffusionLoss("block", block_size=2), encode, project, mask_id=MASK, batch_size=3))
    assert two(params, None, batch, KEY)[0] != pytest.approx(total / 24, rel=1e-4)


def test_block_loss_is_unbiased(network):
    encode, project, params = network
    batch = make_batch(64, 8)
    batch = batch.replace(tokens=jnp.tile(batch.tokens[:1], (64, 1)))
    exact = partial(exact_block_nelbo, encode, project, block_size=4, mask_id=MASK)
    truth = float(jax.jit(exact)(params, batch.tokens[:1])[0]) / 8
    run = jax.jit(objective(DiffusionLoss("block", block_size=4), encode, project, mask_id=MASK, batch_size=64))
    values = np.array([run(params, None, batch, jax.random.key(i))[0] for i in range(40)])
    assert abs(values.mean() - truth) < 4.5 * values.std() / np.sqrt(40)


def test_a_block_does_not_see_itself_clean(network):
    """Changing a masked token changes nothing in its own noisy block, and does change the clean copy."""
    encode, project, params = network
    tokens = make_batch(1, 8).tokens
    mask, positions, hidden = Mask(diffusion=4), jnp.tile(jnp.arange(8), 2)[None], []
    for clean in (tokens, tokens.at[0, 5].set((tokens[0, 5] + 1) % MASK)):
        noisy = clean.at[0, 4:8].set(MASK)
        hidden.append(encode(params, jnp.concatenate([noisy, clean], axis=1), None, mask, positions))
    assert np.array_equal(hidden[0][:, :8], hidden[1][:, :8])
    assert np.array_equal(hidden[0][:, 8:12], hidden[1][:, 8:12])
    assert not np.array_equal(hidden[0][:, 12:], hidden[1][:, 12:])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_equals_the_whole_batch(kind, small):
    loss = DiffusionLoss(kind, block_size=4, random_length=0.3, infill=0.3)
    encode, project, params = small
    batch = make_batch(8, first=24)
    batch = batch.replace(segments=batch.segments.at[2, 3:].set(0).at[5, 10:].set(0))
    run = objective(loss, encode, project, mask_id=MASK, batch_size=8)
    expected, (_, whole) = jax.jit(gradient_of(run))(params, None, batch, KEY)
    gradient, (_, parts) = jax.jit(gradient_of(run, 4))(params, None, batch, KEY)
    assert parts["tokens"] == whole["tokens"]
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_eight_devices_agree_with_one(share, small):
    encode, project, params = small
    batch = make_batch(16)
    run = jax.jit(objective(DiffusionLoss(masked_rows=share), encode, project, mask_id=MASK, batch_size=16))
    one, (_, metrics) = run(params, None, batch, KEY)
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    many, (_, others) = run(params, None, jax.device_put(batch, rows), KEY)
    np.testing.assert_allclose(many, one, rtol=1e-6)
    assert metrics["masked_share"] == others["masked_share"]


def test_gradients_are_finite_and_the_mask_gets_none():
    """In bf16, from logits that would overflow an exponential; the mask's logit neither helps nor learns (SUBS)."""
    params = {"embedding": jax.random.normal(KEY, (32, 8)), "head": jax.random.normal(KEY, (8, 32))}

    def encode(params, tokens, time, mask, positions):
        return (1e3 * small_encode(params, tokens, time, mask, positions)).astype(jnp.bfloat16)

    def project(params, hidden):
        return jnp.matmul(hidden, params["head"].astype(hidden.dtype), preferred_element_type=jnp.float32)

    run = objective(DiffusionLoss(masked_rows=0.6), encode, project, mask_id=MASK, batch_size=4)
    gradient, (_, metrics) = jax.jit(gradient_of(run))(params, None, make_batch(4), KEY)
    assert np.isfinite(metrics["loss"])
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))

    logits = jax.random.normal(KEY, (16, MASK + 1))
    given = objective(
        DiffusionLoss(), lambda p, tokens, *_: jnp.tile(p[None], (4, 1, 1)), identity, mask_id=MASK, batch_size=4
    )
    slope = jax.grad(lambda p: given(p, None, make_batch(4), KEY)[0])(logits)
    assert np.all(slope[:, MASK] == 0) and np.any(slope != 0)


def test_gathered_rows_and_their_gradient():
    x = jax.random.normal(KEY, (6, 3))
    index, slot = jnp.asarray([4, 1, 6]), jnp.asarray([3, 1, 3, 3, 0, 3])
    assert np.array_equal(gather_rows(x, index, slot), np.stack([x[4], x[1], np.zeros(3)]))
    weights = jnp.arange(9.0).reshape(3, 3)
    slope = jax.grad(lambda x: jnp.sum(weights * gather_rows(x, index, slot)))(x)
    expected = np.zeros((6, 3))
    expected[4], expected[1] = weights[0], weights[1]
    assert np.array_equal(slope, expected)


def test_carry_is_handed_through():
    _, (carry, _) = objective(
        DiffusionLoss(), lambda p, tokens, *_: jax.nn.one_hot(tokens, 32), identity, mask_id=MASK, batch_size=2
    )(None, {"state": 3}, make_batch(2), KEY)
    assert carry == {"state": 3}


def test_rows_must_divide_into_blocks(small):
    encode, project, params = small
    with pytest.raises(ConfigError, match="loss.block_size=5"):
        objective(DiffusionLoss("block", block_size=5), encode, project, mask_id=MASK, batch_size=2)(
            params, None, make_batch(2), KEY
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "elbo"},
        {"schedule": "linear"},
        {"time_sampling": "sobol"},
        {"attend": "all"},
        {"steps": 0},
        {"block_size": 2.0},
        {"conditional": 1},
        {"random_length": 1.5},
        {"infill": "half"},
        {"masked_rows": -0.1},
        {"t_min": 0.5, "t_max": 0.5},
    ],
    ids=str,
)
def test_bad_fields_are_named(fields):
    with pytest.raises(ConfigError, match=f"loss.{list(fields)[0]}"):
        DiffusionLoss(**fields)
