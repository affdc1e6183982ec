"""How malloc serves XLA's CPU runtime. Imports no jax: `tune()` has to run before jax is imported.

XLA:CPU allocates its temporary memory anew at each execution, partly from worker threads. glibc's defaults answer with
fresh `mmap` regions and give them back afterwards, so every training step touches its memory for the first time. One
arena that never shrinks keeps the pages; huge pages make the first touch cheap. `scripts/run` sets the same by
environment (and preloads tcmalloc where it is installed, which needs none of this).
"""

import ctypes
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

# mallopt's parameter numbers (malloc.h), the values wanted here, and the names under which an environment sets them.
_SETTINGS = (
    ("arena_max", -8, 1, "MALLOC_ARENA_MAX"),
    ("mmap_max", -4, 0, "MALLOC_MMAP_MAX_"),
    ("trim_threshold", -1, -1, "MALLOC_TRIM_THRESHOLD_"),  # -1: as a size_t the largest there is, never trim
)
_MADV_HUGEPAGE = 14
_RESERVE_LIMIT = 64 << 30
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PRELOADED = ("tcmalloc", "jemalloc", "mimalloc")


@dataclass(frozen=True)
class AllocatorReport:
    """What serves malloc in this process and what was changed. Sizes in bytes."""

    allocator: str  # "glibc 2.36", "tcmalloc", "jemalloc", "mimalloc" or "system" (macOS, musl)
    tuned: bool  # whether `tune` ran in this process
    applied: tuple[str, ...]  # settings made by `tune`, as "arena_max=1"
    kept: tuple[str, ...]  # settings found in the environment and left alone
    huge_pages: str  # "always" (kernel), "tunable" (GLIBC_TUNABLES), "advised" (by `tune`), "off"
    huge_bytes: int  # memory on huge pages now
    note: str  # what did not apply and why, or ""


_applied: AllocatorReport | None = None


def tune() -> AllocatorReport:
    """Make glibc keep its memory and back the heap with huge pages; call before jax is imported. Runs once.

    Leaves alone what the environment sets, and does nothing (and says so) under any other allocator.
    """
    global _applied
    if _applied is None:
        _applied = _tune()
    return _applied


def report() -> AllocatorReport:
    """The allocator as it is now; does not change anything."""
    if _applied is not None:
        return replace(_applied, huge_bytes=_huge_bytes())
    name = _allocator()
    huge = _huge_pages(name, _kernel_mode(), os.environ)
    return AllocatorReport(name, False, (), _kept(os.environ), huge, _huge_bytes(), "not tuned in this process")


def _tune() -> AllocatorReport:
    name = _allocator()
    kept = _kept(os.environ)
    huge = _huge_pages(name, _kernel_mode(), os.environ)
    if not name.startswith("glibc"):
        reason = "manages its own memory" if name in _PRELOADED else "has no mallopt; nothing was changed"
        return AllocatorReport(name, True, (), kept, huge, _huge_bytes(), f"{name} {reason}")
    notes: list[str] = []
    if "jaxlib" in sys.modules:
        notes.append("jax was imported first, so threads may hold arenas of their own")
    libc = ctypes.CDLL(None)
    applied: list[str] = []
    for setting, number, value, _ in _SETTINGS:
        if setting in kept:
            continue
        if libc.mallopt(ctypes.c_int(number), ctypes.c_int(value)) == 1:
            applied.append(f"{setting}={value}")
        else:
            notes.append(f"mallopt refused {setting}={value}")
    if huge == "off" and _kernel_mode() == "madvise" and len(applied) == len(_SETTINGS):
        reserved = _reserve_huge(libc)
        if reserved:
            huge = "advised"
            applied.append(f"huge_page_heap={reserved}")
        else:
            notes.append("the heap could not be advised to huge pages")
    return AllocatorReport(name, True, tuple(applied), kept, huge, _huge_bytes(), "; ".join(notes))


def _allocator() -> str:
    """A preloaded allocator by the libraries mapped into this process, else the C library's own."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        maps = ""
    for name in _PRELOADED:
        if f"lib{name}" in maps:
            return name
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "system"
    except (AttributeError, ValueError, OSError):  # no confstr (Windows), no such name (macOS, musl)
        return "system"


def _kernel_mode() -> str:
    """ "always", "madvise" or "never"; "never" where the kernel has no such setting."""
    try:
        chosen = re.search(r"\[(\w+)\]", _THP.read_text())
    except OSError:
        return "never"
    return chosen.group(1) if chosen else "never"


def _tunables(environ: Mapping[str, str]) -> dict[str, str]:
    pairs = (item.split("=", 1) for item in environ.get("GLIBC_TUNABLES", "").split(":") if "=" in item)
    return dict(pairs)


def _kept(environ: Mapping[str, str]) -> tuple[str, ...]:
    tunables = _tunables(environ)
    return tuple(
        name for name, _, _, variable in _SETTINGS if variable in environ or f"glibc.malloc.{name}" in tunables
    )


def _huge_pages(allocator: str, kernel: str, environ: Mapping[str, str]) -> str:
    if kernel == "always":
        return "always"
    tunable = _tunables(environ).get("glibc.malloc.hugetlb", "0")
    if not allocator.startswith("glibc") or tunable == "0":
        return "off"
    return "tunable" if kernel == "madvise" or tunable != "1" else "off"


def _reserve_huge(libc: ctypes.CDLL) -> int:
    """Grow the heap by address space alone (no page is touched), advise it to huge pages and hand it back to malloc.

    The heap never shrinks after the settings above, so all later requests are served from the advised range. Returns
    the bytes advised, 0 where the process may not reserve them.
    """
    malloc = _function(libc, "malloc", ctypes.c_void_p, ctypes.c_size_t)
    free = _function(libc, "free", None, ctypes.c_void_p)
    madvise = _function(libc, "madvise", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = os.sysconf("SC_PAGE_SIZE")
    size = min(_RESERVE_LIMIT, page * os.sysconf("SC_PHYS_PAGES") * 3 // 4)
    if _limited():
        return 0
    block = malloc(size)
    if not block:
        return 0
    start = -(-block // page) * page
    length = (block + size - start) // page * page
    advised = madvise(start, length, _MADV_HUGEPAGE) == 0
    free(block)
    return length if advised else 0


def _function(libc: ctypes.CDLL, name: str, result: type | None, *arguments: type) -> Callable[..., int]:
    function = libc[name]  # a fresh object, so that other users of ctypes keep their own signatures
    function.restype, function.argtypes = result, arguments
    return function


def _limited() -> bool:
    """Whether address space is limited (ulimit) or accounted for, so that reserving could starve a process."""
    import resource  # POSIX only, as is everything that leads here

    try:
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return True
    except OSError:
        pass
    limits = (resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_DATA))
    return any(soft != resource.RLIM_INFINITY for soft, _ in limits)


def _huge_bytes() -> int:
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"AnonHugePages:\s+(\d+) kB", rollup)
    return int(found.group(1)) * 1024 if found else 0
