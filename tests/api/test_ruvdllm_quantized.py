"""load_q4 and load_f16: folders quantized on loading, GGUF files with the blocks they hold, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quant_matmul import QuantizedWeight, quantize
from ruvjax.api import ruvdllm as api
from ruvjax.core.params import init
from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.diffusion.sampler import Sampler
from ruvjax.io.gguf_export import save_gguf
from ruvjax.io.huggingface import save_model
from ruvjax.models.transformer import Transformer

NETWORK = Transformer(vocab_size=259, layers=2, width=64, heads=2, mlp_width=256, max_length=64, tied_head=False)
TOKENS = np.random.default_rng(0).integers(3, 259, (2, 12))
GREEDY = Sampler(order="confidence", temperature=0.0, steps=6)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, and GGUF files of three kinds, of the same network."""
    root = tmp_path_factory.mktemp("quantized")
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), [])
    saved = tokenizer.save(root / "tokenizer")
    ids = {"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    params = init(NETWORK, jax.random.key(0))
    save_model(root / "model", NETWORK, params, saved, **ids, diffusion={})
    for kind in ("F32", "Q4_0", "Q8_0"):
        save_gguf(root / f"{kind}.gguf", NETWORK, params, kind, saved, causal=False, tokens=ids)
    return root, params


def dequantized(params):
    """Every quantized leaf as the array that the unquantized network has in its place."""

    def dense(path, leaf):
        if not isinstance(leaf, QuantizedWeight):
            return leaf
        return leaf.dequantize().T if "head" in str(path) or "embedding" in str(path) else leaf.dequantize()

    return jax.tree_util.tree_map_with_path(dense, params, is_leaf=lambda x: isinstance(x, QuantizedWeight))


def size(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_a_folder_is_quantized_on_loading(made):
    root, params = made
    model = api.DiffusionModel.load_q4(root / "model")
    layers = model.params.layers
    assert (layers.q.kind, layers.down.kind, model.params.head.kind) == ("Q4_0", "Q4_K", "Q8_0")
    assert model.weights == "Q4_0/Q4_K/Q8_0" and layers.q_norm is None
    np.testing.assert_array_equal(layers.attention_norm, params.layers.attention_norm)
    expected = quantize(np.asarray(params.layers.q), "Q4_0")
    for one, other in zip(jax.tree.leaves(layers.q), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert size(layers.down) < 0.15 * size(params.layers.down)
    # The quantized network is the network of the dequantized weights, and not the one that was stored.
    whole = np.asarray(NETWORK.apply(dequantized(model.params), jnp.asarray(TOKENS, jnp.int32)).logits)
    np.testing.assert_allclose(model.forward(TOKENS, 500), whole, atol=2e-3)
    stored = np.asarray(api.DiffusionModel.load_f16(root / "model").forward(TOKENS, 500))
    error = np.sqrt(np.mean((stored - whole) ** 2)) / stored.std()
    assert 0.005 < error < 0.3


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0"])
def test_gguf_files_keep_their_blocks_or_become_sixteen_bits(kind, made):
    root, params = made
    path = root / f"{kind}.gguf"
    half = api.DiffusionModel.load_f16(path)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float16")}
    assert (half.mask_id, half.eos_id, half.network.shift) == (1, 0, False) and half.tokenizer is not None
    model = api.DiffusionModel.load_q4(path)
    quantized = model.params.layers
    # A GGUF file names no dtype to compute in; in bfloat16 the sums below would differ by a tenth.
    model, half = (
        dataclasses.replace(m, network=dataclasses.replace(m.network, dtype="float32")) for m in (model, half)
    )
    assert quantized.q.kind == ("Q4_0" if kind == "F32" else kind)
    if kind != "F32":
        whole = np.asarray(NETWORK.apply(dequantized(model.params), jnp.asarray(TOKENS, jnp.int32)).logits)
        np.testing.assert_allclose(model.forward(TOKENS, 0), whole, atol=2e-3)
        np.testing.assert_allclose(half.forward(TOKENS, 0), whole, atol=0.05)
    else:
        np.testing.assert_allclose(half.params.layers.q, params.layers.q, atol=1e-3)


def test_text_is_generated_from_quantized_weights(made):
    root, _ = made
    path = root / "Q4_0.gguf"
    llm = api.RuvDLLM(api.DiffusionModel.load_q4(path), api.RuvDLLMConfig(sampler_config=GREEDY), path)
    assert llm.info().weights == "Q4_0/Q8_0" and isinstance(llm.generate("ab", 6), str)
    assert llm.stats().tokens <= 6 and llm.info().memory_bytes < 0.75 * llm.info().parameters


def test_samplers_with_a_cache_generate_too(made):
    root, _ = made
    model = api.DiffusionModel.load_f16(root / "model")
    plain = dataclasses.replace(GREEDY, block_size=4)
    always = dataclasses.replace(plain, cache="dual", refresh_every=1)
    texts = [api.MDLMSampler(sampler).generate(model, "ab", 8) for sampler in (plain, always)]
    assert texts[0] == texts[1]
    guided = dataclasses.replace(plain, cache="prefix", guidance=0.5)
    assert isinstance(api.MDLMSampler(guided).generate(model, "ab", 8), str)
    exact = dataclasses.replace(plain, cache="block", block_origin="canvas")
    with pytest.raises(api.ConfigError, match="cache=block"):
        api.MDLMSampler(exact).generate(model, "ab", 8)


def test_what_cannot_be_quantized_or_read(made, tmp_path):
    odd = dataclasses.replace(NETWORK, width=40, mlp_width=64)
    save_model(tmp_path / "odd", odd, init(odd, jax.random.key(0)))
    with pytest.raises(api.ModelError.QuantizationError, match="32") as caught:
        api.DiffusionModel.load_q4(tmp_path / "odd")
    assert caught.value.hint and api.DiffusionModel.load_f16(tmp_path / "odd").mask_id is None
    (tmp_path / "cut.gguf").write_bytes((made[0] / "Q4_0.gguf").read_bytes()[:5000])
    for load in (api.DiffusionModel.load_q4, api.DiffusionModel.load_f16):
        for name in ("cut.gguf", "absent.gguf", "absent"):
            with pytest.raises(api.ModelError.LoadError, match=name):
                load(tmp_path / name)
