"""Puts the parts together: model functions for losses, likelihoods and samplers, the first state, exports.

The verbs and the notebook share what is here; `ruvjax` itself never knows which model is behind a function.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from experiments.settings import EXPORT, ModelPath, Train, block_size, check_store
from kernels_pallas.attention import Mask as AttentionMask
from ruvjax.api.tokenizer_files import read_template, read_tokenizer
from ruvjax.core.backend import devices, initialise_distributed, require
from ruvjax.core.model import Output
from ruvjax.core.params import init, shardings, unstack
from ruvjax.core.sharding import RULES, MeshConfig, batch_sharding, make_mesh
from ruvjax.data.tokenize import Tokenizer
from ruvjax.decoding import likelihood as left
from ruvjax.decoding.autoregressive import Decoding
from ruvjax.decoding.likelihood import NextToken
from ruvjax.diffusion.cache import cached, empty_cache
from ruvjax.diffusion.loss import Encode, Project, objective
from ruvjax.diffusion.sampler import Forward, Sampler
from ruvjax.diffusion.schedule import Schedule
from ruvjax.errors import BackendError, ConfigError, InputError
from ruvjax.io.chat import ChatTemplate
from ruvjax.io.hub import model_path
from ruvjax.io.huggingface import load_model, save_model
from ruvjax.models.causal import LanguageModel, forward_left_of
from ruvjax.models.transformer import Begun, Transformer
from ruvjax.training.optimizer import build_optimizer, learning_rate
from ruvjax.training.state import TrainState, init_state
from ruvjax.training.step import Step, make_step


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A model that can be used: hyper-parameters, parameters, tokenizer and how it was trained.

    block_size is that of the block objective, 0 for every other; schedule tells the time of a mask share; length is
    that of the rows it was trained on, 0 where nobody says. autoregressive: it looks only to the left. end_ids: tokens
    beside the tokenizer's end token that end a text. published: not trained here, so that texts begin with the
    tokenizer's own first token, where it has one.
    """

    model: LanguageModel
    params: Any
    tokenizer: Tokenizer
    schedule: Schedule = Schedule()
    block_size: int = 0
    length: int = 0
    attention: str | None = None
    autoregressive: bool = False
    end_ids: tuple[int, ...] = ()
    published: bool = False

    @property
    def forward(self) -> Forward:
        if self.autoregressive:
            return forward_left_of(self.model, self.attention)
        return forward_of(self.model, self.attention, self.block_size)

    def denoiser(self, sampler: Sampler, rows: int, length: int, segments: Any) -> tuple[Forward, Any]:
        """The forward and its first carry for `rows` rows (both halves under guidance) of `length` tokens."""
        if sampler.cache == "none":
            return self.forward, segments
        assert isinstance(self.model, Transformer)
        held = self.model.nothing_held(rows, length)
        forward = cached_forward_of(self.model, sampler, self.attention, self.block_size)
        return forward, empty_cache(sampler, held, segments)

    @property
    def context(self) -> int:
        """The longest row the model takes; Mamba's state has no end, so there it is what fits an int32."""
        return self.model.max_length if isinstance(self.model, Transformer) else 2**31 - 1

    @property
    def start_id(self) -> int:
        """What stands before the first token of a text. Models trained here begin after the end of another."""
        return self.tokenizer.start_id if self.published else self.tokenizer.eos_id

    @property
    def never_drawn(self) -> tuple[int, ...]:
        """Tokens that no text holds: the mask, and the padding where that is not an end token as well."""
        ends = (self.tokenizer.eos_id, *self.end_ids)
        return tuple(i for i in (self.tokenizer.mask_id, self.tokenizer.pad_id) if i >= 0 and i not in ends)

    def empty_cache(self, rows: int, capacity: int, settings: Decoding) -> Any:
        """The state before the first token of `rows` rows; a transformer's has room for `capacity` tokens."""
        if isinstance(self.model, Transformer):
            if (tiers := settings.tiers) is not None:
                return self.model.empty_tiered_cache(tiers, rows, capacity)
            return self.model.empty_cache(rows, capacity)
        return self.model.empty_cache(rows)


