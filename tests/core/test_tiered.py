"""The cache in two tiers: what the plain cache gives as long as nothing is quantized, close to it afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Mask
from ruvjax.core.tiered import Tiers
from ruvjax.errors import ConfigError
from ruvjax.models.causal import forward_left_of
from ruvjax.models.transformer import Transformer


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 32, (2, 48), dtype=np.int32)


def read(model, params, cache, tokens, sizes):
    """Logits of all positions, read in chunks of these sizes."""
    out, at, run = [], 0, jax.jit(lambda p, t, c: model.apply(p, t, mask=Mask(causal=True), cache=c))
    for size in sizes:
        output = run(params, tokens[:, at : at + size], cache)
        out.append(output.logits)
        cache, at = output.aux["cache"], at + size
    return jnp.concatenate(out, axis=1), cache


def test_an_unquantized_tail_is_the_plain_cache(tiny_model, tiny_params, rows):
    model = Transformer(**{**vars(tiny_model), "max_length": 64})
    sizes = [8, 1, 15, 1, 8, 15]
    expected, _ = read(model, tiny_params, model.empty_cache(2, 48), rows, sizes)
    tiers = model.empty_tiered_cache(Tiers("int8", tail=48, page=8), 2, 48, chunk=16)
    got, cache = read(model, tiny_params, tiers, rows, sizes)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert cache.length.tolist() == [48, 48] and int(cache.pages.stored.max()) == 0


@pytest.mark.parametrize(
    ("store", "worst"), [pytest.param("int8", 0.02, marks=pytest.mark.slow), ("int4", 0.4), ("int4_rotated", 0.4)]
)
def test_older_tokens_move_to_the_store_and_the_logits_stay_near(tiny_model, tiny_params, rows, store, worst):
    model = Transformer(**{**vars(tiny_model), "max_length": 64})
    sizes = [16, 16] + [1] * 16
    expected, _ = read(model, tiny_params, model.empty_cache(2, 48), rows, sizes)
    got, cache = read(model, tiny_params, model.empty_tiered_cache(Tiers(store, 8, 4), 2, 48, chunk=16), rows, sizes)
    assert int(cache.pages.stored.min()) >= 32 and not bool(cache.pages.failed.any())
    spread = float(jnp.std(expected))
    error = float(jnp.abs(got - expected).max()) / spread
    assert error < worst, error
    assert error > 1e-6  # it was quantized at all


@pytest.mark.slow
def test_padding_and_neighbours_do_not_matter(tiny_model, tiny_params, rows):
    """A row alone, and the same one padded on its left beside another, that is longer."""
    model = Transformer(**{**vars(tiny_model), "max_length": 64})
    forward = jax.jit(forward_left_of(model))
    settings = Tiers("int8", tail=8, page=4)
    short = np.full((2, 32), -1, np.int32)
    short[0, 32 - 20 :], short[1] = rows[0, :20], rows[1, :32]
    cache = model.empty_tiered_cache(settings, 2, 48, chunk=16)
    for at in (0, 16):
        _, cache = forward(tiny_params, short[:, at : at + 16], None, cache)
    output, _ = forward(tiny_params, rows[:, 40:41], None, cache)
    alone = model.empty_tiered_cache(settings, 1, 48, chunk=16)
    for part in (short[:1, :16], short[:1, 16:], rows[:1, 40:41]):
        expected, alone = forward(tiny_params, part, None, alone)
    np.testing.assert_allclose(output.logits[:1], expected.logits, atol=1e-5)


def test_what_it_cannot_express_is_refused(tiny_model, tiny_params, rows):
    cache = tiny_model.empty_tiered_cache(Tiers(tail=8, page=4), 2, 32, chunk=8)
    with pytest.raises(ConfigError, match="causal attention"):
        tiny_model.apply(tiny_params, jnp.asarray(rows[:, :8]), cache=cache)
    with pytest.raises(ConfigError, match="longer than the cache's capacity of 8"):
        tiny_model.apply(tiny_params, jnp.asarray(rows[:, :9]), mask=Mask(causal=True), cache=cache)
    for wrong in ({"store": "int3"}, {"page": 3}, {"tail": 0}):
        with pytest.raises(ConfigError):
            Tiers(**wrong)
