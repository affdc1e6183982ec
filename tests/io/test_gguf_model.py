"""Transformers through GGUF files: weights, llama.cpp's order of rotary pairs, quantized leaves, files that lie."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Mask
from kernels_pallas.quant_matmul import QuantizedWeight
from kernels_pallas.quant_matmul.formats import FORMATS, decode
from ruvjax.core.params import ParamSpec
from ruvjax.core.rope import RopeScaling
from ruvjax.errors import InputError
from ruvjax.io import gguf_export
from ruvjax.io.gguf import open_gguf
from ruvjax.io.gguf_export import save_gguf
from ruvjax.io.gguf_model import load_gguf
from ruvjax.io.gguf_write import Out, encode, write_gguf
from ruvjax.io.huggingface import load_model, save_model
from ruvjax.models.transformer import Transformer

TINY = Transformer(
    vocab_size=40, layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, max_length=64, tied_head=False, head_dim=8
)
MODELS = {
    "llama": TINY,
    "tied": dataclasses.replace(TINY, tied_head=True, rope_scaling=RopeScaling("linear", 2.0)),
    "llama3": dataclasses.replace(TINY, rope_theta=500.0, rope_scaling=RopeScaling("llama3", 8.0, 16)),
    "mistral": dataclasses.replace(TINY, window=5, head_dim=16),
    "qwen2": dataclasses.replace(TINY, qkv_bias=True, norm_eps=1e-5, rope_theta=1e6),
    "qwen3": dataclasses.replace(TINY, qk_norm=True, rope_scaling=RopeScaling("yarn", 4.0, 16, beta_fast=16.0)),
    "llada": TINY,
    "dream": dataclasses.replace(TINY, qkv_bias=True, shift=True),
}
ARCHITECTURES = {"tied": "llama", "llama3": "llama", "mistral": "llama"}
DIFFUSION = ("llada", "dream")
WIDE = dataclasses.replace(TINY, width=256, heads=4, head_dim=64, kv_heads=2, mlp_width=512)


@functools.cache
def drawn(model):
    """Parameters with noise in every leaf: zeros and ones would hide a mix-up."""
    rng = np.random.default_rng(0)

    def draw(path, spec):
        scale = 0.3 if spec.shape[-1] in (model.vocab_size, 1) or len(spec.shape) < 3 else spec.shape[-2] ** -0.5
        centre = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(centre + scale * rng.standard_normal(spec.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, model.spec(), is_leaf=lambda x: isinstance(x, ParamSpec))


def assert_equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", MODELS)
def test_a_float_file_reads_back_bit_for_bit(name, tmp_path):
    model, params = MODELS[name], drawn(MODELS[name])
    tokens = {"eos_token_id": 3, "mask_token_id": 39, "pad_token_id": None}
    path = save_gguf(tmp_path / "m.gguf", model, params, "F32", causal=name not in DIFFUSION, tokens=tokens)
    again, loaded, files = load_gguf(path)
    scaling = again.rope_scaling if name == "llama3" else model.rope_scaling
    assert again == dataclasses.replace(model, dtype="auto", rope_scaling=scaling)
    assert_equal_trees(loaded, params)
    assert files.model_type == ARCHITECTURES.get(name, name) and files.weights == "F32"
    assert files.causal == (name not in DIFFUSION)
    assert (files.eos_token_id, files.eos_token_ids, files.mask_token_id, files.pad_token_id) == (3, (3,), 39, None)
    half = load_gguf(path, "bfloat16")[1]
    assert_equal_trees(half, jax.tree.map(lambda x: x.astype("bfloat16"), params))


def test_the_factors_of_llama3_give_the_same_logits(tmp_path):
    model, params = MODELS["llama3"], drawn(MODELS["llama3"])
    again, loaded, _ = load_gguf(save_gguf(tmp_path / "m.gguf", model, params, "F32"))
    assert again.rope_scaling.kind == "factors" and again.rope_scaling.factors[-1] == pytest.approx(8.0)
    tokens = jnp.arange(40, dtype=jnp.int32)[None]
    mask = Mask(causal=True)
    expected = model.apply(params, tokens, mask=mask).logits
    found = dataclasses.replace(again, dtype="float32").apply(loaded, tokens, mask=mask).logits
    np.testing.assert_allclose(found, expected, atol=2e-5)
    plain = dataclasses.replace(model, rope_scaling=RopeScaling()).apply(params, tokens, mask=mask).logits
    assert np.abs(plain - expected).max() > 1e-2
    # And once more: factors are written as they were read.
    third = load_gguf(save_gguf(tmp_path / "n.gguf", again, loaded, "F32"))[0]
    np.testing.assert_allclose(third.rope_scaling.factors, again.rope_scaling.factors, rtol=1e-6)


def neighbours(x, position, theta):
    """ggml's rotation of a llama head: the pairs are (x[2i], x[2i + 1])."""
    angle = position * theta ** (-np.arange(0, len(x), 2) / len(x))
    even, odd = x[0::2], x[1::2]
    turned = np.stack([even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], -1)
    return turned.reshape(-1)


