"""PEFT folders: recorded logits everywhere, PEFT itself in both directions where the extra `parity` is installed."""

import functools
import importlib.util
import json
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kernels_pallas.attention import Mask
from ruvjax.errors import InputError
from ruvjax.io.huggingface import load_model
from ruvjax.io.peft import load_adapter, save_adapter
from ruvjax.lora.adapter import LoraConfig, attach, count, init, merge, select
from ruvjax.models.mamba import Mamba
from ruvjax.models.transformer import Transformer

TOLERANCE = 1e-5
SCRIPT = Path(__file__).parents[2] / "scripts" / "record_golden_peft.py"
_spec = importlib.util.spec_from_file_location("record_golden_peft", SCRIPT)
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
NAMES = pytest.mark.parametrize("name", golden.ADAPTERS)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def recorded():
    return np.load(golden.GOLDEN)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Model and parameters of every base, read from a folder in the published layout."""
    root, found = tmp_path_factory.mktemp("published"), {}
    for base in sorted({base for base, _ in golden.ADAPTERS.values()}):
        family = golden.family(base)
        folder = root / base
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(family.CONFIGS[base]))
        shapes = family.shapes(family.CONFIGS[base])
        save_file({key: family.weight(key, shape) for key, shape in shapes.items()}, folder / "model.safetensors")
        found[base] = load_model(folder)[:2]
    return found


@pytest.fixture
def folder_of(recorded, tmp_path):
    """Makes the folder that PEFT saved for an adapter."""

    def make(name, **changes):
        described = json.loads(str(recorded[f"{name}.folder"]))
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(described["config"] | changes))
        tensors = {key: golden.factor(name, key, tuple(shape)) for key, shape in described["shapes"].items()}
        save_file(tensors, folder / WEIGHTS)
        return folder

    return make


@functools.partial(jax.jit, static_argnums=0)
def ours(model, params, tokens):
    extra = {"mask": Mask(causal=True)} if isinstance(model, Transformer) else {}
    return model.apply(params, tokens, **extra).logits


def close(found, expected):
    """Within 1e-5 of the largest logit."""
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


@NAMES
def test_logits_equal_the_recorded_ones(name, loaded, recorded, folder_of):
    base = golden.ADAPTERS[name][0]
    model, params = loaded[base]
    adapters, config = load_adapter(folder_of(name), model)
    tokens = jnp.asarray(golden.tokens(base))
    close(ours(model, attach(params, adapters), tokens), recorded[name])
    close(ours(model, merge(params, adapters), tokens), recorded[name])
    plain = ours(model, params, tokens)
    assert np.abs(plain - recorded[name]).max() > 1000 * TOLERANCE  # negative control: the adapter matters
    described = json.loads(str(recorded[f"{name}.folder"]))["shapes"]
    assert count(config, model) == sum(int(np.prod(shape)) for shape in described.values())


def test_a_batch_of_mixed_adapters_equals_the_recorded_one(loaded, recorded, folder_of):
    model, params = loaded["llama"]
    names = [name for name in golden.MIXED if name in golden.ADAPTERS]
    adapters = [load_adapter(folder_of(name), model)[0] for name in names]
    ids = jnp.array([[names.index(name) if name in names else -1] for name in golden.MIXED], jnp.int32)
    found = ours(model, attach(params, select(adapters, ids)), jnp.asarray(golden.mixed_tokens()))
    close(found, recorded["mixed"])
    swapped = ours(model, attach(params, select(adapters[::-1], ids)), jnp.asarray(golden.mixed_tokens()))
    assert np.abs(swapped - recorded["mixed"]).max() > 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "change"),
    [("rslora", {"use_rslora": False}), ("lora", {"lora_alpha": 7}), ("patterns", {"alpha_pattern": {}})],
)
def test_another_setting_is_seen(name, change, loaded, recorded, folder_of):
    model, params = loaded["llama"]
    adapters, _ = load_adapter(folder_of(name, **change), model)
    found = ours(model, attach(params, adapters), jnp.asarray(golden.tokens("llama")))
    assert np.abs(found - recorded[name]).max() > 100 * TOLERANCE


def test_configurations_are_read_in_our_names(loaded, folder_of):
    config = load_adapter(folder_of("patterns"), loaded["llama"][0])[1]
    assert set(config.targets) == {"layers.q", "layers.k", "layers.up"}
    assert config.rank_pattern == {"layers.k": 2, "layers.1.up": 6}
    assert config.alpha_pattern == {"layers.0.q": 5.0, "layers.1.up": 7.5}
    partial = load_adapter(folder_of("layers"), loaded["llama"][0])[1]
    assert set(partial.targets) == {"layers.1.q", "layers.1.down"} and partial.dora


@NAMES
def test_written_and_read_again_to_the_bit(name, loaded, folder_of, tmp_path):
    model = loaded[golden.ADAPTERS[name][0]][0]
    adapters, config = load_adapter(folder_of(name), model)
    save_adapter(tmp_path / "written", model, adapters, config)
    again, same = load_adapter(tmp_path / "written", model)
    assert same == config and again.keys() == adapters.keys()
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {path.name for path in (tmp_path / "written").iterdir()} == {CONFIG, WEIGHTS}


def test_every_site_of_an_own_model_goes_out_and_in(tmp_path):
    llada = Transformer(vocab_size=16, layers=2, width=8, heads=2, mlp_width=12, max_length=8)
    for model, model_type in (
        (llada, "llada"),
        (llada, "llama"),
        (Mamba(vocab_size=16, width=8, direction="both"), ""),
    ):
        targets = ("all-linear",) if isinstance(model, Transformer) else ("inward", "select")
        config = LoraConfig(rank=2, targets=targets)
        adapters = init(config, model, jax.random.key(0))
        folder = save_adapter(tmp_path / "adapter", model, adapters, config, model_type)
        again, read = load_adapter(folder, model, model_type)
        assert count(read, model) == count(config, model)
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
            np.testing.assert_array_equal(one, other)
    written = json.loads((save_adapter(tmp_path / "x", llada, *_all(llada), "llada") / CONFIG).read_text())
    assert "ff_out" not in written["target_modules"]  # it would fit the head too
    assert "model.transformer.blocks.1.ff_out" in written["target_modules"] and "q_proj" in written["target_modules"]


def _all(model):
    config = LoraConfig(rank=2, targets=("all-linear",))
    return init(config, model, jax.random.key(0)), config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_new": 1}, "something_new=1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the weights"),
        ({"use_dora": "yes"}, "use_dora='yes'"),
        ({"r": 2.5}, "r=2.5 must be an integer"),
        ({"r": 0}, "rank 0 of"),
        ({"lora_alpha": 0}, "alpha 0 of"),
        ({"target_modules": ["query"]}, r"target_modules=\['query'\] fits no module"),
        ({"target_modules": 3}, "target_modules=3"),
        ({"target_modules": "(q_proj"}, "is no regular expression"),
        ({"rank_pattern": {"q_proj": 2}}, r"lora_A.weight has shape \[4, 32\].*ask for \[2, 32\]"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"target_modules": ["q_proj"]}, "v_proj is not among the target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lora_A of .*o_proj is missing"),
        ({"exclude_modules": ["v_proj"]}, "v_proj is not among"),
        ({"use_dora": True}, "lora_magnitude_vector of .* is missing"),
    ],
)
def test_what_a_configuration_cannot_mean_is_refused_by_name(change, message, loaded, folder_of):
    with pytest.raises(InputError, match=message) as caught:
        load_adapter(folder_of("lora", **change), loaded["llama"][0])
    assert "\n" not in caught.value.line()


@pytest.mark.parametrize("change", [{"exclude_modules": ["k_proj"]}, {"fan_in_fan_out": True}, {"lora_dropout": 0.5}])
def test_what_changes_nothing_is_passed_over(change, loaded, recorded, folder_of):
    model, params = loaded["llama"]
    adapters, _ = load_adapter(folder_of("lora", **change), model)
    close(ours(model, attach(params, adapters), jnp.asarray(golden.tokens("llama"))), recorded["lora"])


def damage(kind, tensors):
    first = next(key for key in tensors if "layers.1.self_attn.q_proj.lora_B" in key)
    if kind == "missing":
        del tensors[first]
    elif kind == "nan":
        tensors[first] = np.full_like(tensors[first], np.nan)
    elif kind == "integers":
        tensors[first] = tensors[first].astype(np.int32)
    elif kind == "embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((2, 2), np.float32)
    elif kind == "unknown":
        tensors[first.replace("q_proj", "q_porj")] = tensors.pop(first)
    elif kind == "no prefix":
        tensors[first.removeprefix("base_model.model.")] = tensors.pop(first)
    else:
        tensors[first.replace("lora_B.weight", "lora_magnitude_vector")] = np.zeros(32, np.float32)
    return tensors


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "lora_B of model.layers.1.self_attn.q_proj is missing"),
        ("nan", "q_proj.lora_B.weight holds NaN"),
        ("integers", "stored as I32"),
        ("embedding", "lora_embedding_A is no factor of a linear module"),
        ("unknown", "no linear module model.layers.1.self_attn.q_porj"),
        ("no prefix", "is no factor"),
        ("superfluous", "lora_magnitude_vector has no place"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(kind, message, loaded, folder_of):
    folder = folder_of("lora")
    save_file(damage(kind, load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(InputError, match=message):
        load_adapter(folder, loaded["llama"][0])


def test_files_that_are_not_there_or_not_whole_are_refused_by_name(loaded, folder_of, tmp_path):
    model, folder = loaded["llama"][0], folder_of("lora")
    with pytest.raises(InputError, match="no such adapter folder"):
        load_adapter(tmp_path / "nowhere", model)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_adapter(folder, model)
    os.remove(folder / WEIGHTS)
    with pytest.raises(InputError, match="adapter_model.safetensors: no such file"):
        load_adapter(folder, model)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object"):
        load_adapter(folder, model)


def test_what_cannot_be_written_is_refused_and_nothing_is_lost(loaded, tmp_path, monkeypatch):
    model = loaded["llama"][0]
    config = LoraConfig(rank=2, targets=("q",), rank_pattern={"layers.0.q": 1})
    adapters = init(config, model, jax.random.key(0))
    folder = save_adapter(tmp_path / "adapter", model, adapters, config)
    before = (folder / WEIGHTS).read_bytes()
    q = adapters["layers.q"]
    wrong = {
        "differ in layers.v": (adapters, LoraConfig(rank=2, targets=("q", "v"))),
        "is of rank 2, the configuration says 3": (adapters, LoraConfig(rank=3, targets=("q",))),
        "dora=True": (adapters, LoraConfig(rank=2, targets=("q",), dora=True)),
        "is scaled by": (adapters, LoraConfig(rank=2, targets=("q",), alpha=3.0, rank_pattern=config.rank_pattern)),
        "more columns than the rank": ({"layers.q": q.replace(a=q.a + 1.0)}, config),
        "holds NaN": ({"layers.q": q.replace(b=q.b.at[1].set(jnp.nan))}, config),
    }
    for message, (given, described) in wrong.items():
        with pytest.raises(InputError, match=message):
            save_adapter(folder, model, given, described)
    mamba = loaded["mamba"][0]
    for target, module in (("outward", "out_proj"), ("dt", "dt_proj")):
        outside = LoraConfig(rank=2, targets=(target,))
        with pytest.raises(InputError, match=f"adapter of backbone.layers.0.mixer.{module} has no effect"):
            save_adapter(folder, mamba, init(outside, mamba, jax.random.key(0)), outside)
    assert (folder / WEIGHTS).read_bytes() == before
    monkeypatch.setattr("ruvjax.io.peft.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"):
        save_adapter(folder, model, init(config, model, jax.random.key(1)), config)
    assert (folder / WEIGHTS).read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something other than an adapter of ours"):
        save_adapter(folder, model, adapters, config)


def test_an_adapter_that_transformers_passes_by_is_refused_unless_it_is_zero(loaded, folder_of):
    """transformers multiplies by the weight of Mamba's dt_proj itself, so PEFT never trains what it puts there."""
    model, folder = loaded["mamba"][0], folder_of("mamba", target_modules=["in_proj", "x_proj", "dt_proj"])
    tensors = load_file(folder / WEIGHTS)
    for i in range(model.layers):
        at = f"base_model.model.backbone.layers.{i}.mixer.dt_proj."
        tensors[at + "lora_A.weight"] = np.ones((4, model.rank), np.float32)
        tensors[at + "lora_B.weight"] = np.zeros((model.inner, 4), np.float32)
    save_file(tensors, folder / WEIGHTS)
    assert "layers.scan.dt" in load_adapter(folder, model)[0]
    tensors[at + "lora_B.weight"][0] = 1.0
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match="layers.1.mixer.dt_proj has no effect"):
        load_adapter(folder, model)


