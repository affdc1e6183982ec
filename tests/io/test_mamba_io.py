"""Folders of Mamba and Mamba-2: our exports and the published layout, read back bit for bit or refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ruvjax.core.params import ParamSpec, init
from ruvjax.errors import InputError
from ruvjax.io.huggingface import load_model, read_config, save_model
from ruvjax.io.layout import read_transformer
from ruvjax.io.mamba_layout import MAMBA2_PLACES, MAMBA_PLACES
from ruvjax.models.mamba import Mamba
from ruvjax.models.mamba2 import Mamba2
from ruvjax.models.transformer import Transformer

FIRST = Mamba(vocab_size=16, layers=2, width=8, state=3)
SECOND = Mamba2(vocab_size=16, layers=2, width=8, state=3, head_dim=4, groups=2)
MODELS = {
    "mamba": FIRST,
    "mamba_other": dataclasses.replace(FIRST, tied_head=False, bias=True, dt_rank=2, conv=3, dtype="bfloat16"),
    "mamba_both": dataclasses.replace(FIRST, direction="both", bias=True, tied_head=False),
    "mamba2": SECOND,
    "mamba2_both": dataclasses.replace(SECOND, direction="both", bias=True, tied_head=False, remat=True),
}


@functools.cache
def drawn(model):
    """Parameters of `model` with noise in every leaf: zeros and ones would hide a mix-up."""
    params = jax.jit(lambda key: init(model, key))(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 64))
    return jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape), params)


def assert_equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def change_config(folder, remove=(), **changes):
    config = {key: value for key, value in (read_config(folder) | changes).items() if key not in remove}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", MODELS)
def test_an_export_reads_back_bit_for_bit(name, tmp_path):
    model = MODELS[name]
    save_model(tmp_path / "m", model, drawn(model), mask_token_id=1, eos_token_id=0, diffusion={"length": 4})
    again, loaded, info = load_model(tmp_path / "m")
    assert again == model and hash(again) == hash(model)
    assert_equal_trees(loaded, drawn(model))
    assert (info.mask_token_id, info.eos_token_id, info.pad_token_id) == (1, 0, None)
    assert info.diffusion == {"length": 4}
    save_model(tmp_path / "m", model, jax.tree.map(jnp.zeros_like, drawn(model)))  # an export of ours may be replaced
    assert not np.any(np.asarray(load_model(tmp_path / "m")[1].embedding))


@pytest.mark.parametrize("name", [name for name in MODELS if "both" not in name])
def test_what_transformers_reads_says_the_same(name, tmp_path):
    """Without our own entry, config.json is a published one."""
    model = MODELS[name]
    save_model(tmp_path / "m", model, drawn(model))
    limit = [0.0, {"__float__": "Infinity"}]  # as transformers spells it
    change_config(tmp_path / "m", ("mamba", "mamba2", "format_version"), dtype=model.dtype, time_step_limit=limit)
    again, loaded, info = load_model(tmp_path / "m")
    rank = {"dt_rank": model.rank} if isinstance(model, Mamba) else {}
    assert again == dataclasses.replace(model, **rank) and info.model_type in ("mamba", "mamba2")
    assert_equal_trees(loaded, drawn(model))


def test_a_model_of_both_directions_is_not_passed_off_as_a_published_one(tmp_path):
    model = MODELS["mamba_both"]
    save_model(tmp_path / "m", model, drawn(model))
    assert read_config(tmp_path / "m")["model_type"] == "ruvjax_masked_diffusion"


@pytest.mark.parametrize("kind, table", [("mamba", MAMBA_PLACES), ("mamba2", MAMBA2_PLACES)])
def test_every_weight_has_its_own_place(kind, table):
    found = set()
    for name, model in MODELS.items():
        if name.split("_")[0] == kind:
            paths, _ = jax.tree_util.tree_flatten_with_path(model.spec(), is_leaf=lambda x: isinstance(x, ParamSpec))
            found |= {jax.tree_util.keystr(path) for path, _ in paths}
    assert found == set(table)
    assert len({place.name for place in table.values()}) == len(table)


def test_the_tensors_carry_the_published_names_and_orientation(tmp_path):
    save_model(tmp_path / "m", FIRST, drawn(FIRST))
    tensors, params = load_file(tmp_path / "m" / "model.safetensors"), drawn(FIRST)
    mixer = "backbone.layers.1.mixer."
    np.testing.assert_array_equal(tensors[mixer + "dt_proj.weight"], np.asarray(params.layers.scan.dt[1]).T)
    np.testing.assert_array_equal(tensors[mixer + "conv1d.weight"][:, 0], np.asarray(params.layers.scan.conv[1]))
    np.testing.assert_array_equal(tensors[mixer + "A_log"], np.asarray(params.layers.scan.a_log[1]))
    assert "lm_head.weight" not in tensors


def test_the_original_name_of_the_embedding_is_read(tmp_path):
    save_model(tmp_path / "m", FIRST, drawn(FIRST))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].copy()  # old writers store a tied head too
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert_equal_trees(load_model(tmp_path / "m")[1], drawn(FIRST))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("one, other", [(FIRST, SECOND), (SECOND, FIRST)])
def test_a_checkpoint_of_the_other_version_is_one_clear_line(one, other, own, tmp_path):
    for name, model in (("m", one), ("other", other)):
        save_model(tmp_path / name, model, drawn(model))
    (tmp_path / "m" / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    if not own:
        change_config(tmp_path / "m", ("mamba", "mamba2", "format_version"))
    with pytest.raises(InputError, match="the weights are Mamba(-2)?'s, config.json describes Mamba") as caught:
        load_model(tmp_path / "m")
    assert str(tmp_path / "m") in caught.value.line() and "\n" not in caught.value.line()


@pytest.mark.parametrize(
    "model, changes, message",
    [
        (FIRST, {"hidden_act": "gelu"}, "hidden_act"),
        (FIRST, {"intermediate_size": 24}, "intermediate_size=24"),
        (FIRST, {"state_size": None, "num_hidden_layers": "two"}, "num_hidden_layers='two'"),
        (FIRST, {"conv_kernel": 3}, "conv1d.weight has shape"),
        (FIRST, {"use_bias": True}, "lack backbone.layers.1.mixer.in_proj.bias"),
        (SECOND, {"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        (SECOND, {"num_heads": 3}, "num_heads"),
        (SECOND, {"rms_norm": False}, "rms_norm"),
        (SECOND, {"n_groups": 3}, "model.groups=3"),
    ],
)
def test_what_a_published_config_cannot_be_is_named(model, changes, message, tmp_path):
    save_model(tmp_path / "m", model, drawn(model))
    change_config(tmp_path / "m", ("mamba", "mamba2", "format_version"), **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_model(tmp_path / "m")
    assert "\n" not in caught.value.line()


def test_an_export_of_another_family_is_told_apart(tmp_path):
    save_model(tmp_path / "m", FIRST, drawn(FIRST))
    with pytest.raises(InputError, match="describes a Mamba, not a transformer"):
        read_transformer(read_config(tmp_path / "m"), "here")
    wide = Transformer(vocab_size=16, layers=1, width=8, heads=2, mlp_width=8)
    save_model(tmp_path / "t", wide, init(wide, jax.random.key(0)))
    assert load_model(tmp_path / "t")[0] == wide
    change_config(tmp_path / "m", mamba={"layers": 2, "wide": 3})
    with pytest.raises(InputError, match="Mamba has no wide"):
        load_model(tmp_path / "m")
    change_config(tmp_path / "m", format_version=99)
    with pytest.raises(InputError, match="format_version=99"):
        load_model(tmp_path / "m")
