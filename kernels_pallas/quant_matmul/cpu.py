"""The CPU kernel: compiled from `csrc/` by the machine's own C++ compiler on first use, never required.

The library goes to `$XDG_CACHE_HOME/ruvjax` (`~/.cache/ruvjax`), named after what it was made from. It holds every
instruction set and chooses when it runs, so that machines may share the folder.
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
import jaxlib
import numpy as np

from kernels_pallas.quant_matmul.weight import QuantizedWeight

TARGETS = {"Q8_0": "ruvjax_quant_matvec", "Q4_0": "ruvjax_quant_matvec", "Q4_K": "ruvjax_quant_matvec_nested"}
# Instruction sets that can be asked for; "" takes the widest of the processor.
LEVELS = {"": 0, "portable": 1, "avx2": 2, "avx512": 3}
SOURCES = Path(__file__).parent / "csrc"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w")
_TIMEOUT_S = 300
_log = logging.getLogger(__name__)
_lock = threading.Lock()


def missing() -> str:
    """Why the kernel cannot be used in this process, "" where it can. Compiles it at the first call, in about ten
    seconds, where no earlier process has."""
    with _lock:
        return _load()


def multiply(x: jax.Array, weight: QuantizedWeight, level: str = "") -> jax.Array:
    """x float32 [rows, inner] @ weight -> float32 [rows, outer], one call on the CPU.

    `level` is one of `LEVELS`; one that the processor lacks fails when the program runs. Under `jax.vmap` it runs once
    for each element.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[-1]), x.dtype)
    call = jax.ffi.ffi_call(TARGETS[weight.kind], out, vmap_method="sequential")
    options = {"level": np.int64(LEVELS[level])}
    if weight.kind == "Q4_K":
        return call(x, weight.codes, weight.scales, weight.mins, weight.steps, **options)
    return call(x, weight.codes, weight.scales, kind=np.int64(weight.kind == "Q4_0"), **options)


@functools.cache
def _load() -> str:
    if sys.byteorder != "little" or os.name != "posix":
        return f"the CPU kernel is written for little-endian POSIX systems, not {platform.system()}"
    try:
        library = ctypes.CDLL(str(_build()))
        for target in set(TARGETS.values()):
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except _Unavailable as error:
        return str(error)
    except (OSError, AttributeError) as error:
        return f"the CPU kernel cannot be loaded ({error})"
    return ""


class _Unavailable(Exception):
    pass


def _compiler() -> list[str]:
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


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ruvjax"


def _build() -> Path:
    """The path of the library, compiled unless an earlier process has done it."""
    sources = sorted(SOURCES.iterdir())
    content = b"".join(path.read_bytes() for path in sources)
    made_from = [platform.system(), platform.machine(), jaxlib.__version__, *_FLAGS, os.environ.get("CXX", "")]
    digest = hashlib.sha256(content + "\0".join(made_from).encode()).hexdigest()[:16]
    library = cache_folder() / f"quant_matmul-{digest}.so"
    if library.exists():
        return library
    compiler = _compiler()
    include = Path(jax.ffi.include_dir())
    if not include.is_dir():
        raise _Unavailable(f"jaxlib {jaxlib.__version__} has no headers to compile the CPU kernel with")
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # In the folder itself, then renamed: another process sees a whole library or none.
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
            made = Path(folder) / library.name
            main = next(path for path in sources if path.suffix == ".cc")
            _log.info("compiling the CPU kernel of quantized matmuls into %s, once", library)
            command = [*compiler, *_FLAGS, f"-I{include}", str(main), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
            os.replace(made, library)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines() or [""]
        raise _Unavailable(f"{compiler[0]} could not compile the CPU kernel: {lines[0].strip()}") from None
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"{compiler[0]} took more than {_TIMEOUT_S} s to compile the CPU kernel") from None
    except OSError as error:
        raise _Unavailable(f"the CPU kernel cannot be compiled into {library.parent} ({error})") from None
    return library
