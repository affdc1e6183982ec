"""MDLMSampler: text from a DiffusionModel, whole or step by step. A handle over `diffusion.sampler`."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import jax
import numpy as np
from jaxtyping import Int

from ruvjax import errors
from ruvjax.api.ruvdllm_dgr import DGRConfig, DGRSystem
from ruvjax.api.ruvdllm_errors import ConfigError, GenerationError, ModelError
from ruvjax.api.ruvdllm_model import DiffusionModel, cached_forward_of, forward_of
from ruvjax.api.ruvdllm_talora import TALoRAManager
from ruvjax.core.events import Event
from ruvjax.data.tokenize import Tokenizer
from ruvjax.diffusion.cache import empty_cache
from ruvjax.diffusion.sampler import Forward, Sampler, SamplerState, final_prefix, sample, stream
from ruvjax.lora import denoise, talora
from ruvjax.lora.guided import DGR
from ruvjax.lora.talora import Search, TALoRA
from ruvjax.models.transformer import Transformer

BUCKET = 64  # rows are padded to a multiple of it, so that few lengths are compiled


@dataclass(frozen=True)
class SamplerConfig:
    """The documented settings; `ruvjax.diffusion.sampler.Sampler` has every other one. Raises ConfigError.

    Ancestral sampling in `num_steps` passes; a text ends at the model's end token, if it has one. top_k 0 and top_p 1
    are off, temperature 0 is greedy.
    """

    num_steps: int = 8
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.0

    def __post_init__(self):
        self.sampler()

    def sampler(self) -> Sampler:
        """The same settings as a `Sampler`, linear schedule."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        try:
            return Sampler(order="ancestral", steps=values.pop("num_steps"), **values)
        except errors.ConfigError as error:
            raise ConfigError(str(error).replace("sampler.steps", "num_steps"), error.hint) from error


@dataclass(frozen=True, eq=False)
class GenerationStep:
    """What a step of generation did.

    step counts from 1. timestep: the noise level of the pass, num_timesteps at the start. tokens: int32 of the prompt
    and the text, the mask's id where nothing is committed. text: the left part of the generated text that can no longer
    change. masked: how many tokens are still open. events: what was committed or taken back.
    """

    step: int
    timestep: int
    tokens: Int[np.ndarray, "length"]
    text: str
    masked: int
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Generated:
    """A finished text, and what it took: tokens (without end and padding), and forward passes."""

    text: str
    tokens: int
    passes: int


@dataclass(frozen=True)
class MDLMSampler:
    """Samples text; the same seed gives the same text. `config` may be a full `Sampler` as well."""

    config: SamplerConfig | Sampler = SamplerConfig()
    seed: int = 0

    @classmethod
    def new(cls) -> "MDLMSampler":
        """A sampler with the documented defaults."""
        return cls()

    @classmethod
    def with_config(cls, config: SamplerConfig | Sampler, seed: int = 0) -> "MDLMSampler":
        """A sampler with these settings."""
        return cls(config, seed)

    def generate(self, model: DiffusionModel, prompt: str, max_length: int) -> str:
        """The text that follows `prompt`, at most `max_length` tokens of it.

        Raises GenerationError.TokenizationError for a prompt that cannot be encoded, .ContextLengthExceeded where the
        prompt and the text exceed the model's positions, .Interrupted on SIGINT; ModelError.ConfigError for a model
        without a mask token or tokenizer; ConfigError for settings that do not fit.
        """
        return self.run(model, prompt, max_length).text

    def run(
        self, model: DiffusionModel, prompt: str, max_length: int, adapters: TALoRAManager | DGRSystem | None = None
    ) -> Generated:
        """`generate`, or with adapters one of the others, with counts."""
        row = _prepare(model, self.config, prompt, max_length, adapters)
        try:
            state = sample(row.sampler, row.forward, row.params, **row.inputs(self.seed))
        except KeyboardInterrupt as error:
            _interrupted(error)
        return row.finish(state)

    def generate_stream(
        self, model: DiffusionModel, prompt: str, max_length: int, callback: Callable[[GenerationStep], bool]
    ) -> None:
        """Call `callback` after each step; generation ends early where it returns False. Raises as `generate` does.

        The last step's `text` is what `generate` returns.
        """
        for step, _ in self.steps(model, prompt, max_length):
            if callback(step) is False:
                return

    def steps(
        self, model: DiffusionModel, prompt: str, max_length: int, adapters: TALoRAManager | DGRSystem | None = None
    ) -> Iterator[tuple[GenerationStep, Generated]]:
        """The steps of a generation one by one, each with the counts so far."""
        row = _prepare(model, self.config, prompt, max_length, adapters)
        try:
            following = stream(row.sampler, row.forward, row.params, **row.inputs(self.seed))
            for number, (state, events) in enumerate(following, start=1):
                yield row.step(number, state, events), row.finish(state)
        except KeyboardInterrupt as error:
            _interrupted(error)

    def generate_with_talora(self, model: DiffusionModel, prompt: str, max_length: int, talora: TALoRAManager) -> str:
        """`generate` with adapters from the banks of `talora`, retrieved at each step for the hidden state of the step
        before. Empty banks leave the text as it would be without them. Raises as `generate` does, and ConfigError for
        adapters of another width than the model's and a sampler with a cache."""
        return self.run(model, prompt, max_length, talora).text

    def generate_with_dgr(self, model: DiffusionModel, prompt: str, max_length: int, dgr: DGRSystem) -> str:
        """`generate_with_talora`, and further adapters at the positions where the model is unsure."""
        return self.run(model, prompt, max_length, dgr).text


