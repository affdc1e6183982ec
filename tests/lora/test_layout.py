"""Adapters of banks at linear sites, against models whose weights were changed densely, row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.params import init
from ruvjax.errors import ConfigError
from ruvjax.lora import adapter, bankfile, denoise, layout, talora
from ruvjax.lora import bank as banking
from ruvjax.lora.guided import DGR
from ruvjax.lora.sites import LoraConfig
from ruvjax.lora.talora import TALoRA
from ruvjax.models.mamba import Mamba
from ruvjax.models.transformer import Transformer

MODEL = Transformer(vocab_size=24, layers=2, width=16, heads=2, mlp_width=32, max_length=10)
MAMBA = Mamba(vocab_size=24, layers=2, width=16)
TARGETS = ("layers.1.q", "down")


def adapters_of(model, targets, rank, count):
    """Adapters that are not zero."""
    made = []
    for number in range(count):
        key = jax.random.key(100 * rank + number)
        one = adapter.init(LoraConfig(rank, alpha=3.0, targets=targets), model, key)
        for path, update in one.items():
            acts = jnp.any(update.a != 0, axis=(-2, -1), keepdims=True)  # a layer that is left out stays as it is
            b = 0.3 * jax.random.normal(jax.random.fold_in(key, 1), update.b.shape)
            one[path] = dataclasses.replace(update, b=jnp.where(acts, b, 0))
        made.append(one)
    return made


def bank_of(sites, adapters, capacity, seed=0):
    factors = [layout.joined(sites, one) for one in adapters]
    keys = np.random.default_rng(seed).normal(size=(len(adapters), 16)).astype(np.float32)
    a, b = (jnp.stack(parts) for parts in zip(*factors))
    return banking.filled(keys, a, b, capacity=capacity, dtype=jnp.float32)


def merged(params, adapters, weights):
    for one, weight in zip(adapters, weights):
        scaled = {path: dataclasses.replace(x, scale=x.scale * weight) for path, x in one.items()}
        params = adapter.merge(params, scaled)
    return params


@pytest.mark.parametrize(
    "model, targets", [(MODEL, TARGETS), (MAMBA, ("inward", "scan.select"))], ids=["mdlm", "mamba"]
)
def test_each_row_runs_with_the_adapters_selected_for_it(model, targets):
    sites = layout.layout(model, targets)
    large, small = adapters_of(model, targets, 3, 4), adapters_of(model, targets, 2, 3)
    banks = [bank_of(sites, large, 6), bank_of(sites, small, 5)]
    assert banks[0].a.shape == (6, sites.rows, 3) and banks[0].b.shape == (6, 3, sites.columns)
    slots = [jnp.array([[2, -1], [0, 3], [-1, -1]]), jnp.array([[-1, 1], [2, 0], [-1, -1]])]
    weights = [jnp.array([[0.5, 9.0], [1.0, 0.25], [7.0, 7.0]]), jnp.array([[3.0, 0.75], [0.5, 2.0], [1.0, 1.0]])]
    params = jax.tree.map(lambda x: 2 * x, init(model, jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (3, 10), 0, 24)
    chosen = layout.selected(sites, [(bank.a, bank.b) for bank in banks], slots, weights)
    found = jax.jit(model.apply)(adapter.attach(params, chosen), tokens).logits
    apply = jax.jit(model.apply)
    parts_of = (
        ([large[2], small[1]], [0.5, 0.75]),
        ([large[0], large[3], small[2], small[0]], [1.0, 0.25, 0.5, 2.0]),
        ([], []),
    )
    for row, parts in enumerate(parts_of):
        wanted = apply(merged(params, *parts), tokens[row : row + 1]).logits[0]
        np.testing.assert_allclose(found[row], wanted, atol=2e-4)
    plain = apply(params, tokens).logits
    assert np.abs(found - plain).max((1, 2))[:2].min() > 0.05
    np.testing.assert_array_equal(found[2], plain[2])


def test_a_denoising_step_adapts_its_sites_by_the_step_before():
    sites = layout.layout(MODEL, TARGETS)
    given = adapters_of(MODEL, TARGETS, 2, 5)
    config = TALoRA(16, banks=((8, 2),), boundaries=(), k=2, layout=sites)
    banks = (bank_of(sites, given, 8),)
    talora.check(config, banks)
    params = jax.tree.map(lambda x: 2 * x, init(MODEL, jax.random.key(0)))

    def base(params, tokens, time, carry):
        return MODEL.apply(params, tokens), carry

    run = jax.jit(denoise.forward(config, base, mask_id=23, timeless=True))
    tokens = jnp.full((2, 10), 23).at[:, :4].set(jnp.arange(8).reshape(2, 4))
    wrapped = denoise.Params(params, banks)
    first, memory = run(wrapped, tokens, jnp.ones(2), denoise.begin(config, 2, 10, None))
    np.testing.assert_array_equal(first.logits, jax.jit(base)(params, tokens, None, None)[0].logits)
    second, _ = run(wrapped, tokens, jnp.ones(2), memory)
    for row, query in enumerate(np.asarray(first.hidden, np.float64).mean(1)):
        cosine = np.asarray(banks[0].keys.values[:5], np.float64) @ query / np.linalg.norm(query)
        best = np.argsort(-cosine)[:2]
        dense = merged(params, [given[i] for i in best], [float(max(cosine[i], 0)) for i in best])
        np.testing.assert_allclose(second.logits[row], MODEL.apply(dense, tokens[row : row + 1]).logits[0], atol=5e-4)
    assert np.abs(second.logits - first.logits).max() > 0.02
    none, _ = run(denoise.Params(params, talora.empty_banks(config)), tokens, jnp.ones(2), memory)
    np.testing.assert_array_equal(none.logits, first.logits)


def test_a_bank_of_sites_is_stored_and_saved_like_another(tmp_path):
    sites = layout.layout(MODEL, TARGETS)
    one, other = adapters_of(MODEL, TARGETS, 2, 2)
    config = TALoRA(16, banks=((3, 2),), boundaries=(), k=1, layout=sites)
    (bank,) = talora.empty_banks(config)
    bank, stored = jax.jit(banking.store)(bank, jnp.ones(16), *layout.joined(sites, one))
    bank, _ = jax.jit(banking.store)(bank, -jnp.ones(16), *layout.joined(sites, other))
    (loaded,), _ = bankfile.load(bankfile.save(tmp_path / "bank", [bank]))
    jax.tree.map(np.testing.assert_array_equal, loaded, bank)
    a, b = layout.joined(sites, one)
    np.testing.assert_array_equal(loaded.a[int(stored.slot)], a.astype(jnp.bfloat16))
    np.testing.assert_array_equal(loaded.b[int(stored.slot)], b.astype(jnp.bfloat16))


def test_what_does_not_fit_is_refused():
    sites = layout.layout(MODEL, TARGETS)
    with pytest.raises(ConfigError, match="no linear site"):
        layout.layout(MODEL, ("query",))
    (elsewhere,) = adapters_of(MODEL, ("q", "v"), 2, 1)
    with pytest.raises(ConfigError, match="layers.v"):
        layout.joined(sites, elsewhere)
    (everywhere,) = adapters_of(MODEL, ("q", "down"), 2, 1)
    with pytest.raises(ConfigError, match="no room"):
        layout.joined(sites, everywhere)
    magnitudes = adapter.init(
        LoraConfig(2, targets=TARGETS, dora=True), MODEL, jax.random.key(0), init(MODEL, jax.random.key(0))
    )
    with pytest.raises(ConfigError, match="DoRA"):
        layout.joined(sites, magnitudes)
    (wide,) = adapters_of(dataclasses.replace(MODEL, width=32), TARGETS, 2, 1)
    mixed = adapter.init(LoraConfig(2, targets=TARGETS, rank_pattern={"down": 3}), MODEL, jax.random.key(0))
    for wrong in (wide, mixed):
        with pytest.raises(ConfigError, match="where a bank of rank"):
            layout.joined(sites, wrong)
    timed = dataclasses.replace(MODEL, time="adaln")
    with pytest.raises(ConfigError, match="every position is seen"):
        layout.layout(timed, ("q", "modulation"))
    assert not [part.path for part in layout.layout(timed, ("all-linear",)).parts if "modulation" in part.path]
    config = TALoRA(16, banks=((3, 2),), boundaries=(), k=1, layout=sites)
    with pytest.raises(ConfigError, match="residual stream"):
        denoise.forward(config, lambda *_: None, mask_id=23, timeless=True, guide=DGR())
    with pytest.raises(ConfigError, match="rows, columns"):
        talora.check(config, [banking.empty(3, 2, 16)])
