"""Updates of the residual stream, against the same made densely, in every way that a model runs its layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Mask
from ruvjax.core.adapted import Lora, Selected
from ruvjax.core.params import init, unstack
from ruvjax.core.residual import Residual, Spots, enter, reordered
from ruvjax.errors import ConfigError
from ruvjax.models.mamba import Mamba
from ruvjax.models.mamba2 import Mamba2
from ruvjax.models.transformer import Transformer

WIDTH, LENGTH, RANK = 16, 6, 2
TRANSFORMER = Transformer(vocab_size=20, layers=3, width=WIDTH, heads=2, mlp_width=24, max_length=LENGTH)
MAMBA = Mamba(vocab_size=20, layers=3, width=WIDTH, state=4)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, LENGTH)), jnp.int32)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


BANK = (draw(5, WIDTH, RANK, seed=1), draw(5, RANK, WIDTH, seed=2))
LORA = Lora(draw(WIDTH, RANK, seed=3), draw(RANK, WIDTH, seed=4), jnp.float32(0.3))
IDS = jnp.asarray([[0, 3], [4, -1]], jnp.int32)
WHOLE = Selected(*BANK, IDS, draw(2, 2, seed=5))
EACH = Selected(
    *BANK, jnp.asarray(np.random.default_rng(6).integers(-1, 5, (2, LENGTH, 1)), jnp.int32), draw(2, LENGTH, 1)
)
SPOTS = Spots(jnp.asarray([[5, 0], [2, 3]], jnp.int32), Selected(*BANK, IDS[:, :, None], draw(2, 2, 1, seed=8)))


def added(update, x):
    """What `update` adds to x [2, LENGTH, WIDTH], in float64."""
    x = np.asarray(x, np.float64)
    if isinstance(update, Lora):
        return float(update.scale) * x @ np.asarray(update.a) @ np.asarray(update.b)
    total = np.zeros_like(x)
    chosen = update.update if isinstance(update, Spots) else update
    a, b = (np.asarray(part, np.float64) for part in BANK)
    ids, weights = np.asarray(chosen.ids), np.asarray(chosen.weights)
    for row in range(2):
        if isinstance(update, Spots):
            places = [(int(at), ids[row, n], weights[row, n]) for n, at in enumerate(update.positions[row])]
        elif ids.ndim == 3:
            places = [(at, ids[row, at], weights[row, at]) for at in range(LENGTH)]
        else:
            places = [(at, ids[row], weights[row]) for at in range(LENGTH)]
        for at, chosen_ids, counts in places:
            for id, count in zip(chosen_ids, counts):
                if id >= 0:
                    total[row, at] += count * (x[row, at] @ a[id] @ b[id])
    return total


@pytest.mark.parametrize("update", [LORA, WHOLE, EACH, SPOTS, (LORA, WHOLE, SPOTS)])
def test_the_stream_gains_what_the_updates_make_of_it(update):
    x = draw(2, LENGTH, WIDTH, seed=9)
    parts = update if isinstance(update, tuple) else (update,)
    found = jax.jit(lambda x: enter(Residual(update, 1), 1, x))(x)
    np.testing.assert_allclose(found, np.asarray(x) + sum(added(part, x) for part in parts), atol=1e-5)
    assert enter(Residual(update, 1), 0, x) is x and enter(None, 1, x) is x
    half = enter(Residual(update, 1), 1, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), found, atol=0.3)


def test_what_selects_nothing_leaves_every_bit():
    x = draw(2, LENGTH, WIDTH).at[0, 0].set(-0.0)
    nothing = dataclasses.replace(WHOLE, ids=jnp.full((2, 2), -1))
    spots = dataclasses.replace(SPOTS, update=dataclasses.replace(SPOTS.update, ids=jnp.full((2, 2, 1), -1)))
    found = jax.jit(lambda x: enter(Residual((nothing, spots), 0), 0, x))(x)
    assert np.array_equal(np.asarray(found).view(np.int32), np.asarray(x).view(np.int32))


hidden_of = jax.jit(
    lambda model, params, tokens, **options: model.apply(params, tokens, **options).hidden, static_argnums=0
)


def adapted(model, params, layer, update, **options):
    """The hidden states with the update, which must do something."""
    found, plain = (
        np.asarray(hidden_of(model, dataclasses.replace(params, residual=r), TOKENS, **options))
        for r in (Residual(update, layer), None)
    )
    assert np.abs(found - plain).max() > 0.01
    return found


@pytest.mark.parametrize("model", [TRANSFORMER, MAMBA], ids=["transformer", "mamba"])
def test_every_way_of_running_the_layers_agrees(model):
    params = init(model, jax.random.key(0))
    update, found = (WHOLE, SPOTS), {}
    for layer in (0, 1, 2):
        one = found[layer] = adapted(model, params, layer, update)
        scanned = adapted(dataclasses.replace(model, unroll=False), params, layer, update)
        np.testing.assert_allclose(scanned, one, atol=1e-5)
    np.testing.assert_allclose(adapted(model, unstack(params, 3), 1, update), found[1], atol=1e-5)
    assert np.abs(found[1] - found[0]).max() > 0.01 < np.abs(found[2] - found[1]).max()


def test_the_update_reads_and_changes_the_stream_before_its_layer():
    """Mamba tells the stream before each layer: what the rest of the layers makes of it and the dense update."""
    params = init(MAMBA, jax.random.key(0))
    stream = MAMBA.apply(params, TOKENS, trace=True).aux["layers"][1]
    table = stream + jnp.asarray(added(WHOLE, stream) + added(SPOTS, stream), jnp.float32)
    rest = dataclasses.replace(MAMBA, layers=2, vocab_size=2 * LENGTH, tied_head=False)
    layers = jax.tree.map(lambda w: w[1:], params.layers)
    given = dataclasses.replace(params, embedding=table.reshape(-1, WIDTH), layers=layers, head=params.embedding)
    wanted = hidden_of(rest, given, jnp.arange(2 * LENGTH, dtype=jnp.int32).reshape(2, LENGTH))
    np.testing.assert_allclose(adapted(MAMBA, params, 1, (WHOLE, SPOTS)), wanted, atol=1e-4)


def test_the_other_passes_of_the_transformer_agree():
    """Over keys and values that are held, and over a cache with padding in the middle of the chunk."""
    params = dataclasses.replace(init(TRANSFORMER, jax.random.key(0)), residual=Residual((WHOLE, SPOTS), 1))
    one = hidden_of(TRANSFORMER, params, TOKENS)
    for model in (TRANSFORMER, dataclasses.replace(TRANSFORMER, unroll=False)):
        held, _ = jax.jit(model.over)(params, TOKENS, model.nothing_held(2, LENGTH))
        np.testing.assert_allclose(held, one, atol=1e-5)
    segments = jnp.asarray([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1]], jnp.int32)
    mask = Mask(causal=True, segments=segments)
    cached = hidden_of(TRANSFORMER, params, TOKENS, mask=mask, cache=TRANSFORMER.empty_cache(2, LENGTH))
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    plain = hidden_of(TRANSFORMER, params, TOKENS, mask=mask, positions=positions)
    real = np.asarray(segments) != 0
    np.testing.assert_allclose(np.asarray(cached)[real], np.asarray(plain)[real], atol=1e-5)


def test_padding_in_mambas_rows_moves_what_is_chosen_by_position():
    params = init(MAMBA, jax.random.key(0))
    segments = jnp.asarray([[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1]], jnp.int32)
    real = np.asarray(segments) != 0
    found = adapted(MAMBA, params, 1, EACH, segments=segments)
    for row in range(2):
        at = np.flatnonzero(real[row])
        ids, weights = (part[row : row + 1, at] for part in (EACH.ids, EACH.weights))
        alone = dataclasses.replace(params, residual=Residual(Selected(*BANK, ids, weights), 1))
        wanted = hidden_of(MAMBA, alone, TOKENS[row : row + 1, at])
        np.testing.assert_allclose(found[row, at], wanted[0], atol=1e-5)
    source = jnp.asarray([[2, 0, 1]], jnp.int32)
    spots = reordered(Residual(Spots(jnp.asarray([[0]], jnp.int32), SPOTS.update), 0), source, jnp.asarray([[1, 2, 0]]))
    assert spots.update.positions.tolist() == [[1]]


def test_mamba2_takes_them_too():
    model = Mamba2(vocab_size=20, layers=2, width=WIDTH, state=4, head_dim=8)
    adapted(model, init(model, jax.random.key(0)), 1, WHOLE)


def test_without_updates_programs_are_what_they_were_and_a_missing_layer_is_named():
    params = init(TRANSFORMER, jax.random.key(0))
    assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(dataclasses.replace(params, residual=None)))
    for model in (TRANSFORMER, MAMBA):
        weights = dataclasses.replace(init(model, jax.random.key(0)), residual=Residual(LORA, 3))
        with pytest.raises(ConfigError, match="layer 3 of a model that has 3"):
            model.apply(weights, TOKENS)


def test_a_residual_lora_is_trained_like_any_weight():
    params = init(TRANSFORMER, jax.random.key(0))

    def loss(update):
        return jnp.sum(
            TRANSFORMER.apply(dataclasses.replace(params, residual=Residual(update, 1)), TOKENS).hidden[:, 0]
        )

    gradient = jax.grad(loss)(LORA)
    step = 1e-2
    moved = dataclasses.replace(LORA, b=LORA.b.at[1, 3].add(step))
    back = dataclasses.replace(LORA, b=LORA.b.at[1, 3].add(-step))
    np.testing.assert_allclose(gradient.b[1, 3], (loss(moved) - loss(back)) / (2 * step), rtol=0.05, atol=1e-3)
