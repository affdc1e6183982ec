"""Kernels written in C++ for the CPU: compiled once on the machine that runs them, called by XLA through its FFI.

A kernel is never required. `unavailable` gives the reason why one cannot be had (no compiler, one that fails, no folder
to write to, switched off by RUVJAX_NATIVE=0), and the op then runs its XLA form. Libraries are kept in
`$XDG_CACHE_HOME/ruvjax` (`~/.cache/ruvjax`) under a name that holds a digest of the sources, XLA's headers, the
compiler and the processor: a folder that machines share never serves the wrong one.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax

_ROOT = Path(__file__).resolve().parent
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-DNDEBUG", "-w")
_TIMEOUT_S = 300
# What `-march=native` depends on, as lines of /proc/cpuinfo.
_PROCESSOR = (
    "vendor_id",
    "cpu family",
    "model",
    "flags",
    "CPU implementer",
    "CPU architecture",
    "CPU part",
    "Features",
)
_log = logging.getLogger(__name__)
_lock = threading.Lock()


class _Unavailable(Exception):
    pass


def switched_off() -> bool:
    """Whether RUVJAX_NATIVE=0 keeps every op on its XLA form."""
    return os.environ.get("RUVJAX_NATIVE", "") == "0"


def unavailable(source: str, targets: tuple[str, ...]) -> str:
    """Why the FFI handlers `targets` of `source` (a path in this package) cannot be called in this process.

    "" where they can: they are then registered with XLA. The first call in a process loads the library, the first on
    a machine compiles it, which takes about ten seconds.
    """
    if switched_off():
        return "switched off by RUVJAX_NATIVE=0"
    with _lock:
        return _load(source, targets)


@functools.cache
def _load(source: str, targets: tuple[str, ...]) -> str:
    if sys.byteorder != "little" or os.name != "posix":
        return f"the native kernels are written for little-endian POSIX systems, not {platform.system()}"
    try:
        library = ctypes.CDLL(str(_build(_ROOT / source)))
        for target in targets:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except _Unavailable as error:
        return str(error)
    except (OSError, AttributeError) as error:
        return f"{Path(source).name} cannot be loaded ({error})"
    return ""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ruvjax"


def _build(source: Path) -> Path:
    """The library of `source`, compiled unless an earlier process has done it."""
    compiler = _compiler()
    include = Path(jax.ffi.include_dir())
    if not include.is_dir():
        raise _Unavailable("jaxlib has no headers to compile native kernels with")
    machine = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    command = [*compiler, *_FLAGS, machine, f"-I{include}", f"-I{_ROOT / 'csrc'}"]
    folder = cache_folder()
    library = folder / f"{source.stem}-{_digest(source, include, command)}.so"
    if library.exists():
        return library
    try:
        # Only the user may write there: what lies in the folder is run.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Made in the folder itself, then renamed: another process sees a whole library or none.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as temporary:
            made = Path(temporary) / library.name
            _log.info("compiling %s into %s, once", source.name, library)
            command = [*command, str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
            os.replace(made, library)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines() or [""]
        raise _Unavailable(f"{compiler[0]} could not compile {source.name}: {lines[0].strip()}") from None
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"{compiler[0]} took more than {_TIMEOUT_S} s to compile {source.name}") from None
    except OSError as error:
        raise _Unavailable(f"{source.name} cannot be compiled into {folder} ({error})") from None
    return library


def _compiler() -> list[str]:
    """The command of $CXX where it is set, else the first compiler on the path."""
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        if not shutil.which(command[0]):
            raise _Unavailable(f"the C++ compiler of CXX={chosen!r} is not there")
        return command
    for name in _COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise _Unavailable(f"no C++ compiler on the path ({', '.join(_COMPILERS)}, or CXX)")


def _digest(source: Path, include: Path, command: list[str]) -> str:
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, timeout=_TIMEOUT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"{command[0]} does not run ({error})") from None
    digest = hashlib.sha256("\0".join([*command, platform.system(), *_processor()]).encode() + version)
    for path in (source, *sorted(source.parent.glob("*.h")), *sorted((_ROOT / "csrc").glob("*.h"))):
        digest.update(path.read_bytes())
    for path in sorted(include.rglob("*.h")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return [platform.machine(), *sorted({line for line in lines if line.startswith(_PROCESSOR)})]
