"""SONA of RuvLLM: learning from interaction at three speeds. A handle over `ruvjax.lora.sona`.

    sona = SonaLlm(SonaLlmConfig(), backend=backend)
    sona.instant_adapt("What is a monad?", "A monoid in the category of endofunctors.", 0.9)
    backend.generate("What is a monad?")           # with what was learned

With a backend the site that learns is its model's last hidden states: there the gradient of a response's log-likelihood
needs the readout alone, and texts are generated with the update added. Without one no model reads the text: its
features are hashed (Weinberger et al. 2009, arXiv:0902.2206), a direction comes from the caller or not at all, and what
is learned acts where the caller adds `forward`.
"""

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ruvjax.api.ruvllm_backend import JaxBackend
from ruvjax.api.ruvllm_errors import RuvLLMError
from ruvjax.api.ruvllm_lora import AdaptFeedback, MicroLoraConfig, TargetModule, vector
from ruvjax.api.ruvllm_sona_samples import (
    Clock,
    Kept,
    as_it_is,
    features,
    groups,
    microseconds,
    optimizer,
    order,
    split,
    stacked,
    text_features,
    told,
)
from ruvjax.api.ruvllm_sona_types import AdaptationResult, LearningLoopStats, SonaLlmConfig, TrainingSample
from ruvjax.core.adapted import low_rank
from ruvjax.lora import sona as loops
from ruvjax.lora.sona import Consolidation, Deepening, Draw, Gradient, Pairs, Sona

BATCH = 256  # samples that one consolidation reads: their hidden states are held together

_gradient = jax.jit(lambda at, params, state, sample: at(params, loops.learned(state), sample), static_argnums=0)
_instant = jax.jit(loops.instant, donate_argnums=0)
_consolidate = jax.jit(loops.consolidate, static_argnames=("members", "gradient_at", "draw", "settings"))
_deep = jax.jit(loops.deep, static_argnames=("gradient_at", "draw", "transformation", "settings"))
_likelihood = jax.jit(loops.log_likelihood, static_argnames="gradient_at")
_end_task = jax.jit(loops.end_task)
_output = jax.jit(lambda state, x: low_rank(x, loops.learned(state)))
# Copies, because the state's own arrays are given away at the next step.
_learned = jax.jit(lambda state: jax.tree.map(jnp.copy, loops.learned(state)))


