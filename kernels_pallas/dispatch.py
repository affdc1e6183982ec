"""Which body of a kernel op runs, and why.

An op hands `dispatch` its bodies by implementation name. A Pallas body is a `Body` with the reason it cannot run on
these operands, "" where it can; reasons depend on shapes, dtypes and options, never on values. `impl=None` takes the
best body of the platform that the program is lowered for: `jax.lax.platform_dependent` decides where the process has
more than a CPU, so one jitted function serves a CPU and a GPU of the same process.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.extend
from jax import lax

IMPLS = ("reference", "xla", "pallas_gpu", "pallas_tpu", "interpret")
PLATFORM_BODIES = {"cuda": "pallas_gpu", "tpu": "pallas_tpu"}
_log = logging.getLogger(__name__)


class ImplError(ValueError):
    """A kernel implementation that was asked for by name and is unknown, not written, or cannot run on the operands."""


class Body(NamedTuple):
    """One implementation of an op. `unsupported` says why it cannot run on the operands at hand, "" where it can."""

    run: Callable[..., Any]
    unsupported: str = ""


def dispatch(op: str, impl: str | None, bodies: Mapping[str, Body], *operands: Any) -> Any:
    """Run `op` on `operands` (pytrees of arrays; options are bound into the bodies).

    impl: a name of `IMPLS`, which runs exactly that body, or None, which runs "pallas_gpu" on CUDA and "pallas_tpu" on
    TPU where they are written and can run, and "xla" everywhere else; what was passed over is logged once. All bodies
    return arrays of the same shapes and dtypes. Raises ImplError for a named body that is unknown, is not written for
    this op, or cannot run on these operands: a named one never falls back to another.
    """
    if impl is not None:
        return named(op, impl, bodies)(*operands)
    default = bodies["xla"].run
    branches = {}
    for platform in platforms():
        name = PLATFORM_BODIES.get(platform)
        if name is None or name not in bodies:
            continue
        if bodies[name].unsupported:
            log_fallback(op, name, bodies[name].unsupported)
        else:
            branches[platform] = bodies[name].run
    if not branches:
        return default(*operands)
    return lax.platform_dependent(*operands, default=default, **branches)


def named(op: str, impl: str, bodies: Mapping[str, Body]) -> Callable[..., Any]:
    """The body called `impl`. Raises ImplError as `dispatch` does."""
    if impl not in IMPLS:
        raise ImplError(f"{op}: impl={impl!r} is not known; one of {', '.join(IMPLS)}, or None")
    if impl not in bodies:
        raise ImplError(f"{op}: impl={impl!r} is not written for this op; it has {', '.join(bodies)}")
    if bodies[impl].unsupported:
        raise ImplError(f"{op}: impl={impl!r} cannot run here: {bodies[impl].unsupported}")
    return bodies[impl].run


@functools.cache
def platforms() -> tuple[str, ...]:
    """The platforms of this process, by the names that lowering uses: ("cpu",), ("cuda", "cpu"), ("tpu", "cpu")."""
    return tuple(jax.extend.backend.backends())


@functools.cache
def log_fallback(op: str, impl: str, reason: str) -> None:
    """Say once for each op and reason that the XLA form runs in the place of a kernel."""
    _log.warning("%s: %s cannot run (%s); the XLA form runs instead", op, impl, reason)
