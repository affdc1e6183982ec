"""MicroLoRA of RuvLLM: adapters of rank one or two that learn from single requests, over `ruvjax.lora.micro`."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ruvjax.api.ruvllm_errors import RuvLLMError
from ruvjax.core.adapted import Lora
from ruvjax.lora import micro
from ruvjax.lora.ewc import EwcState, finish_task, nothing_learned, observe, squares_of_rows

LARGEST = float(np.finfo(np.float32).max)
Vector = Float[np.ndarray, "size"]


class TargetModule(Enum):
    """What an adapter stands beside: a projection, or the last hidden states, where SONA learns with a backend."""

    QProj = "q_proj"
    KProj = "k_proj"
    VProj = "v_proj"
    OProj = "o_proj"
    GateProj = "gate_proj"
    UpProj = "up_proj"
    DownProj = "down_proj"
    Hidden = "hidden"


@dataclass(frozen=True)
class MicroLoraConfig:
    """Sizes of the adapters, one for each of `target_modules`. Raises RuvLLMError.Config.

    rank: held within 1 and 2. alpha: the scale is alpha / rank. dropout: the share of an input's entries that `adapt`
    leaves out. gradient_checkpointing: only False; an adapter's gradient needs its input alone, so there is nothing to
    compute twice.
    """

    in_features: int = 768
    out_features: int = 768
    rank: int = 2
    alpha: float = 4.0
    dropout: float = 0.0
    target_modules: tuple[TargetModule, ...] = (TargetModule.QProj, TargetModule.VProj)
    gradient_checkpointing: bool = False

    def __post_init__(self):
        for name in ("in_features", "out_features", "rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and name != "rank"):
                raise RuvLLMError.Config(f"MicroLoraConfig.{name}={value!r} must be a whole number of at least 1")
        object.__setattr__(self, "rank", min(max(self.rank, 1), 2))
        check_number("MicroLoraConfig.alpha", self.alpha, above=0.0)
        check_number("MicroLoraConfig.dropout", self.dropout, least=0.0, below=1.0)
        modules = self.target_modules
        object.__setattr__(self, "target_modules", tuple(modules) if isinstance(modules, list) else modules)
        modules = self.target_modules
        if not isinstance(modules, tuple) or not modules or not all(isinstance(m, TargetModule) for m in modules):
            raise RuvLLMError.Config(
                f"MicroLoraConfig.target_modules={modules!r}", "a tuple of TargetModule, not empty"
            )
        if len(set(modules)) != len(modules):
            raise RuvLLMError.Config("MicroLoraConfig.target_modules names a module twice", "name each once")
        if self.gradient_checkpointing is not False:
            raise RuvLLMError.Config(
                f"MicroLoraConfig.gradient_checkpointing={self.gradient_checkpointing!r} would change nothing: "
                "an adapter keeps its input alone",
                "leave it out",
            )

    @classmethod
    def for_hidden_dim(cls, hidden_dim: int) -> "MicroLoraConfig":
        """Square adapters of this width, with the other defaults."""
        return cls(hidden_dim, hidden_dim)


@dataclass(frozen=True, eq=False)
class AdaptFeedback:
    """What is known of a request's result. Raises RuvLLMError.Adapter.

    quality: from 0 to 1. gradient_estimate: the gradient of a loss in the adapted module's output [out_features], empty
    where it is not known. reward: its weight, 1 where it is None. source_module: the one that learns, None for all.
    latency_us and session_id are for the caller's own books.
    """

    quality: float
    gradient_estimate: Any = ()
    reward: float | None = None
    latency_us: int = 0
    source_module: TargetModule | None = None
    session_id: str | None = None

    def __post_init__(self):
        check_number("AdaptFeedback.quality", self.quality, least=0.0, most=1.0, error=RuvLLMError.Adapter)
        if self.reward is not None:
            check_number("AdaptFeedback.reward", self.reward, error=RuvLLMError.Adapter)
        if self.source_module is not None and not isinstance(self.source_module, TargetModule):
            raise RuvLLMError.Adapter(f"AdaptFeedback.source_module={self.source_module!r} is no TargetModule")

    @classmethod
    def from_quality(cls, quality: float) -> "AdaptFeedback":
        """Nothing is known but the quality."""
        return cls(quality)

    @property
    def has_direction(self) -> bool:
        return len(self.gradient_estimate) > 0

    @property
    def factor(self) -> float:
        """The weight of `gradient_estimate`."""
        return 1.0 if self.reward is None else float(self.reward)


@dataclass(frozen=True)
class MicroLoraStats:
    """adaptations: calls of `adapt`. updates: of `apply_updates`, with or without EWC. pending: accumulated gradients
    by module. mean_quality: the running mean that quality is compared with, 0.5 at first."""

    adaptations: int
    updates: int
    pending: Mapping[TargetModule, int]
    mean_quality: float
    parameters: int
    memory_bytes: int


@dataclass
class _Counts:
    adaptations: int = 0
    updates: int = 0


_adapt = jax.jit(micro.adapt, static_argnames="dropout", donate_argnums=0)
_apply = jax.jit(micro.apply_updates, donate_argnums=0)
_apply_with_ewc = jax.jit(micro.apply_updates_with_ewc, donate_argnums=0)
_outputs = jax.jit(micro.outputs)


class MicroLoRA:
    """Adapters that learn while requests are served; for one thread at a time.

    What is learned here acts where the caller adds `forward` to the module's output. A call that raises leaves the
    adapters as they were.
    """

    def __init__(self, config: MicroLoraConfig | None = None, seed: int = 0):
        self._config = MicroLoraConfig() if config is None else config
        self._seed = seed
        self._index = {module: i for i, module in enumerate(self._config.target_modules)}
        self._state, self._counts = self._fresh(), _Counts()

    @classmethod
    def new(cls, config: MicroLoraConfig) -> "MicroLoRA":
        """The documented constructor."""
        return cls(config)

    def adapt(self, input: Any, feedback: AdaptFeedback) -> None:
        """Accumulate the gradient of one request, for `apply_updates`.

        input: [in_features], what went into the module. With `feedback.gradient_estimate` the gradient is that of
        <gradient_estimate, output> times the reward. With a quality alone it is that of the adapter's own output
        energy, -(quality - running mean) 1/2 |output|^2: results above the mean strengthen what the adapter does. An
        adapter that does nothing yet learns nothing from a quality alone. Raises RuvLLMError.Adapter for another size,
        numbers that are not finite, and a module that is not adapted.
        """
        config = self._config
        x = vector("input", input, config.in_features)
        direction = None
        if feedback.has_direction:
            direction = vector("gradient_estimate", feedback.gradient_estimate, config.out_features)
        chosen = np.ones(len(self._index), bool)
        if feedback.source_module is not None:
            chosen = np.arange(len(chosen)) == self._place(feedback.source_module)
        key = None
        if config.dropout:
            key = jax.random.fold_in(jax.random.key(self._seed), self._counts.adaptations)
        quality, factor = np.float32(feedback.quality), np.float32(feedback.factor)
        self._state = _adapt(self._state, x, direction, quality, factor, chosen, key, dropout=config.dropout)
        self._counts.adaptations += 1

    def forward(self, input: Any, module: TargetModule) -> Vector:
        """What the adapter of `module` adds to its output for this input [in_features]. Raises RuvLLMError.Adapter."""
        place = self._place(module)
        return np.asarray(_outputs(self._state, vector("input", input, self._config.in_features), place))

    def forward_add(self, input: Any, module: TargetModule, output: np.ndarray) -> None:
        """Add it to `output` [out_features] in place. Raises RuvLLMError.Adapter."""
        wanted = (self._config.out_features,)
        if not isinstance(output, np.ndarray) or output.shape != wanted or output.dtype.kind != "f":
            told = f"{type(output).__name__} {getattr(output, 'dtype', '')} {getattr(output, 'shape', '')}"
            raise RuvLLMError.Adapter(f"output is {told}", f"a numpy array of floats, {wanted}")
        output += self.forward(input, module)

    def apply_updates(self, learning_rate: float) -> None:
        """One step of gradient descent by the mean of each module's accumulated gradients, which are then forgotten.

        Raises RuvLLMError.Adapter where the step is not finite: the adapters stay, the gradients are dropped.
        """
        rate = _rate(learning_rate)
        self._finish(*_apply(self._state, rate))

    def apply_updates_with_ewc(
        self, learning_rate: float, ewc_states: Mapping[TargetModule, EwcState], ewc_lambda: float
    ) -> None:
        """`apply_updates`, and then one step on `ewc_lambda` times the penalty of each module's state, on the product
        of the factors. A module without a state has no penalty. Raises RuvLLMError.Adapter."""
        rate = _rate(learning_rate)
        check_number("ewc_lambda", ewc_lambda, least=0.0, error=RuvLLMError.Adapter)
        for module, state in ewc_states.items():
            self._place(module)
            if state.anchor.a.shape != self._state.lora.a.shape[1:] or state.anchor.b.shape[1:] != (
                self._config.out_features,
            ):
                raise RuvLLMError.Adapter(f"the EwcState of {module.name} is of an adapter of another size")
        nothing = nothing_learned(self._adapter(0))
        states = [ewc_states.get(module, nothing) for module in self._index]
        stacked: Any = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        self._finish(*_apply_with_ewc(self._state, rate, stacked, np.float32(ewc_lambda)))

    def ewc_state(self, module: TargetModule, inputs: Any, gradients: Any) -> EwcState:
        """The state at the end of a task: the adapter as it is now, and the importance of its entries.

        inputs [examples, in_features] and gradients [examples, out_features]: of each example by itself, the module's
        input and the gradient of the log-likelihood of a label, drawn from the model, in the module's output. Raises
        RuvLLMError.Adapter.
        """
        adapter = self._adapter(self._place(module))
        sizes = (("inputs", inputs, self._config.in_features), ("gradients", gradients, self._config.out_features))
        x, g = (_rows(name, values, size) for name, values, size in sizes)
        if len(x) != len(g):
            raise RuvLLMError.Adapter(f"{len(x)} inputs and {len(g)} gradients", "one of each for every example")
        return _finished(adapter, x, g)

    def reset(self) -> None:
        """Adapters, gradients and statistics as they were at first."""
        self._state, self._counts = self._fresh(), _Counts()

    def stats(self) -> MicroLoraStats:
        """Counts and sizes."""
        pending = {module: int(n) for module, n in zip(self._index, np.asarray(self._state.count))}
        factors = (self._state.lora.a, self._state.lora.b)
        return MicroLoraStats(
            self._counts.adaptations,
            self._counts.updates,
            pending,
            float(self._state.baseline.mean),
            sum(leaf.size for leaf in factors),
            sum(leaf.nbytes for leaf in factors),
        )

    def _fresh(self) -> micro.Micro:
        c = self._config
        key = jax.random.key(self._seed)
        return micro.init_micro(key, len(self._index), c.in_features, c.out_features, c.rank, c.alpha)

    def _adapter(self, place: int) -> Lora:
        return jax.tree.map(lambda leaf: leaf[place], self._state.lora)

    def _place(self, module: TargetModule) -> int:
        if module not in self._index:
            known = ", ".join(m.name for m in self._index)
            raise RuvLLMError.Adapter(f"{getattr(module, 'name', module)!r} has no adapter here", f"one of {known}")
        return self._index[module]

    def _finish(self, state: micro.Micro, finite: jax.Array) -> None:
        self._state = state
        if not finite:
            raise RuvLLMError.Adapter("the update is not finite: it was dropped", "a smaller learning rate or gradient")
        self._counts.updates += 1


@jax.jit
def _finished(adapter: Lora, x: jax.Array, g: jax.Array) -> EwcState:
    each = jax.vmap(lambda x, g: squares_of_rows(x[None], g[None]))(x, g)
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), each)
    return finish_task(observe(nothing_learned(adapter), mean, x.shape[0]), adapter)


def vector(name: str, values: Any, size: int) -> Vector:
    """`values` as float32 [size]. Raises RuvLLMError.Adapter for another shape and numbers that are not finite."""
    found = _numbers(name, values)
    if found.shape != (size,):
        raise RuvLLMError.Adapter(f"{name} has the shape {found.shape}, the adapter takes ({size},)")
    return found


def _rows(name: str, values: Any, size: int) -> Float[np.ndarray, "rows size"]:
    found = _numbers(name, values)
    if found.ndim != 2 or found.shape[1] != size or not len(found):
        raise RuvLLMError.Adapter(f"{name} has the shape {found.shape}, not (examples, {size})")
    return found


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):
            found = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise RuvLLMError.Adapter(f"{name} does not consist of numbers") from error
    if not np.isfinite(found).all():
        raise RuvLLMError.Adapter(f"{name} has numbers that are not finite")
    return found


def _rate(value: Any) -> np.float32:
    check_number("learning_rate", value, least=0.0, error=RuvLLMError.Adapter)
    return np.float32(value)


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -np.inf,
    above: float = -np.inf,
    most: float = np.inf,
    below: float = np.inf,
    error: type[RuvLLMError] = RuvLLMError.Config,
) -> None:
    """Raises `error` unless `value` is a number of float32 with least <= value <= most and above < value < below."""
    number = isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)
    if not number or not (least <= value <= most and above < value < below and abs(value) <= LARGEST):
        low = f"from {least:g}" if least > -np.inf else (f"above {above:g}" if above > -np.inf else "finite")
        high = f" to {most:g}" if most < np.inf else (f" to below {below:g}" if below < np.inf else "")
        raise error(f"{name}={value!r} must be a number {low}{high}")
