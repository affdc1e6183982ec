import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Mask
from ruvjax.core.params import count, init, shardings
from ruvjax.core.rope import RopeScaling
from ruvjax.core.sharding import RULES, MeshConfig, batch_sharding, make_mesh
from ruvjax.errors import ConfigError
from ruvjax.models.transformer import Transformer

TINY = Transformer(vocab_size=32, layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, max_length=64)
VARIANTS = {
    "llama": TINY,
    "qwen2": dataclasses.replace(TINY, qkv_bias=True, tied_head=False),
    "qwen3": dataclasses.replace(TINY, qk_norm=True, head_dim=16),
    "sinusoidal": dataclasses.replace(TINY, time="sinusoidal"),
    "mdlm": dataclasses.replace(TINY, time="adaln", norm="layer", mlp="gelu", kv_heads=0),
    "yarn": dataclasses.replace(TINY, rope_scaling=RopeScaling("yarn", 4.0, 32)),
    "dream": dataclasses.replace(TINY, qkv_bias=True, shift=True, window=4),
}


def noisy(model, seed=0):
    """Parameters with every leaf non-zero, so that zero-initialised weights count too."""
    params = init(model, jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return treedef.unflatten([x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def tokens(batch=2, length=10, seed=5):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 32)


def times(model, batch=2):
    return None if model.time == "none" else jnp.linspace(0.2, 0.9, batch)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("llama", "sinusoidal", "dream") else pytest.param(name, marks=pytest.mark.slow)
        for name in VARIANTS
    ],
)
def test_scan_and_loop_agree_and_every_weight_matters(name):
    model = VARIANTS[name]
    params, x = noisy(model), tokens()
    loop = model.apply(params, x, time=times(model))
    scan = dataclasses.replace(model, unroll=False).apply(params, x, time=times(model))
    assert loop.logits is not None and loop.logits.shape == (2, 10, 32)
    np.testing.assert_allclose(loop.logits, scan.logits, atol=1e-5)
    assert count(model) == sum(leaf.size for leaf in jax.tree.leaves(params))
    gradient = jax.grad(lambda p: jnp.sum(model.apply(p, x, time=times(model)).logits ** 2))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", VARIANTS)
def test_some_rows_can_be_finished_alone(name):
    model = VARIANTS[name]
    params, x, rows = noisy(model), tokens(), jnp.array([13, 2, 2, 7])
    begun = model.begin(params, x, time=times(model))
    assert (begun.mixed is None) == (model.time == "adaln")
    some = jax.tree.map(lambda part: part.reshape(20, -1)[rows], begun)
    whole = model.apply(params, x, time=times(model), logits=False).hidden
    np.testing.assert_allclose(model.finish(params, some), whole.reshape(20, -1)[rows], atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_follows_float32(name):
    model = VARIANTS[name]
    params, x = noisy(model), tokens()
    wide = model.apply(params, x, time=times(model)).logits
    narrow = dataclasses.replace(model, dtype="bfloat16").apply(params, x, time=times(model)).logits
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.05 * np.abs(wide).max())


def test_causal_mask_hides_the_future_and_bidirectional_does_not():
    params, x = noisy(TINY), tokens()
    changed = x.at[:, 7].set((x[:, 7] + 1) % 32)
    causal = [TINY.apply(params, t, mask=Mask(causal=True)).logits for t in (x, changed)]
    both = [TINY.apply(params, t).logits for t in (x, changed)]
    np.testing.assert_array_equal(causal[0][:, :7], causal[1][:, :7])
    assert np.abs(both[0][:, :7] - both[1][:, :7]).max() > 1e-4


def test_packed_segments_equal_separate_rows():
    params, x = noisy(TINY), tokens(1, 10)
    segments = jnp.array([[1] * 4 + [2] * 6], jnp.int32)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]], jnp.int32)
    packed = TINY.apply(params, x, mask=Mask(segments=segments), positions=positions).logits
    first, second = TINY.apply(params, x[:, :4]).logits, TINY.apply(params, x[:, 4:]).logits
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], axis=1), atol=1e-5)


def test_padding_changes_nothing():
    params, x = noisy(TINY), tokens(2, 10)
    segments = jnp.array([[1] * 10, [1] * 6 + [0] * 4], jnp.int32)
    padded = TINY.apply(params, x, mask=Mask(segments=segments)).logits
    np.testing.assert_allclose(padded[1, :6], TINY.apply(params, x[1:, :6]).logits[0], atol=1e-5)


def test_a_window_of_the_model_is_one_of_the_mask_and_the_narrower_counts():
    params, x = noisy(TINY), tokens()
    windowed = dataclasses.replace(TINY, window=4)
    expected = TINY.apply(params, x, mask=Mask(causal=True, window=4)).logits
    assert np.abs(expected - TINY.apply(params, x, mask=Mask(causal=True)).logits).max() > 1e-4
    for given in (0, 4, 9):
        found = windowed.apply(params, x, mask=Mask(causal=True, window=given)).logits
        np.testing.assert_array_equal(found, expected)
    narrow = windowed.apply(params, x, mask=Mask(window=2)).logits
    np.testing.assert_array_equal(narrow, TINY.apply(params, x, mask=Mask(window=2)).logits)


