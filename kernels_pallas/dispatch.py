"""Which body of a kernel op runs: each op hands `resolve` the bodies it has, by implementation name."""

from collections.abc import Callable, Mapping

IMPLS = ("reference", "xla", "pallas_gpu", "pallas_tpu", "interpret")


class ImplError(ValueError):
    """A kernel implementation that was asked for by name and is unknown, or that this op does not have."""


def resolve(op: str, impl: str | None, bodies: Mapping[str, Callable]) -> Callable:
    """The body of `op` named `impl`; None picks "xla", the path that runs on every device.

    Raises ImplError where the name is unknown or the op has no such body: a named one never falls back to another.
    """
    name = "xla" if impl is None else impl
    if name not in IMPLS:
        raise ImplError(f"{op}: impl={impl!r} is not known; one of {', '.join(IMPLS)}, or None")
    if name not in bodies:
        raise ImplError(f"{op}: impl={impl!r} is not written for this op yet; it has {', '.join(bodies)}")
    return bodies[name]
