"""The documented CodeRepairTRM: shapes, keys, presets, early stop, masks, saving, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.api.repair_code import CodeRepairConfig, CodeRepairTRM
from ruvjax.errors import ConfigError, InputError

TINY = CodeRepairConfig(
    grid_height=4, grid_width=5, vocab_size=11, embed_dim=16, n_heads=2, ffn_dim=32, n_blocks=1, max_iterations=4
)


@pytest.fixture(scope="module")
def model() -> CodeRepairTRM:
    return CodeRepairTRM.from_config(TINY)


@pytest.fixture(scope="module")
def grid() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 11, (3, 4, 5))


def test_forward_and_its_keys(model, grid):
    logits, info = model.forward(grid, labels=grid)
    assert logits.shape == (3, 4, 5, 11) and logits.dtype == jnp.float32
    assert set(info) == {"iterations", "confidence", "q_hat", "loss"}
    assert info["iterations"] == 4  # an untrained model is never confident
    np.testing.assert_allclose(info["confidence"], 1 / (1 + np.exp(-np.asarray(info["q_hat"]))), rtol=1e-5)
    assert "loss" not in model.forward(grid)[1]


def test_the_loss_leaves_padding_out(model, grid):
    """Against stable-max written out; labels of 0 and below cost nothing."""
    labels = grid.copy()
    labels[:, 2:] = 0
    labels[0, 0, 0] = -100
    logits, info = model.forward(grid, labels=labels)
    x = np.asarray(logits, np.float64)
    s = np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))
    p = s / s.sum(-1, keepdims=True)
    keep = labels > 0
    expected = -np.log(np.take_along_axis(p, np.maximum(labels, 0)[..., None], -1)[..., 0])[keep].mean()
    np.testing.assert_allclose(info["loss"], expected, rtol=1e-4)


def test_generate(model, grid):
    found = model.generate(grid, max_iterations=2)
    assert set(found) == {"output", "logits", "iterations", "confidence"} and found["iterations"] == 2
    np.testing.assert_array_equal(found["output"], np.argmax(found["logits"], -1))


def test_it_stops_when_every_row_is_confident(grid):
    model = CodeRepairTRM.from_config(TINY)
    model.params = model.params.replace(halt_bias=jnp.full((1,), 9.0))
    assert model.forward(grid)[1]["iterations"] == TINY.min_iterations
    wary = CodeRepairTRM(dataclasses.replace(TINY, q_threshold=1.0), model.params)
    assert wary.forward(grid)[1]["iterations"] == TINY.max_iterations


def test_masked_cells_take_no_part(model, grid):
    mask = np.ones(grid.shape, bool)
    mask[:, :, 4] = False
    scribbled = np.where(mask, grid, 3)
    one, two = (model.forward(x, mask=mask)[0][:, :, :4] for x in (grid, scribbled))
    np.testing.assert_allclose(one, two, atol=1e-5)
    free = (model.forward(x)[0][:, :, :4] for x in (grid, scribbled))
    assert not np.allclose(*free, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "millions"), [("tiny", 0.295), ("small", 9.70), ("base", 13.56), ("large", 24.64), ("arc", 8.0)]
)
def test_presets_and_their_real_size(preset, millions):
    config = (
        CodeRepairConfig.for_arc_agi_7m()
        if preset == "arc"
        else getattr(CodeRepairConfig, f"for_code_repair_{preset}")()
    )
    params = jax.eval_shape(lambda: CodeRepairTRM(config).params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert size == pytest.approx(millions * 1e6, rel=0.005)


def test_num_parameters(model):
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert model.num_parameters(trainable_only=False) == size
    assert model.num_parameters() == size - 2 * TINY.embed_dim


def test_save_and_load(model, grid, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = CodeRepairTRM.from_pretrained(tmp_path / "saved")
    assert again.config == TINY
    np.testing.assert_array_equal(again.forward(grid)[0], model.forward(grid)[0])
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something other"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("remat", [False, True])
def test_checkpointing_changes_no_result(grid, remat):
    config = dataclasses.replace(TINY, use_gradient_checkpointing=remat)
    np.testing.assert_allclose(CodeRepairTRM(config).forward(grid)[0], CodeRepairTRM(TINY).forward(grid)[0], atol=1e-6)


def test_errors(model, grid, tmp_path):
    with pytest.raises(InputError, match="shape"):
        model.forward(grid[:, :3])
    with pytest.raises(InputError, match="ids from"):
        model.forward(grid + 1)
    with pytest.raises(InputError, match="integers"):
        model.forward(grid.astype(float))
    with pytest.raises(ConfigError, match="dropout"):
        CodeRepairConfig(dropout=0.1)
    with pytest.raises(ConfigError, match="min_iterations"):
        CodeRepairConfig(min_iterations=9)
    with pytest.raises(InputError, match=r"config\.json"):
        CodeRepairTRM.from_pretrained(tmp_path)