def test_an_adapter_of_others_is_not_replaced(loaded, folder_of):
    model = loaded["llama"][0]
    with pytest.raises(InputError, match="something other than an adapter of ours"):
        save_adapter(folder_of("lora"), model, *_all(model))


def live():
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason=f"live parity needs {package}: install the extra `parity`")


@NAMES
def test_live_an_adapter_that_peft_saves(name, loaded, tmp_path):
    live()
    base = golden.ADAPTERS[name][0]
    reference = golden.adapted((name,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.save_pretrained(tmp_path)
    model, params = loaded[base]
    adapters, _ = load_adapter(tmp_path / name, model)
    tokens = golden.tokens(base)
    close(ours(model, attach(params, adapters), jnp.asarray(tokens)), golden.logits(reference, tokens))


LIVE = {
    "lora": ("llama", LoraConfig(rank=3, alpha=5.0, targets=("q", "v", "down"))),
    "rslora": ("qwen3", LoraConfig(rank=4, targets=("all-linear",), rslora=True, init="gaussian")),
    "dora": ("qwen2", LoraConfig(rank=2, targets=("q", "up"), dora=True)),
    "patterns": (
        "llama",
        LoraConfig(
            rank=4,
            targets=("q", "k", "layers.1.gate"),
            rank_pattern={"k": 1, "layers.0.q": 6},
            alpha_pattern={"layers.1.gate": 2.5},
            dora=True,
        ),
    ),
    "mamba": ("mamba_bias", LoraConfig(rank=2, targets=("inward", "layers.0.scan.select"), rslora=True)),
    "mamba2": ("mamba2", LoraConfig(rank=2, targets=("in_proj",), dora=True)),
}


@pytest.mark.parametrize("name", LIVE)
def test_live_an_adapter_of_ours_in_peft(name, loaded, tmp_path):
    live()
    import peft

    base, config = LIVE[name]
    model, params = loaded[base]
    adapters = init(config, model, jax.random.key(0), params)
    for path, update in adapters.items():
        live_rows = jnp.any(update.a != 0, axis=-2)[..., None]
        b = jnp.where(live_rows, 0.3 * jax.random.normal(jax.random.key(1), update.b.shape), 0)
        magnitude = None if update.magnitude is None else update.magnitude * 1.2
        adapters[path] = update.replace(b=b, magnitude=magnitude)
    save_adapter(tmp_path / "adapter", model, adapters, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = peft.PeftModel.from_pretrained(
            golden.family(base).reference(base), str(tmp_path / "adapter")
        ).eval()
    tokens = golden.tokens(base)
    found = ours(model, attach(params, adapters), jnp.asarray(tokens))
    close(found, golden.logits(reference, tokens))
    assert np.abs(ours(model, params, jnp.asarray(tokens)) - found).max() > 100 * TOLERANCE


def test_live_a_batch_of_mixed_adapters(loaded, tmp_path):
    live()
    names = tuple(name for name in golden.MIXED if name in golden.ADAPTERS)
    reference = golden.adapted(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.save_pretrained(tmp_path)
    model, params = loaded["llama"]
    adapters = [load_adapter(tmp_path / name, model)[0] for name in names]
    ids = jnp.array([[names.index(name) if name in names else -1] for name in golden.MIXED], jnp.int32)
    found = ours(model, attach(params, select(adapters, ids)), jnp.asarray(golden.mixed_tokens()))
    close(found, golden.logits(reference, golden.mixed_tokens(), adapter_names=list(golden.MIXED)))
