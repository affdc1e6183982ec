"""Adapters over every family: identity at the start, merged weights, ranks by layer, training of the adapters alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quant_matmul import quantize
from ruvjax.core import params as core_params
from ruvjax.core.adapted import Adapted, Lora
from ruvjax.core.params import unstack
from ruvjax.errors import ConfigError
from ruvjax.lora.adapter import (
    Adapters,
    LoraConfig,
    attach,
    count,
    detach,
    init,
    merge,
    objective_over,
    select,
    unmerge,
)
from ruvjax.lora.sites import linear_sites, plan
from ruvjax.models.mamba import Mamba
from ruvjax.models.mamba2 import Mamba2
from ruvjax.models.transformer import Transformer
from ruvjax.models.trm import TinyRecursive
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer, learning_rate
from ruvjax.training.state import init_state
from ruvjax.training.step import compile_step, make_step

TINY = Transformer(vocab_size=16, layers=2, width=16, heads=2, kv_heads=1, mlp_width=24, max_length=16)
BOARD = {"vocab_size": 6, "length": 9, "rows": 3, "columns": 3, "width": 8, "heads": 2, "mlp_width": 12, "mix_width": 8}
BOARD |= {"layers": 1, "prefix": 3, "cycles": 1, "updates": 1, "unroll": False}
MODELS = {
    "transformer": TINY,
    "scanned": dataclasses.replace(TINY, unroll=False, qkv_bias=True),
    "adaln": dataclasses.replace(TINY, time="adaln", norm="layer", mlp="gelu", unroll=False),
    "mamba": Mamba(vocab_size=16, layers=2, width=8, state=4, dt_rank=2, direction="both", unroll=False),
    "mamba2": Mamba2(vocab_size=16, layers=2, width=8, state=4, head_dim=4, groups=2, unroll=False),
    # In float64: the recursion of a random network this small makes 1e-2 of a rounding of 1e-7.
    "trm": TinyRecursive(**BOARD, copy=1, marks=2, dtype="float64"),
    "trm_axial": TinyRecursive(**BOARD, mixer="axial", dtype="float64"),
}
QUICK = ("transformer", "scanned", "mamba")  # the others compile for ten seconds each
TRANSFORMER = ("layers.q", "layers.k", "layers.v", "layers.o", "layers.up", "layers.down", "layers.gate")
SITES = {
    "transformer": set(TRANSFORMER),
    "scanned": set(TRANSFORMER),
    "adaln": {*TRANSFORMER[:-1], "layers.modulation", "time.first", "time.second", "time.final"},
    "mamba": {"layers.inward", "layers.outward"}
    | {f"layers.{scan}.{name}" for scan in ("scan", "reverse") for name in ("select", "dt")},
    "mamba2": {"layers.inward", "layers.outward"},
    "trm": {"layers.up", "layers.down", "layers.mix_up", "layers.mix_down", "copy.gate"},
    "trm_axial": {f"layers.{name}" for name in ("up", "down", "qkv", "o", "column_qkv", "column_o")},
}


@functools.cache
def base(name):
    """Parameters with noise in every leaf, so that nothing is at zero."""
    params = core_params.init(MODELS[name], jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 64))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    return as_computed(name, params)


def as_computed(name, tree):
    return jax.tree.map(lambda x: x.astype(MODELS[name].dtype), tree)


@functools.partial(jax.jit, static_argnames="name")
def outputs(name, params):
    """Logits of a batch of 3."""
    model = MODELS[name]
    if isinstance(model, TinyRecursive):
        tokens = jax.random.randint(jax.random.key(2), (3, model.length), 0, model.vocab_size, jnp.int32)
        return model.apply(params, tokens, model.init_latent(params, 3))[0].logits
    tokens = jax.random.randint(jax.random.key(2), (3, 5), 0, model.vocab_size)
    return model.apply(params, tokens, time=jnp.array([0.2, 0.5, 0.9])).logits


def everywhere(name, **settings):
    return LoraConfig(rank=2, targets=tuple(sorted(SITES[name])), **settings)


def trained(adapters, seed=5):
    """`adapters` with numbers where a trained adapter has them: in `b`, up to each layer's rank; magnitudes moved."""

    def moved(index, update):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index), 2)
        live = jnp.any(update.a != 0, axis=-2)[..., None]
        b = jnp.where(live, 0.3 * jax.random.normal(keys[0], update.b.shape), 0)
        magnitude = update.magnitude
        if magnitude is not None:
            magnitude = magnitude * (1 + 0.2 * jax.random.normal(keys[1], magnitude.shape))
        return dataclasses.replace(update, b=b, magnitude=magnitude)

    return {path: moved(i, update) for i, (path, update) in enumerate(sorted(adapters.items()))}


