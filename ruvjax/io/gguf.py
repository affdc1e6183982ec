"""GGUF files, versions 2 and 3: typed metadata and tensors in ggml's formats, read over a memory map.

Layout (little-endian): "GGUF", version u32, number of tensors u64, number of entries u64; the entries (key, type,
value); for each tensor its name, dimensions (the fastest first), type and offset; padding; the tensors' bytes. A string
is a u64 length and UTF-8.

A header can say anything, so every count, length and offset is held against the bytes that are left in the file before
anything is allocated for it, and tensors are decoded one at a time, when they are asked for.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from kernels_pallas.quant_matmul import formats
from ruvjax.errors import InputError

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
MAX_DIMENSIONS = 4
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
# ggml's number, name, weights a block and bytes a block of the tensor types in use. Those that READ does not name are
# known so that a file that holds one can be opened, and its other tensors read.
_TYPES = """0 F32 1 4, 1 F16 1 2, 2 Q4_0 32 18, 3 Q4_1 32 20, 6 Q5_0 32 22, 7 Q5_1 32 24, 8 Q8_0 32 34, 9 Q8_1 32 36,
10 Q2_K 256 84, 11 Q3_K 256 110, 12 Q4_K 256 144, 13 Q5_K 256 176, 14 Q6_K 256 210, 15 Q8_K 256 292, 16 IQ2_XXS 256 66,
17 IQ2_XS 256 74, 18 IQ3_XXS 256 98, 19 IQ1_S 256 50, 20 IQ4_NL 32 18, 21 IQ3_S 256 110, 22 IQ2_S 256 82,
23 IQ4_XS 256 136, 24 I8 1 1, 25 I16 1 2, 26 I32 1 4, 27 I64 1 8, 28 F64 1 8, 29 IQ1_M 256 56, 30 BF16 1 2,
34 TQ1_0 256 54, 35 TQ2_0 256 66, 39 MXFP4 32 17, 40 NVFP4 64 36"""


class TensorType(NamedTuple):
    """One of ggml's tensor types: a row is cut into blocks of `weights` numbers in `bytes` bytes."""

    number: int
    name: str
    weights: int
    bytes: int