def halves(x, position, theta):
    """The rotation of the published checkpoints and ours: the pairs are (x[i], x[i + dim / 2])."""
    angle = position * theta ** (-np.arange(0, len(x), 2) / len(x))
    one, two = np.split(x, 2)
    return np.concatenate([one * np.cos(angle) - two * np.sin(angle), two * np.cos(angle) + one * np.sin(angle)])


@pytest.mark.parametrize("name", ["llama", "mistral", "llada", "qwen2", "dream", "qwen3"])
def test_attention_scores_are_those_that_ggml_computes_from_the_file(name, tmp_path):
    model, params = MODELS[name], drawn(MODELS[name])
    path = save_gguf(tmp_path / "m.gguf", model, params, "F32", causal=name not in DIFFUSION)
    file, dim = open_gguf(path), model.dim_per_head
    rotate = neighbours if name in ("llama", "mistral", "llada") else halves
    x, y = np.random.default_rng(0).standard_normal((2, model.width))
    for head in range(model.heads):
        key_head = head // (model.heads // model.key_heads)
        scores = []
        for q, k, turn in (
            (np.asarray(params.layers.q[1]).T, np.asarray(params.layers.k[1]).T, halves),
            (file.read("blk.1.attn_q.weight"), file.read("blk.1.attn_k.weight"), rotate),
        ):
            one = turn(q[head * dim : (head + 1) * dim] @ x, 7, model.rope_theta)
            other = turn(k[key_head * dim : (key_head + 1) * dim] @ y, 3, model.rope_theta)
            scores.append(one @ other)
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    same = np.array_equal(file.read("blk.1.attn_q.weight"), np.asarray(params.layers.q[1]).T)
    assert same == (rotate is halves)


def matrices(params):
    layers = params.layers
    return [layers.q, layers.k, layers.v, layers.o, layers.gate, layers.up, layers.down, params.embedding, params.head]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K"])
def test_every_kind_is_written_and_read(kind, tmp_path):
    params = drawn(WIDE)
    path = save_gguf(tmp_path / "m.gguf", WIDE, params, kind, name="tiny")
    file = open_gguf(path)
    assert file.tensors["blk.0.ffn_down.weight"].kind == kind and file.tensors["blk.0.attn_norm.weight"].kind == "F32"
    assert file.tensors["output.weight"].kind == ("Q8_0" if kind.startswith("Q4") else kind)
    assert file.metadata["general.name"] == "tiny"
    assert ("general.quantization_version" in file.metadata) == (kind in FORMATS)
    _, loaded, files = load_gguf(path)
    assert kind in files.weights.split("/")
    worst = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02, "Q4_0": 0.2, "Q4_K": 0.2}[kind]
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params)):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < worst
    np.testing.assert_array_equal(loaded.layers.attention_norm, params.layers.attention_norm)
    kept = load_gguf(path, quantized=True)[1]
    if kind in FORMATS:
        for leaf, dense in zip(matrices(kept), matrices(loaded)):
            assert isinstance(leaf, QuantizedWeight)
            table = leaf is kept.embedding or leaf is kept.head
            values = np.swapaxes(leaf.dequantize(), -1, -2) if table else leaf.dequantize()
            np.testing.assert_array_equal(np.asarray(values), np.asarray(dense))
        assert kept.layers.q.kind == kind
        again = save_gguf(tmp_path / "again.gguf", WIDE, kept, "F16")
        for name in file.tensors:
            np.testing.assert_array_equal(open_gguf(again).blocks(name), file.blocks(name))
    else:
        assert_equal_trees(kept, loaded)


