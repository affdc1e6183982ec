"""From plain YAML to frozen dataclasses. This is the only place that turns a `_target_` into an object.

A `_target_` may name a frozen dataclass of ruvjax or of the allow-list below, and nothing else: configurations travel
with checkpoints, so building one must never import or call what its author chose. The dataclass is the only schema:
unknown keys, missing keys and wrong types are reported with the dotted path of the field.
"""

import dataclasses
import difflib
import functools
import importlib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from ruvjax.errors import ConfigError, RuvjaxError

ALLOWED_PREFIX = "ruvjax."
ALLOWED_MODULES = frozenset(
    f"experiments.{name}" for name in ("settings", "puzzle_settings", "repair_settings", "adapt_settings")
)
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def nearest(name: str, known: Iterable[str], path: str = "") -> str:
    """A hint that names the entry of `known` (under `path`) closest to `name`, or lists them where none is close."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.55)
    if close:
        return f"did you mean {_join(path, close[0])}?"
    return "one of " + ", ".join(names) if names else ""


def build(config: DictConfig | Mapping[str, Any], path: str = "") -> Any:
    """Build the object that `config` describes.

    Raises ConfigError for a `_target_` that is not allowed, an unknown or missing key, a wrong type, an interpolation
    that leads nowhere, and whatever the dataclass itself rejects.
    """
    if isinstance(config, DictConfig):
        try:
            config = typing.cast(dict, OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
        except MissingMandatoryValue as error:
            raise ConfigError(f"{error.full_key} has no value", f"set {error.full_key}=...") from error
        except InterpolationKeyError as error:
            hint = "the key it points to does not exist"
            raise ConfigError(f"{error.full_key}: {_first_line(error)}", hint) from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    if "_target_" not in config:
        raise ConfigError(f"{path or 'the configuration'} has no _target_", "name the dataclass it builds")
    return _construct(_resolve(config["_target_"], path), config, path)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _resolve(target: Any, path: str) -> type:
    """The dataclass that `target` names, or ConfigError where it is not one that a configuration may build."""
    where = f"{path}._target_" if path else "_target_"
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{where}={target!r} is not a dotted name")
    module_name, name = target.rsplit(".", 1)
    refusal = ConfigError(
        f"{where}={target!r} is not allowed", f"a configuration may only build frozen dataclasses of {ALLOWED_PREFIX}*"
    )
    if not (target.startswith(ALLOWED_PREFIX) or module_name in ALLOWED_MODULES):
        raise refusal
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{where}: there is no module {error.name!r}") from error
    found = getattr(module, name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if _is_frozen(value)]
        raise ConfigError(f"{where}: {module_name} has no {name!r}", nearest(name, classes))
    home = getattr(found, "__module__", "")
    if not _is_frozen(found) or not (home.startswith(ALLOWED_PREFIX) or home in ALLOWED_MODULES):
        raise refusal
    return found


def _is_frozen(value: Any) -> bool:
    return isinstance(value, type) and dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen  # pyright: ignore


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """Annotation of every constructor field of `cls`, and whether it must be given."""
    hints = typing.get_type_hints(cls)
    empty = dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is empty and field.default_factory is empty)
        for field in dataclasses.fields(cls)
        if field.init
    }


def _construct(cls: type, config: Mapping[str, Any], path: str) -> Any:
    known = _fields(cls)
    for key in config:
        if key != "_target_" and key not in known:
            raise ConfigError(f"{_join(path, key)} is not a setting of {cls.__name__}", nearest(str(key), known, path))
    missing = [name for name, (_, required) in known.items() if required and name not in config]
    if missing:
        raise ConfigError(f"{_join(path, missing[0])} is missing", f"{cls.__name__} needs it")
    values = {key: convert(value, known[key][0], _join(path, key)) for key, value in config.items() if key in known}
    try:
        return cls(**values)
    except RuvjaxError as error:
        told = not path or f"{path}." in str(error)
        raise type(error)(str(error) if told else f"{path}: {error}", error.hint) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path or cls.__name__}: {_first_line(error)}") from error


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotation `hint` asks for it (lists become tuples, integers floats), or ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Mapping) and "_target_" in value:
        built = build(value, path)
        options = arguments if origin in (typing.Union, types.UnionType) else (hint,)
        classes = tuple(option for option in options if isinstance(option, type))
        checkable = len(classes) == len(options) and not any(getattr(c, "_is_protocol", False) for c in classes)
        if checkable and not isinstance(built, classes):
            raise _wrong(path, " or ".join(_describe(option) for option in options), type(built).__name__)
        return built
    if hint is Any:
        return _plain(value)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, path)
    if origin is typing.Literal:
        if not any(type(value) is type(option) and value == option for option in arguments):
            options = [str(option) for option in arguments]
            raise ConfigError(f"{path}={_show(value)} is not one of its values", nearest(str(value), options))
        return value
    if origin is tuple or hint is tuple:
        return _convert_tuple(value, arguments, path)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise _wrong(path, "a mapping", value)
        inner = arguments[1] if arguments else Any
        return {key: convert(item, inner, _join(path, key)) for key, item in value.items()}
    if _is_frozen(hint):
        if not isinstance(value, Mapping):
            raise _wrong(path, hint, value)
        return _construct(hint, value, path)
    return _convert_scalar(value, hint, path)


def _convert_union(value: Any, options: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in options:
        return None
    ordered = sorted(options, key=lambda option: option is not type(value))  # an exact match before a conversion
    errors = []
    for option in ordered:
        if option is not type(None):
            try:
                return convert(value, option, path)
            except ConfigError as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise _wrong(path, " or ".join(_describe(option) for option in options), value)


def _convert_tuple(value: Any, arguments: tuple[Any, ...], path: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise _wrong(path, "a list", value)
    if not arguments:
        return tuple(_plain(item) for item in value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(convert(item, arguments[0], f"{path}[{index}]") for index, item in enumerate(value))
    if len(arguments) != len(value):
        raise _wrong(path, f"a list of {len(arguments)}", value)
    return tuple(convert(item, kind, f"{path}[{index}]") for index, (item, kind) in enumerate(zip(value, arguments)))


def _convert_scalar(value: Any, hint: Any, path: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isnan(value):
            raise _wrong(path, hint, value)
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (int, bool, str, type(None)) and type(value) is hint:
        return value
    raise _wrong(path, hint, value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def _describe(hint: Any) -> str:
    return hint if isinstance(hint, str) else NAMES.get(hint, f"a {getattr(hint, '__name__', hint)}")


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _wrong(path: str, hint: Any, value: Any) -> ConfigError:
    advice = {int: f"such as {path}=10", float: f"such as {path}=0.5", bool: f"{path}=true or {path}=false"}.get(
        hint, ""
    )
    if hint is str and isinstance(value, (int, float)):
        advice = f"write {path}='\"{value}\"' for text"
    elif hint is int and isinstance(value, float) and value.is_integer():
        advice = f"write {path}={value:.0f}"
    elif value is None:
        advice = f"give {path} a value"
    got = f"{path}={_show(value)} has the wrong type: expected {_describe(hint)}, got {type(value).__name__}"
    return ConfigError(got, advice)