def _parts(adapters: TALoRAManager | DGRSystem) -> tuple[TALoRAManager, DGRConfig | None]:
    return (adapters, None) if isinstance(adapters, TALoRAManager) else (adapters.talora, adapters.config)


@lru_cache(maxsize=8)  # a search may hold an index
def _adapted_forward_of(
    network: Transformer,
    block_size: int,
    impl: str | None,
    config: TALoRA,
    guide: DGR | None,
    mask_id: int,
    searches: tuple[Search, ...],
) -> Forward:
    base, timeless = forward_of(network, block_size, impl), network.time == "none"
    return denoise.forward(config, base, mask_id=mask_id, timeless=timeless, guide=guide, searches=searches)


def _interrupted(error: BaseException) -> NoReturn:
    raise GenerationError.Interrupted("generation was interrupted") from error


@dataclass(frozen=True, eq=False)
class _Row:
    """A prompt laid out for the sampler: tokens [start, end) are to be generated, what is behind them is padding."""

    model: DiffusionModel
    tokenizer: Tokenizer
    sampler: Sampler
    tokens: Int[np.ndarray, "1 width"]
    segments: Int[np.ndarray, "1 width"]
    start: int
    end: int
    mask_id: int
    adapters: TALoRAManager | DGRSystem | None = None

    @property
    def params(self) -> Any:
        if self.adapters is None:
            return self.model.params
        manager, guide = _parts(self.adapters)
        talora.check(manager.config.talora(self.model.network.layers), manager.banks)
        return denoise.Params(self.model.params, manager.banks, None if guide is None else guide.head)

    @property
    def forward(self):
        settings = (self.model.block_size, self.model.impl)
        if self.adapters is not None:
            manager, guide = _parts(self.adapters)
            config = manager.config.talora(self.model.network.layers)
            dgr = None if guide is None else guide.guide()
            return _adapted_forward_of(self.model.network, *settings, config, dgr, self.mask_id, manager.searches())
        if self.sampler.cache == "none":
            return forward_of(self.model.network, *settings)
        return cached_forward_of(self.model.network, self.sampler, *settings)

    def inputs(self, seed: int) -> dict[str, Any]:
        rows = 2 if self.sampler.guidance else 1
        carry: Any = np.repeat(self.segments, rows, axis=0)
        if self.sampler.cache != "none":
            held = self.model.network.nothing_held(rows, self.tokens.shape[1])
            carry = empty_cache(self.sampler, held, carry)
        if self.adapters is not None:
            manager, guide = _parts(self.adapters)
            config, dgr = manager.config.talora(self.model.network.layers), None if guide is None else guide.guide()
            carry = denoise.begin(config, rows, self.tokens.shape[1], carry, guide=dgr, segments=carry)
        return {
            "tokens": self.tokens,
            "key": jax.random.key(seed),
            "mask_id": self.mask_id,
            "carry": carry,
        }

    def finish(self, state: SamplerState) -> Generated:
        tokens = np.asarray(state.tokens)[0, self.start : self._settled(state)]
        named = (self.mask_id, self.model.eos_id, self.model.pad_id, *self.model.end_ids)
        specials = [number for number in named if number is not None]
        count = int((~np.isin(np.asarray(state.tokens)[0, self.start : self.end], specials)).sum())
        return Generated(self.tokenizer.decode(tokens), count, int(state.nfe[0]))

    def step(self, number: int, state: SamplerState, events: list[Event]) -> GenerationStep:
        tokens = np.asarray(state.tokens)[0, : self.end]
        masked = int((tokens[self.start :] == self.mask_id).sum())
        timestep = round(float(state.time[0]) * self.model.noise.num_timesteps)
        settled = self._settled(state)
        text = self.tokenizer.decode(tokens[self.start : settled])
        if settled < self.end:
            text = text.rstrip("\ufffd")  # half a character may yet become a whole one
        return GenerationStep(number, timestep, tokens, text, masked, tuple(events))

    def _settled(self, state: SamplerState) -> int:
        return min(int(final_prefix(self.sampler, state)[0]), self.end)