def test_the_doorway_of_folders_takes_gguf_files_too(tmp_path):
    """Quantized matrices go through `core.linear` as they are: the logits are those of the decoded weights."""
    path = save_gguf(tmp_path / "m.gguf", WIDE, drawn(WIDE), "Q4_K", tokens={"eos_token_id": 3})
    model, params, files = load_model(path)
    assert files.causal and files.eos_token_id == 3 and files.folder == tmp_path
    assert_equal_trees(params, load_gguf(path)[1])
    kept = load_model(path, quantized=True)[1]
    assert isinstance(kept.layers.q, QuantizedWeight) and kept.layers.q.kind == "Q4_K"
    model, tokens = dataclasses.replace(model, dtype="float32"), jnp.arange(12, dtype=jnp.int32)[None]
    dense = model.apply(params, tokens, mask=Mask(causal=True)).logits
    found = model.apply(kept, tokens, mask=Mask(causal=True)).logits
    np.testing.assert_allclose(found, dense, atol=0.05 * float(jnp.abs(dense).max()))
    with pytest.raises(InputError, match="not read into shardings"):
        load_model(path, shardings=lambda model: None)
    with pytest.raises(InputError, match="only .gguf files"):
        load_model(save_model(tmp_path / "folder", WIDE, drawn(WIDE)), quantized=True)
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="no such model folder"):
        load_model(tmp_path / "m.bin")


def test_rows_that_are_no_whole_blocks_get_a_finer_kind(tmp_path):
    odd = dataclasses.replace(TINY, width=64, heads=4, head_dim=16, mlp_width=40)
    file = open_gguf(save_gguf(tmp_path / "m.gguf", odd, drawn(odd), "Q4_K"))
    assert file.tensors["blk.0.attn_q.weight"].kind == "Q8_0" and file.tensors["blk.1.ffn_down.weight"].kind == "F16"


def rewritten(path, edit, metadata=None):
    """The file with its tensors changed by `edit(name, kind, blocks)` -> (kind, shape, blocks) or None to drop."""
    file = open_gguf(path)
    outs = []
    for name, tensor in file.tensors.items():
        changed = edit(name, tensor.kind, file.blocks(name).copy())
        if changed is not None:
            kind, shape, blocks = changed
            outs.append(Out(name, kind, shape or tensor.shape, lambda blocks=blocks: blocks))
    target = path.with_name("changed.gguf")
    return write_gguf(target, file.metadata | (metadata or {}), outs)


def test_a_matrix_in_several_kinds_becomes_q8_0(tmp_path):
    path = save_gguf(tmp_path / "m.gguf", WIDE, drawn(WIDE), "Q4_K")
    six = np.random.default_rng(0).integers(0, 256, (256, 420), dtype=np.uint8)
    for start in (208, 418):
        six[:, start : start + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)

    def edit(name, kind, blocks):
        return ("Q6_K", None, six) if name == "blk.1.ffn_down.weight" else (kind, None, blocks)

    changed = rewritten(path, edit)
    _, dense, files = load_gguf(changed)
    assert files.weights == "F32/Q4_K/Q6_K/Q8_0"
    np.testing.assert_array_equal(np.asarray(dense.layers.down[1]).T, decode("Q6_K", six))
    kept = load_gguf(changed, quantized=True)[1]
    assert kept.layers.down.kind == "Q8_0" and kept.layers.up.kind == "Q4_K"
    error = np.abs(np.asarray(kept.layers.down.dequantize()) - np.asarray(dense.layers.down))
    assert (
        error.max() <= np.abs(np.asarray(dense.layers.down)).max() / 226
    )  # half a step of d = max / 127, and d is a float16