class SonaLlm:
    """A language model that learns from what is said of its responses; for one thread at a time.

    backend: a JaxBackend with a model. From the first step on it generates with what was learned here, until `reset` or
    until it loads another model, with which a new SonaLlm is needed. A call that raises leaves the adapters as they
    were.
    """

    def __init__(self, config: SonaLlmConfig | None = None, backend: JaxBackend | None = None):
        self._config = SonaLlmConfig() if config is None else config
        self._backend = backend
        self._model = None if backend is None else backend.model_info()
        self._lora = _sizes(self._config, backend)
        self._compiled: set[Any] = set()
        self.reset()

    @classmethod
    def new(cls, config: SonaLlmConfig | None = None, backend: JaxBackend | None = None) -> "SonaLlm":
        """The documented constructor."""
        return cls(config, backend)

    def reset(self) -> None:
        """Adapters, waiting samples and statistics as they were at first; the backend generates without an update."""
        c, rank = self._lora, self._config.sona.base_lora_rank
        keys = jax.random.split(jax.random.key(self._config.training.seed), len(c.target_modules) + 1)
        self._sites: dict[TargetModule, Sona] = {
            module: loops.init_sona(key, c.in_features, c.out_features, c.rank, rank, c.alpha)
            for module, key in zip(c.target_modules, keys[1:])
        }
        self._key = keys[0]
        self._pending: deque[Kept] = deque(maxlen=self._config.capacity)
        self._stats = LearningLoopStats()
        self._last_background = time.monotonic()
        if self._backend is not None and self._backend.model_info() is self._model:
            self._backend.attach(None)

    def instant_adapt(self, request: Any, response: Any, feedback: Any) -> AdaptationResult:
        """One gradient step after a response, and the response is kept for consolidation if it is good enough.

        request, response: texts. feedback: the quality, from 0 to 1, or an AdaptFeedback. With a backend the step
        climbs the response's mean log-likelihood per token times `feedback.reward`, by default the quality less its
        running mean, so that bad responses become less likely. Without one it descends <feedback.gradient_estimate,
        output> for features of the request and the response; where only a quality is given, the energy of the adapter's
        own output stands for a direction, which is none as long as the adapter does nothing. `latency_us` of the result
        covers the adaptation and not the model's forward pass.

        Raises RuvLLMError.Adapter (quality, gradient_estimate), Sona, and what `JaxBackend.read` raises.
        """
        given = feedback if isinstance(feedback, AdaptFeedback) else AdaptFeedback.from_quality(feedback)
        modules = self._chosen(given)
        began = time.perf_counter()
        pairs = self._read(request, response, given, modules[0])
        factor = None
        if given.reward is not None or given.has_direction:
            factor = np.float32(given.factor)
        quality, rate = np.float32(given.quality), np.float32(self._config.rate)
        kind = (pairs.x.shape, pairs.g is None, factor is None)
        if kind not in self._compiled:  # on a copy, since the state is given away
            _instant(jax.tree.map(jnp.copy, self._sites[modules[0]]), pairs, quality, rate, factor)
            self._compiled.add(kind)
        read = time.perf_counter()
        moved: list[bool] = []
        ended: list[bool] = []
        for module in modules:
            self._sites[module], *facts = _instant(self._sites[module], pairs, quality, rate, factor)
            moved.append(bool(facts[0]))
            ended.append(bool(facts[1]))
        done = time.perf_counter()
        for module in (m for m, over in zip(modules, ended) if over):
            self._end_task(module)
        self._keep(request, response, given, pairs, modules)
        self._attach()
        applied = any(moved)
        self._count(
            instant_runs=self._stats.instant_runs + 1,
            instant_applied=self._stats.instant_applied + applied,
            accumulated_quality=self._stats.accumulated_quality + float(given.quality),
        )
        reason = "" if applied else "the gradient is zero: no advantage, or no direction is known"
        spent = microseconds(read, done), microseconds(began, read)
        return AdaptationResult(applied, int(applied), *spent, None, reason)

    def background_consolidate(self) -> AdaptationResult:
        """Move what the waiting samples teach, of the oldest 256, into the base adapter, by the configured strategy.

        With a backend one sample in five is held back to measure `quality_delta` on. Such samples took part in the
        instant loop like all others: the figure is the effect of this consolidation on samples that it did not train
        on. Raises RuvLLMError.Sona where the result is not finite.
        """
        kept = list(itertools.islice(self._pending, BATCH))
        self._last_background = time.monotonic()
        if len(kept) < self._config.background_min_samples:
            least = self._config.background_min_samples
            return AdaptationResult(False, 0, 0, reason=f"{len(kept)} samples wait, {least} are needed")
        self._check_model()
        clock = Clock()
        used, held = split(kept) if self._backend is not None else (kept, [])
        samples, there = self._stack(used)
        measured = self._stack(held) if held else None
        before = self._measure(self._sites, measured)
        members = min(self._config.sona.pattern_clusters, len(there))
        group = groups(features(samples)[: len(used)], members, len(there))
        quality = np.zeros(len(there), np.float32)
        quality[: len(used)] = [k.quality for k in used]
        c, sona = self._config, self._config.sona
        decay = c.training.fisher_decay
        settings = Consolidation(c.consolidation_strategy, c.rate, c.background_steps, sona.ewc_lambda, decay)
        at, draw, params = self._model_functions()

        def learns(module: TargetModule) -> np.ndarray:
            those = [not k.modules or module in k.modules for k in used]
            return there * np.pad(np.asarray(those, np.float32), (0, len(there) - len(used)))

        clock.adapting()
        sites = {
            module: _consolidate(
                params, state, samples, quality, learns(module), group, self._next_key(),
                members=members, gradient_at=at, draw=draw, settings=settings,
            )
            for module, state in self._sites.items()
        }  # fmt: skip
        _check_finite(sites)
        clock.reading()
        after = self._measure(sites, measured)
        self._sites = sites
        for _ in kept:
            self._pending.popleft()
        self._attach()
        clock.stop()
        delta = None if before is None or after is None else after - before
        self._count(background_runs=self._stats.background_runs + 1, delta=delta)
        return AdaptationResult(True, len(used), clock.adapt_us, clock.read_us, delta)

    def deep_optimize(self, dataset: Sequence[Any]) -> AdaptationResult:
        """Train the base adapter over TrainingSamples, and end a task: from then on consolidation and training are held
        near what is known now, where it matters. The sum of qualities starts over.

        The hidden states of all responses are held together. One sample in five is held back to measure
        `quality_delta` on, where there are five. Raises RuvLLMError.Sona
        (without a backend, for an empty dataset, where training is not finite), and what `JaxBackend.read` raises.
        """
        if self._backend is None:
            raise RuvLLMError.Sona("deep_optimize reads text with a model", "SonaLlm(config, backend=JaxBackend)")
        if not dataset or not all(isinstance(sample, TrainingSample) for sample in dataset):
            raise RuvLLMError.Sona("deep_optimize takes TrainingSamples, at least one", "TrainingSample(text, text)")
        self._check_model()
        clock, training = Clock(), self._config.training
        kept = [Kept(float(s.quality), (s.request, s.response)) for s in dataset]
        used, held = split(kept)
        samples, there = self._stack(used)
        measured = self._stack(held) if held else None
        before = self._measure(self._sites, measured)
        steps = order(len(used), training)
        weight = np.zeros(len(there), np.float32)
        weight[: len(used)] = [k.quality for k in used]
        settings = Deepening(self._config.deep_lambda, training.fisher_decay, training.task_decay)
        at, draw, params = self._model_functions()
        clock.adapting()
        sites = {
            module: _deep(
                params, state, samples, weight, steps, self._next_key(),
                gradient_at=at, draw=draw, transformation=optimizer(training, len(steps)), settings=settings,
            )[0]
            for module, state in self._sites.items()
        }  # fmt: skip
        _check_finite(sites)
        clock.reading()
        after = self._measure(sites, measured)
        self._sites = sites
        self._attach()
        clock.stop()
        delta = None if before is None or after is None else after - before
        self._count(
            deep_runs=self._stats.deep_runs + 1, accumulated_quality=0.0, tasks=self._stats.tasks + 1, delta=delta
        )
        return AdaptationResult(True, len(used), clock.adapt_us, clock.read_us, delta)

    def maybe_background(self) -> AdaptationResult | None:
        """`background_consolidate` where its interval has passed and enough samples wait, else None."""
        due = time.monotonic() - self._last_background >= self._config.interval_s
        enough = len(self._pending) >= self._config.background_min_samples
        return self.background_consolidate() if due and enough else None

    def should_trigger_deep(self) -> bool:
        """Whether the qualities since the last deep loop add up to `deep_trigger_threshold`."""
        return self._stats.accumulated_quality >= self._config.deep_trigger_threshold

    def stats(self) -> LearningLoopStats:
        """Counts and means."""
        state = next(iter(self._sites.values()))
        mean = float(state.baseline.mean)
        return replace(self._stats, pending_samples=len(self._pending), mean_quality=mean)

    def forward(self, input: Any, module: TargetModule) -> Float[np.ndarray, "size"]:
        """What was learned adds to the output of `module` for this input [in_features]. With a backend the module is
        TargetModule.Hidden. Raises RuvLLMError.Adapter."""
        return np.asarray(_output(self._site(module), vector("input", input, self._lora.in_features)))

    def _site(self, module: Any) -> Sona:
        if module not in self._sites:
            known = ", ".join(m.name for m in self._sites)
            raise RuvLLMError.Adapter(f"{getattr(module, 'name', module)!r} has no adapter here", f"one of {known}")
        return self._sites[module]

    def _chosen(self, feedback: AdaptFeedback) -> tuple[TargetModule, ...]:
        if feedback.source_module is None:
            return tuple(self._sites)
        self._site(feedback.source_module)
        return (feedback.source_module,)

    def _read(self, request: Any, response: Any, feedback: AdaptFeedback, module: TargetModule) -> Pairs:
        """What the site sees of a request and its response."""
        if not isinstance(request, str) or not isinstance(response, str):
            raise RuvLLMError.Sona("request and response are texts", "MicroLoRA.adapt takes vectors")
        if self._backend is None:
            c, direction = self._lora, None
            if feedback.has_direction:
                direction = -vector("gradient_estimate", feedback.gradient_estimate, c.out_features)[None]
            x: Any = text_features(f"{request}\0{response}", c.in_features)[None]
            given: Any = (x, direction, np.float32(np.nan), np.float32(1.0))
            return Pairs(*given)
        if feedback.has_direction:
            what = "gradient_estimate would have no effect: the backend's model gives the gradient"
            raise RuvLLMError.Sona(what, "leave it out")
        self._check_model()
        at, _, params = self._model_functions()
        sample = self._backend.read(request, response)
        pairs = jax.block_until_ready(_gradient(at, params, self._sites[module], sample))
        if not np.isfinite(pairs.value):
            raise RuvLLMError.Sona("the log-likelihood of the response is not finite", "reset, or a smaller instant_lr")
        return pairs

    def _keep(
        self, request: str, response: str, feedback: AdaptFeedback, pairs: Pairs, modules: tuple[TargetModule, ...]
    ) -> None:
        """Put a sample among those that wait, where it is good enough and says a direction."""
        if feedback.quality < self._config.sona.quality_threshold or pairs.g is None:
            return
        if len(self._pending) == self._pending.maxlen:
            self._count(dropped_samples=self._stats.dropped_samples + 1)
        quality = float(feedback.quality)
        if self._backend is not None:
            self._pending.append(Kept(quality, text=(request, response)))
        else:
            weighted = replace(pairs, g=feedback.factor * pairs.g)
            self._pending.append(Kept(quality, pairs=weighted, modules=modules))

    def _stack(self, kept: Sequence[Kept]) -> tuple[Any, Float[np.ndarray, "samples"]]:
        """`stacked`, with the texts read by the model."""

        def sample(one: Kept) -> Any:
            if one.text is None:
                return one.pairs
            assert self._backend is not None
            return self._backend.read(*one.text)

        return stacked([sample(one) for one in kept])

    def _measure(self, sites: dict[TargetModule, Sona], measured: Any) -> float | None:
        """The mean log-likelihood per token of the samples held back, in nats."""
        if measured is None:
            return None
        at, _, params = self._model_functions()
        return float(_likelihood(params, sites[TargetModule.Hidden], *measured, gradient_at=at))

    def _model_functions(self) -> tuple[Gradient, Draw, Any]:
        if self._backend is None:
            return told, as_it_is, None
        head, params = self._backend.readout()
        return loops.hidden_gradient(head), loops.hidden_draw(head), params

    def _end_task(self, module: TargetModule) -> None:
        """A boundary that the statistics of the inputs show, if anything was consolidated since the last."""
        state = self._sites[module]
        if float(state.ewc.weight) > 0:
            self._sites[module] = _end_task(state, np.float32(self._config.training.task_decay))
            self._count(tasks=self._stats.tasks + 1)

    def _attach(self) -> None:
        if self._backend is not None:
            self._backend.attach(_learned(self._sites[TargetModule.Hidden]))

    def _check_model(self) -> None:
        if self._backend is not None and self._backend.model_info() is not self._model:
            raise RuvLLMError.Sona("the backend has another model than when SONA began", "make a new SonaLlm")

    def _next_key(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key

    def _count(self, delta: float | None = None, **changed: Any) -> None:
        kept = self._stats.last_quality_delta
        self._stats = replace(self._stats, last_quality_delta=kept if delta is None else delta, **changed)


def _sizes(config: SonaLlmConfig, backend: JaxBackend | None) -> MicroLoraConfig:
    """The adapters' sizes. Raises RuvLLMError.Config where they do not fit the backend's model."""
    given, rank = config.micro_lora, config.sona.micro_lora_rank
    if backend is None:
        return replace(MicroLoraConfig(), rank=rank) if given is None else given
    width, at = backend.width(), (TargetModule.Hidden,)
    wanted = MicroLoraConfig(width, width, rank, target_modules=at)
    if given is None:
        return wanted
    if (given.in_features, given.out_features, given.target_modules) != (width, width, at):
        told = f"with this backend SONA learns at its last hidden states of width {width}"
        raise RuvLLMError.Config(f"SonaLlmConfig.micro_lora: {told}", "leave micro_lora out, or say just that")
    return given


def _check_finite(sites: dict[TargetModule, Sona]) -> None:
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(list(sites.values()))):
        raise RuvLLMError.Sona("what was learned is not finite: the adapters stay as they were", "a smaller rate")
