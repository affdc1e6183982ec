"""The Tiny Recursive Model (Jolicoeur-Martineau 2025, arXiv:2510.04871).

One small network f improves two latents by turns: z <- f(z + y + x), n times, then y <- f(y + z); T such cycles make
one supervision step, and only the last cycle carries gradient. y is read out as the answer, z is scratch space, x the
embedded question. Steps follow each other through the detached `Latent`; `trm_loss` trains and `trm_solve` runs them.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int

from kernels_pallas.attention import Mask, attention
from ruvjax.core.gate import swiglu
from ruvjax.core.linear import embed, linear, readout
from ruvjax.core.mixing import mix
from ruvjax.core.model import DTYPES, Output, compute_dtype
from ruvjax.core.norm import rms
from ruvjax.core.params import declare, unstack
from ruvjax.core.rope import RopeScaling, rotations
from ruvjax.errors import ConfigError

COPY_BIAS = 5.0  # of the token that stands in the very cell: to begin with, the answer is the question
HALT_BIAS = -5.0  # a model that has learned nothing never halts


@struct.dataclass
class Layer:
    """Weights of all layers, stacked; None where the mixer leaves a weight out.

    `up` and `qkv` are fused: gate and up, or queries, keys and values, side by side. In the axial mixer `qkv` and `o`
    attend along rows, `column_qkv` and `column_o` along columns.
    """

    up: Any
    down: Any
    mix_up: Any = None
    mix_down: Any = None
    qkv: Any = None
    o: Any = None
    column_qkv: Any = None
    column_o: Any = None


@struct.dataclass
class Copying:
    """Gates of the copies in the head, [width, 2 copy + 1], and the start of the middle one's bias."""

    gate: Any
    here: Any


@struct.dataclass
class TinyRecursiveParams:
    """`answer_start` and `latent_start` are drawn once and never trained: their gradient is zero."""

    embedding: Any
    layers: Layer
    head: Any
    halt: Any
    halt_bias: Any
    answer_start: Any
    latent_start: Any
    puzzles: Any = None
    marks: Any = None
    copy: Copying | None = None


@struct.dataclass
class Latent:
    """What one supervision step hands to the next: y and z, each [batch, prefix + length, width], detached."""

    answer: Any
    scratch: Any


