"""Mamba and Mamba-2: padding, packing, chunks, steps and rollback change nothing that they should not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.params import count, init, shardings
from ruvjax.core.sharding import RULES, MeshConfig, make_mesh
from ruvjax.errors import ConfigError
from ruvjax.models import ssm
from ruvjax.models.mamba import Mamba
from ruvjax.models.mamba2 import Mamba2

MODELS = {
    "mamba": Mamba(vocab_size=32, layers=2, width=16, state=4),
    "mamba2": Mamba2(vocab_size=32, layers=2, width=16, state=4, head_dim=8, groups=2),
}
VARIANTS = MODELS | {
    "untied": dataclasses.replace(MODELS["mamba"], tied_head=False, bias=True, conv_bias=False, dt_rank=3, conv=3),
    "both": dataclasses.replace(MODELS["mamba"], direction="both"),
    "both2": dataclasses.replace(MODELS["mamba2"], direction="both", bias=True),
}
TOLERANCE = 2e-5
NAMES = pytest.mark.parametrize("name", MODELS)


@functools.cache
def noisy(model):
    """Parameters with noise in every leaf: zeros and ones would hide a mix-up."""
    params = jax.jit(lambda key: init(model, key))(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 64))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params)


@functools.partial(jax.jit, static_argnames=("model", "trace", "impl"))
def apply(model, params, tokens, segments=None, cache=None, trace=False, impl=None):
    return model.apply(params, tokens, segments=segments, cache=cache, trace=trace, impl=impl)


def tokens(batch=2, length=10, seed=2):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 32)


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), one, other)


@pytest.mark.parametrize(
    "name", [name if name in MODELS else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_scan_and_loop_agree_and_every_weight_matters(name):
    model = VARIANTS[name]
    params, x = noisy(model), tokens()
    loop = apply(model, params, x, trace=True)
    scan = apply(dataclasses.replace(model, unroll=False, remat=True), params, x, trace=True)
    close((loop.logits, loop.aux["layers"]), (scan.logits, scan.aux["layers"]))
    assert loop.logits.shape == (2, 10, 32) and len(loop.aux["layers"]) == model.layers + 1
    close(loop.logits, apply(model, params, x, impl="reference").logits)
    assert count(model) == sum(leaf.size for leaf in jax.tree.leaves(params))
    model = dataclasses.replace(model, unroll=False)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, x).logits ** 2)))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@NAMES
@pytest.mark.parametrize("packed", [False, True])
def test_spans_of_a_long_row_change_nothing(name, packed, monkeypatch):
    """Loss and gradients with the row taken four positions at a time, the last span short."""
    monkeypatch.setattr(ssm, "SPAN", 4)
    model = dataclasses.replace(MODELS[name], unroll=False)
    params, x = noisy(model), tokens()
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 3, 3, 3], [0, 1, 1, 1, 1, 1, 0, 2, 0, 0]]) if packed else None

    def loss(params, remat):
        logits = dataclasses.replace(model, remat=remat).apply(params, x, segments=segments).logits
        return jnp.sum(jnp.where(True if segments is None else (segments != 0)[:, :, None], logits, 0.0) ** 2)

    plain, spans = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3 * np.abs(a).max()), plain, spans)


@NAMES
@pytest.mark.parametrize("size", [1, 3, 10])
def test_chunks_and_steps_equal_one_pass(name, size):
    model = MODELS[name]
    params, x = noisy(model), tokens()
    whole = apply(model, params, x, cache=model.empty_cache(2))
    close(whole.logits, apply(model, params, x).logits)
    cache, found = model.empty_cache(2), []
    for start in range(0, 10, size):
        output = apply(model, params, x[:, start : start + size], cache=cache)
        cache = output.aux["cache"]
        found.append(output.logits)
    close((jnp.concatenate(found, axis=1), cache), (whole.logits, whole.aux["cache"]))
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, model.empty_cache(2))


@NAMES
@pytest.mark.parametrize("real", [[2, 3, 4, 6, 7], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [9], []], ids=str)
def test_padding_anywhere_leaves_logits_cache_and_steps_as_they_are(name, real):
    model = MODELS[name]
    params, x = noisy(model), tokens(1)
    segments = jnp.zeros((1, 10), jnp.int32).at[0, jnp.array(real, jnp.int32)].set(1)
    before = apply(model, params, tokens(1, 4, 5), cache=model.empty_cache(1)).aux["cache"]
    for cache in (model.empty_cache(1), before):
        padded = apply(model, params, x, segments, cache)
        if not real:
            close(padded.aux["cache"], cache)
            continue
        alone = apply(model, params, x[:, jnp.array(real)], None, cache)
        close((padded.logits[:, jnp.array(real)], padded.aux["cache"]), (alone.logits, alone.aux["cache"]))
        steps = [apply(model, params, x[:, :1], None, output.aux["cache"]).logits for output in (padded, alone)]
        close(*steps)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_segments_equal_separate_rows(name):
    model = VARIANTS[name]
    params, x = noisy(model), tokens(1)
    # Two stretches of one segment with another between them are two texts.
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0, 1, 1]], jnp.int32)
    packed = apply(model, params, x, segments).logits
    for start, stop in ((0, 3), (3, 4), (4, 6), (8, 10)):
        close(packed[:, start:stop], apply(model, params, x[:, start:stop]).logits)
    joined = apply(model, params, x).logits
    assert np.abs(joined[:, 8:] - packed[:, 8:]).max() > 1e-3


@NAMES
def test_the_cache_after_packed_rows_is_that_of_the_last_text(name):
    model = MODELS[name]
    params, x = noisy(model), tokens(1)
    output = apply(model, params, x, jnp.array([[1, 1, 1, 1, 1, 1, 1, 2, 2, 0]], jnp.int32), model.empty_cache(1))
    alone = apply(model, params, x[:, 7:9], jnp.full((1, 2), 2, jnp.int32), model.empty_cache(1))
    close(output.aux["cache"], alone.aux["cache"])
    # In the next chunk the text goes on, or another one starts.
    on, new = (
        apply(model, params, x[:, :3], jnp.full((1, 3), s, jnp.int32), output.aux["cache"]).logits for s in (2, 3)
    )
    close(new, apply(model, params, x[:, :3]).logits)
    assert np.abs(on - new).max() > 1e-3


@NAMES
def test_rollback_gives_the_cache_of_any_prefix(name):
    model = MODELS[name]
    params, x = noisy(model), tokens(3)
    before = apply(model, params, x[:, :4], cache=model.empty_cache(3)).aux["cache"]
    keep = jnp.array([0, 2, 6])
    rolled = jax.jit(model.rollback)(params, before, x[:, 4:], keep)
    for row, kept in enumerate(keep):
        wanted = apply(model, params, x[row : row + 1, : 4 + int(kept)], cache=model.empty_cache(1)).aux["cache"]
        close(jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], rolled), wanted)


@NAMES
def test_gradients_pass_through_the_cache(name):
    model = MODELS[name]
    params, x = noisy(model), tokens()

    def whole(params):
        return jnp.sum(model.apply(params, x).logits[:, 5:] ** 2)

    def in_chunks(params):
        cache = model.apply(params, x[:, :5], cache=model.empty_cache(2)).aux["cache"]
        return jnp.sum(model.apply(params, x[:, 5:], cache=cache).logits ** 2)

    one, other = (jax.jit(jax.grad(loss))(params) for loss in (whole, in_chunks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(a).max()), one, other)


@NAMES
def test_the_future_is_hidden_from_left_to_right_and_seen_in_both_directions(name):
    model = MODELS[name]
    x = tokens()
    changed = x.at[:, 7].set((x[:, 7] + 1) % 32)
    for direction, seen in (("forward", False), ("both", True)):
        wanted = dataclasses.replace(model, direction=direction)
        one, other = (apply(wanted, noisy(wanted), t).logits for t in (x, changed))
        assert (np.abs(one[:, :7] - other[:, :7]).max() > 1e-4) == seen


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_follows_float32(name):
    model = VARIANTS[name]
    params, x = noisy(model), tokens()
    wide = apply(model, params, x).logits
    narrow = apply(dataclasses.replace(model, dtype="bfloat16"), params, x)
    assert narrow.logits.dtype == jnp.float32 and narrow.hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.logits, wide, atol=0.08 * np.abs(wide).max())


@NAMES
def test_the_official_initialisation(name):
    model = dataclasses.replace(MODELS[name], width=64, layers=3, head_dim=1) if name == "mamba2" else Mamba(width=64)
    params = init(model, jax.random.key(3))
    scan = params.layers.scan
    steps = np.log1p(np.exp(np.asarray(scan.dt_bias, np.float64)))
    assert steps.min() > 0.0009 and steps.max() < 0.101 and np.median(steps) < 0.03  # log-uniform: the median is 0.01
    np.testing.assert_array_equal(scan.skip, np.ones_like(scan.skip))
    decay = np.exp(np.asarray(scan.a_log, np.float64))
    if name == "mamba":
        np.testing.assert_allclose(decay, np.broadcast_to(np.arange(1, 17), decay.shape), rtol=1e-6)
        assert 0.9 / np.sqrt(model.rank) < np.abs(scan.dt).max() <= 1 / np.sqrt(model.rank)
    else:
        assert 1 <= decay.min() < 2 and 15 < decay.max() <= 16
    bound = 1 / np.sqrt(model.layers * model.inner)
    assert 0.98 * bound < np.abs(params.layers.outward).max() <= bound
    np.testing.assert_allclose(np.std(params.embedding), 0.02, rtol=0.02)


@NAMES
def test_one_batch_is_learned_by_heart(name):
    model = MODELS[name]
    params, x = init(model, jax.random.key(0)), tokens(4, 9)
    moments = jax.tree.map(jnp.zeros_like, (params, params))

    def loss(params):
        logits = jax.nn.log_softmax(model.apply(params, x[:, :-1]).logits)
        return -jnp.mean(jnp.take_along_axis(logits, x[:, 1:, None], -1))

    @jax.jit
    def step(params, moments):
        value, gradient = jax.value_and_grad(loss)(params)
        first = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, moments[0], gradient)
        second = jax.tree.map(lambda m, g: 0.95 * m + 0.05 * g * g, moments[1], gradient)
        update = jax.tree.map(lambda p, m, v: p - 0.01 * m / (jnp.sqrt(v) + 1e-8), params, first, second)
        return update, (first, second), value

    for _ in range(120):
        params, moments, value = step(params, moments)
    assert value < 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree_on_a_mesh(name):
    model = VARIANTS[name]
    params, x = noisy(model), tokens(4)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    laid_out = jax.device_put(params, shardings(model, mesh, RULES))
    close(apply(model, laid_out, x).logits, apply(model, params, x).logits)


@pytest.mark.parametrize(
    "model, change, message",
    [
        ("mamba", {"width": 0}, "model.width=0"),
        ("mamba", {"state": 2.5}, "model.state=2.5"),
        ("mamba", {"dt_rank": -1}, "model.dt_rank=-1"),
        ("mamba", {"dt_min": 0.2}, "model.dt_min=0.2 must not exceed"),
        ("mamba", {"direction": "backward"}, "model.direction='backward'"),
        ("mamba", {"remat": 1}, "model.remat=1"),
        ("mamba2", {"head_dim": 5}, "model.head_dim=5 must divide"),
        ("mamba2", {"groups": 3}, "model.groups=3 must divide"),
    ],
)
def test_wrong_hyper_parameters_are_named(model, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(MODELS[model], **change)


def test_a_model_of_both_directions_has_no_cache():
    model = VARIANTS["both"]
    with pytest.raises(ConfigError, match="no cache"):
        model.empty_cache(1)
    with pytest.raises(ConfigError, match="no cache"):
        model.apply(noisy(model), tokens(), cache=MODELS["mamba"].empty_cache(2))
    assert hash(model) == hash(dataclasses.replace(model))
