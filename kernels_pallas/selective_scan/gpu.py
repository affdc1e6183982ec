"""The selective scan as Mosaic GPU kernels for Hopper: a warpgroup a row and 64 channels, from the first position on.

The state of a program, [64 channels, state], lies in registers in the layout of a matrix product's result: four threads
share a channel, so that y costs two shuffles, and b and c reach all channels without a copy. A chunk of the inputs is
fetched into shared memory while the one before it is worked on. The backward kernel takes the chunks from the last to
the first; it recomputes as many states of a chunk at a time as shared memory holds beside a second program's, which
costs half an exponential more a position and state for 16 states.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.selective_scan import chunk
from kernels_pallas.tiles import Kernel, recorded

CHANNELS = 64  # rows of the register layout
SHARED_BYTES = 1 << 16  # shared memory for recomputed states: two programs share the 227 KiB of an H100 or H200
SLOTS = 2  # chunks in shared memory


class Tiles(NamedTuple):
    """kept: positions of a chunk whose states the backward kernel holds at a time; divides `chunk.CHUNK`."""

    kept: int


def heuristic(state: int) -> Tiles:
    return Tiles(max(1, min(chunk.CHUNK, SHARED_BYTES // (4 * CHANNELS * state))))


def _unfit(tiles: Tiles) -> str:
    return f"kept={tiles.kept} does not divide a chunk of {chunk.CHUNK}" if chunk.CHUNK % tiles.kept else ""


KERNEL = Kernel("selective_scan_gpu", Tiles, ("state",), _unfit)


def unsupported(x, delta, b, c) -> str:
    """Why the kernels cannot take these operands, "" where they can."""
    for name, value in {"x": x, "delta": delta, "b": b, "c": c}.items():
        if value.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {value.dtype}; the kernels take float32 and bfloat16"
    width, state = x.shape[-1], b.shape[-1]
    if width % CHANNELS:
        return f"a width of {width} is no multiple of {CHANNELS}"
    if state not in (8, 16, 32, 64):
        return f"{state} states; the kernels take 8, 16, 32 or 64"
    return compat.missing("gpu")


class _Plan(NamedTuple):
    """Sizes; the positions of the last chunk are filled up with zeros, which change no state."""

    batch: int
    chunks: int
    steps: int
    state: int
    width: int

    @staticmethod
    def of(x, state: int) -> "_Plan":
        batch, length, width = x.shape
        # Short rows too: a chunk of fewer positions would need buffers, and copies, of odd sizes.
        return _Plan(batch, -(-length // chunk.CHUNK), chunk.CHUNK, state, width)

    def fill(self, value):
        end = self.chunks * self.steps - value.shape[1]
        return jnp.pad(value, ((0, 0), (0, end), *((0, 0),) * (value.ndim - 2))) if end else value

    def call(self, kernel, outputs, streams, scratch, operands):
        """Run `kernel`; `streams` are the operands, first of all, that come chunk by chunk."""
        plgpu: Any = compat.mosaic_gpu()
        buffers = [
            plgpu.SMEM((SLOTS, self.steps, *((CHANNELS,) if x.shape[2:] == (self.width,) else x.shape[2:])), x.dtype)
            for x in streams
        ]
        ready = plgpu.Barrier(num_arrivals=len(streams), num_barriers=SLOTS)
        return plgpu.kernel(
            kernel,
            out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
            scratch_types=[*buffers, ready, *(plgpu.SMEM(shape, jnp.float32) for shape in scratch)],
            grid=(self.batch, self.width // CHANNELS),
            grid_names=("row", "channels"),
            # A thread reads from shared memory what it wrote itself, or what a barrier says has been copied in.
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                unsafe_no_auto_barriers=True,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
        )(*streams, *operands)


def _read(ref, axis: int | None = None):
    """[channels, state] from memory, or with `axis` what it is reduced to along that axis, in float32."""
    plgpu: Any = compat.mosaic_gpu()
    layout = plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(axis)
    return compat.gpu_load(ref, layout).astype(jnp.float32)


def _spread(values, axis: int, shape):
    """Over the channels (axis 0) or the states (axis 1)."""
    plgpu: Any = compat.mosaic_gpu()
    return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (1 - axis,)), plgpu.Layout.WGMMA)


def _decayed(state, delta, a, cut):
    left = jnp.exp(delta * a) * state
    return left if cut is None else jnp.where(cut > 0.0, 0.0, left)


class _Stream(NamedTuple):
    """The operands that come chunk by chunk, and where they go."""

    sources: Any
    buffers: Any
    ready: Any
    steps: int
    reverse: bool
    chunks: int

    def at(self, i):
        """The chunk that is worked on at turn `i`."""
        return self.chunks - 1 - i if self.reverse else i

    def fetch(self, i):
        from jax.experimental import pallas as pl

        plgpu: Any = compat.mosaic_gpu()
        row, channels = lax.axis_index("row"), pl.ds(lax.axis_index("channels") * CHANNELS, CHANNELS)
        positions = pl.ds(self.at(i) * self.steps, self.steps)
        slot = lax.rem(i, SLOTS)
        for source, buffer in zip(self.sources, self.buffers):
            wide = len(source.shape) == 3 and buffer.shape[2] != source.shape[2] or source.shape[2:] == (CHANNELS,)
            index = (row, positions, channels) if wide else (row, positions)
            plgpu.copy_gmem_to_smem(source.at[index], buffer.at[slot], self.ready.at[slot])

    def arrive(self, i):
        """Wait for the chunk of turn `i`, and send for the next. The buffers of this turn."""
        from jax.experimental import pallas as pl

        plgpu: Any = compat.mosaic_gpu()

        @pl.when(i + 1 < self.chunks)
        def _():
            plgpu.commit_smem()  # all threads have left the chunk before, whose place is taken
            self.fetch(i + 1)

        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(self.ready.at[slot])
        return [buffer.at[slot] for buffer in self.buffers]


def forward(x, delta, a, b, c, d, initial, reset):
    """See `xla.forward`; the saved states are [..., width, state] inside, which only `backward` has to know."""
    (batch, length, width), state = x.shape, a.shape[0]
    plan = _Plan.of(x, state)
    streams = [plan.fill(value) for value in (x, delta, b, c)]
    if reset is not None:
        streams.append(plan.fill(reset.astype(jnp.float32)))
    outputs = [
        ((batch, plan.chunks * plan.steps, width), x.dtype),
        ((batch, width, state), jnp.float32),
        ((plan.chunks, batch, width, state), jnp.float32),
    ]
    kernel = partial(_forward_kernel, plan=plan, resets=reset is not None)
    y, final, starts = plan.call(kernel, outputs, streams, [], (a.T, d, initial.swapaxes(1, 2)))
    return y[:, :length], final.swapaxes(1, 2), starts.reshape(plan.chunks, batch, state, width)


def _forward_kernel(*refs, plan: _Plan, resets: bool):
    from jax.experimental import pallas as pl

    count = 4 + resets
    sources, (a_ref, d_ref, initial_ref, y_ref, final_ref, starts_ref) = refs[:count], refs[count : count + 6]
    stream = _Stream(sources, refs[count + 6 : -1], refs[-1], plan.steps, False, plan.chunks)
    stream.fetch(jnp.int32(0))
    row, channels = lax.axis_index("row"), pl.ds(lax.axis_index("channels") * CHANNELS, CHANNELS)
    shape = (CHANNELS, plan.state)
    a, d = _read(a_ref.at[channels]), _read(d_ref.at[channels], 1)

    def one(i, state):
        x, delta, b, c, *cut = stream.arrive(i)
        starts_ref[i, row, channels] = state

        def step(t, state):
            now, u = _read(delta.at[t], 1), _read(x.at[t], 1)
            state = _decayed(state, _spread(now, 1, shape), a, cut[0][t] if resets else None)
            state = state + _spread(_read(b.at[t], 0), 0, shape) * _spread(now * u, 1, shape)
            y = jnp.sum(_spread(_read(c.at[t], 0), 0, shape) * state, axis=1) + d * u
            y_ref[row, i * plan.steps + t, channels] = y.astype(y_ref.dtype)
            return state

        return lax.fori_loop(0, plan.steps, step, state)

    final_ref[row, channels] = lax.fori_loop(0, plan.chunks, one, _read(initial_ref.at[row, channels]))


def backward(x, delta, a, b, c, d, reset, starts, dy, dfinal, *, tiles: Tiles | None = None):
    """See `xla.backward`."""
    (batch, length, width), state = x.shape, a.shape[0]
    plan = _Plan.of(x, state)
    kept = (tiles or recorded(KERNEL, "gpu", x.dtype, {"state": state}, heuristic(state))).kept
    streams = [plan.fill(value) for value in (x, delta, b, c, dy)]
    if reset is not None:
        streams.append(plan.fill(reset.astype(jnp.float32)))
    filled, blocks = plan.chunks * plan.steps, width // CHANNELS
    outputs = [
        ((batch, filled, width), x.dtype),
        ((batch, filled, width), delta.dtype),
        ((blocks, batch, filled, state), jnp.float32),
        ((blocks, batch, filled, state), jnp.float32),
        ((batch, width, state), jnp.float32),
        ((batch, width), jnp.float32),
        ((batch, width, state), jnp.float32),
    ]
    kernel = partial(_backward_kernel, plan=plan, resets=reset is not None, kept=kept)
    operands = (a.T, d, starts.reshape(plan.chunks, batch, width, state), dfinal.swapaxes(1, 2))
    scratch = [(kept, CHANNELS, state)]
    dx, ddelta, db, dc, da, dd, dinitial = plan.call(kernel, outputs, streams, scratch, operands)
    db, dc = (jnp.sum(g, axis=0)[:, :length].astype(value.dtype) for g, value in ((db, b), (dc, c)))
    return dx[:, :length], ddelta[:, :length], jnp.sum(da, 0).T, db, dc, jnp.sum(dd, 0), dinitial.swapaxes(1, 2)


def _backward_kernel(*refs, plan: _Plan, resets: bool, kept: int):
    from jax.experimental import pallas as pl

    plgpu: Any = compat.mosaic_gpu()
    count = 5 + resets
    sources, (a_ref, d_ref, starts_ref, dfinal_ref) = refs[:count], refs[count : count + 4]
    dx_ref, ddelta_ref, db_ref, dc_ref, da_ref, dd_ref, dinitial_ref = refs[count + 4 : count + 11]
    *buffers, ready, left_ref = refs[count + 11 :]
    stream = _Stream(sources, buffers, ready, plan.steps, True, plan.chunks)
    stream.fetch(jnp.int32(0))
    block = lax.axis_index("channels")
    row, channels = lax.axis_index("row"), pl.ds(block * CHANNELS, CHANNELS)
    shape = (CHANNELS, plan.state)
    a, d = _read(a_ref.at[channels]), _read(d_ref.at[channels], 1)

    def one(i, carry):
        x, delta, b, c, dy, *cut = stream.arrive(i)
        at = stream.at(i)

        def left(t, state):
            return _decayed(state, _spread(_read(delta.at[t], 1), 1, shape), a, cut[0][t] if resets else None)

        def arriving(t):
            u = _read(delta.at[t], 1) * _read(x.at[t], 1)
            return _spread(_read(b.at[t], 0), 0, shape) * _spread(u, 1, shape)

        for first in reversed(range(0, plan.steps, kept)):
            state = _read(starts_ref.at[at, row, channels])
            state = lax.fori_loop(0, first, lambda t, state: left(t, state) + arriving(t), state)

            def again(t, state, first=first):
                state = left(first + t, state)
                left_ref[t] = state
                return state + arriving(first + t)

            lax.fori_loop(0, kept, again, state)

            def retreat(back, carry, first=first):
                adjoint, da, dd = carry
                t = first + kept - 1 - back
                now, u, gy = _read(delta.at[t], 1), _read(x.at[t], 1), _read(dy.at[t], 1)
                before = _read(left_ref.at[kept - 1 - back])
                arrives = _spread(_read(b.at[t], 0), 0, shape)
                g = adjoint + _spread(_read(c.at[t], 0), 0, shape) * _spread(gy, 1, shape)
                moved = g * before
                arrived = jnp.sum(g * arrives, axis=1)
                input_ = _spread(now * u, 1, shape)
                position = at * plan.steps + t
                dx_ref[row, position, channels] = (arrived * now + d * gy).astype(dx_ref.dtype)
                ddelta = jnp.sum(moved * a, axis=1) + arrived * u
                ddelta_ref[row, position, channels] = ddelta.astype(ddelta_ref.dtype)
                db_ref[block, row, position] = jnp.sum(g * input_, axis=0)
                dc_ref[block, row, position] = jnp.sum((before + arrives * input_) * _spread(gy, 1, shape), axis=0)
                adjoint = _decayed(g, _spread(now, 1, shape), a, cut[0][t] if resets else None)
                return adjoint, da + moved * _spread(now, 1, shape), dd + gy * u

            carry = lax.fori_loop(0, kept, retreat, carry)
        return carry

    def zeros(shape, layout):
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

    carry = (
        _read(dfinal_ref.at[row, channels]),
        zeros(shape, plgpu.Layout.WGMMA),
        zeros((CHANNELS,), plgpu.Layout.WGMMA.reduce(1)),
    )
    adjoint, da, dd = lax.fori_loop(0, plan.chunks, one, carry)
    dinitial_ref[row, channels], da_ref[row, channels], dd_ref[row, channels] = adjoint, da, dd
