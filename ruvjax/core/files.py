"""Files that are whole or absent: written beside their final place, flushed to disk, then renamed over it."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO

from ruvjax.errors import RunError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write `data` (text as UTF-8) to `path`; a reader sees the old file or the new one, never a part of either.

    The folder is made where it is missing. When writing fails (a full disk, say) the temporary file is removed, what
    was at `path` before is still there, and the OSError is raised as it came.
    """
    payload = data.encode("utf-8") if isinstance(data, str) else data
    return stream_atomic(path, lambda file: file.write(payload))


def stream_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> Path:
    """`write_atomic` of whatever `write(file)` puts into an open file, for what is too large to be held at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
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


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Make `folder` hold what `write(partial)` puts into a new folder beside it: all of it or, where anything fails,
    what it held before, and the error is raised as it came. The files are on disk before the folder has its name.

    `folder` must be absolute; whether what it holds may be replaced is the caller's to check.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=".partial", dir=folder.parent))
    try:
        write(partial)
        partial.chmod(0o755)
        for path in partial.iterdir():
            _flush(path)
        _flush(partial)
        _put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(folder.parent)
    return folder


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`. A full folder cannot be replaced in one step: the old one steps aside first."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(partial, folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=".old", dir=folder.parent))
    os.replace(folder, aside)
    try:
        os.replace(partial, folder)
    except BaseException:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Hand a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def full_disk_fails(path: str | os.PathLike[str]) -> Generator[None, None, None]:
    """Turn the system's "no space left" into a RunError that names `path`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise RunError(
            f"the disk is full: could not write {path}", "free some space, then continue with trainer.resume=auto"
        ) from error
