"""Model folders: whole or absent, read back bit for bit, refused with the name of the file where they are damaged."""

import dataclasses
import functools
import itertools
import json
import os
import resource
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ruvjax.core.params import ParamSpec, init
from ruvjax.core.rope import RopeScaling
from ruvjax.errors import InputError, NotYetError, RuvjaxError
from ruvjax.io import huggingface, weights
from ruvjax.io.huggingface import load_model, read_config, save_model, save_pretrained
from ruvjax.io.layout import read_transformer
from ruvjax.io.transformer_layout import PLACES
from ruvjax.models.transformer import Transformer

TINY = Transformer(vocab_size=16, layers=2, width=8, heads=2, mlp_width=12, max_length=32)
MODELS = {
    "mdlm": dataclasses.replace(TINY, time="adaln", norm="layer", mlp="gelu"),
    "sinusoidal": dataclasses.replace(TINY, time="sinusoidal", kv_heads=1, tied_head=False),
    "llada": dataclasses.replace(TINY, tied_head=False, rope_scaling=RopeScaling("llama3", 8.0, 16)),
    "qwen": dataclasses.replace(TINY, qkv_bias=True, qk_norm=True, head_dim=6, dtype="bfloat16"),
}
DIFFUSION = {"schedule": {"kind": "linear"}, "timesteps": 1000}


@functools.cache
def drawn(model):
    """Parameters of `model` with noise in every leaf: zeros and ones would hide a mix-up."""
    params = init(model, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 64))
    return jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape), params)


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "model"
    (tmp_path / "tokenizer.json").write_text("{}")
    save_model(folder, TINY, drawn(TINY), tmp_path / "tokenizer.json", mask_token_id=1, diffusion=DIFFUSION)
    return folder


def change_config(folder, **changes):
    config = read_config(folder) | changes
    (folder / "config.json").write_text(json.dumps(config))


def assert_equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", MODELS)
def test_an_export_reads_back_bit_for_bit(name, tmp_path):
    model = MODELS[name]
    params = drawn(model)
    save_model(tmp_path / "m", model, params, mask_token_id=1, eos_token_id=0, pad_token_id=2, diffusion=DIFFUSION)
    again, loaded, info = load_model(tmp_path / "m")
    assert again == model and hash(again) == hash(model)
    assert_equal_trees(loaded, params)
    assert (info.mask_token_id, info.eos_token_id, info.pad_token_id) == (1, 0, 2)
    assert info.diffusion == DIFFUSION and info.weights == "F32" and info.tokenizer is None


def test_every_weight_that_a_transformer_may_have_has_its_own_place():
    found = set()
    for model in MODELS.values():
        paths, _ = jax.tree_util.tree_flatten_with_path(model.spec(), is_leaf=lambda x: isinstance(x, ParamSpec))
        found |= {jax.tree_util.keystr(path) for path, _ in paths}
    assert found == set(PLACES)
    assert len({place.name for place in PLACES.values()}) == len(PLACES)


def test_the_tensors_carry_the_published_names_and_orientation(exported):
    tensors = load_file(exported / "model.safetensors")
    params = drawn(TINY)
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"], np.asarray(params.layers.down[1]).T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], np.asarray(params.embedding))
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("limit, shards", [(400, 3), (10**6, 1)])
def test_shards_hold_the_same_weights(limit, shards, tmp_path):
    params = drawn(TINY)
    save_model(tmp_path / "m", TINY, params, max_shard_bytes=limit)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) >= shards
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file() == (shards > 1)
    assert_equal_trees(load_model(tmp_path / "m")[1], params)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_parameters_keep_their_dtype_unless_one_is_named(stored, tmp_path):
    params = jax.tree.map(lambda x: x.astype(stored), drawn(TINY))
    save_model(tmp_path / "m", TINY, params)
    assert_equal_trees(load_model(tmp_path / "m")[1], params)
    assert_equal_trees(
        load_model(tmp_path / "m", dtype="float32")[1], jax.tree.map(lambda x: x.astype("float32"), params)
    )


def test_a_loaded_model_computes_the_same_logits(exported):
    model, params, info = load_model(exported)
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    expected = TINY.apply(drawn(TINY), tokens).logits
    np.testing.assert_array_equal(np.asarray(model.apply(params, tokens).logits), np.asarray(expected))
    assert info.tokenizer == exported / "tokenizer.json"


