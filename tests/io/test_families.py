"""Checkpoints of every published family against what their own code computes: recorded everywhere, live with torch."""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kernels_pallas.attention import Mask
from ruvjax.core.params import shardings
from ruvjax.core.sharding import RULES, MeshConfig, make_mesh
from ruvjax.errors import InputError
from ruvjax.io.huggingface import load_model, read_config, save_model, save_pretrained
from ruvjax.models.mamba import Mamba
from ruvjax.models.transformer import Transformer

TOLERANCE = 1e-4
SCRIPT = Path(__file__).parents[2] / "scripts" / "record_golden_families.py"
_spec = importlib.util.spec_from_file_location("record_golden_families", SCRIPT)
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

DIFFUSION = ("dream", "llada")
PAD = 5  # positions of padding on the left of a row
LENGTH = PAD + golden.LENGTHS[0] + golden.CONTINUED  # one shape, and so one compilation, for every check


@pytest.fixture(scope="module")
def recorded():
    return np.load(golden.GOLDEN)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A published folder per family, with the weights that the recording script draws."""
    root = tmp_path_factory.mktemp("published")
    for name, config in golden.CONFIGS.items():
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {key: golden.weight(key, shape) for key, shape in golden.shapes(config).items()}
        save_file(tensors, folder / "model.safetensors")
    return root


@functools.partial(jax.jit, static_argnames=("model", "causal"))
def _logits(model, params, tokens, segments, causal):
    start = jnp.argmax(segments != 0, axis=1)[:, None]
    positions = jnp.maximum(jnp.arange(tokens.shape[1])[None, :] - start, 0)
    mask = Mask(causal=causal, segments=segments)
    return model.apply(params, tokens, mask=mask, positions=positions).logits


def logits(name, model, params, rows, starts=(0, 0)):
    """Logits of two rows of any lengths, each beginning at its own position of the batch."""
    tokens, segments = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, start : start + len(row)] = row
        segments[i, start : start + len(row)] = 1
    answer = np.asarray(_logits(model, params, tokens, segments, name not in DIFFUSION))
    return [answer[i, start : start + len(row)] for i, (row, start) in enumerate(zip(rows, starts, strict=True))]


def given_rows(name):
    rows = golden.rows()
    return [golden.masked(row) for row in rows] if name in DIFFUSION else rows


def worst(name, model, params, recorded, starts=(0, 0)):
    answers = logits(name, model, params, given_rows(name), starts)
    return max(np.abs(answer - recorded[f"{name}.{i}"]).max() for i, answer in enumerate(answers))


@pytest.mark.parametrize("name", golden.CONFIGS)
def test_logits_equal_the_recorded_ones_also_in_a_padded_batch(name, folders, recorded):
    model, params, info = load_model(folders / name)
    assert info.model_type == golden.CONFIGS[name]["model_type"] and info.causal == (name not in DIFFUSION)
    assert worst(name, model, params, recorded) < TOLERANCE
    assert worst(name, model, params, recorded, (2, PAD)) < TOLERANCE


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama2", {"norm_eps": 1e-2}),
        ("llama3", {"rope_theta": 510.0}),
        ("mistral", {"window": 6}),
        ("mistral", {"window": 0}),
        ("qwen2_window", {"window": 0}),
        ("dream", {"shift": False}),
        ("llada", {"rope_theta": 510.0}),
    ],
)
def test_a_wrong_hyper_parameter_is_seen(name, change, folders, recorded):
    model, params, _ = load_model(folders / name)
    assert worst(name, dataclasses.replace(model, **change), params, recorded) > 10 * TOLERANCE


@pytest.mark.parametrize("name", golden.CAUSAL)
def test_greedy_continuations_are_token_equal_also_with_padding_on_the_left(name, folders, recorded):
    model, params, _ = load_model(folders / name)
    single, padded = golden.rows()[0], golden.rows()[0]
    for _ in range(golden.CONTINUED):
        one, other = logits(name, model, params, (single, padded), (0, PAD))
        single, padded = (np.append(row, x[-1].argmax()) for row, x in ((single, one), (padded, other)))
    np.testing.assert_array_equal(single[-golden.CONTINUED :], recorded[f"{name}.greedy"])
    np.testing.assert_array_equal(padded, single)


def softmax(x):
    x = np.exp(np.float64(x) - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def commit(tokens, best, confidence, count):
    """`tokens` with the `count` most confident masks filled."""
    chosen = np.argsort(-confidence, kind="stable")[:count]
    tokens = tokens.copy()
    tokens[chosen] = best[chosen]
    return tokens


def test_llada_fills_a_canvas_as_its_published_loop_does(folders, recorded):
    model, params, info = load_model(folders / "llada")
    assert info.mask_token_id == golden.MASK and not model.shift
    tokens, prompt = golden.canvas(golden.rows()[0]), golden.LENGTHS[0]
    blocks = golden.CANVAS // golden.BLOCK
    for block in range(blocks):
        end = prompt + (block + 1) * golden.BLOCK
        for _ in range(golden.STEPS // blocks):
            scores = softmax(logits("llada", model, params, (tokens, tokens), (0, PAD))[1])
            free = (tokens == golden.MASK) & (np.arange(len(tokens)) < end)
            confidence = np.where(free, scores.max(-1), -np.inf)
            tokens = commit(tokens, scores.argmax(-1), confidence, golden.BLOCK * blocks // golden.STEPS)
    np.testing.assert_array_equal(tokens, recorded["llada.generate"])


@pytest.mark.parametrize("algorithm", ["maskgit_plus", "entropy"])
def test_dream_fills_a_canvas_as_its_published_loop_does(algorithm, folders, recorded):
    model, params, info = load_model(folders / "dream")
    assert info.mask_token_id == golden.MASK and model.shift
    tokens = golden.canvas(golden.rows()[0])
    times = np.linspace(1, 1e-3, golden.STEPS + 1, dtype=np.float32)
    for i in range(golden.STEPS):
        scores = softmax(logits("dream", model, params, (tokens, tokens), (0, PAD))[1])
        free = tokens == golden.MASK
        count = int(free.sum() * (1 - times[i + 1] / times[i])) if i < golden.STEPS - 1 else free.sum()
        certainty = scores.max(-1) if algorithm == "maskgit_plus" else (scores * np.log(scores + 1e-10)).sum(-1)
        tokens = commit(tokens, scores.argmax(-1), np.where(free, certainty, -np.inf), count)
    np.testing.assert_array_equal(tokens, recorded[f"dream.{algorithm}"])


def assert_equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def spelled_out(model):
    """`model` without the defaults that have two spellings."""
    return dataclasses.replace(model, head_dim=model.dim_per_head, kv_heads=model.key_heads)


@pytest.mark.parametrize("name", golden.CONFIGS)
def test_what_is_saved_as_published_reads_back_the_same(name, folders, tmp_path):
    model, params, info = load_model(folders / name)
    family = info.model_type
    for shard in (10**9, 9000):  # the second time over the first, and in shards
        save_pretrained(
            tmp_path / "m", model, params, family=family, eos_token_id=3, bos_token_id=1, max_shard_bytes=shard
        )
        again, loaded, found = load_model(tmp_path / "m")
        assert spelled_out(again) == spelled_out(model) and found.causal == info.causal
        assert (found.eos_token_id, found.eos_token_ids, found.bos_token_id, found.mask_token_id) == (3, (3,), 1, None)
        assert_equal_trees(loaded, params)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    assert family == "llada" or save_pretrained(tmp_path / "own", model, params)
    assert family == "llada" or read_config(tmp_path / "own")["model_type"] == family
    stored = load_file(folders / name / "model.safetensors")
    if "lm_head.weight" not in stored and family != "llada":
        assert read_config(tmp_path / "m")["tie_word_embeddings"] is True


@pytest.mark.parametrize("name", ["mistral", "llada", "dream"])
def test_weights_are_read_straight_into_a_sharding(name, folders, tmp_path):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    model, params, _ = load_model(folders / name)
    save_pretrained(tmp_path / "m", model, params, family=golden.CONFIGS[name]["model_type"], max_shard_bytes=9000)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    again, sharded, _ = load_model(tmp_path / "m", "float32", lambda model: shardings(model, mesh, RULES))
    assert spelled_out(again) == spelled_out(model)
    assert_equal_trees(sharded, params)
    wanted = shardings(model, mesh, RULES)
    for leaf, sharding in zip(jax.tree.leaves(sharded), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == sharding
    assert not sharded.layers.up.is_fully_replicated
    narrow = load_model(tmp_path / "m", "bfloat16", lambda model: shardings(model, mesh, RULES))[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}


TINY = Transformer(vocab_size=16, layers=2, width=8, heads=2, mlp_width=12, max_length=32)


@pytest.mark.parametrize(
    "change, family, message",
    [
        ({"time": "adaln"}, None, "model.time='adaln' is not what llama can be"),
        ({"norm": "layer"}, None, "model.norm='layer'"),
        ({"mlp": "gelu"}, "mistral", "model.mlp='gelu'"),
        ({"qkv_bias": True}, "llama", "model.qkv_bias=True is not what llama can be"),
        ({"qkv_bias": True, "qk_norm": True}, None, "model.qkv_bias=True is not what qwen3 can be"),
        ({"shift": True}, "qwen2", "model.qkv_bias=False"),
        ({"shift": True, "qkv_bias": True}, "qwen2", "model.shift=True"),
        ({"window": 3}, "llama", "model.window=3"),
        ({"head_dim": 6}, "llada", "model.head_dim=6"),
        ({}, "gpt2", "family='gpt2' is not known"),
    ],
)
def test_a_model_that_a_family_cannot_be_is_not_passed_off_as_one(change, family, message, tmp_path):
    model = dataclasses.replace(TINY, **change)
    with pytest.raises(InputError, match=message):
        save_pretrained(tmp_path / "m", model, None, family=family)
    assert list(tmp_path.iterdir()) == []


def test_a_mamba_of_both_directions_is_not_a_published_one(tmp_path):
    with pytest.raises(InputError, match="not one that is published as a Mamba"):
        save_pretrained(tmp_path / "m", Mamba(direction="both"), None)
    with pytest.raises(InputError, match="not one that is published as llama"):
        save_pretrained(tmp_path / "m", Mamba(), None, family="llama")


def test_a_checkpoint_of_others_is_not_replaced(folders):
    model, params, _ = load_model(folders / "qwen3")
    for save in (save_model, save_pretrained):
        with pytest.raises(InputError, match="something other"):
            save(folders / "qwen3", model, params)
    assert load_model(folders / "qwen3")[0] == model


def test_the_files_of_the_tokenizer_come_along(folders, tmp_path):
    model, params, _ = load_model(folders / "qwen2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (tmp_path / name).write_text(name)
    save_pretrained(tmp_path / "m", model, params, tmp_path / "tokenizer.json")
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} and "README.md" not in names
    save_pretrained(tmp_path / "m", model, params)
    assert load_model(tmp_path / "m")[2].tokenizer is None


def test_end_tokens_are_those_of_both_files(folders, tmp_path):
    model, params, _ = load_model(folders / "llama2")
    save_pretrained(tmp_path / "m", model, params, eos_token_id=3)
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [5, 3, 7]}')
    info = load_model(tmp_path / "m")[2]
    assert info.eos_token_id == 3 and info.eos_token_ids == (5, 3, 7)
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [5, 64]}')
    with pytest.raises(InputError, match="generation_config.json: eos_token_id="):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(value, stored, tmp_path):
    from ruvjax.core.params import init

    params = jax.tree.map(lambda x: x.astype(stored), init(TINY, jax.random.key(0)))
    damaged = params.replace(layers=params.layers.replace(up=params.layers.up.at[1, 2, 3].set(value)))
    save_model(tmp_path / "m", TINY, damaged)
    with pytest.raises(InputError, match="model.layers.1.mlp.up_proj.weight holds NaN or infinite") as caught:
        load_model(tmp_path / "m")
    assert "\n" not in caught.value.line()
    save_model(tmp_path / "m", TINY, params)
    load_model(tmp_path / "m")


@pytest.mark.parametrize(
    "change",
    [
        {"block_type": "sequential"},
        {"activation_type": "swiglu"},
        {"layer_norm_type": "default"},
        {"rope": False},
        {"include_bias": True},
        {"scale_logits": True},
        {"block_group_size": 2},
        {"attention_layer_norm": True},
        {"n_heads": "4"},
        {"d_model": None},
    ],
)
def test_what_a_llada_config_cannot_be_is_refused(change, folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(golden.LLADA | change))
    with pytest.raises(InputError, match="config.json") as caught:
        load_model(tmp_path)
    assert "\n" not in caught.value.line()


def live():
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"live parity needs {package}: install the extra `parity`")


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", golden.CAUSAL)
def test_live_transformers_loads_what_we_saved(name, folders, tmp_path, recorded):
    live()
    import transformers

    model, params, _ = load_model(folders / name)
    save_pretrained(tmp_path, model, params, eos_token_id=3, pad_token_id=0, max_shard_bytes=9000)
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(reference).__name__ == golden.CLASSES[golden.CONFIGS[name]["model_type"]]
    assert reference.config.eos_token_id == 3 and reference.dtype.itemsize == 4
    for i, row in enumerate(golden.rows()):
        found = golden.logits(reference.eval(), row)
        np.testing.assert_allclose(found, recorded[f"{name}.{i}"], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", golden.CAUSAL)
def test_live_checkpoints_of_transformers_load_here(name, tmp_path, recorded):
    live()
    golden.reference(name).save_pretrained(tmp_path, max_shard_size="20kB")
    model, params, _ = load_model(tmp_path)
    assert worst(name, model, params, recorded) < TOLERANCE
