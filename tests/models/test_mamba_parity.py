"""Mamba and Mamba-2 against transformers: recorded logits everywhere, live ones where torch is installed."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ruvjax.io.huggingface import load_model, save_model

TOLERANCE = 1e-4
SCRIPT = Path(__file__).parents[2] / "scripts" / "record_golden_mamba.py"
_spec = importlib.util.spec_from_file_location("record_golden_mamba", SCRIPT)
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
NAMES = pytest.mark.parametrize("name", golden.CONFIGS)


@pytest.fixture(scope="module")
def recorded():
    return np.load(golden.GOLDEN)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Each configuration in the published layout, with the weights the recording script draws, as we read it."""
    root, found = tmp_path_factory.mktemp("published"), {}
    for name, config in golden.CONFIGS.items():
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {key: golden.weight(key, shape) for key, shape in golden.shapes(config).items()}
        save_file(tensors, folder / "model.safetensors")
        found[name] = load_model(folder)[:2]
    return found


@partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, segments=None, cache=None):
    return model.apply(params, tokens, segments=segments, cache=cache)


def batch(side):
    """Both rows in one batch, the short one padded on the left or on the right; and where its tokens lie."""
    long, short = golden.rows()
    first = golden.LENGTH - golden.SHORT if side == "left" else 0
    tokens, segments = (np.zeros((2, golden.LENGTH), np.int32) for _ in range(2))
    places = (slice(0, golden.LENGTH), slice(first, first + golden.SHORT))
    for line, (row, place) in enumerate(zip((long, short), places)):
        tokens[line, place], segments[line, place] = row, 1
    return jnp.asarray(tokens), jnp.asarray(segments), places


@NAMES
def test_one_pass_gives_the_recorded_logits(name, loaded, recorded):
    model, params = loaded[name]
    for i, row in enumerate(golden.rows()):
        answer = apply(model, params, jnp.asarray(row)[None]).logits[0]
        np.testing.assert_allclose(answer, recorded[f"{name}.{i}"], atol=TOLERANCE, rtol=0)


@NAMES
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_and_the_steps_after_them_give_them_too(name, side, loaded, recorded):
    model, params = loaded[name]
    tokens, segments, places = batch(side)
    output = apply(model, params, tokens, segments, model.empty_cache(2))
    for line, place in enumerate(places):
        np.testing.assert_allclose(output.logits[line, place], recorded[f"{name}.{line}"], atol=TOLERANCE, rtol=0)
    last = jnp.stack([output.logits[line, place.stop - 1] for line, place in enumerate(places)])
    cache, drawn = output.aux["cache"], []
    for _ in range(golden.CONTINUED):
        drawn.append(jnp.argmax(last, axis=-1).astype(jnp.int32))
        output = apply(model, params, drawn[-1][:, None], None, cache)
        last, cache = output.logits[:, 0], output.aux["cache"]
    for line in range(2):
        np.testing.assert_array_equal(np.stack(drawn)[:, line], recorded[f"{name}.{line}.greedy"])


@NAMES
def test_steps_give_them_too(name, loaded, recorded):
    model, params = loaded[name]
    cache, found = model.empty_cache(1), []
    for token in golden.rows()[0]:
        output = apply(model, params, jnp.full((1, 1), token, jnp.int32), None, cache)
        cache = output.aux["cache"]
        found.append(output.logits[0, 0])
    np.testing.assert_allclose(np.stack(found), recorded[f"{name}.0"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "name, change", [("mamba", "skip"), ("mamba", "dt_bias"), ("mamba2", "a_log"), ("mamba2", "conv")]
)
def test_a_wrong_weight_is_seen(name, change, loaded, recorded):
    model, params = loaded[name]
    scan = params.layers.scan
    moved = params.replace(
        layers=params.layers.replace(scan=scan.replace(**{change: jnp.roll(getattr(scan, change), 1, 1)}))
    )
    answer = apply(model, moved, jnp.asarray(golden.rows()[0])[None]).logits[0]
    assert np.abs(answer - recorded[f"{name}.0"]).max() > 10 * TOLERANCE


def live():
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"live parity needs {package}: install the extra `parity`")


@NAMES
def test_live_logits_of_a_saved_pretrained_folder(name, tmp_path):
    live()
    reference = golden.reference(name)
    reference.save_pretrained(tmp_path, max_shard_size="20kB")
    model, params, info = load_model(tmp_path)
    assert info.model_type == golden.CONFIGS[name]["model_type"]
    for row in golden.rows():
        answer = apply(model, params, jnp.asarray(row)[None]).logits[0]
        np.testing.assert_allclose(answer, golden.logits(reference, row), atol=TOLERANCE, rtol=0)


@NAMES
def test_transformers_reads_our_exports(name, loaded, tmp_path):
    live()
    import transformers

    model, params = loaded[name]
    save_model(tmp_path / "m", model, params)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    row = golden.rows()[0]
    answer = apply(model, params, jnp.asarray(row)[None]).logits[0]
    np.testing.assert_allclose(answer, golden.logits(reference, row), atol=TOLERANCE, rtol=0)
