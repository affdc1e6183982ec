"""Measured block sizes of the Pallas kernels: one JSON file a kernel, by kind of device, dtype and bucket of shape.

A file of `tiles/` reads

    {"format_version": 1, "kernel": NAME, "entries": [
        {"device": "NVIDIA H200", "dtype": "bfloat16", "shape": {"state": 16}, "tiles": {"kept": 16}}]}

"device" is what jax calls the kind of device. A size of a shape stands for its bucket: the sizes above half of it, up
to itself, so it is a power of two. Where nothing is recorded the kernel's heuristic decides. RUVJAX_TILES=error makes a
miss an error instead, for runs that mean to measure recorded tiles only.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import jax

FOLDER = Path(__file__).resolve().parent / "tiles"
FORMAT_VERSION = 1
MODES = ("heuristic", "error")
T = TypeVar("T", bound=tuple[int, ...])


class TileError(ValueError):
    """A table of tiles that cannot be used, or a shape that it does not hold where RUVJAX_TILES=error asks for it."""


@dataclass(frozen=True)
class Kernel(Generic[T]):
    """What a table of a kernel holds.

    name: of the file, without ".json". tiles: the NamedTuple of whole numbers that the kernel takes. sizes: names of
    the sizes that a shape has. unfit: why the kernel cannot take these tiles, "" where it can.
    """

    name: str
    tiles: type[T]
    sizes: tuple[str, ...]
    unfit: Callable[[T], str]

    @property
    def fields(self) -> tuple[str, ...]:
        return cast(Any, self.tiles)._fields


class Key(NamedTuple):
    """What is looked up. `shape` holds buckets, in the order of `Kernel.sizes`."""

    device: str
    dtype: str
    shape: tuple[int, ...]


def bucket(size: int) -> int:
    """The smallest power of two that is not below `size` (1 or more)."""
    return 1 << (size - 1).bit_length()


def choose(
    kernel: Kernel[T],
    table: Mapping[Key, T],
    device: str,
    dtype: Any,
    shape: Mapping[str, int],
    heuristic: T,
    mode: str = "heuristic",
) -> T:
    """The tiles of `table` for this device, dtype and shape, else `heuristic`.

    In mode "error" a miss raises TileError, unless `device` is "": a kernel that is interpreted, or lowered for a
    device that this process does not have, is not one that was measured.
    """
    if mode not in MODES:
        raise TileError(f"RUVJAX_TILES={mode!r} is not known; one of {', '.join(MODES)}")
    name = jax.numpy.dtype(dtype).name
    key = Key(device, name, tuple(bucket(shape[size]) for size in kernel.sizes))
    if key in table:
        return table[key]
    if mode == "error" and device:
        sizes = ", ".join(f"{size} {shape[size]} (bucket {rounded})" for size, rounded in zip(kernel.sizes, key.shape))
        raise TileError(
            f"no tiles of {kernel.name} are recorded for {device}, {name}, {sizes}; "
            f"add an entry to kernels_pallas/tiles/{kernel.name}.json, or unset RUVJAX_TILES"
        )
    return heuristic


def recorded(kernel: Kernel[T], platform: str, dtype: Any, shape: Mapping[str, int], heuristic: T) -> T:
    """`choose` from the file of this kernel, for the first device of `platform` ("gpu" or "tpu") and RUVJAX_TILES."""
    mode = os.environ.get("RUVJAX_TILES", "") or "heuristic"
    return choose(kernel, _table(kernel), device_kind(platform), dtype, shape, heuristic, mode)


@functools.cache
def device_kind(platform: str) -> str:
    """What jax calls the first device of `platform`, "" where this process has none."""
    try:
        return jax.devices(platform)[0].device_kind
    except RuntimeError:
        return ""


@functools.cache
def _table(kernel: Kernel[T]) -> dict[Key, T]:
    return load(kernel, FOLDER / f"{kernel.name}.json")


def load(kernel: Kernel[T], path: Path) -> dict[Key, T]:
    """The entries of a file. Raises TileError, which names the file, the entry and what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TileError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    try:
        _fields(found, ("format_version", "kernel", "entries"), "the file")
        for name, wanted in (("format_version", FORMAT_VERSION), ("kernel", kernel.name)):
            if found[name] != wanted:
                raise TileError(f"{name} is {found[name]!r}, not {wanted!r}")
        if not isinstance(found["entries"], list):
            raise TileError("entries is not a list")
        entries: dict[Key, T] = {}
        for number, entry in enumerate(found["entries"]):
            key, tiles = _entry(kernel, entry, f"entry {number}")
            if key in entries:
                raise TileError(f"entry {number} repeats {key.device}, {key.dtype}, {entry['shape']}")
            entries[key] = tiles
    except TileError as error:
        raise TileError(f"{path}: {error}") from None
    return entries


def _entry(kernel: Kernel[T], entry: Any, where: str) -> tuple[Key, T]:
    _fields(entry, ("device", "dtype", "shape", "tiles"), where)
    for name in ("device", "dtype"):
        if not isinstance(entry[name], str) or not entry[name]:
            raise TileError(f"{where}: {name} is {entry[name]!r}, not a name")
    try:
        named = jax.numpy.dtype(entry["dtype"]).name
    except TypeError:
        named = ""
    if named != entry["dtype"]:
        raise TileError(f"{where}: {entry['dtype']!r} is no dtype")
    for name, wanted in (("shape", kernel.sizes), ("tiles", kernel.fields)):
        _fields(entry[name], wanted, f"{where}, {name}")
        for field in wanted:
            value = entry[name][field]
            if type(value) is not int or value < 1:
                raise TileError(f"{where}, {name}: {field} is {value!r}, not a whole number above 0")
    for size in kernel.sizes:
        if bucket(entry["shape"][size]) != entry["shape"][size]:
            raise TileError(f"{where}, shape: {size} is {entry['shape'][size]}, not a power of two")
    tiles: T = cast(Any, kernel.tiles)(*(entry["tiles"][field] for field in kernel.fields))
    if reason := kernel.unfit(tiles):
        raise TileError(f"{where}, tiles: {reason}")
    return Key(entry["device"], entry["dtype"], tuple(entry["shape"][size] for size in kernel.sizes)), tiles


def _fields(found: Any, wanted: tuple[str, ...], where: str) -> None:
    if not isinstance(found, dict) or set(found) != set(wanted):
        held = sorted(found) if isinstance(found, dict) else repr(found)
        raise TileError(f"{where} must hold {', '.join(wanted)} and nothing else, not {held}")
