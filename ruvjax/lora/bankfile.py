"""Banks in one file: whole or absent, checked when read.

The file is a safetensors file (8 bytes of header length, a JSON header, the arrays one after the other), so that other
programs can look into it; its metadata holds the format version and the SHA-256 of all the rest. Of each bank the
taken slots are written, not the room: a file has the size of what was stored.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.retrieve import keys_of
from ruvjax.core.files import FULL_DISK, stream_atomic
from ruvjax.errors import InputError, RunError
from ruvjax.lora.bank import NONE, Bank

FORMAT_VERSION = 1
KIND = "ruvjax adapter banks"
BLANK = "0" * 64  # stands for the digest while it is computed
STALE_S = 600  # what a killed process left half written, and nobody has written to for so long
ROWS = ("a", "b", "ids", "success", "trials", "uses", "last_used")
NAMES = {"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32, "I32": np.int32}
DTYPES = {np.dtype(dtype): name for name, dtype in NAMES.items()}


def save(path: str | os.PathLike[str], banks: Sequence[Bank], meta: Mapping[str, str] = {}) -> Path:
    """Write `banks`, and what the caller wants to find beside them, to `path`.

    Crash-safe: the bytes are flushed to the disk under a temporary name, which is then renamed; a process that is
    killed, or a disk that is full, leaves the file that was there. Raises RunError where the disk is full, InputError
    for a path that cannot be written.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    for number, bank in enumerate(banks):
        taken = np.flatnonzero(np.asarray(bank.ids) != NONE).astype(np.int32)
        rows = {"slots": taken, "keys": _rows(bank.keys.values, taken)}
        rows |= {name: _rows(getattr(bank, name), taken) for name in ROWS}
        counts = {"clock": bank.clock, "next_id": bank.next_id, "capacity": np.int32(bank.capacity)}
        rows |= {name: np.asarray(value, np.int32).reshape(1) for name, value in counts.items()}
        arrays |= {f"{number}.{name}": np.ascontiguousarray(array) for name, array in rows.items()}
    header = _header(arrays, {**meta, "kind": KIND, "format_version": str(FORMAT_VERSION), "banks": str(len(banks))})
    digest = hashlib.sha256(header)
    for array in arrays.values():
        digest.update(_bytes(array))
    header = header.replace(BLANK.encode(), digest.hexdigest().encode(), 1)

    def write(file: BinaryIO) -> None:
        file.write(header)
        for array in arrays.values():
            file.write(_bytes(array))

    try:
        stream_atomic(path, write)
    except OSError as error:
        if error.errno in FULL_DISK:
            kept = "what was there before is unchanged" if path.exists() else "nothing was written"
            raise RunError(f"the disk is full: could not write the bank {path}; {kept}", "free some space") from error
        raise InputError(f"the bank {path} cannot be written: {error.strerror or error}") from error
    _forget_stale(path)
    return path


def load(path: str | os.PathLike[str]) -> tuple[tuple[Bank, ...], dict[str, str]]:
    """The banks of a file and what was written beside them. Every adapter is in the slot, and has the id, it had.

    Raises InputError, naming the file, where it is missing, no file of banks, of another format version, cut short or
    altered by as much as a bit.
    """
    path = Path(path)
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"the bank {path} cannot be read: {error.strerror or error}") from error
    length = int(data[:8].view("<u8")[0]) if data.size >= 8 else 0
    try:
        values = json.loads(data[8 : 8 + length].tobytes().decode()) if 0 < length <= data.size - 8 else None
        meta = dict(values.pop("__metadata__")) if values else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        meta, values = {}, None
    if values is None or meta.get("kind") != KIND:
        raise InputError(f"{path} is no file of adapter banks, or is damaged", "load another copy")
    if meta.get("format_version") != str(FORMAT_VERSION):
        raise InputError(
            f"{path} has format version {meta.get('format_version')}, this version reads {FORMAT_VERSION}",
            "save it again with the version that wrote it",
        )
    stated = meta.pop("sha256", "")
    start = data[: 8 + length].tobytes().replace(stated.encode(), BLANK.encode(), 1) if len(stated) == 64 else b""
    digest = hashlib.sha256(start)
    digest.update(data[8 + length :].data)
    if digest.hexdigest() != stated:
        raise InputError(f"{path} is damaged: its bytes do not have the checksum that it states", "load another copy")
    found: dict[str, np.ndarray] = {}
    for name, entry in values.items():
        first, last = entry["data_offsets"]
        part = data[8 + length + first : 8 + length + last]
        found[name] = part.view(NAMES[entry["dtype"]]).reshape(entry["shape"])
    banks = tuple(_restored(found, f"{number}.") for number in range(int(meta.pop("banks"))))
    return banks, {name: text for name, text in meta.items() if name not in ("kind", "format_version")}


def _restored(arrays: Mapping[str, np.ndarray], prefix: str) -> Bank:
    slots, capacity = arrays[f"{prefix}slots"], int(arrays[f"{prefix}capacity"][0])

    def spread(name: str, blank: int = 0) -> jax.Array:
        rows = arrays[prefix + name]
        whole = np.full((capacity, *rows.shape[1:]), blank, rows.dtype)
        whole[slots] = rows
        return jnp.asarray(whole)

    rows = {name: spread(name, NONE if name == "ids" else 0) for name in ROWS}
    clock, next_id = (jnp.asarray(arrays[prefix + name][0]) for name in ("clock", "next_id"))
    return Bank(keys=jax.jit(keys_of)(spread("keys")), clock=clock, next_id=next_id, **rows)


def _rows(array: Any, taken: np.ndarray) -> np.ndarray:
    return np.asarray(array)[taken]


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _header(arrays: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"sha256": BLANK, **meta}}
    offset = 0
    for name, array in arrays.items():
        entries[name] = {
            "dtype": DTYPES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # arrays are aligned
    return len(text).to_bytes(8, "little") + text


def _forget_stale(path: Path) -> None:
    """Remove what processes that were killed while they saved this very file have left beside it."""
    for left in path.parent.glob(f".{path.name[:100]}.*.partial"):
        try:
            if time.time() - left.stat().st_mtime > STALE_S:
                left.unlink()
        except FileNotFoundError:
            continue  # its process was alive after all