@pytest.mark.parametrize("name", MODELS)
def test_the_linear_sites_of_a_family(name):
    assert set(linear_sites(MODELS[name])) == SITES[name]
    layers = {path for path in SITES[name] if path.startswith("layers.")}
    assert set(plan(LoraConfig(targets=("all-linear",)), MODELS[name])) == layers


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODELS]
)
def test_a_new_adapter_changes_nothing_and_a_trained_one_is_the_merged_weights(name):
    model, wide = MODELS[name], MODELS[name].dtype == "float64"
    with jax.enable_x64(wide):
        params = base(name)
        plain = outputs(name, params)
        fresh = as_computed(name, init(everywhere(name), model, jax.random.key(3)))
        np.testing.assert_array_equal(outputs(name, attach(params, fresh)), plain)
        for settings in ({}, {"dora": True}):
            adapters = trained(init(everywhere(name, **settings), model, jax.random.key(3), params))
            adapters = as_computed(name, adapters)
            found = outputs(name, attach(params, adapters))
            scale = float(jnp.abs(plain).max())
            expected = outputs(name, merge(params, adapters))
            np.testing.assert_allclose(found, expected, atol=(1e-8 if wide else 2e-5) * scale)
            assert float(jnp.abs(found - plain).max()) > 0.01 * scale  # negative control: it is there at all


def test_a_new_dora_adapter_changes_nothing_but_rounding():
    fresh = init(everywhere("transformer", dora=True), TINY, jax.random.key(3), base("transformer"))
    found = outputs("transformer", attach(base("transformer"), fresh))
    np.testing.assert_allclose(found, outputs("transformer", base("transformer")), atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_layers_may_be_unstacked_after_attaching(dora):
    config = LoraConfig(rank=2, targets=("q", "layers.1.down"), rank_pattern={"layers.0.q": 1}, dora=dora)
    adapters = trained(init(config, TINY, jax.random.key(3), base("transformer")))
    attached = attach(base("transformer"), adapters)
    scanned = outputs("scanned", attach(base("scanned"), adapters))
    assert scanned.shape == outputs("transformer", unstack(attached, TINY.layers)).shape
    np.testing.assert_allclose(
        outputs("transformer", unstack(attached, TINY.layers)), outputs("transformer", attached), atol=1e-5
    )
    one_by_one = dataclasses.replace(MODELS["scanned"], unroll=True)
    tokens = jax.random.randint(jax.random.key(2), (3, 5), 0, TINY.vocab_size)
    logits = jax.jit(lambda params: one_by_one.apply(params, tokens).logits)
    np.testing.assert_allclose(scanned, logits(attach(base("scanned"), adapters)), atol=1e-5)


def test_ranks_alphas_and_scales_by_layer():
    config = LoraConfig(
        rank=4,
        alpha=8.0,
        targets=("q_proj", "layers.1.up"),
        rank_pattern={"q": 2, "layers.1.q": 1},
        alpha_pattern={"layers.1.q": 3.0},
    )
    sites = plan(config, TINY)
    assert {path: site.ranks for path, site in sites.items()} == {"layers.q": (2, 1), "layers.up": (0, 4)}
    assert sites["layers.q"].scales(rslora=False) == (4.0, 3.0)
    assert sites["layers.up"].scales(rslora=True) == (0.0, 4.0)
    adapters = init(config, TINY, jax.random.key(0))
    a = np.asarray(adapters["layers.q"].a)
    assert a.shape == (2, 16, 2) and np.all(a[1, :, 1] == 0) and np.all(a[1, :, 0] != 0) and np.all(a[0] != 0)
    assert np.all(np.asarray(adapters["layers.up"].a)[0] == 0)
    assert count(config, TINY) == 2 * (16 + 16) + (16 + 16) + 4 * (16 + 24)
    assert count(dataclasses.replace(config, dora=True), TINY) == count(config, TINY) + 2 * 16 + 24


def test_first_values_are_those_of_peft():
    """Uniform within 1 / sqrt(inner), whose deviation is that over sqrt(3), or normal of deviation 1 / rank."""
    model = dataclasses.replace(TINY, width=256, mlp_width=256, heads=4, kv_heads=0)
    a = np.asarray(init(LoraConfig(rank=64, targets=("up",)), model, jax.random.key(0))["layers.up"].a)
    assert np.abs(a).max() <= 1 / 16 and a.std() == pytest.approx(1 / 16 / np.sqrt(3), rel=0.02)
    config = LoraConfig(rank=64, targets=("up",), rank_pattern={"layers.0.up": 32}, init="gaussian")
    a = np.asarray(init(config, model, jax.random.key(0))["layers.up"].a)
    assert a[1].std() == pytest.approx(1 / 64, rel=0.03) and a[0, :, :32].std() == pytest.approx(1 / 32, rel=0.03)


def test_adapters_are_declared_like_a_models_parameters():
    declared = Adapters(LoraConfig(rank=2, targets=("q", "up")), TINY)
    shapes = core_params.abstract(declared)
    assert shapes["layers.up"].b.shape == (2, 2, 24)
    drawn = init(declared.config, TINY, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def objective(params, carry, batch, key):
    logits = TINY.apply(params, batch).logits[:, :-1]
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch[:, 1:, None], -1)[..., 0]
    return jnp.mean(nll), (carry, {"loss_sum": jnp.sum(nll), "tokens": jnp.float32(nll.size)})


@pytest.mark.parametrize(("kind", "dora"), [("adamw", False), ("muon", False), ("adamw", True)])
def test_one_batch_is_overfitted_by_the_adapters_alone(kind, dora):
    """`training.step` as it is; afterwards the base is what it was, and so are scales, padding and idle layers."""
    params = base("transformer")
    before = jax.tree.map(np.asarray, params)
    config = LoraConfig(rank=4, targets=("q", "v", "up", "layers.1.down"), rank_pattern={"layers.0.q": 1}, dora=dora)
    settings = OptimizerConfig(kind=kind, lr=0.02, schedule="constant", warmup_steps=1, weight_decay=0.1)
    optimizer = build_optimizer(settings, Adapters(config, TINY).spec())
    fresh = init(config, TINY, jax.random.key(3), params)
    start = jax.tree.map(np.asarray, fresh)
    state = init_state(fresh, optimizer, jax.random.key(4))
    step = make_step(objective_over(objective, params), optimizer, functools.partial(learning_rate, settings))
    batch = jax.random.randint(jax.random.key(5), (4, 8), 0, 16)
    compiled = compile_step(step, state, batch)
    losses = []
    for _ in range(40):
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, params))
    ranks = {path: site.ranks for path, site in plan(config, TINY).items()}
    for path, update in state.params.items():
        np.testing.assert_array_equal(update.scale, start[path].scale)
        for layer, rank in enumerate(ranks[path]):
            assert not np.any(update.a[layer, :, rank:]) and not np.any(update.b[layer, rank:])
            assert rank == 0 or np.any(update.b[layer, :rank])
        if dora:
            moved = np.any(np.asarray(update.magnitude) != start[path].magnitude, axis=-1)
            np.testing.assert_array_equal(moved, np.asarray(ranks[path]) > 0)


