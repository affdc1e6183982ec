"""Where a weight lies in a checkpoint, and numbers out of a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ruvjax.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where one of our leaves lies in a checkpoint: `{}` stands for the layer; `matrix` means transposed there.

    taps: the kernel of a depthwise convolution, [channels, 1, taps] there and [channels, taps] here. alias: a name that
    other writers gave it.
    """

    name: str
    matrix: bool = False
    taps: bool = False
    alias: str = ""

    def stored(self, shape: tuple[int, ...]) -> list[int]:
        """The shape on disk of a weight that has `shape` here."""
        if self.taps:
            return [shape[0], 1, shape[1]]
        return list(shape[::-1] if self.matrix else shape)

    def read(self, array: Any) -> Any:
        """What is on disk, in our orientation."""
        return array[:, 0] if self.taps else array.T if self.matrix else array

    def part(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The part of what is on disk that `read` turns into `index` of our weight."""
        if self.taps:
            return index[0], slice(None), index[1]
        return index[::-1] if self.matrix else index

    def write(self, array: Any) -> Any:
        """Our weight as it goes to disk."""
        return array[:, None] if self.taps else array.T if self.matrix else array


def number(config: Mapping[str, Any], key: str, source: str, default: Any = None) -> Any:
    """A number of config.json; a missing one or null is `default`. Raises InputError for anything else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        raise InputError(f"{source}: {key}={value!r} must be a number")
    return value


def integer(config: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    """`number`, where only a whole one will do."""
    value = number(config, key, source, default)
    if not isinstance(value, int):
        raise InputError(f"{source}: {key}={value!r} must be an integer")
    return value


def dtype_of(config: Mapping[str, Any], source: str) -> str:
    """The compute dtype that config.json names. Raises InputError for one that is not known."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise InputError(f"{source}: dtype={name!r} is not known", "one of float32, bfloat16, float16, float64")
    return name
