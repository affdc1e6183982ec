"""Files that are whole or absent: written beside their final place, flushed to disk, then renamed over it."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write `data` (text as UTF-8) to `path`; a reader sees the old file or the new one, never a part of either.

    The folder is made where it is missing. When writing fails (a full disk, say) the temporary file is removed, what
    was at `path` before is still there, and the OSError is raised as it came.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, _mode(path))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)
    return path


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 2) -> Path:
    """`write_atomic` of `value` as JSON, with a closing newline. NaN and infinities are not JSON: ValueError."""
    return write_atomic(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def _mode(path: Path) -> int:
    """The permissions a plain `open` would give: those of the file being replaced, else 0666 less the umask."""
    try:
        return path.stat().st_mode & 0o7777
    except FileNotFoundError:
        mask = os.umask(0o022)  # POSIX has no way to read it without setting it
        os.umask(mask)
        return 0o666 & ~mask


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable; file systems that cannot open or sync a folder are left as they are."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