def _prepare(
    model: DiffusionModel,
    config: SamplerConfig | Sampler,
    prompt: str,
    max_length: int,
    adapters: TALoRAManager | DGRSystem | None = None,
) -> _Row:
    if model.mask_id is None or model.tokenizer is None:
        lacking = "mask token" if model.mask_id is None else "tokenizer"
        raise ModelError.ConfigError(f"the model has no {lacking}: it cannot generate", "load a diffusion export")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ConfigError(f"max_length={max_length!r} must be a whole number of at least 1")
    ids = encoded(model.tokenizer, prompt)
    start, end, limit = len(ids), len(ids) + max_length, model.network.max_length
    if end > limit:
        raise GenerationError.ContextLengthExceeded(
            f"a prompt of {start} tokens and {max_length} more exceed the model's {limit}",
            "shorten the prompt or lower max_length",
        )
    mask_id = model.mask_id
    pad_id = next(number for number in (model.pad_id, model.eos_id, 0, 1) if number is not None and number != mask_id)
    tokens = np.full((1, min(-(-end // BUCKET) * BUCKET, limit)), pad_id, np.int32)
    tokens[0, :start], tokens[0, start:end] = ids, mask_id
    segments = np.zeros(tokens.shape, np.int32)
    segments[0, :end] = 1
    try:
        sampler = _finish_sampler(model, config, pad_id)
    except errors.ConfigError as error:
        raise ConfigError(str(error), error.hint) from error
    if adapters is not None:
        check_banks(model, _parts(adapters)[0])
        if sampler.cache != "none":
            raise ConfigError(f"sampler.cache={sampler.cache} and adapters do not go together", "cache=none")
    return _Row(model, model.tokenizer, sampler, tokens, segments, start, end, mask_id, adapters)


def encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of a text [tokens]. Raises GenerationError.TokenizationError where it has none."""
    try:
        return tokenizer.encode(text)
    except errors.InputError as error:
        raise GenerationError.TokenizationError(str(error), error.hint) from error


def check_banks(model: DiffusionModel, manager: TALoRAManager) -> None:
    """Raises ConfigError for banks whose adapters cannot act in `model`."""
    width, layers = model.network.width, model.network.layers
    if manager.config.hidden_dim != width:
        raise ConfigError(f"adapters of hidden_dim={manager.config.hidden_dim} for a model of width {width}")
    if not 0 <= manager.config.talora(layers).layer < layers:
        raise ConfigError(f"TALoRAConfig.layer={manager.config.layer} of a model of {layers} layers")


def _finish_sampler(model: DiffusionModel, config: SamplerConfig | Sampler, pad_id: int) -> Sampler:
    """What only the model knows: its blocks, its schedule and its end token (where a `Sampler` does not say)."""
    sampler = config
    if isinstance(sampler, SamplerConfig):
        sampler = dataclasses.replace(sampler.sampler(), schedule=model.noise.schedule)
        if model.eos_id is not None and model.eos_id != model.mask_id:
            ends = {"eos_id": model.eos_id, "end_ids": model.end_ids, "pad_id": pad_id}
            sampler = dataclasses.replace(sampler, eos_handling="stop", **ends)
    if model.block_size:
        sampler = dataclasses.replace(sampler, block_size=model.block_size, block_origin="canvas")
    if sampler.cache == "block" and (not model.block_size or model.network.time != "none"):
        raise errors.ConfigError("sampler.cache=block is for models trained in blocks, without a time", "cache=dual")
    if model.tokenizer is not None and model.tokenizer.vocab_size < model.network.vocab_size:
        sampler = dataclasses.replace(sampler, vocabulary=model.tokenizer.vocab_size)
    return sampler
