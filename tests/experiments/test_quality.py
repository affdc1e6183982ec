"""What quantization costs, on a model of random weights: the table orders what it has to order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quality
from experiments.wiring import Loaded
from kernels_pallas.attention import Mask
from ruvjax.core.params import init
from ruvjax.data.pack import Packed
from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.errors import ConfigError, InputError
from ruvjax.models.mamba import Mamba
from ruvjax.models.transformer import Transformer

MODEL = Transformer(vocab_size=260, layers=2, width=64, heads=2, kv_heads=1, mlp_width=64, max_length=128)
LENGTH = 96


@pytest.fixture(scope="module")
def loaded():
    params = init(MODEL, jax.random.key(0))
    layers = params.layers.replace(q=8 * params.layers.q, k=8 * params.layers.k)  # attention that tells keys apart
    tokenizer = train_tokenizer(TokenizerConfig(kind="bytes"), [])
    return Loaded(MODEL, params.replace(layers=layers), tokenizer, autoregressive=True)


@pytest.fixture(scope="module")
def packed():
    tokens = np.random.default_rng(0).integers(3, 259, (3, LENGTH), dtype=np.int32)
    segments = np.ones_like(tokens)
    segments[2, 50:] = 0  # not a full row: left out
    return Packed(tokens, segments, np.zeros(tokens.shape, bool), np.full(3, LENGTH), np.arange(3, dtype=np.int32))


def test_the_table(loaded, packed, monkeypatch):
    monkeypatch.setattr(quality, "TAILS", (32,))
    monkeypatch.setattr(quality, "STORES", ("int8", "int4"))
    costs = {cost.name: cost for cost in quality.table(loaded, packed, 8)}
    assert costs["as it is"].kl == 0 and costs["as it is"].agreement == 1
    weights = [cost for name, cost in costs.items() if name.startswith("weights")]
    assert [round(cost.bits, 1) for cost in weights] == [8.5, 5.5, 5.5]  # tables are Q8_0; rows of 64 have no Q4_K
    assert 0 < weights[0].kl < weights[1].kl / 5
    int8, int4, by_token = (costs[f"cache {kind}, tail 32"].kl for kind in ("int8", "int4", "int4, keys by token"))
    assert 0 < int8 < int4 / 10
    planted = {kind: costs[f"cache {kind}, tail 32, planted outliers"].kl for kind in ("int4", "int4, keys by token")}
    assert planted["int4"] == pytest.approx(int4, rel=0.2)  # each channel has its own scale
    assert planted["int4, keys by token"] > 3 * by_token  # the control: one scale for all channels
    assert "cache int4" in quality.line(costs["cache int4, tail 32"])
    page = quality.html(list(costs.values()), {"int8, tail 64": 1.9})
    assert page.count("<tr>") == 1 + len(costs) + 1 and "1.90x" in page


def test_planted_outliers_leave_the_function_as_it_was(loaded):
    tokens = jnp.arange(40)[None] + 3
    planted = quality.plant(MODEL, loaded.params)
    outputs = [MODEL.apply(p, tokens, mask=Mask(causal=True)).logits for p in (loaded.params, planted)]
    np.testing.assert_allclose(*outputs, atol=1e-4)
    norms = jnp.abs(planted.layers.k[0]).max(axis=0)
    assert float(norms[0]) > 10 * float(norms[1])


def test_what_it_cannot_measure_is_refused(loaded, packed):
    with pytest.raises(InputError, match="at least 384 tokens, not 96"):
        next(quality.table(loaded, packed, 8))
    mamba = Mamba(vocab_size=260, layers=1, width=16, state=4)
    for model, causal in ((mamba, True), (MODEL, False)):
        with pytest.raises(ConfigError, match="autoregressive transformers"):
            quality.check(Loaded(model, None, loaded.tokenizer, autoregressive=causal))


@pytest.mark.slow
def test_compression_counts_every_byte():
    found = quality.compression()
    for tail in quality.TAILS:
        assert 1.9 < found[f"int8, tail {tail}, 16384 tokens"] * 1.02 < 2.0
        assert found[f"int4, tail {tail}, 16384 tokens"] < 4.0
    assert found["int4, tail 256, 1024 tokens"] < found["int4, tail 64, 1024 tokens"] < 4.0