def start_backend(name: str, distributed: Any = None) -> None:
    """Join the run of many processes where one is configured, then make `name` the default backend.

    Raises BackendError where it cannot run here.
    """
    if distributed is not None:
        initialise_distributed(distributed)
    kind = require(name)
    if name != "auto" and devices(kind)[0] not in jax.devices():
        jax.config.update("jax_default_device", devices(kind)[0])


@functools.cache
def cached_forward_of(model: Transformer, sampler: Sampler, attention: str | None, block_size: int) -> Forward:
    """The forward of a `sampler` with a cache; one object per model and settings, as `forward_of`."""

    def run(params, tokens, time, segments, held):
        mask = AttentionMask(segments=segments, block=block_size)
        return model.over(params, tokens, held, mask=mask, time=time, impl=attention)

    return cached(sampler, run, model.head, shift=model.shift)


@functools.cache
def forward_of(model: LanguageModel, attention: str | None = None, block_size: int = 0) -> Forward:
    """`(params, tokens, time, carry) -> (Output, carry)`; `carry` is the segments of each row, or None without padding.

    One object per model and settings, because jitted samplers hold it as a static argument.
    """

    def forward(params: Any, tokens: jax.Array, time: jax.Array, carry: Any) -> tuple[Output, Any]:
        if not isinstance(model, Transformer):
            return model.apply(params, tokens, segments=carry), carry
        mask = AttentionMask(segments=carry, block=block_size)
        return model.apply(params, tokens, mask=mask, time=time, impl=attention), carry

    return forward


def encode_left_of(model: LanguageModel, attention: str | None = None) -> left.Encode:
    """`(params, inputs, segments) -> hidden`, causal, for the autoregressive loss."""

    def encode(params, inputs, segments):
        if not isinstance(model, Transformer):
            return model.apply(params, inputs, segments=segments, logits=False).hidden
        mask = AttentionMask(segments=segments, causal=True)
        return model.apply(params, inputs, mask=mask, logits=False, impl=attention).hidden

    return encode


def encode_of(model: LanguageModel, attention: str | None = None) -> Encode:
    """`(params, tokens, time, mask, positions) -> hidden`, for the training losses: of a transformer, `Begun`."""

    def encode(params, tokens, time, mask, positions):
        if not isinstance(model, Transformer):
            return model.apply(params, tokens, segments=None if mask is None else mask.segments, logits=False).hidden
        return model.begin(params, tokens, mask=mask, positions=positions, time=time, impl=attention)

    return encode


def project_of(model: LanguageModel) -> Project:
    """`(params, hidden) -> logits`, for the training losses; `hidden` is what `encode_of` gives or hidden states."""

    def project(params, hidden):
        if isinstance(model, Transformer) and isinstance(hidden, Begun):
            hidden = model.finish(params, hidden)
        return model.head(params, hidden)

    return project


def fit_vocabulary(model: LanguageModel, tokenizer: Tokenizer, note: Callable[[str], None]) -> LanguageModel:
    """`model` with the vocabulary of a tokenizer that was just trained; says so where that changes its size."""
    if model.vocab_size != tokenizer.vocab_size:
        note(f"model.vocab_size {model.vocab_size} becomes {tokenizer.vocab_size}, the size of the trained tokenizer")
    return dataclasses.replace(model, vocab_size=tokenizer.vocab_size)


def mesh_of(config: MeshConfig, batch: int) -> Mesh | None:
    """The mesh over all devices; None where there is one device, which needs no layout.

    Raises ConfigError where a batch of so many rows does not divide among the devices that split it.
    """
    mesh = make_mesh(config)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % rows:
        raise ConfigError(
            f"pipeline.batch={batch} does not divide among {rows} devices",
            f"make it a multiple of {rows}, or lay the mesh out otherwise (mesh=tensor, mesh.data=...)",
        )
    return mesh if mesh.size > 1 else None


