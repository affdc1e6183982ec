"""The selective scan as Mosaic TPU kernels: a program a row, block of the width and chunk, the chunks in order.

The state, [state, width], stays in VMEM between the chunks of a row: states lie along sublanes and the width along
lanes, so that a position costs vector operations only. b and c arrive with their states along lanes, and are turned
with a one-hot mask and a sum, which every TPU does exactly. The backward kernel takes the chunks from the last to the
first, recomputes the states of one from the state saved before it, and keeps them in VMEM.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.selective_scan import chunk
from kernels_pallas.tiles import Kernel, recorded

STATES_BYTES = 1 << 22  # VMEM for the states of one chunk in the backward kernel; a core has 16 MiB or more


class Tiles(NamedTuple):
    """width: channels of a program; a multiple of 128, or all of them."""

    width: int


def heuristic(width: int, state: int) -> Tiles:
    """As wide as the states of a chunk allow: b and c are read and turned again for each block of the width."""
    most = max(128, STATES_BYTES // (4 * chunk.CHUNK * state) // 128 * 128)
    if width <= min(most, 512):
        return Tiles(width)
    return Tiles(next(size for size in (512, 256, 128) if size <= most and (width % size == 0 or size == 128)))


def _unfit(tiles: Tiles) -> str:
    return f"width={tiles.width} is no multiple of 128" if tiles.width % 128 else ""


KERNEL = Kernel("selective_scan_tpu", Tiles, ("width", "state"), _unfit)


def unsupported(x, delta, b, c) -> str:
    """Why the kernels cannot take these operands, "" where they can."""
    for name, value in {"x": x, "delta": delta, "b": b, "c": c}.items():
        if value.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {value.dtype}; the kernels take float32 and bfloat16"
    return compat.missing("tpu")


class _Plan(NamedTuple):
    """Sizes after the last chunk and the last block of the width were filled up with zeros, which change no state."""

    batch: int
    chunks: int
    steps: int
    state: int
    width: int
    block: int

    @staticmethod
    def of(x, state: int, tiles: Tiles | None) -> "_Plan":
        batch, length, width = x.shape
        chunks, steps = chunk.cut(length)
        if tiles is None:
            sizes = {"width": width, "state": state}
            tiles = recorded(KERNEL, "tpu", x.dtype, sizes, heuristic(width, state))
        block = min(tiles.width, width)
        return _Plan(batch, chunks, steps, state, -(-width // block) * block, block)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.width // self.block, self.chunks

    def fill(self, value, *axes: str):
        """Zeros at the ends of the axes called "length" and "width"."""
        sizes = {"length": self.chunks * self.steps, "width": self.width}
        ends = [sizes.get(axis, size) - size for axis, size in zip(axes, value.shape)]
        return jnp.pad(value, [(0, end) for end in ends]) if any(ends) else value

    def specs(self, reverse: bool) -> dict[str, Any]:
        """A block for each kind of operand. `reverse` takes the chunks from the last to the first."""
        from jax.experimental import pallas as pl

        vmem = compat.mosaic_tpu().VMEM

        def spec(block, index):
            def turned(i, w, k):
                return index(i, w, self.chunks - 1 - k if reverse else k)

            return pl.BlockSpec(block, turned, memory_space=vmem)

        return {
            "rows": spec((1, self.steps, self.block), lambda i, w, k: (i, k, w)),
            "states": spec((1, self.steps, self.state), lambda i, w, k: (i, k, 0)),
            "cut": spec((1, self.steps, 1), lambda i, w, k: (i, k, 0)),
            "decay": spec((self.state, self.block), lambda i, w, k: (0, w)),
            "skip": spec((1, self.block), lambda i, w, k: (0, w)),
            "state": spec((1, self.state, self.block), lambda i, w, k: (i, 0, w)),
            "start": spec((1, 1, self.state, self.block), lambda i, w, k: (k, i, 0, w)),
            "partial": spec((1, 1, self.steps, self.state), lambda i, w, k: (w, i, k, 0)),
            "skips": spec((1, 1, self.block), lambda i, w, k: (i, 0, w)),
        }

    def call(self, kernel, inputs, outputs, scratch, reverse: bool, interpret: bool):
        """Run `kernel`; inputs are (kind, array) pairs, outputs (kind, shape, dtype)."""
        from jax.experimental import pallas as pl

        pltpu = compat.mosaic_tpu()
        specs = self.specs(reverse)
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=[specs[kind] for kind, _ in inputs],
            out_specs=[specs[kind] for kind, *_ in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
        )(*(value for _, value in inputs))


def _as_flags(reset):
    return [] if reset is None else [reset.astype(jnp.float32)[..., None]]


def _row(ref, t):
    from jax.experimental import pallas as pl

    return ref[pl.ds(t, 1), :]


def _same(state: int):
    """The one-hot mask that turns a row of states into a column and back."""
    return lax.broadcasted_iota(jnp.int32, (state, state), 0) == lax.broadcasted_iota(jnp.int32, (state, state), 1)


def _column(row, same):
    return jnp.sum(jnp.where(same, row, 0.0), axis=1, keepdims=True)


def _line(column, same):
    return jnp.sum(jnp.where(same, column, 0.0), axis=0, keepdims=True)


def _decayed(state, delta, a, cut):
    left = jnp.exp(delta * a) * state
    return left if cut is None else jnp.where(cut > 0.0, 0.0, left)


def forward(x, delta, a, b, c, d, initial, reset, *, tiles: Tiles | None = None, interpret: bool = False):
    """See `xla.forward`."""
    (batch, length, width), state = x.shape, a.shape[0]
    plan = _Plan.of(x, state, tiles)
    flags = _as_flags(reset)
    inputs = [
        *(("rows", plan.fill(value, "", "length", "width")) for value in (x, delta)),
        ("decay", plan.fill(a, "", "width")),
        *(("states", plan.fill(value, "", "length", "")) for value in (b, c)),
        ("skip", plan.fill(d[None], "", "width")),
        ("state", plan.fill(initial, "", "", "width")),
        *(("cut", plan.fill(value, "", "length", "")) for value in flags),
    ]
    rows = (batch, plan.chunks * plan.steps, plan.width)
    outputs = [
        ("rows", rows, x.dtype),
        ("state", (batch, state, plan.width), jnp.float32),
        ("start", (plan.chunks, batch, state, plan.width), jnp.float32),
    ]
    scratch = [(plan.steps, plan.block)] * 3 + [(plan.steps, state)] * 2
    kernel = partial(_forward_kernel, steps=plan.steps, resets=bool(flags))
    y, final, starts = plan.call(kernel, inputs, outputs, scratch, False, interpret)
    return y[:, :length, :width], final[..., :width], starts[..., :width]


def _forward_kernel(x_ref, delta_ref, a_ref, b_ref, c_ref, d_ref, initial_ref, *refs, steps, resets):
    from jax.experimental import pallas as pl

    cut_ref = refs[0] if resets else None
    y_ref, state_ref, start_ref, wide, delta, y, b, c = refs[resets:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    # Wide copies in scratch: single rows of packed bfloat16 cannot be addressed.
    wide[...], delta[...] = (ref[0].astype(jnp.float32) for ref in (x_ref, delta_ref))
    b[...], c[...] = (ref[0].astype(jnp.float32) for ref in (b_ref, c_ref))
    start_ref[0, 0] = state_ref[0]
    a, d, same = a_ref[...], d_ref[...], _same(a_ref.shape[0])

    def step(t, state):
        now, x = _row(delta, t), _row(wide, t)
        state = _decayed(state, now, a, None if cut_ref is None else cut_ref[0, pl.ds(t, 1), :])
        state = state + _column(_row(b, t), same) * (now * x)
        y[pl.ds(t, 1), :] = jnp.sum(_column(_row(c, t), same) * state, axis=0, keepdims=True) + d * x
        return state

    state_ref[0] = lax.fori_loop(0, steps, step, state_ref[0])
    y_ref[0] = y[...].astype(y_ref.dtype)


def backward(x, delta, a, b, c, d, reset, starts, dy, dfinal, *, tiles: Tiles | None = None, interpret: bool = False):
    """See `xla.backward`."""
    (batch, length, width), state = x.shape, a.shape[0]
    plan = _Plan.of(x, state, tiles)
    flags = _as_flags(reset)
    inputs = [
        *(("rows", plan.fill(value, "", "length", "width")) for value in (x, delta, dy)),
        ("decay", plan.fill(a, "", "width")),
        *(("states", plan.fill(value, "", "length", "")) for value in (b, c)),
        ("skip", plan.fill(d[None], "", "width")),
        ("start", plan.fill(starts, "", "", "", "width")),
        ("state", plan.fill(dfinal, "", "", "width")),
        *(("cut", plan.fill(value, "", "length", "")) for value in flags),
    ]
    blocks, filled = plan.width // plan.block, plan.chunks * plan.steps
    outputs = [
        ("rows", (batch, filled, plan.width), x.dtype),
        ("rows", (batch, filled, plan.width), delta.dtype),
        ("partial", (blocks, batch, filled, state), jnp.float32),
        ("partial", (blocks, batch, filled, state), jnp.float32),
        ("state", (batch, state, plan.width), jnp.float32),
        ("skips", (batch, 1, plan.width), jnp.float32),
        ("state", (batch, state, plan.width), jnp.float32),
    ]
    scratch = [(plan.steps, plan.block)] * 5 + [(plan.steps, state)] * 2 + [(plan.steps, state, plan.block)]
    kernel = partial(_backward_kernel, steps=plan.steps, resets=bool(flags))
    dx, ddelta, db, dc, da, dd, dinitial = plan.call(kernel, inputs, outputs, scratch, True, interpret)
    db, dc = (jnp.sum(g, axis=0)[:, :length].astype(value.dtype) for g, value in ((db, b), (dc, c)))
    dx, ddelta = dx[:, :length, :width], ddelta[:, :length, :width]
    return dx, ddelta, jnp.sum(da, 0)[:, :width], db, dc, jnp.sum(dd, (0, 1))[:width], dinitial[..., :width]


def _backward_kernel(x_ref, delta_ref, dy_ref, a_ref, b_ref, c_ref, d_ref, start_ref, dfinal_ref, *refs, steps, resets):
    from jax.experimental import pallas as pl

    cut_ref = refs[0] if resets else None
    dx_ref, ddelta_ref, db_ref, dc_ref, da_ref, dd_ref, adjoint_ref, *scratch = refs[resets:]
    wide, delta, dy, dx, ddelta, b, c, left = scratch

    @pl.when(pl.program_id(2) == 0)
    def _():
        adjoint_ref[...] = dfinal_ref[...]
        da_ref[...] = jnp.zeros_like(da_ref)
        dd_ref[...] = jnp.zeros_like(dd_ref)

    wide[...], delta[...], dy[...] = (ref[0].astype(jnp.float32) for ref in (x_ref, delta_ref, dy_ref))
    b[...], c[...] = (ref[0].astype(jnp.float32) for ref in (b_ref, c_ref))
    a, d, same = a_ref[...], d_ref[...], _same(a_ref.shape[0])

    def cut(t):
        return None if cut_ref is None else cut_ref[0, pl.ds(t, 1), :]

    def again(t, state):
        now = _row(delta, t)
        kept = _decayed(state, now, a, cut(t))
        left[pl.ds(t, 1)] = kept[None]
        return kept + _column(_row(b, t), same) * (now * _row(wide, t))

    lax.fori_loop(0, steps, again, start_ref[0, 0])

    def retreat(i, carry):
        adjoint, da, dd = carry
        t = steps - 1 - i
        x, now, gy = _row(wide, t), _row(delta, t), _row(dy, t)
        kept, arrives, reads = left[pl.ds(t, 1)][0], _column(_row(b, t), same), _column(_row(c, t), same)
        g = adjoint + reads * gy
        moved = g * kept
        arrived = jnp.sum(g * arrives, axis=0, keepdims=True)
        dx[pl.ds(t, 1), :] = arrived * now + d * gy
        ddelta[pl.ds(t, 1), :] = jnp.sum(moved * a, axis=0, keepdims=True) + arrived * x
        u = now * x
        db_ref[0, 0, pl.ds(t, 1), :] = _line(jnp.sum(g * u, axis=1, keepdims=True), same)
        dc_ref[0, 0, pl.ds(t, 1), :] = _line(jnp.sum((kept + arrives * u) * gy, axis=1, keepdims=True), same)
        return _decayed(g, now, a, cut(t)), da + moved * now, dd + gy * x

    carry = (adjoint_ref[0], da_ref[0], dd_ref[0])
    adjoint_ref[0], da_ref[0], dd_ref[0] = lax.fori_loop(0, steps, retreat, carry)
    dx_ref[0] = dx[...].astype(dx_ref.dtype)
    ddelta_ref[0] = ddelta[...].astype(ddelta_ref.dtype)
