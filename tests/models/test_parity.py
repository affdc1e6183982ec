"""Logits against transformers: recorded ones everywhere, live ones where the extra `parity` is installed."""

import dataclasses
import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from kernels_pallas.attention import Mask
from ruvjax.core.rope import RopeScaling
from ruvjax.io.huggingface import load_model

TOLERANCE = 1e-4
SCRIPT = Path(__file__).parents[2] / "scripts" / "record_golden.py"
_spec = importlib.util.spec_from_file_location("record_golden", SCRIPT)
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

CASES = [(name, kind) for name in golden.CONFIGS for kind in ("causal", "left", "right")]


@pytest.fixture(scope="module")
def recorded():
    return np.load(golden.GOLDEN)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder per configuration, in the published layout, with the weights the recording script draws."""
    root = tmp_path_factory.mktemp("published")
    for name, config in golden.CONFIGS.items():
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {key: golden.weight(key, shape) for key, shape in golden.shapes(config).items()}
        save_file(tensors, folder / "model.safetensors")
    return root


@partial(jax.jit, static_argnames=("model", "impl"))
def causal_logits(model, params, tokens, padding, positions, impl):
    mask = Mask(causal=True, segments=padding)
    return model.apply(params, tokens, mask=mask, positions=positions, impl=impl).logits


def ours(model, params, tokens, mask, impl=None):
    """Causal logits under a 0/1 padding mask, zero at padding."""
    answer = causal_logits(model, params, jnp.asarray(tokens), jnp.asarray(mask), golden.positions(mask), impl)
    return np.asarray(answer) * mask[:, :, None]


@pytest.mark.parametrize("name, kind", CASES)
def test_logits_equal_the_recorded_ones(name, kind, folders, recorded):
    tokens, masks = golden.batch()
    np.testing.assert_array_equal(tokens, recorded["tokens"])
    model, params, _ = load_model(folders / name)
    np.testing.assert_allclose(
        ours(model, params, tokens, masks[kind]), recorded[f"{name}.{kind}"], atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("name", golden.CONFIGS)
def test_the_scanned_and_the_reference_form_agree_too(name, folders, recorded):
    tokens, masks = golden.batch()
    model, params, _ = load_model(folders / name)
    scanned = dataclasses.replace(model, unroll=not model.unroll)
    answer = ours(scanned, params, tokens, masks["left"], impl="reference")
    np.testing.assert_allclose(answer, recorded[f"{name}.left"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama", {"rope_scaling": RopeScaling()}),
        ("llama_linear", {"rope_scaling": RopeScaling()}),
        ("qwen2_yarn", {"rope_scaling": RopeScaling()}),
        ("qwen3", {"rope_theta": 310.0}),
        ("qwen3", {"norm_eps": 1e-2}),
    ],
)
def test_a_wrong_hyper_parameter_is_seen(name, change, folders, recorded):
    tokens, masks = golden.batch()
    model, params, _ = load_model(folders / name)
    answer = ours(dataclasses.replace(model, **change), params, tokens, masks["causal"])
    assert np.abs(answer - recorded[f"{name}.causal"]).max() > 10 * TOLERANCE


def test_grouped_heads_in_the_wrong_order_are_seen(folders, recorded):
    tokens, masks = golden.batch()
    model, params, _ = load_model(folders / "llama")
    half = params.layers.k.shape[-1] // 2
    swapped = params.replace(layers=params.layers.replace(k=jnp.roll(params.layers.k, half, axis=-1)))
    answer = ours(model, swapped, tokens, masks["causal"])
    assert np.abs(answer - recorded["llama.causal"]).max() > 10 * TOLERANCE


def live():
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"live parity needs {package}: install the extra `parity`")


@pytest.mark.parametrize("name", golden.CONFIGS)
def test_live_logits_of_a_saved_pretrained_folder(name, tmp_path):
    live()
    reference = golden.reference(name)
    reference.save_pretrained(tmp_path, max_shard_size="20kB")  # small shards: the index is read as well
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, params, info = load_model(tmp_path)
    assert info.model_type == golden.CONFIGS[name]["model_type"]
    tokens, masks = golden.batch()
    for mask in masks.values():
        expected = golden.logits(reference, tokens, mask)
        np.testing.assert_allclose(ours(model, params, tokens, mask), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_live_half_precision_weights_are_read_exactly(stored, tmp_path):
    live()
    import torch

    halved = golden.reference("llama").to(getattr(torch, stored))
    halved.save_pretrained(tmp_path)
    reference = golden.reference("llama")  # afresh: the round trip through half precision also rounds its rotary table
    reference.load_state_dict(halved.state_dict())
    model, params, _ = load_model(tmp_path, dtype="float32")
    assert model.dtype == stored and params.embedding.dtype == jnp.float32
    tokens, masks = golden.batch()
    expected = golden.logits(reference, tokens, masks["causal"])
    answer = ours(dataclasses.replace(model, dtype="float32"), params, tokens, masks["causal"])
    np.testing.assert_allclose(answer, expected, atol=TOLERANCE, rtol=0)