def training_parts(
    job: Train, model: LanguageModel, tokenizer: Tokenizer, mesh: Mesh | None
) -> tuple[TrainState, Step]:
    """The state before the first step and the step itself. Parameters depend on `job.seed` and on nothing else."""
    optimizer = build_optimizer(job.optimizer, model.spec())
    params_key, run_key = jax.random.split(jax.random.key(job.seed))
    layout = shardings(model, mesh, dict(RULES)) if mesh is not None else None
    params = jax.jit(partial(init, model), out_shardings=layout)(params_key)
    state = init_state(params, optimizer, run_key, ema=job.optimizer.ema > 0)
    attention, project = job.kernels.attention_impl, project_of(model)
    if isinstance(job.objective, NextToken):
        encode = encode_left_of(model, attention)
        loss = left.objective(job.objective, encode, project, start_id=tokenizer.eos_id, mask_id=tokenizer.mask_id)
    else:
        ids = {"mask_id": tokenizer.mask_id, "batch_size": job.pipeline.batch}
        loss = objective(job.objective, encode_of(model, attention), project, **ids)
    rate = partial(learning_rate, job.optimizer)
    return state, make_step(loss, optimizer, rate, ema=job.optimizer.ema, accumulation=job.trainer.accumulation)


def gathered(params: Any) -> Any:
    """`params` as this process can use them alone: in a run of several processes each holds only a part of some."""
    return params if jax.process_count() == 1 else process_allgather(params, tiled=True)


def usable(job: Train, model: LanguageModel, params: Any, tokenizer: Tokenizer) -> Loaded:
    """The model of a training job with the (gathered) parameters it has now."""
    attention, length = job.kernels.attention_impl, job.pipeline.length
    if isinstance(job.objective, NextToken):
        return Loaded(model, params, tokenizer, length=length, attention=attention, autoregressive=True)
    return Loaded(model, params, tokenizer, job.objective.schedule, block_size(job.objective), length, attention)


def batch_layout(mesh: Mesh | None):
    """How a batch lies over the mesh, None for one device."""
    return None if mesh is None else batch_sharding(mesh)


def block_sampler(sampler: Sampler, block_size: int, note: Callable[[str], None]) -> Sampler:
    """`sampler` as a model of the block objective needs it: its block size, counted from position 0."""
    if not block_size or (sampler.block_size == block_size and sampler.block_origin == "canvas"):
        return sampler
    note(f"sampler.block_size becomes {block_size}, counted from position 0: the model was trained in such blocks")
    return dataclasses.replace(sampler, block_size=block_size, block_origin="canvas")


def check_cache(sampler: Sampler, loaded: Loaded) -> None:
    """Raise ConfigError for a cache that the model cannot have."""
    model = loaded.model
    if not isinstance(model, Transformer):
        raise ConfigError(f"sampler.cache={sampler.cache} is for transformers", "sampler.cache=none")
    if sampler.cache == "block" and not loaded.block_size:
        raise ConfigError("sampler.cache=block is for models trained with objective=block", "sampler.cache=dual")
    if sampler.cache == "block" and model.time != "none":
        raise ConfigError(
            f"sampler.cache=block is exact, and with model.time={model.time} no cache is: keys depend on the time",
            "sampler.cache=dual, or a model with time=none",
        )


def finish_sampler(sampler: Sampler | Decoding, loaded: Loaded, note: Callable[[str], None]) -> Sampler | Decoding:
    """`sampler` with what only the model knows: its blocks, and its end and padding tokens where they are asked for.

    Raises ConfigError where a model that looks only to the left is to be denoised, or the other way round.
    """
    if isinstance(sampler, Decoding) != loaded.autoregressive:
        kind, right = (
            ("an autoregressive", "sampler=left_to_right")
            if loaded.autoregressive
            else ("a diffusion", "sampler=confidence")
        )
        raise ConfigError(f"this is {kind} model", f"sample it with {right}")
    if isinstance(sampler, Decoding):
        return _finish_decoding(sampler, loaded)
    sampler, tokenizer = block_sampler(sampler, loaded.block_size, note), loaded.tokenizer
    if sampler.eos_handling != "none" and sampler.eos_id < 0:
        ends = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "end_ids": loaded.end_ids}
        sampler = dataclasses.replace(sampler, **ends)
    if sampler.cache != "none":
        check_cache(sampler, loaded)
    if not sampler.vocabulary and tokenizer.vocab_size < loaded.model.vocab_size:
        sampler = dataclasses.replace(sampler, vocabulary=tokenizer.vocab_size)
    return sampler