@dataclass(frozen=True)
class TinyRecursive:
    """Hyper-parameters of the recursion and of its network.

    length: cells of a board. mixer: how positions exchange: "mlp" (a SwiGLU over positions; no positional code),
    "attention", or "axial" (attention along the rows and then along the columns of a `rows` x `columns` grid).
    mlp_width and mix_width are inner widths, of which `mix_width` 0 means 8/3 of the positions in multiples of 256, as
    published. prefix: positions before the board; the first holds the puzzle's vector where there are `puzzles` (ids 0
    to puzzles - 1), and the halting logit is read from position 0. For "axial" they are whole rows above the grid.
    cycles and updates: T and n of the paper. dtype: compute dtype; parameters are float32. unroll: write the last cycle
    out instead of looping, for longer compilation and faster steps; remat: compute its activations again backward.

    Beyond the paper, for answers that are mostly the question: marks, the kinds of mark that a cell of the question may
    carry (its input is token + vocab_size * mark, mark 0 is none); copy, how far to the left and right in its row a
    cell may copy the question's token from (-1: no copying): a gate for each such cell is added to the logit of the
    token that stands there (a pointer into the input, as in Gu et al. 2016). begin: the token that begins a puzzle on
    boards that hold several one after another ("attention" without a prefix; 0: a board is one puzzle): cells attend
    inside their puzzle, and cells of token 0 not at all.
    """

    vocab_size: int = 11
    length: int = 81
    rows: int = 0
    columns: int = 0
    puzzles: int = 1
    prefix: int = 16
    width: int = 512
    heads: int = 8
    layers: int = 2
    mlp_width: int = 1536
    mix_width: int = 0
    cycles: int = 3
    updates: int = 6
    mixer: str = "mlp"
    mlp: str = "swiglu"
    rope: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    dtype: str = "float32"
    unroll: bool = True
    remat: bool = False
    marks: int = 1
    copy: int = -1
    begin: int = 0

    def __post_init__(self):
        least = {"vocab_size": 2, "length": 1, "width": 1, "heads": 1, "layers": 1, "mlp_width": 1, "cycles": 1}
        least |= {"updates": 1, "rows": 0, "columns": 0, "puzzles": 0, "prefix": 0, "mix_width": 0}
        least |= {"marks": 1, "copy": -1, "begin": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"model.{name}={value!r} must be an integer of at least {low}")
        choices = {
            "mixer": ("mlp", "attention", "axial"),
            "mlp": ("swiglu", "gelu"),
            "dtype": DTYPES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"model.{name}={getattr(self, name)!r} is not known", f"one of {', '.join(allowed)}")
        for name in ("rope", "unroll", "remat"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"model.{name}={getattr(self, name)!r} must be true or false")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"model.{name}={value!r} must be a positive number")
        if self.puzzles and not self.prefix:
            raise ConfigError("model.prefix=0 leaves no place for puzzle vectors", "set model.puzzles=0")
        if self.mixer != "mlp" and (self.width % self.heads or (self.width // self.heads) % 2):
            raise ConfigError(f"model.width={self.width} must be model.heads={self.heads} times an even number")
        if self.copy >= 0 and self.rows * self.columns != self.length:
            raise ConfigError(f"model.copy={self.copy} needs rows: model.rows x model.columns is not {self.length}")
        if self.begin and (self.mixer != "attention" or self.prefix):
            raise ConfigError(
                f"model.begin={self.begin} with model.mixer={self.mixer}, model.prefix={self.prefix}",
                "boards of several puzzles want model.mixer=attention and model.prefix=0",
            )
        if self.mixer == "axial" and (self.rows * self.columns != self.length or self.prefix % self.columns):
            raise ConfigError(
                f"model.rows={self.rows} x model.columns={self.columns} is not model.length={self.length}, or "
                f"model.prefix={self.prefix} is not a number of whole rows"
            )

    @property
    def positions(self) -> int:
        return self.prefix + self.length

    @property
    def position_width(self) -> int:
        """The inner width of the network over positions."""
        return self.mix_width or 256 * -(-round(self.positions * 8 / 3) // 256)

    def spec(self) -> TinyRecursiveParams:
        """Every weight, declared once. No biases but the halting head's."""
        n, d, v = self.layers, self.width, self.vocab_size
        gated = 2 if self.mlp == "swiglu" else 1

        def matrix(inner: int, outer: int, axes: tuple[str | None, str | None]) -> Any:
            return declare((n, inner, outer), ("layers", *axes))

        over_positions = self.mixer == "mlp"
        over_rows, over_columns = not over_positions, self.mixer == "axial"
        layers = Layer(
            up=matrix(d, gated * self.mlp_width, ("embed", "mlp")),
            down=matrix(self.mlp_width, d, ("mlp", "embed")),
            mix_up=matrix(self.positions, gated * self.position_width, (None, None)) if over_positions else None,
            mix_down=matrix(self.position_width, self.positions, (None, None)) if over_positions else None,
            qkv=matrix(d, 3 * d, ("embed", "heads")) if over_rows else None,
            o=matrix(d, d, ("heads", "embed")) if over_rows else None,
            column_qkv=matrix(d, 3 * d, ("embed", "heads")) if over_columns else None,
            column_o=matrix(d, d, ("heads", "embed")) if over_columns else None,
        )
        return TinyRecursiveParams(
            embedding=declare((v, d), ("vocab", "embed"), "normal", 1 / math.sqrt(d)),
            layers=layers,
            head=declare((v, d), ("vocab", "embed"), "normal", 1 / math.sqrt(d)),
            halt=declare((d,), ("embed",), "zeros"),
            halt_bias=declare((1,), (None,), "ones", HALT_BIAS),
            answer_start=declare((d,), (None,), "normal"),
            latent_start=declare((d,), (None,), "normal"),
            puzzles=declare((self.puzzles, d), ("puzzles", "embed"), "zeros") if self.puzzles else None,
            marks=declare((self.marks, d), ("marks", "embed"), "normal", 1 / math.sqrt(d)) if self.marks > 1 else None,
            copy=self._copy_spec(),
        )

    def _copy_spec(self) -> Copying | None:
        if self.copy < 0:
            return None
        gate = declare((self.width, 2 * self.copy + 1), ("embed", None), "zeros")
        return Copying(gate, declare((1,), (None,), "ones", COPY_BIAS))

    def init_latent(self, params: TinyRecursiveParams, batch: int) -> Latent:
        """The latents of `batch` rows before their first step."""
        shape, dtype = (batch, self.positions, self.width), compute_dtype(self.dtype)
        start = (params.answer_start, params.latent_start)
        return Latent(*(jnp.broadcast_to(lax.stop_gradient(x).astype(dtype)[None, None], shape) for x in start))

    def apply(
        self,
        params: TinyRecursiveParams,
        inputs: Int[Array, "batch length"],
        latent: Latent,
        *,
        puzzle: Int[Array, "batch"] | None = None,
        mask: Bool[Array, "batch length"] | None = None,
        impl: str | None = None,
    ) -> tuple[Output, Latent]:
        """One supervision step: T cycles from `latent`, the last one with gradient.

        puzzle: ids of the puzzle vectors (None: no vector). mask: false where a cell takes no part (attention and axial
        only). Output: logits float32 [batch, length, vocab], hidden [batch, length, width], aux["halt"] float32
        [batch], the logit of "the answer is right". Raises ConfigError for a mask that the mixer cannot heed, or for a
        board of another length.
        """
        if inputs.shape[1] != self.length:
            raise ConfigError(f"the board has {inputs.shape[1]} cells, the model takes model.length={self.length}")
        if mask is not None and self.mixer == "mlp":
            raise ConfigError("model.mixer=mlp has no way to leave cells out", "attention or axial")
        question = self._question(params, inputs, puzzle)
        answer, scratch = (self._inward(x) for x in (latent.answer, latent.scratch))
        network = functools.partial(self._network, mixing=self._mixing(self._segments(inputs, mask), impl))
        layers = unstack(params, self.layers).layers
        if self.cycles > 1:
            fixed, still = lax.stop_gradient((layers, question))
            start = lax.stop_gradient((answer, scratch))

            def cycle(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                answer, scratch = state
                given = answer + still
                scratch = lax.fori_loop(0, self.updates, lambda _, z: network(z + given, fixed), scratch)
                return network(answer + scratch, fixed), scratch

            answer, scratch = lax.fori_loop(0, self.cycles - 1, cycle, start)
        answer, scratch = self._last_cycle(answer, scratch, question, network, layers)
        answer, scratch = self._outward(answer), self._outward(scratch)
        hidden = answer[:, self.prefix :]
        first = answer[:, 0].astype(jnp.float32)
        halt = jnp.sum(first * params.halt[None, :], axis=-1) + params.halt_bias
        logits = readout(hidden, params.head)
        if params.copy is not None:
            logits = self._with_copies(logits, linear(hidden, params.copy.gate), params.copy.here, inputs)
        output = Output(logits, hidden, {"halt": halt})
        return output, lax.stop_gradient(Latent(answer, scratch))

    def _with_copies(self, logits: jax.Array, gates: jax.Array, here: jax.Array, inputs: jax.Array) -> jax.Array:
        """Add each cell's gates to the logits of the tokens that stand up to `copy` cells beside it in the question."""
        batch, reach = inputs.shape[0], self.copy
        grid = (inputs % self.vocab_size).reshape(batch, self.rows, self.columns)

        def beside(x: jax.Array) -> jax.Array:
            padded = jnp.pad(x, ((0, 0), (0, 0), (reach, reach)))
            return jnp.stack([padded[:, :, offset : offset + self.columns] for offset in range(2 * reach + 1)], axis=-1)

        tokens = beside(grid)
        parts = self._segments(inputs, None)
        if parts is not None:  # what is of another puzzle counts as outside
            own = parts.reshape(grid.shape)
            tokens = jnp.where(beside(own) == own[..., None], tokens, 0)
        tokens = tokens.reshape(-1)
        gates = gates.astype(logits.dtype).at[..., reach].add(here)
        rows = jnp.repeat(jnp.arange(batch * self.length), 2 * reach + 1)
        flat = logits.reshape(batch * self.length, -1).at[rows, tokens].add(gates.reshape(-1))
        return flat.reshape(logits.shape)

    def _last_cycle(self, answer, scratch, question, network, layers):
        """The cycle with gradient: n updates of the scratch latent, then one of the answer."""
        given = answer + question
        if self.remat:
            network = jax.checkpoint(network)
        if self.unroll:
            for _ in range(self.updates):
                scratch = network(scratch + given, layers)
        else:
            scratch, _ = lax.scan(lambda z, _: (network(z + given, layers), None), scratch, length=self.updates)
        return network(answer + scratch, layers), scratch

    def _question(self, params: TinyRecursiveParams, inputs: jax.Array, puzzle: jax.Array | None) -> jax.Array:
        """x: the embedded prefix and board, times sqrt(width), in the order of the network's axes."""
        dtype = compute_dtype(self.dtype)
        x = embed(inputs % self.vocab_size if self.marks > 1 else inputs, params.embedding)
        if params.marks is not None:
            x = x + embed(inputs // self.vocab_size, params.marks)
        x = x.astype(dtype)
        if self.prefix:
            front = jnp.zeros((inputs.shape[0], self.prefix, self.width), dtype)
            if params.puzzles is not None and puzzle is not None:
                front = front.at[:, 0].set(embed(puzzle, params.puzzles).astype(dtype))
            x = jnp.concatenate([front, x], axis=1)
        return self._inward(x * jnp.asarray(math.sqrt(self.width), dtype))

    def _inward(self, x: jax.Array) -> jax.Array:
        """The network over positions keeps them first, so that both its dots are plain (`core.mixing`)."""
        return jnp.swapaxes(x, 0, 1) if self.mixer == "mlp" else x

    _outward = _inward

    def _network(self, x: jax.Array, layers: tuple[Layer, ...], mixing: Any) -> jax.Array:
        for w in layers:
            x = mixing(x, w)
            x = rms(x + self._mlp(x, w), -1, self.norm_eps)
        return x

    def _mlp(self, x: jax.Array, w: Layer) -> jax.Array:
        return linear(self._gate(linear(x, w.up), -1), w.down)

    def _gate(self, x: jax.Array, axis: int) -> jax.Array:
        if self.mlp == "gelu":
            return jax.nn.gelu(x)
        gate, up = jnp.split(x, 2, axis=axis)
        return swiglu(gate, up)

    def _segments(self, inputs: jax.Array, mask: jax.Array | None) -> jax.Array | None:
        """Which puzzle every position belongs to, 0 for none; None where all are of one."""
        parts = None if mask is None else mask.astype(jnp.int32)
        if self.begin:
            tokens = inputs % self.vocab_size
            number = jnp.cumsum((tokens == self.begin).astype(jnp.int32), axis=1) * (tokens > 0)
            parts = number if parts is None else number * parts
        if parts is None:
            return None
        front = jnp.ones((inputs.shape[0], self.prefix), jnp.int32)
        return jnp.concatenate([front, parts], axis=1)

    def _mixing(self, segments: jax.Array | None, impl: str | None):
        """`(x, weights) -> x` after the exchange between positions and its norm."""
        if self.mixer == "mlp":
            # The norm is over positions here, as published: the state stands transposed while they are mixed.
            return lambda x, w: rms(x + mix(self._gate(mix(x, w.mix_up), 0), w.mix_down), 0, self.norm_eps)
        if self.mixer == "attention":
            turn = self._rotation(self.positions)
            return lambda x, w: self._attend(x, w.qkv, w.o, Mask(segments=segments), turn, impl)
        columns = self.columns
        rows = self.positions // columns
        along_row, along_column = self._rotation(columns), self._rotation(rows)
        grid = None if segments is None else segments.reshape(-1, rows, columns)
        row_mask = Mask(segments=None if grid is None else grid.reshape(-1, columns))
        column_mask = Mask(segments=None if grid is None else jnp.swapaxes(grid, 1, 2).reshape(-1, rows))

        def axial(x: jax.Array, w: Layer) -> jax.Array:
            batch, _, d = x.shape
            x = x.reshape(batch * rows, columns, d)
            x = self._attend(x, w.qkv, w.o, row_mask, along_row, impl)
            x = jnp.swapaxes(x.reshape(batch, rows, columns, d), 1, 2).reshape(batch * columns, rows, d)
            x = self._attend(x, w.column_qkv, w.column_o, column_mask, along_column, impl)
            return jnp.swapaxes(x.reshape(batch, columns, rows, d), 1, 2).reshape(batch, rows * columns, d)

        return axial

    def _rotation(self, length: int):
        if not self.rope:
            return None
        positions = jnp.arange(length, dtype=jnp.int32)[None, :]
        return rotations(positions, self.width // self.heads, self.rope_theta, RopeScaling())

    def _attend(self, x: jax.Array, qkv: Any, o: Any, mask: Mask, turn: Any, impl: str | None) -> jax.Array:
        batch, length, d = x.shape
        parts = jnp.split(linear(x, qkv), 3, axis=-1)
        q, k, v = (part.reshape(batch, length, self.heads, d // self.heads) for part in parts)
        out = attention(q, k, v, mask, rotation=turn, impl=impl).reshape(batch, length, d)
        return rms(x + linear(out, o), -1, self.norm_eps)