def test_a_quantized_base_is_adapted_but_not_merged():
    model = dataclasses.replace(TINY, width=32, mlp_width=32)
    params = core_params.init(model, jax.random.key(0))
    names = ("q", "k", "v", "o", "up", "down", "gate")
    held = {name: quantize(np.asarray(getattr(params.layers, name)), "Q8_0") for name in names}
    packed = params.replace(layers=params.layers.replace(**held))
    plain = params.replace(layers=params.layers.replace(**{name: held[name].dequantize() for name in names}))
    tokens = jax.random.randint(jax.random.key(2), (2, 5), 0, 16)
    logits = jax.jit(lambda params: model.apply(params, tokens).logits)
    for dora in (False, True):
        config = LoraConfig(rank=2, targets=("all-linear",), dora=dora)
        adapters = trained(init(config, model, jax.random.key(3), packed))
        found, expected = (logits(attach(weights, adapters)) for weights in (packed, plain))
        np.testing.assert_allclose(found, expected, atol=0.03 * float(jnp.abs(expected).max()))
        with pytest.raises(ConfigError, match=r"layers\.\w+ is quantized \(Q8_0\)"):
            merge(packed, adapters)


def test_unmerging_gives_the_weights_back():
    params, config = base("transformer"), LoraConfig(rank=2, targets=("all-linear",))
    adapters = trained(init(config, TINY, jax.random.key(3)))
    back = unmerge(merge(params, adapters), adapters)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    dora = trained(init(dataclasses.replace(config, dora=True), TINY, jax.random.key(3), params))
    with pytest.raises(ConfigError, match="DoRA update cannot be taken out"):
        unmerge(params, dora)


def test_detaching_gives_the_very_parameters_back():
    params = base("transformer")
    attached = attach(params, init(LoraConfig(rank=2), TINY, jax.random.key(3)))
    assert isinstance(attached.layers.q, Adapted)
    assert all(a is b for a, b in zip(jax.tree.leaves(detach(attached)), jax.tree.leaves(params), strict=True))


