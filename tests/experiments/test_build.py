"""experiments.build: what a configuration may build, and what it says about mistakes."""

import pytest
from omegaconf import OmegaConf

from experiments.build import build, convert
from ruvjax.errors import ConfigError
from ruvjax.models.transformer import Transformer

MODEL = {"_target_": "ruvjax.models.transformer.Transformer", "layers": 2, "width": 32, "heads": 2}


def refused(config, path="model") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(OmegaConf.create(config) if isinstance(config, dict) else config, path)
    return caught.value


def test_builds_the_dataclass_with_nested_sections():
    nested = {**MODEL, "rope_scaling": {"kind": "linear", "factor": 2.0}, "norm_eps": 1}
    model = build(nested)
    assert isinstance(model, Transformer) and hash(model)
    assert model.rope_scaling.factor == 2.0 and isinstance(model.norm_eps, float)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "ruvjax.models.transformer.math.sqrt",  # reached through a ruvjax module
        "ruvjax.models.transformer.jax",
        "ruvjax.core.params.init",  # a function of ruvjax
        "ruvjax.core.params.Model",  # a protocol
        "experiments.build.build",
        "ruvjaxevil.Config",
        "Transformer",
        7,
    ],
)
def test_refuses_every_other_target(target):
    error = refused({**MODEL, "_target_": target})
    assert "_target_" in str(error) and error.exit_code == 2


def test_refuses_a_target_nested_in_a_list_or_field():
    error = refused({**MODEL, "rope_scaling": {"_target_": "os.system", "command": "true"}})
    assert "model.rope_scaling._target_" in str(error)


def test_misspelt_class_names_the_nearest():
    assert "Transformer" in refused({**MODEL, "_target_": "ruvjax.models.transformer.Transfomer"}).hint


def test_misspelt_key_names_the_nearest_with_its_path():
    error = refused({**MODEL, "widht": 3})
    assert "model.widht" in str(error) and error.hint == "did you mean model.width?"
    assert "model.rope_scaling.fator" in str(refused({**MODEL, "rope_scaling": {"fator": 2.0}}))


@pytest.mark.parametrize(
    ("key", "value", "expected", "got"),
    [
        ("layers", "four", "an integer", "str"),
        ("layers", 2.5, "an integer", "float"),
        ("layers", True, "an integer", "bool"),
        ("layers", None, "an integer", "NoneType"),
        ("norm_eps", "small", "a number", "str"),
        ("qk_norm", 1, "true or false", "int"),
        ("time", 3, "text", "int"),
        ("layers", [1, 2], "an integer", "list"),
        ("rope_scaling", 3, "RopeScaling", "int"),
    ],
)
def test_wrong_type_names_field_expected_and_got(key, value, expected, got):
    text = str(refused({**MODEL, key: value}))
    assert f"model.{key}=" in text and expected in text and text.endswith(f"got {got}")


def test_missing_values_and_broken_interpolations():
    assert "layers" in str(refused(OmegaConf.create({**MODEL, "layers": "???"})))
    assert "layers" in str(refused(OmegaConf.create({**MODEL, "layers": "${nowhere.at.all}"})))


def test_what_the_dataclass_rejects_keeps_its_hint():
    error = refused({**MODEL, "dtype": "int8"})
    assert "int8" in str(error) and "bfloat16" in error.hint


def test_containers_become_tuples():
    assert convert([1, [2, 3]], tuple[int, tuple[int, int]], "x") == (1, (2, 3))
    assert convert([0.5, 1], tuple[float, ...], "x") == (0.5, 1.0)
    assert convert(["a"], str | tuple[str, ...], "x") == ("a",)
    assert convert(None, int | None, "x") is None
    with pytest.raises(ConfigError, match=r"x\[1\]"):
        convert([1, "b"], tuple[int, ...], "x")
