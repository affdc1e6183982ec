"""One clear line for each way a run can end: Hydra's own errors and the system's, in the style of ruvjax.errors."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.build import nearest
from ruvjax.core.files import FULL_DISK
from ruvjax.errors import ConfigError, InputError, RunError, RuvjaxError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose_config(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The composed configuration, without Hydra's own node. Raises ConfigError; leaves Hydra's global state alone."""
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            return compose(config_name, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, config_name, overrides) from error


def explain(error: BaseException, config_name: str, overrides: Sequence[str]) -> RuvjaxError:
    """The error of ours that says what `error` (Hydra's, the system's, anyone's) means."""
    if isinstance(error, RuvjaxError):
        return error
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return ConfigError(f"cannot read {error.override!r}", _parse_hint(error))
    if isinstance(error, (ConfigCompositionException, HydraException, OmegaConfBaseException)):
        return _composition(error, config_name, overrides)
    full = _full_disk(error)
    if full is not None:
        return RunError(f"the disk is full: {full}", "free some space, then continue with trainer.resume=auto")
    if isinstance(error, (FileExistsError, NotADirectoryError, PermissionError, IsADirectoryError, FileNotFoundError)):
        return InputError(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return RunError(
            f"out of memory: {_lines(error)[0]}", "lower pipeline.batch, pipeline.length or the model's size"
        )
    return RunError(f"{type(error).__name__}: {_lines(error)[0]}", "debug=true shows the traceback")


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]


def _chain(error: BaseException) -> Iterable[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _full_disk(error: BaseException) -> str | None:
    """The path (or message) of an ENOSPC anywhere in the chain; checkpoint libraries keep only its text."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            return str(cause.filename or cause.strerror)
        for line in _lines(cause):
            if "No space left on device" in line or "Disk quota exceeded" in line:
                return line[:200]
    return None


def _parse_hint(error: OverrideParseException) -> str:
    key, _, value = error.override.partition("=")
    if not _:
        return f"overrides are key=value: write {key}=..."
    return f"quote a value that holds punctuation: {key}='\"{value}\"'"


def _missing_option(error: MissingConfigException) -> RuvjaxError:
    missing = error.missing_cfg_file or ""
    group, _, option = missing.rpartition("/")
    if not group or not error.options:
        return ConfigError(_lines(error)[0])
    return ConfigError(f"{group}={option} is not an option", nearest(option, error.options))


def _composition(error: Exception, config_name: str, overrides: Sequence[str]) -> RuvjaxError:
    lines = _lines(error)
    absent = re.match(r"Could not override '([^']+)'", lines[0])
    if absent:
        key, known = absent.group(1), known_keys(config_name, overrides)
        return ConfigError(f"{key} is not a setting of experiments.{config_name}", suggest(key, known))
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause is not error:
        where = re.search(r"merging override (\S+)", lines[0])
        return ConfigError(f"{where.group(1) if where else lines[0]}: {_lines(cause)[0]}")
    if lines[0].startswith("Ambiguous value"):
        return ConfigError(lines[0], "-m runs one job per value; a list is [a,b]")
    hint = "the key it points to does not exist" if lines[0].startswith("Interpolation key") else ""
    return ConfigError(" ".join(lines[:2]) if not hint else lines[0], hint)


def known_keys(config_name: str, overrides: Sequence[str]) -> list[str]:
    """Every key that may be overridden: dotted settings of the composed configuration, and the config groups."""
    groups = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_dir()}
    chosen = [item for item in overrides if item.partition("=")[0] in groups and "," not in item]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            config = compose(config_name, chosen)
    except (HydraException, OmegaConfBaseException):
        return sorted(groups)
    return sorted(groups.union(_dotted(config, "")))


def _dotted(config: DictConfig, path: str) -> Iterable[str]:
    for key in map(str, config):
        if key == "_target_":
            continue
        here = f"{path}.{key}" if path else key
        yield here
        value = None if OmegaConf.is_interpolation(config, key) or OmegaConf.is_missing(config, key) else config[key]
        if isinstance(value, DictConfig):
            yield from _dotted(value, here)


def suggest(key: str, known: Sequence[str]) -> str:
    """A hint naming the known dotted key nearest to `key`: the same last name elsewhere, a sibling, or any alike."""
    parent, _, last = key.rpartition(".")
    same_last = [name for name in known if name.rpartition(".")[2] == last]
    if same_last:
        likeness = difflib.SequenceMatcher(b=key)

        def unlike(name: str) -> float:
            likeness.set_seq1(name)
            return -likeness.ratio()

        found = sorted(same_last, key=unlike)[: 1 if parent else 3]
        return "did you mean " + " or ".join(found) + "?"
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    if parent and siblings:
        names = [name.rpartition(".")[2] for name in siblings]
        close = difflib.get_close_matches(last, names, n=1, cutoff=0.5)
        listed = ", ".join(names)
        return f"did you mean {parent}.{close[0]}?" if close else f"{parent} has {listed}"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    by_last = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.6)
    found = [name for name in known if by_last and name.rpartition(".")[2] == by_last[0]]
    return f"did you mean {found[0]}?" if found else "--cfg job prints every setting"
