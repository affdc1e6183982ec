"""Writing GGUF files, version 3: metadata with the types that readers expect, tensors encoded one at a time."""

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from kernels_pallas.quant_matmul import formats
from ruvjax.core.files import stream_atomic
from ruvjax.errors import InputError
from ruvjax.io.gguf import ALIGNMENT, ARRAY, BOOL, FLOATS, MAGIC, NUMBERS, STRING, TYPES

VERSION = 3
WRITTEN = ("F32", "F16", "BF16", *formats.ENCODED)
_NUMBER_OF = {dtype.newbyteorder("="): number for number, dtype in NUMBERS.items()}


@dataclass(frozen=True)
class Out:
    """A tensor to write: its type, its shape in numpy's order, and a function that gives its bytes when asked."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        kind, weights = TYPES[self.kind], 1
        for length in self.shape:
            weights *= length
        return weights // kind.weights * kind.bytes


def encode(kind: str, array: np.ndarray) -> np.ndarray:
    """The bytes of `array` as a tensor of type `kind`, one of `WRITTEN`: uint8 [..., bytes of a row].

    Raises ValueError for rows that are no whole blocks, and for numbers that are not finite or do not fit the type.
    """
    if kind not in FLOATS:
        return formats.encode(kind, np.asarray(array, np.float32))
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(array, FLOATS[kind])
    if not np.isfinite(found.astype(np.float32) if found.dtype == ml_dtypes.bfloat16 else found).all():
        raise ValueError(f"{kind} cannot hold numbers up to {np.max(np.abs(np.asarray(array, np.float32))):.3g}")
    return found.reshape(*found.shape[:-1], -1).view(np.uint8)


def write_gguf(path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Iterable[Out]) -> Path:
    """Write a GGUF file to `path`, whole or not at all; a file that is there is replaced.

    metadata: str, bool, int (u32, else i64 or u64), float (f32), numpy scalars and arrays (their own type), sequences
    of str, in the order given. Raises InputError for values of other types, and naming the tensor that cannot be
    encoded as asked.
    """
    tensors = list(tensors)
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _string(key) + _value(key, value)
    offset = 0
    for tensor in tensors:
        header += _string(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        header += struct.pack("<IQ", TYPES[tensor.kind].number, offset)
        offset = _aligned(offset + tensor.nbytes)

    def write(file: BinaryIO) -> None:
        file.write(header + bytes(_aligned(len(header)) - len(header)))
        for tensor in tensors:
            try:
                data = tensor.data()
            except ValueError as error:
                raise InputError(f"{path}: {tensor.name} cannot be written as {tensor.kind}: {error}") from error
            if data.nbytes != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {data.nbytes} bytes were announced as {tensor.nbytes}")
            file.write(np.ascontiguousarray(data).data.cast("B"))
            file.write(bytes(_aligned(tensor.nbytes) - tensor.nbytes))

    return stream_atomic(path, write)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """The type and the bytes of a value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        value = np.uint32(value) if 0 <= value < 2**32 else np.int64(value) if value < 2**63 else np.uint64(value)
    if isinstance(value, float) and not isinstance(value, np.generic):  # np.float64 is both
        value = np.float32(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype in _NUMBER_OF:
        number = _NUMBER_OF[value.dtype]
        raw = np.ascontiguousarray(value, NUMBERS[number]).tobytes()
        lead = struct.pack("<I", number) if value.ndim == 0 else struct.pack("<IIQ", ARRAY, number, value.size)
        return lead + raw
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    raise InputError(f"{key}={value!r} cannot be an entry of a GGUF file")