TYPES = {
    entry.name: entry
    for number, name, weights, size in (text.split() for text in _TYPES.split(","))
    for entry in [TensorType(int(number), name, int(weights), int(size))]
}
_BY_NUMBER = {entry.number: entry for entry in TYPES.values()}
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
READ = (*FLOATS, *formats.FORMATS)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. kind: its type, such as "Q4_K". shape: numpy's order, rows last; offset: from the start of
    the tensors' bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class GgufFile:
    """An open file. metadata holds int, float, bool, str, numpy arrays of numbers and lists of str."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    data: np.ndarray

    def blocks(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 [..., bytes of a row]: a view of the file, which may not be written to.

        Raises InputError where the file has no such tensor.
        """
        tensor = self._find(name)
        kind = TYPES[tensor.kind]
        *lead, row = tensor.shape or (1,)
        data = self.data[tensor.offset : tensor.offset + tensor.nbytes]
        return data.reshape(*lead, row // kind.weights * kind.bytes)

    def read(self, name: str) -> np.ndarray:
        """The numbers of a tensor: float32 of a quantized one, else in its own float dtype (F16, BF16, F32).

        Raises InputError where the file has no such tensor, or has it in a type that is not one of `READ`.
        """
        tensor = self._find(name)
        if tensor.kind in formats.FORMATS:
            return formats.decode(tensor.kind, self.blocks(name)).reshape(tensor.shape)
        if tensor.kind not in FLOATS:
            hint = f"this reads {', '.join(READ)}"
            raise InputError(f"{self.path}: {name} is stored as {tensor.kind}, which cannot be decoded", hint)
        dtype = FLOATS[tensor.kind]
        flat = np.frombuffer(self.data, dtype, tensor.nbytes // dtype.itemsize, tensor.offset)
        return flat.reshape(tensor.shape).copy()

    def _find(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise InputError(f"{self.path}: the file has no tensor {short(name)}")
        return self.tensors[name]


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read the header of a GGUF file and map the rest.

    Raises InputError, in one line that names the file, for one that is missing, empty, cut short, of another format or
    version, or whose header contradicts itself or the file's length.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise InputError(f"{path}: the file is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return _Header(path, np.frombuffer(mapped, np.uint8)).read()


class _Header:
    """A walk over the header; `at` is the offset that was reached."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, data, 0

    def read(self) -> GgufFile:
        if bytes(self.data[:4]) != MAGIC:
            raise InputError(f"{self.path}: not a GGUF file", "its first four bytes are not GGUF")
        self.at = 4
        version = self.number("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            reason = "a big-endian file" if swapped else f"version {version}"
            raise InputError(f"{self.path}: {reason} of GGUF is not supported", "this reads versions 2 and 3")
        count, entries = self.number("Q", "the header"), self.number("Q", "the header")
        self.expect(entries, 14, f"{entries} entries")  # a key of one letter, a type, a value of one byte
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.string("a key")
            if not key or key in metadata:
                raise InputError(f"{self.path}: a key of the header is {short(key) + ' again' if key else 'empty'}")
            metadata[key] = self.value(self.number("I", key), key)
        self.expect(count, 24, f"{count} tensors")  # a name of no letters, no dimensions, a type, an offset
        found = [self.tensor() for _ in range(count)]
        tensors = {tensor.name: tensor for tensor in found}
        if len(tensors) < count:
            raise InputError(f"{self.path}: the header names a tensor twice")
        return GgufFile(self.path, version, metadata, tensors, self.contents(metadata, found))

    def contents(self, metadata: dict[str, Any], found: list[Tensor]) -> np.ndarray:
        """The bytes after the header, of which every tensor has its own."""
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise InputError(f"{self.path}: general.alignment={alignment!r} is not a power of two up to 1048576")
        start = -(-self.at // alignment) * alignment
        room = len(self.data) - start
        end = 0
        for tensor in sorted(found, key=lambda tensor: tensor.offset):
            if tensor.offset % alignment or tensor.offset < end:
                where = f"begins at {tensor.offset}, inside another tensor or askew"
                raise InputError(f"{self.path}: {short(tensor.name)} {where}")
            end = tensor.offset + tensor.nbytes
            if end > room:
                missing = f"{short(tensor.name)} ends {end - max(room, 0)} bytes after the file's end"
                raise InputError(f"{self.path}: the file is cut short: {missing}", "download it again")
        return self.data[start:]

    def tensor(self) -> Tensor:
        name = self.string("the name of a tensor")
        what = f"{self.path}: {short(name)}"
        dimensions = self.number("I", name)
        if dimensions > MAX_DIMENSIONS:
            raise InputError(f"{what} has {dimensions} dimensions", f"at most {MAX_DIMENSIONS}")
        shape = tuple(self.number("Q", name) for _ in range(dimensions))[::-1]
        number = self.number("I", name)
        kind = _BY_NUMBER.get(number)
        if kind is None:
            raise InputError(f"{what} has the tensor type {number}, which is not known")
        weights = 1
        for length in shape:
            weights *= length
        if weights == 0 or (shape[-1] if shape else 1) % kind.weights:
            blocks = f"rows of whole blocks of {kind.weights}"
            raise InputError(f"{what} has shape {list(shape)}", f"{kind.name} has {blocks}")
        nbytes = weights // kind.weights * kind.bytes
        if nbytes > len(self.data):
            raise InputError(f"{what} takes {nbytes} bytes, the file has {len(self.data)}")
        return Tensor(name, kind.name, shape, self.number("Q", name), nbytes)

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string(key)
        if kind in NUMBERS:
            return self.numbers(kind, 1, key)[0].item()
        if kind != ARRAY:
            raise InputError(f"{self.path}: {short(key)} has the value type {kind}, which is not known")
        inner, length = self.number("I", key), self.number("Q", key)
        if inner in NUMBERS:
            return self.numbers(inner, length, key)
        if inner != STRING:
            raise InputError(f"{self.path}: {short(key)} is an array of the value type {inner}, which cannot be read")
        self.expect(length, 8, key)
        return [self.string(key) for _ in range(length)]

    def numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        dtype = NUMBERS[kind]
        self.expect(count, dtype.itemsize, what)
        raw = np.frombuffer(self.data, np.uint8 if kind == BOOL else dtype, count, self.at)
        self.at += count * dtype.itemsize
        return raw != 0 if kind == BOOL else raw.astype(dtype.newbyteorder("="))

    def number(self, code: str, what: str) -> int:
        size = struct.calcsize(code)
        self.expect(1, size, what)
        (value,) = struct.unpack_from(f"<{code}", self.data.data, self.at)
        self.at += size
        return value

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        self.expect(length, 1, what)
        raw = self.data[self.at : self.at + length].tobytes()
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {short(what)} is not UTF-8 at offset {self.at - length}") from error

    def expect(self, count: int, size: int, what: str) -> None:
        """Raises InputError where `count` items of at least `size` bytes are more than is left of the file."""
        left = len(self.data) - self.at
        if count * size > left:
            lies = f"the header is cut short or lies: {left} bytes are left for {short(what)}"
            raise InputError(f"{self.path}: {lies}", "download it again")


def short(text: str) -> str:
    """`text` as it may stand in an error: a header can name a tensor anything."""
    return text if len(text) < 80 and text.isprintable() else repr(text[:77] + "...")