def test_saving_again_replaces_the_export(exported):
    save_model(exported, TINY, jax.tree.map(jnp.zeros_like, drawn(TINY)))
    assert not np.any(np.asarray(load_model(exported)[1].embedding))
    assert load_model(exported)[2].tokenizer is None  # the old tokenizer is not left beside new weights
    assert [path.name for path in exported.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("failing", ["config", "weights", "rename"])
def test_a_failed_export_leaves_the_old_one_and_no_litter(failing, exported, monkeypatch):
    full = OSError(28, "No space left on device")

    def fail(*arguments, **settings):
        raise full

    if failing == "rename":
        renames = itertools.count()
        real = os.replace
        monkeypatch.setattr(os, "replace", lambda *a: fail() if next(renames) == 1 else real(*a))
    else:
        place, name = (weights, "save_file") if failing == "weights" else (huggingface, "write_json")
        monkeypatch.setattr(place, name, fail)
    before = drawn(TINY)
    with pytest.raises(OSError) as caught:
        save_model(exported, TINY, jax.tree.map(jnp.zeros_like, before))
    assert caught.value is full
    monkeypatch.undo()
    assert_equal_trees(load_model(exported)[1], before)
    assert sorted(path.name for path in exported.parent.iterdir()) == ["model", "tokenizer.json"]


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(InputError, match="something other"):
        save_model(tmp_path, TINY, drawn(TINY))
    assert (tmp_path / "thesis.txt").read_text() == "three years"
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a folder"):
        save_model(tmp_path / "file", TINY, drawn(TINY))


def test_a_published_checkpoint_is_not_replaced(exported):
    change_config(exported, model_type="llama")
    with pytest.raises(InputError, match="something other"):
        save_model(exported, TINY, drawn(TINY))


def test_parameters_of_another_model_are_not_saved(tmp_path):
    with pytest.raises(InputError, match="shape"):
        save_model(tmp_path / "m", dataclasses.replace(TINY, mlp_width=16), drawn(TINY))
    assert list(tmp_path.iterdir()) == []


def damage(raw: bytes) -> dict[str, bytes]:
    header = int.from_bytes(raw[:8], "little")
    return {
        "cut": raw[:-5],
        "cut in the header": raw[: header // 2],
        "empty": b"",
        "longer": raw + b"\0" * 8,
        "length lies": (1 << 62).to_bytes(8, "little") + raw[8:],
        "shape lies": raw.replace(b'"shape":[16,8]', b'"shape":[99,8]', 1),
        "offset lies": raw.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        "web page": b"<html><body>404</body></html>",
        "header is no JSON": raw[:8] + b"x" * header + raw[8 + header :],
    }


@pytest.mark.parametrize("how", damage(b"\x10" + b"\0" * 40))
def test_damaged_weights_are_named(how, exported):
    path = exported / "model.safetensors"
    raw = path.read_bytes()
    broken = damage(raw)[how]
    assert broken != raw
    path.write_bytes(broken)
    with pytest.raises(InputError, match="model.safetensors: not a whole safetensors file"):
        load_model(exported)


def rewrite(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"), "lack model.layers.1.self_attn.q_proj.weight"),
        (lambda t: t.update({"model.norm.weight": np.ones(9, np.float32)}), r"has shape \[9\]"),
        (lambda t: t.update({"model.norm.weight": np.ones(8, np.int8)}), "stored as I8"),
        (lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": np.ones(8, np.float32)}), "no place in the model"),
    ],
)
def test_weights_that_do_not_fit_are_refused(edit, message, exported):
    rewrite(exported, edit)
    with pytest.raises(InputError, match=message):
        load_model(exported)


def test_buffers_of_old_checkpoints_and_a_tied_head_are_passed_over(exported):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    rewrite(exported, lambda t: t.update(extra, **{"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_equal_trees(load_model(exported)[1], drawn(TINY))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not known"),
        ({"format_version": 99}, "format_version=99"),
        ({"transformer": {"layerz": 3}}, "no layerz"),
        ({"transformer": None}, "must be an object"),
        ({"transformer": {"layers": -1}}, "layers=-1"),
        ({"transformer": {**dataclasses.asdict(TINY), "layers": 10**9}}, "lack model.layers.999999999"),
        ({"mask_token_id": 16}, "mask_token_id=16"),
        ({"diffusion": [1]}, "diffusion must be an object"),
    ],
)
def test_a_config_that_lies_is_refused(changes, message, exported):
    change_config(exported, **changes)
    with pytest.raises(InputError, match=message):
        load_model(exported)


PUBLISHED = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "rope_scaling": None,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
        {"model_type": "qwen3", "layer_types": ["chunked_attention", "full_attention"]},
        {"model_type": "qwen3", "layer_types": [["full_attention"], {}]},
        {"model_type": "qwen3", "layer_types": 3},
        {"model_type": "Dream", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        {"model_type": "mistral", "sliding_window": -4},
        {"model_type": "mistral", "sliding_window": "wide"},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        {"rope_scaling": "linear"},
        {"hidden_size": "8"},
        {"hidden_size": None},
        {"num_hidden_layers": 2.5},
        {"torch_dtype": "int8"},
    ],
)
def test_what_the_transformer_cannot_express_is_refused(changes):
    read_transformer(PUBLISHED, "config.json")
    with pytest.raises(InputError, match="config.json"):
        read_transformer(PUBLISHED | changes, "config.json")


def test_quantized_checkpoints_are_not_there_yet():
    with pytest.raises(NotYetError, match="quantized"):
        read_transformer(PUBLISHED | {"quantization_config": {"bits": 4}}, "config.json")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, (10000.0, RopeScaling())),
        ({"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2}}, (5.0, RopeScaling("linear", 2.0))),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7}}, (7.0, RopeScaling())),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, (10000.0, RopeScaling())),
        (
            {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            (10000.0, RopeScaling("yarn", 4.0, 64)),
        ),
    ],
)
def test_both_spellings_of_the_rotary_settings(changes, expected):
    model = read_transformer(PUBLISHED | changes, "config.json")
    assert (model.rope_theta, model.rope_scaling) == expected


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(InputError, match="config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="holds no model.safetensors") as caught:
        load_model(tmp_path)
    assert "pytorch_model.bin" in caught.value.hint


@pytest.mark.parametrize(
    "shard, message",
    [("../../secret.safetensors", "not the name of a shard"), ("gone.safetensors", "missing"), (3, "3")],
)
def test_a_shard_outside_or_absent_is_refused(shard, message, exported):
    (exported / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": shard}}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        load_model(exported)


def test_a_shard_that_lacks_what_the_index_promises_is_named(tmp_path):
    folder = save_model(tmp_path / "m", TINY, drawn(TINY), max_shard_bytes=400)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(RuvjaxError, match=first.name):
        load_model(folder)


def accident(raw: bytes, rng) -> bytes:
    """`raw` with one to three accidents: a byte, a bit, a cut, an insertion, a repeat."""
    changed = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, len(changed))) if changed else 0
        kind = rng.integers(0, 5)
        if kind == 0 and changed:
            changed[at] = rng.integers(0, 256)
        elif kind == 1 and changed:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 2:
            del changed[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            changed[at:at] = rng.choice([b"9", b"-", b"null", b"[]", b"{}", b"1e999", b'"', b"\0", b"9" * 400])
        else:
            changed[at:at] = changed[max(0, at - 30) : at]
    return bytes(changed)


def peak_bytes():
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fuzz(count, folder, seed):
    """How many damaged folders load; anything but InputError fails, and so does memory beyond the files' size.

    Python's allocations are traced for the first few, which makes them slow; the process's peak covers the rest.
    """
    own = dataclasses.replace(TINY, layers=1)
    published = dataclasses.replace(own, kv_heads=1, qkv_bias=True, rope_scaling=RopeScaling("yarn", 2.0, 16))
    save_pretrained(folder / "p", published, drawn(published), eos_token_id=3, max_shard_bytes=900)
    save_model(folder / "o", own, drawn(own), mask_token_id=1, diffusion=DIFFUSION)
    whole = {path: path.read_bytes() for path in [*(folder / "p").iterdir(), *(folder / "o").iterdir()]}
    rng, loaded, names = np.random.default_rng(seed), 0, sorted(whole)
    load_model(folder / "p")
    peak = peak_bytes()
    for i in range(count):
        path = names[rng.integers(0, len(names))]
        path.write_bytes(accident(whole[path], rng))
        if i < 60:
            tracemalloc.start()
        try:
            load_model(path.parent)
            loaded += 1
        except (InputError, NotYetError) as error:
            assert "\n" not in error.line()
        if i < 60:
            assert tracemalloc.get_traced_memory()[1] < 3_000_000
            tracemalloc.stop()
        path.write_bytes(whole[path])
    assert peak_bytes() - peak < 100_000_000
    return loaded


def test_some_hundred_damaged_folders_do_no_harm(tmp_path):
    assert 10 < fuzz(200, tmp_path, seed=0) < 190


@pytest.mark.slow
def test_ten_thousand_damaged_folders_do_no_harm(tmp_path):
    assert fuzz(10_000, tmp_path, seed=1) > 100