def _finish_decoding(settings: Decoding, loaded: Loaded) -> Decoding:
    """A published model's texts end at its end tokens; the rows of its table beyond the tokenizer's are never drawn."""
    tokenizer, known = loaded.tokenizer, {}
    check_store(settings, loaded.model)
    if loaded.published and not settings.ends:
        known = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "end_ids": loaded.end_ids}
    if not settings.vocabulary and tokenizer.vocab_size < loaded.model.vocab_size:
        known["vocabulary"] = tokenizer.vocab_size
    return dataclasses.replace(settings, **known)


def export(folder: Path, loaded: Loaded) -> Path:
    """Write the model as safetensors, config.json and tokenizer.json; `load` and `RuvDLLM.load` read it."""
    tokenizer = loaded.tokenizer
    saved = tokenizer.save(folder.parent / "tokenizer")
    if loaded.autoregressive:
        diffusion: dict[str, Any] = {"length": loaded.length, "autoregressive": True}
    else:
        schedule = dataclasses.asdict(loaded.schedule)
        diffusion = {"schedule": schedule, "block_size": loaded.block_size, "length": loaded.length}
    return save_model(
        folder,
        loaded.model,
        jax.device_get(loaded.params),
        saved,
        mask_token_id=tokenizer.mask_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        diffusion=diffusion,
    )


def model_folder(path: ModelPath) -> Path:
    """The model folder or .gguf file that `model.path` names. A model of the hub is downloaded where no such folder is
    here. Raises InputError where there is none."""
    if not path.path:
        raise InputError("model.path is empty", "model.path=runs/<name>/<stamp>, a model folder, or a .gguf file")
    try:
        folder = model_path(path.path)
    except InputError as error:
        raise InputError(f"model.path={error}", error.hint) from error
    return folder / EXPORT if (folder / EXPORT / "config.json").is_file() else folder


def load(path: ModelPath, attention: str | None = None) -> Loaded:
    """The model at `path`. Raises InputError where it cannot be read or has no tokenizer."""
    folder = model_folder(path)
    model, params, files = load_model(folder, quantized=path.quantized)
    tokenizer = read_tokenizer(folder, files)
    if tokenizer.vocab_size > model.vocab_size:
        sizes = f"{tokenizer.vocab_size} entries, the model {model.vocab_size}"
        raise InputError(f"{folder}: the tokenizer has {sizes}", "copy the right one")
    settings = files.diffusion
    try:
        schedule = Schedule(**settings.get("schedule", {}))
        block, length = int(settings.get("block_size", 0)), int(settings.get("length", 0))
    except (TypeError, ValueError, ConfigError) as error:
        raise InputError(f"{folder}/config.json: bad diffusion settings: {error}", "export the model again") from error
    ends = tuple(end for end in files.eos_token_ids if end not in (tokenizer.eos_id, tokenizer.mask_id))
    return Loaded(model, params, tokenizer, schedule, block, length, attention, files.causal, ends, not settings)


def template_of(path: ModelPath) -> ChatTemplate:
    """The chat template of the model at `path`. Raises InputError where it has none."""
    return read_template(model_folder(path))


def apart(loaded: Loaded) -> Loaded:
    """`loaded` with its layers unstacked, as a decoding loop wants them: every token would copy them out otherwise."""
    return dataclasses.replace(loaded, params=unstack(loaded.params, loaded.model.layers))


def check_kernels(attention: str | None) -> None:
    """Raises BackendError where the kernel implementation that was named is for a device that is not there."""
    from kernels_pallas.dispatch import PLATFORM_BODIES, platforms

    needs = {body: platform for platform, body in PLATFORM_BODIES.items()}.get(attention or "")
    if needs is not None and needs not in platforms():
        raise BackendError(
            f"kernels.attention={attention!r} needs {needs}, which this process does not have",
            "one of auto, xla, reference, interpret",
        )
