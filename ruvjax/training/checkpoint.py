"""Checkpoints of a run: the whole TrainState, the data position and the plan, written by Orbax in the background.

A checkpoint is a folder `run_dir/checkpoints/<step>` that appears by renaming once it is whole, so killing the process
leaves the one before. Beside the arrays lie their CRC-32 sums: Orbax alone does not notice a flipped bit.
"""

import contextlib
import logging
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ruvjax.errors import InputError, RunError
from ruvjax.training.state import TrainState

FORMAT = 1
FOLDER = "checkpoints"
SLACK = 2**20  # bytes of a checkpoint beside its arrays, generously
ROOM_HINT = "free space or fix permissions, then continue with trainer.resume=auto; earlier checkpoints are untouched"


class Checkpoints:
    """The open checkpoint folder of one run, which keeps the newest `keep`; close it to wait for the last write."""

    def __init__(self, run_dir: Path, keep: int):
        self.folder = Path(run_dir).absolute() / FOLDER
        # Orbax logs a failed write as tracebacks from several threads; here it is raised, as one error.
        self._levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in ("absl", "asyncio")]
        for logger, _ in self._levels:
            logger.setLevel(logging.CRITICAL)
        with self._telling(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, extra: dict[str, Any]) -> None:
        """Copy `state` and write it in the background with `extra` (JSON: data position, plan). Raises RunError where
        the disk has no room, or this write or the one before it fails. Does nothing where this step is already there.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        stored = _storable(state)
        _check_room(self.folder, stored)
        if jax.default_backend() == "cpu":  # Orbax reads host views, and a donated buffer is overwritten under them
            stored = jax.tree.map(jnp.copy, stored)
        document = {"format": FORMAT, "step": step, "leaves": _describe(stored), **extra}
        with self._telling(self.folder / str(step)):
            items = ocp.args.Composite(state=ocp.args.StandardSave(stored), extra=ocp.args.JsonSave(document))
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Return once everything saved so far is on disk; raises RunError where it could not be written."""
        with self._telling(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and let go of the folder; raises RunError where something could not be written."""
        with self._telling(self.folder):
            self._manager.close()
        for logger, level in self._levels:
            logger.setLevel(level)

    @contextlib.contextmanager
    def _telling(self, path: Path) -> Iterator[None]:
        try:
            with _writing(path):
                yield
        except RunError:
            self._levels = []  # Orbax's threads go on about it until the process ends: the loggers stay quiet
            raise


def _check_room(folder: Path, tree: Any) -> None:
    """Raise RunError before a write that would fill the disk: Orbax fails on one late and in many words."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + SLACK
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"no room for a checkpoint in {folder}: it takes {needed / 2**20:.0f} MiB of {free / 2**20:.0f} MiB free",
            ROOM_HINT,
        )


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the finished checkpoints of a run, in order."""
    folder = Path(run_dir) / FOLDER
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def latest(run_dir: Path) -> Path | None:
    """The newest finished checkpoint of a run, or None."""
    steps = saved_steps(run_dir)
    return Path(run_dir).absolute() / FOLDER / str(steps[-1]) if steps else None


def restore(path: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Read a checkpoint into the structure, dtypes and device layout of `like`; also the `extra` it was saved with.

    Raises InputError where the checkpoint is cut short or altered (the hint names the newest whole one), where its
    format is not ours, or where it holds another model or optimiser.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise InputError(f"no checkpoint at {path}", "name a folder <run>/checkpoints/<step>")
    try:
        stored, extra = _read(path, _storable(like))
    except _Damaged as error:
        steps = [step for step in saved_steps(path.parent.parent) if str(step) != path.name]
        whole = next(
            (path.parent / str(step) for step in reversed(steps) if _is_whole(path.parent / str(step), like)), None
        )
        hint = f"remove {path} to resume from {whole}" if whole else "no other checkpoint of this run is whole"
        raise InputError(f"checkpoint {path} is cut short or altered: {error}", hint) from error
    return jax.tree.map(_as_like, stored, like), extra


def save_once(path: Path, state: TrainState) -> None:
    """Write `state` to a folder of its own, in the foreground."""
    with _writing(path), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(Path(path).absolute(), args=ocp.args.StandardSave(_storable(state)), force=True)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(tree: Any) -> Any:
    """Typed keys as their integers."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _as_like(leaf: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like)) if _is_key(like) else leaf


def _describe(tree: Any, sums: bool = True) -> dict[str, dict[str, Any]]:
    """Shape, dtype and CRC-32 of each leaf by path; the sum is None where other processes hold parts of the leaf."""
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        entry: dict[str, Any] = {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
        if sums:
            entry["crc32"] = zlib.crc32(np.asarray(leaf).tobytes()) if leaf.is_fully_addressable else None
        described[jax.tree_util.keystr(path)] = entry
    return described


def _show(entry: dict[str, Any] | None) -> str:
    return "missing" if entry is None else f"{entry['dtype']}{entry['shape']}"


class _Damaged(Exception):
    """What could not be read, in one line."""


def _read(path: Path, target: Any) -> tuple[Any, dict[str, Any]]:
    """The arrays, like those of `target`, and the extra of a checkpoint, both checked. Raises as `restore` does, but
    _Damaged for damage."""
    extra = _read_extra(path)
    if extra["format"] != FORMAT:
        raise InputError(f"checkpoint {path} has format {extra['format']}; this version reads format {FORMAT}")
    expected = _describe(target, sums=False)
    found = {name: {"shape": leaf["shape"], "dtype": leaf["dtype"]} for name, leaf in extra["leaves"].items()}
    if found != expected:
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise InputError(
            f"checkpoint {path} does not fit this model and optimiser: {names[0]} is {_show(found.get(names[0]))} "
            f"there and {_show(expected.get(names[0]))} here ({len(names)} of {len(expected)} leaves differ)",
            "resume with the configuration the run was started with",
        )
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            stored = reader.restore(path / "state", args=ocp.args.StandardRestore(shapes))
    except Exception as error:  # Orbax and TensorStore raise whatever they meet: OSError, ValueError, KeyError, ...
        raise _Damaged(_first_line(error)) from error
    for name, leaf in _describe(stored).items():
        if leaf["crc32"] != extra["leaves"][name]["crc32"]:
            raise _Damaged(f"{name} is not what was written")
    return stored, extra


def _read_extra(path: Path) -> dict[str, Any]:
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            extra = reader.restore(path / "extra", args=ocp.args.JsonRestore())
        if not {"shape", "dtype", "crc32"} <= set.intersection(*(set(leaf) for leaf in extra["leaves"].values())):
            raise ValueError("its list of arrays is malformed")
        return {"format": None, **extra}
    except Exception as error:  # as in `_read`: what is raised depends on which byte is missing
        raise _Damaged(_first_line(error)) from error


def _is_whole(path: Path, like: TrainState) -> bool:
    try:
        _read(path, _storable(like))
    except (_Damaged, InputError):
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a full disk surfaces as OSError or ValueError, at once or one save later
        raise RunError(f"could not write checkpoint {path}: {_first_line(error)}", ROOM_HINT) from error