def test_shifted_logits_are_those_of_the_position_before():
    params, x = noisy(TINY), tokens(1, 10)
    shifted = dataclasses.replace(TINY, shift=True)
    plain, found = TINY.apply(params, x), shifted.apply(params, x)
    np.testing.assert_array_equal(found.logits[:, 1:], plain.logits[:, :-1])
    np.testing.assert_array_equal(found.logits[:, 0], plain.logits[:, 0])
    np.testing.assert_array_equal(shifted.head(params, found.hidden), found.logits)  # whoever reads out finds the same
    # In a packed row every segment begins anew, and padding on the left changes nothing.
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2]], jnp.int32)
    positions = jnp.array([[0, 0, 0, 1, 2, 0, 1, 2, 3, 4]], jnp.int32)
    packed = shifted.apply(params, x, mask=Mask(segments=segments), positions=positions).logits
    for start, end in ((2, 5), (5, 10)):
        alone = shifted.apply(params, x[:, start:end]).logits
        np.testing.assert_allclose(packed[:, start:end], alone, atol=1e-5)


def test_factors_divide_the_frequencies():
    params, x = noisy(TINY), tokens()
    linear = dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 3.0)).apply(params, x).logits
    factors = dataclasses.replace(TINY, rope_scaling=RopeScaling("factors", factors=(3.0,) * 4)).apply(params, x)
    np.testing.assert_allclose(factors.logits, linear, atol=1e-6)
    wrong = dataclasses.replace(TINY, rope_scaling=RopeScaling("factors", factors=(3.0,) * 5))
    with pytest.raises(ConfigError, match="has 5 entries, the heads have 4 pairs"):
        wrong.apply(params, x)


def test_attention_depends_on_relative_position_only():
    params, x = noisy(TINY), tokens(1, 8)
    moved = TINY.apply(params, x, positions=jnp.arange(8)[None] + 100).logits
    np.testing.assert_allclose(moved, TINY.apply(params, x).logits, atol=2e-4)


@pytest.mark.parametrize("mesh", [MeshConfig(8), MeshConfig(1, 8), MeshConfig(2, 2, 2), MeshConfig(2, 1, -1)])
def test_losses_agree_on_any_mesh(mesh):
    model = dataclasses.replace(TINY, heads=4, kv_heads=4)
    params, x = noisy(model), tokens(8, 10)

    def loss(params, x):
        logits = model.apply(params, x).logits
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], -1))

    plain, gradient = jax.jit(jax.value_and_grad(loss))(params, x)
    devices = make_mesh(mesh)
    laid_out = jax.device_put(params, shardings(model, devices, RULES))
    batch = jax.device_put(x, batch_sharding(devices))
    sharded, sharded_gradient = jax.jit(jax.value_and_grad(loss))(laid_out, batch)
    np.testing.assert_allclose(sharded, plain, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, sharded_gradient)


def test_one_batch_is_learned_by_heart():
    params, x = init(TINY, jax.random.key(0)), tokens(4, 8)

    @jax.jit
    def step(params):
        def loss(params):
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(TINY.apply(params, x).logits), x[..., None], -1))

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), value

    for _ in range(60):
        params, value = step(params)
    assert value < 0.05


@pytest.mark.parametrize(
    "change,message",
    [
        ({"width": 33}, "multiple of model.heads"),
        ({"heads": 3}, "multiple of model.kv_heads"),
        ({"layers": "two"}, "model.layers='two'"),
        ({"time": "sin"}, "model.time='sin'"),
        ({"head_dim": 7}, "must be even"),
        ({"tied_head": "yes"}, "true or false"),
        ({"shift": 1}, "model.shift=1 must be true or false"),
        ({"window": -1}, "model.window=-1"),
        ({"rope_theta": float("nan")}, "model.rope_theta=nan"),
        ({"norm_eps": float("inf")}, "model.norm_eps=inf"),
    ],
)
def test_wrong_hyper_parameters_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "ntk"}, "rope_scaling.kind='ntk'"),
        ({"kind": "linear", "factor": 0.5}, "rope_scaling.factor=0.5"),
        ({"kind": "linear", "factor": float("nan")}, "rope_scaling.factor=nan"),
        ({"kind": "yarn", "factor": 2.0}, "original_length must be positive"),
        ({"kind": "yarn", "factor": 2.0, "original_length": 8, "beta_slow": 0.0}, "beta_slow=0.0 must be positive"),
        ({"kind": "llama3", "factor": 2.0, "original_length": 8, "low_freq": 4.0}, "low_freq=4.0 must be below"),
        ({"kind": "factors"}, "rope_scaling.factors="),
        ({"kind": "factors", "factors": (1.0, 0.0)}, "must be positive"),
        ({"kind": "none", "factors": (1.0,)}, "only for kind='factors'"),
    ],
)
def test_wrong_rope_scalings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**settings)


def test_a_time_conditioned_model_asks_for_the_time():
    model = VARIANTS["sinusoidal"]
    with pytest.raises(ConfigError, match="needs the time"):
        model.apply(noisy(model), tokens())