def test_a_batch_of_mixed_adapters_is_each_row_with_its_own():
    params = base("transformer")
    configs = [
        LoraConfig(rank=2, targets=("q", "down")),
        LoraConfig(rank=4, alpha=4.0, targets=("q", "v"), rank_pattern={"layers.0.q": 1}),
    ]
    adapters = [trained(init(config, TINY, jax.random.key(i)), i) for i, config in enumerate(configs)]
    ids = jnp.array([[1], [-1], [0]], jnp.int32)
    found = outputs("transformer", attach(params, select(adapters, ids)))
    alone = [outputs("transformer", attach(params, one)) for one in adapters] + [outputs("transformer", params)]
    for row, which in enumerate((1, 2, 0)):
        np.testing.assert_allclose(found[row], alone[which][row], atol=1e-5)
    both = select(adapters, jnp.array([[0, 1]] * 3, jnp.int32), jnp.array([[0.5, 0.25]] * 3))
    weighted = [{p: u.replace(scale=w * u.scale) for p, u in one.items()} for one, w in zip(adapters, (0.5, 0.25))]
    merged = merge(merge(params, weighted[0]), weighted[1])
    np.testing.assert_allclose(outputs("transformer", attach(params, both)), outputs("transformer", merged), atol=2e-5)
    dora = init(LoraConfig(dora=True), TINY, jax.random.key(0), params)
    with pytest.raises(ConfigError, match="DoRA adapters cannot be mixed"):
        select([dora], ids)
    with pytest.raises(ConfigError, match="no adapter to select"):
        select([], ids)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"targets": ("gatte",)}, "no linear site 'gatte'", "did you mean gate?"),
        ({"targets": ("q", "layers.7.q")}, "no linear site 'layers.7.q'", "did you mean layers.1.q?"),
        ({"targets": ("embedding",)}, "no linear site 'embedding'", "one of down, gate, k, o, q, up, v"),
        ({"targets": ("inward",)}, "no linear site 'inward'", ""),
        ({"rank_pattern": {"k": 2}}, "adapter.rank_pattern: no target is called 'k'", ""),
        ({"alpha_pattern": {"layers.1.qq": 2.0}}, "adapter.alpha_pattern", "did you mean layers.1.q?"),
    ],
)
def test_a_name_that_fits_nothing_is_refused_with_the_nearest(settings, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        plan(LoraConfig(**settings), TINY)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": True},
        {"rank": 2.0},
        {"alpha": 0.0},
        {"alpha": float("inf")},
        {"targets": ()},
        {"targets": "q"},
        {"rank_pattern": {"q": 0}},
        {"rank_pattern": ("q", 1)},
        {"alpha_pattern": {"q": -1.0}},
        {"rslora": "yes"},
        {"init": "zeros"},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(settings):
    with pytest.raises(ConfigError, match="adapter."):
        LoraConfig(**settings)


def test_what_cannot_be_attached_is_refused():
    params, adapters = base("transformer"), init(LoraConfig(rank=2, targets=("q",)), TINY, jax.random.key(3))
    attached = attach(params, adapters)
    with pytest.raises(ConfigError, match=r"layers\.q is adapted already"):
        attach(attached, adapters)
    with pytest.raises(ConfigError, match="unstacked"):
        attach(unstack(params, TINY.layers), adapters)
    with pytest.raises(ConfigError, match=r"no weight at 'layers\.inward'"):
        attach(params, {"layers.inward": adapters["layers.q"]})
    with pytest.raises(ConfigError, match=r"layers\.k: factors .* do not fit"):
        attach(params, {"layers.k": adapters["layers.q"]})
    odd = Lora(adapters["layers.q"].a[..., :1], adapters["layers.q"].b, adapters["layers.q"].scale)
    with pytest.raises(ConfigError, match="do not fit"):
        attach(params, {"layers.q": odd})
    with pytest.raises(ConfigError, match="column lengths"):
        init(LoraConfig(dora=True), TINY, jax.random.key(0))


def test_a_configuration_is_built_from_yaml():
    from omegaconf import OmegaConf

    from experiments.build import build

    text = """
    _target_: ruvjax.lora.adapter.LoraConfig
    rank: 4
    alpha: 8
    targets: [q, layers.1.up]
    rank_pattern: {layers.1.q: 2}
    """
    built = build(OmegaConf.create(text), "adapter")
    assert built == LoraConfig(4, 8.0, ("q", "layers.1.up"), {"layers.1.q": 2})
    assert hash(built) == hash(LoraConfig(4, 8.0, ("q", "layers.1.up")))
    with pytest.raises(ConfigError, match="adapter.targets"):
        build(OmegaConf.create("{_target_: ruvjax.lora.adapter.LoraConfig, targets: 3}"), "adapter")