def refused(path, message):
    for quantized in (False, True):
        with pytest.raises(InputError, match=message) as caught:
            load_gguf(path, quantized=quantized)
        line = caught.value.line()
        assert Path(path).name in line and "\n" not in line and len(line) < 500


DROP = object()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"general.architecture": "gpt2"}, "general.architecture=gpt2 is not known"),
        ({"general.architecture": DROP}, "general.architecture= is not known"),
        ({"general.architecture": 7}, "general.architecture is a int, not a str"),
        ({"llama.block_count": 10**6}, "promises 1000000 layers"),
        ({"llama.block_count": 3}, "lack blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, "9 tensors have no place in the model, such as blk.1"),
        ({"llama.block_count": DROP}, "block_count=None must be a number"),
        ({"llama.block_count": 0}, "model.layers=0"),
        ({"llama.attention.head_count": np.array([4, 2])}, "attention.head_count='ndarray' must be a number"),
        ({"llama.attention.head_count": ["4"]}, "attention.head_count='list' must be a number"),
        ({"llama.attention.head_count": 0}, "model.heads=0"),
        ({"llama.attention.head_count_kv": 3}, "must be a multiple"),
        ({"llama.embedding_length": 16}, "has shape .* the header asks for"),
        ({"llama.embedding_length": np.int32(-32)}, "model.width=-32"),
        ({"llama.feed_forward_length": 2.5}, "feed_forward_length=2.5 must be an integer"),
        ({"llama.attention.key_length": 7}, "rotary embeddings of a part|must be even|width"),
        ({"llama.attention.value_length": 4}, "values of another width than keys"),
        ({"llama.rope.dimension_count": 4}, "rotary embeddings of a part of the head"),
        ({"llama.rope.freq_base": float("nan")}, "rope_theta=nan"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling longrope is not known"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.5}, "factor=0.5"),
        ({"llama.rope.scaling.type": 3}, "rope.scaling.type is a int"),
        ({"llama.attention.layer_norm_rms_epsilon": DROP}, "layer_norm_rms_epsilon=None"),
        ({"llama.attention.layer_norm_rms_epsilon": np.float64(1e200)}, "norm_eps=inf"),
        ({"llama.expert_count": 8}, "experts cannot be expressed"),
        ({"diffusion.shift_logits": True}, "shifted logits cannot"),
        ({"split.count": 2}, "one of several parts"),
        ({"split.count": np.array([1, 2])}, "split.count is a ndarray"),
        ({"tokenizer.ggml.eos_token_id": 40}, "eos_token_id=40 is not a token"),
        ({"tokenizer.ggml.bos_token_id": ["a"]}, "bos_token_id is a list"),
        ({"llama.attention.causal": "yes"}, "attention.causal is a str"),
    ],
)
def test_headers_that_do_not_fit_are_one_clear_line(changes, message, tmp_path):
    path = save_gguf(tmp_path / "m.gguf", TINY, drawn(TINY), "F32")
    file = open_gguf(path)
    metadata = {key: value for key, value in (file.metadata | changes).items() if value is not DROP}
    outs = [Out(n, t.kind, t.shape, lambda n=n: file.blocks(n)) for n, t in file.tensors.items()]
    refused(write_gguf(tmp_path / "changed.gguf", metadata, outs), message)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda n, k, b: None if n == "output_norm.weight" else (k, None, b), "lack output_norm.weight"),
        (lambda n, k, b: None if n == "token_embd.weight" else (k, None, b), "lack token_embd.weight"),
        (lambda n, k, b: ("Q5_K", (256, 256), b) if n == "blk.0.attn_q.weight" else (k, None, b), "stored as Q5_K"),
        (lambda n, k, b: (k, (512, 128), b) if n == "blk.0.attn_q.weight" else (k, None, b), r"shape \[512, 128\]"),
        (lambda n, k, b: (k, None, np.full_like(b, 255)) if n == "blk.1.ffn_up.weight" else (k, None, b), "holds NaN"),
        (lambda n, k, b: (k, None, np.full_like(b, 255)) if n == "output_norm.weight" else (k, None, b), "holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_one_clear_line(edit, message, tmp_path):
    path = save_gguf(tmp_path / "m.gguf", WIDE, drawn(WIDE), "Q8_0")

    def sized(name, kind, blocks):
        changed = edit(name, kind, blocks)
        if changed is not None and changed[0] == "Q5_K":
            return "Q5_K", changed[1], np.zeros((256, 176), np.uint8)
        return changed

    refused(rewritten(path, sized), message)


@pytest.mark.parametrize(
    "change, causal, message",
    [
        ({"time": "adaln"}, True, "model.time='adaln' is not what llama can be"),
        ({"norm": "layer"}, True, "model.norm='layer'"),
        ({"mlp": "gelu"}, False, "model.mlp='gelu' is not what llada can be"),
        ({"qk_norm": True, "qkv_bias": True}, True, "model.qk_norm=True is not what qwen3 can be"),
        ({"qk_norm": True}, False, "model.qk_norm=True is not what llada can be"),
        ({"shift": True}, True, "model.shift=True is not what llama can be"),
        ({"window": 4}, False, "model.window=4"),
        ({"qkv_bias": True, "rope_scaling": RopeScaling("llama3", 8.0, 16)}, True, "rope_scaling.kind='llama3'"),
        ({"rope_scaling": RopeScaling("dynamic", 8.0, 16)}, True, "rope_scaling.kind='dynamic'"),
    ],
)
def test_a_model_that_no_architecture_expresses_is_refused(change, causal, message, tmp_path):
    model = dataclasses.replace(TINY, **change)
    with pytest.raises(InputError, match=message):
        save_gguf(tmp_path / "m.gguf", model, None, causal=causal)
    with pytest.raises(InputError, match="kind='Q6_K' cannot be written"):
        save_gguf(tmp_path / "m.gguf", TINY, drawn(TINY), "Q6_K")
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(InputError, match="the model asks for"):
        save_gguf(tmp_path / "m.gguf", dataclasses.replace(TINY, mlp_width=64), drawn(TINY))
    large = jax.tree.map(lambda x: x * 1e6, drawn(TINY))
    with pytest.raises(InputError, match="cannot be written as F16: F16 cannot hold"):
        save_gguf(tmp_path / "m.gguf", TINY, large, "F16")
    assert list(tmp_path.iterdir()) == []


def test_only_one_matrix_is_encoded_at_a_time(tmp_path, monkeypatch):
    alive = []

    def watched(kind, array):
        alive.append(array.nbytes)
        return encode(kind, array)

    monkeypatch.setattr(gguf_export, "encode", watched)
    save_gguf(tmp_path / "m.gguf", TINY, drawn(TINY), "F16")
    assert max(alive) == 4 * TINY.mlp_width * TINY.width and len(alive) == 3 + 9 * TINY.layers


def test_mutated_models_load_or_are_refused(tmp_path):
    raw = save_gguf(tmp_path / "m.gguf", TINY, drawn(TINY), "Q8_0").read_bytes()
    rng, loaded = np.random.default_rng(0), 0
    header = len(raw) - len(open_gguf(tmp_path / "m.gguf").data)
    for i in range(300):
        changed = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, header if i % 3 else len(raw)))
            changed[at] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / "n.gguf").write_bytes(changed)
        try:
            load_gguf(tmp_path / "n.gguf", quantized=bool(i % 2))
            loaded += 1
        except InputError as error:
            assert "\n" not in error.line()
    assert 10 < loaded < 290
