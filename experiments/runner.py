"""What every verb shares: composing its configuration, its exit code, and its last line on stdout.

Exit codes: 0 done; 1 the run failed; 2 wrong usage, configuration or input; 130 and 143 interrupted (SIGINT, SIGTERM).
A failure is one line with a hint on stderr; `debug=true` adds the traceback. The last line on stdout is the path of
summary.json.
"""

import contextlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.build import build
from experiments.complaints import CONFIGS, explain
from experiments.settings import EXPORT, Launch
from ruvjax.errors import ConfigError

Verb = Callable[[Any, Launch], Path]
PROMPT = "sample.prompt="
# The configurations of the verbs that take a model.path, by the model_type that its config.json names.
BY_MODEL = {"tiny_recursive": "puzzle", "code_repair": "repair"}


class Terminated(BaseException):
    """SIGTERM outside the training loop (which saves a checkpoint first)."""


def main(name: str, verb: Verb, arguments: Sequence[str] | None = None) -> int:
    """Run `verb` on the job that `configs/<name>.yaml` and the command line describe; returns the exit code.

    Where the command line names a trained model of another kind than a language model, its own configuration of the
    verb takes the place of that file: `configs/<name>_puzzle.yaml`, `configs/<name>_repair.yaml`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "debug=true" in [argument.lower() for argument in arguments]
    arguments = [_quoted(argument) for argument in arguments]
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        _check_flags(arguments)
        _call_hydra(name, config_for(name, arguments), verb, arguments)
        return 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 2
    except BaseException as error:  # every way to end becomes an exit code and one line
        return _report(error, name, arguments, debug)
    finally:
        signal.signal(signal.SIGTERM, before)


def config_for(name: str, arguments: Sequence[str]) -> str:
    """The configuration of the verb `name` for the model that `model.path=` names among the arguments."""
    paths = [argument.removeprefix("model.path=") for argument in arguments if argument.startswith("model.path=")]
    if paths:
        folder = Path(paths[-1].strip("'\"")).expanduser()
        for path in (folder / EXPORT / "config.json", folder / "config.json"):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # what is wrong with it, the verb will say
                kind = BY_MODEL.get(json.loads(path.read_bytes()).get("model_type"))
                return f"{name}_{kind}" if kind else name
    return name


def _report(error: BaseException, name: str, arguments: Sequence[str], debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted", 130)
    if isinstance(error, Terminated):
        return _say("terminated", 143)
    known = explain(error, name, [argument for argument in arguments if not argument.startswith("-")])
    return _say(f"error: {known.line()}", known.exit_code)


def _say(line: str, code: int) -> int:
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    return code


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated


def _quoted(argument: str) -> str:
    """`sample.prompt=<text>` in Hydra's quotes, so that a prompt may hold any punctuation; what is quoted stays."""
    value = argument.removeprefix(PROMPT)
    if value == argument or value[:1] in ("'", '"') or not value:
        return argument
    value = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return PROMPT + "'" + value.replace("${", "\\${") + "'"


def _check_flags(arguments: Sequence[str]) -> None:
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"wrong usage: {message}", "flags: --help, --cfg job, --info, -m for a sweep")

    parser.error = refuse
    if parser.parse_args(arguments).experimental_rerun is not None:
        refuse("--experimental-rerun reads a pickle")


def _call_hydra(name: str, config_name: str, verb: Verb, arguments: Sequence[str]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving
    OmegaConf.register_new_resolver("or_here", lambda folder: folder or ".", replace=True)
    root = str(CONFIGS.parent)
    if root not in sys.path:  # hydra_plugins/ is found there
        sys.path.append(root)

    failures: list[BaseException] = []

    def task(config: DictConfig) -> str | None:
        hydra_config = HydraConfig.get()
        try:
            return str(run_job(name, verb, config, tuple(hydra_config.overrides.task)))
        except Exception as error:
            if hydra_config.mode == RunMode.MULTIRUN:  # another process, maybe: its launcher has to hear of it
                raise
            failures.append(error)  # Hydra would print lines of its own
        return None

    saved = sys.argv
    sys.argv = [f"experiments.{name}", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()
    finally:
        sys.argv = saved
    if failures:
        raise failures[0]


def run_job(name: str, verb: Verb, config: DictConfig, overrides: tuple[str, ...]) -> Path:
    """Build the job, run the verb, print the path of its summary.json as the last line on stdout."""
    job = build(config)
    launch = Launch(name, OmegaConf.to_container(config, resolve=True), overrides)  # pyright: ignore[reportArgumentType]
    summary = verb(job, launch)
    print(summary, flush=True)
    return summary
