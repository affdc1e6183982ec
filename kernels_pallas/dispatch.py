"""Which body of a kernel op runs, and why.

An op hands `dispatch` its bodies by implementation name. A Pallas body is a `Body` with the reason it cannot run on
these operands, "" where it can; reasons depend on shapes, dtypes and options, never on values. `impl=None` takes the
best body of the platform that the program is lowered for: `jax.lax.platform_dependent` decides where the process has
more than a CPU, so one jitted function serves a CPU and a GPU of the same process, one device and several.
"""

import functools
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax.extend
from jax import lax

from kernels_pallas.whole import where_whole

IMPLS = ("reference", "xla", "pallas_gpu", "pallas_tpu", "interpret")
PLATFORM_BODIES = {"cuda": "pallas_gpu", "tpu": "pallas_tpu"}
SPLIT = "XLA's partitioner splits the arrays and cannot look into a kernel, but shard_map hands it whole ones"
_log = logging.getLogger(__name__)


class ImplError(ValueError):
    """A kernel implementation that was asked for by name and is unknown, not written, or cannot run on the operands."""


class Body(NamedTuple):
    """One implementation of an op. `unsupported` says why it cannot run on the operands at hand, "" where it can."""

    run: Callable[..., Any]
    unsupported: str = ""


class Decision(NamedTuple):
    """What one call of `dispatch` came to. taken: the body that runs on whole arrays, by platform of this process.
    refused: why bodies of any platform cannot run on the operands. written: the names of all bodies of the op."""

    op: str
    taken: Mapping[str, str]
    refused: Mapping[str, str]
    written: tuple[str, ...]


_observed: ContextVar[list[Decision] | None] = ContextVar("observed", default=None)


@contextmanager
def observe() -> Generator[list[Decision], None, None]:
    """The decisions of the ops traced inside, in order. A jitted function that was traced before makes none."""
    decisions: list[Decision] = []
    token = _observed.set(decisions)
    try:
        yield decisions
    finally:
        _observed.reset(token)


def decide(op: str, impl: str | None, bodies: Mapping[str, Body]) -> Decision:
    """The choice that `dispatch` makes, and its errors."""
    refused = {name: body.unsupported for name, body in bodies.items() if body.unsupported}
    if impl is not None:
        named(op, impl, bodies)
        return Decision(op, dict.fromkeys(platforms(), impl), refused, tuple(bodies))
    taken = dict.fromkeys(platforms(), "xla")
    for platform in taken:
        name = PLATFORM_BODIES.get(platform, "")
        if name in bodies and name not in refused:
            taken[platform] = name
    return Decision(op, taken, refused, tuple(bodies))


def dispatch(op: str, impl: str | None, bodies: Mapping[str, Body], *operands: Any) -> Any:
    """Run `op` on `operands` (pytrees of arrays; options are bound into the bodies).

    impl: a name of `IMPLS`, which runs exactly that body, or None, which runs "pallas_gpu" on CUDA and "pallas_tpu" on
    TPU where they are written, can run and find whole arrays (on one device, or inside `shard_map`), and "xla"
    everywhere else; what was passed over is logged once. All bodies return arrays of the same shapes and dtypes. Raises
    ImplError for a named body that is unknown, is not written for this op, or cannot run on these operands: a named one
    never falls back to another.
    """
    decision = decide(op, impl, bodies)
    if (observed := _observed.get()) is not None:
        observed.append(decision)
    if impl is not None:
        return bodies[impl].run(*operands)
    for platform in decision.taken:
        if (name := PLATFORM_BODIES.get(platform, "")) in decision.refused:
            log_fallback(op, name, decision.refused[name])
    xla = bodies["xla"].run
    branches = {
        platform: where_whole(bodies[name].run, xla, partial(log_fallback, op, name, SPLIT))
        for platform, name in decision.taken.items()
        if name != "xla"
    }
    if not branches:
        return xla(*operands)
    return lax.platform_dependent(*operands, default=xla, **branches)


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
