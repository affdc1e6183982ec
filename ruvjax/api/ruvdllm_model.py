"""DiffusionModel, its DiffusionConfig and its NoiseSchedule: over `models.transformer` and `diffusion.schedule`.

Timesteps are the documented whole numbers 0..num_timesteps (1000), t * num_timesteps: 0 is clean text, the largest all
masks.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import Mask
from ruvjax import errors
from ruvjax.api.ruvdllm_errors import ConfigError, GenerationError, ModelError
from ruvjax.api.ruvdllm_files import Read, read_files
from ruvjax.core.held import Held
from ruvjax.core.model import Output
from ruvjax.core.rope import RopeScaling
from ruvjax.data.tokenize import Tokenizer
from ruvjax.diffusion.cache import cached
from ruvjax.diffusion.sampler import Forward, Sampler
from ruvjax.diffusion.schedule import Kind, Schedule
from ruvjax.io.huggingface import read_config
from ruvjax.io.layout import read_transformer
from ruvjax.models.transformer import Transformer


class NoiseScheduleType(Enum):
    """How the visible share falls with time; `ruvjax.diffusion.schedule.Schedule` has the formulae.

    The BETA_ kinds and CUSTOM multiply up betas, one a timestep; the others are given in closed form.
    """

    LINEAR = "linear"
    LOG_LINEAR = "log_linear"
    COSINE = "cosine"
    SQUARED_COSINE = "squared_cosine"
    POLYNOMIAL = "polynomial"
    GEOMETRIC = "geometric"
    BETA_LINEAR = "beta_linear"
    BETA_COSINE = "beta_cosine"
    BETA_SQRT = "beta_sqrt"
    CUSTOM = "custom"


@dataclass(frozen=True)
class NoiseSchedule:
    """A schedule counted in timesteps."""

    schedule: Schedule = field(default_factory=Schedule)
    num_timesteps: int = 1000

    def __post_init__(self):
        if isinstance(self.num_timesteps, bool) or not isinstance(self.num_timesteps, int) or self.num_timesteps < 1:
            raise ConfigError(f"num_timesteps={self.num_timesteps!r} must be a whole number of at least 1")

    @classmethod
    def new(
        cls, kind: NoiseScheduleType, num_timesteps: int = 1000, betas: tuple[float, ...] | None = None
    ) -> "NoiseSchedule":
        """The schedule of `kind`; `betas` go with CUSTOM and with nothing else. Raises ConfigError."""
        if (betas is not None) != (kind is NoiseScheduleType.CUSTOM):
            raise ConfigError(f"betas={betas!r} do not go with {kind}", "betas belong to NoiseScheduleType.CUSTOM")
        try:
            if betas is not None:
                return cls(Schedule(kind="betas", betas=tuple(betas)), num_timesteps)
            if kind.value.startswith("beta_"):
                return cls(Schedule("betas", betas=kind.value[5:], timesteps=num_timesteps), num_timesteps)
            return cls(Schedule(cast(Kind, kind.value)), num_timesteps)
        except errors.ConfigError as error:
            raise ConfigError(str(error), error.hint) from error

    @property
    def kind(self) -> NoiseScheduleType:
        schedule = self.schedule
        if schedule.kind != "betas":
            return NoiseScheduleType(schedule.kind)
        return NoiseScheduleType(f"beta_{schedule.betas}" if isinstance(schedule.betas, str) else "custom")

    def time(self, timestep: int) -> float:
        """The time in [0, 1] of a timestep. Raises ConfigError for one outside 0..num_timesteps."""
        whole = isinstance(timestep, (int, np.integer)) and not isinstance(timestep, bool)
        if not whole or not 0 <= timestep <= self.num_timesteps:
            raise ConfigError(f"timestep={timestep!r} must be a whole number from 0 to {self.num_timesteps}")
        return int(timestep) / self.num_timesteps

    def alpha(self, timestep: int) -> float:
        """The share of tokens that are visible at a timestep."""
        return float(self.schedule.alpha(jnp.float32(self.time(timestep))))

    def mask_probability(self, timestep: int) -> float:
        """The share of tokens that are masked at a timestep."""
        return float(self.schedule.mask_probability(jnp.float32(self.time(timestep))))


@dataclass(frozen=True)
class DiffusionConfig:
    """The documented configuration, and below it what Qwen and MDLM shapes need beside it. Raises ConfigError."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    num_timesteps: int = 1000
    noise_schedule: NoiseScheduleType = NoiseScheduleType.LINEAR
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int = 0
    shift: bool = False
    norm: str = "rms"
    mlp: str = "swiglu"
    time: str = "none"
    dtype: str = "float32"

    def __post_init__(self):
        if not isinstance(self.noise_schedule, NoiseScheduleType):
            allowed = ", ".join(kind.value for kind in NoiseScheduleType)
            raise ConfigError(f"noise_schedule={self.noise_schedule!r} is not a NoiseScheduleType", f"one of {allowed}")
        NoiseSchedule(num_timesteps=self.num_timesteps)
        self.transformer()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "DiffusionConfig":
        """Read a JSON file: the documented keys, or the config.json of a model (or the folder that holds one)."""
        try:
            values = read_config(path)
            if "model_type" in values:
                schedule = _schedule_of(values.get("diffusion") or {}, str(path))
                return cls.of(read_transformer(values, str(path)), schedule)
        except errors.RuvjaxError as error:
            raise ConfigError(str(error), error.hint) from error
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        missing = [name for name, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in missing if name not in values]
        if unknown or missing:
            what = f"unknown keys {', '.join(unknown)}" if unknown else f"no {', '.join(missing)}"
            raise ConfigError(f"{path}: {what}", f"the keys are {', '.join(known)}")
        if "noise_schedule" in values:
            values["noise_schedule"] = _kind_named(values["noise_schedule"], str(path))
        if "rope_scaling" in values:
            try:
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            except (TypeError, errors.ConfigError) as error:
                raise ConfigError(f"{path}: rope_scaling: {error}") from error
        return cls(**values)

    @classmethod
    def of(cls, network: Transformer, schedule: NoiseSchedule) -> "DiffusionConfig":
        """The configuration of a network trained under `schedule`."""
        return cls(
            vocab_size=network.vocab_size,
            hidden_size=network.width,
            intermediate_size=network.mlp_width,
            num_hidden_layers=network.layers,
            num_attention_heads=network.heads,
            num_key_value_heads=network.key_heads,
            max_position_embeddings=network.max_length,
            rope_theta=network.rope_theta,
            rms_norm_eps=network.norm_eps,
            num_timesteps=schedule.num_timesteps,
            noise_schedule=schedule.kind,
            head_dim=network.head_dim,
            rope_scaling=network.rope_scaling,
            tie_word_embeddings=network.tied_head,
            qkv_bias=network.qkv_bias,
            qk_norm=network.qk_norm,
            window=network.window,
            shift=network.shift,
            norm=network.norm,
            mlp=network.mlp,
            time=network.time,
            dtype=network.dtype,
        )

    @classmethod
    def llama_7b(cls) -> "DiffusionConfig":
        """The shape of Llama 2 7B."""
        return cls(32000, 4096, 11008, 32, 32, 32, 4096, rms_norm_eps=1e-5, dtype="bfloat16")

    @classmethod
    def llama_13b(cls) -> "DiffusionConfig":
        """The shape of Llama 2 13B."""
        return cls(32000, 5120, 13824, 40, 40, 40, 4096, rms_norm_eps=1e-5, dtype="bfloat16")

    @classmethod
    def qwen_7b(cls) -> "DiffusionConfig":
        """The shape of Qwen2 7B."""
        return cls(152064, 3584, 18944, 28, 28, 4, 32768, 1e6, qkv_bias=True, dtype="bfloat16")

    def transformer(self) -> Transformer:
        """The network of this configuration."""
        try:
            return Transformer(
                vocab_size=self.vocab_size,
                layers=self.num_hidden_layers,
                width=self.hidden_size,
                heads=self.num_attention_heads,
                kv_heads=self.num_key_value_heads,
                head_dim=self.head_dim,
                mlp_width=self.intermediate_size,
                max_length=self.max_position_embeddings,
                rope_theta=self.rope_theta,
                rope_scaling=self.rope_scaling,
                norm=self.norm,
                norm_eps=self.rms_norm_eps,
                mlp=self.mlp,
                qkv_bias=self.qkv_bias,
                qk_norm=self.qk_norm,
                window=self.window,
                shift=self.shift,
                tied_head=self.tie_word_embeddings,
                time=self.time,
                dtype=self.dtype,
                unroll=isinstance(self.num_hidden_layers, int) and self.num_hidden_layers <= 8,
            )
        except errors.ConfigError as error:
            raise ConfigError(str(error), error.hint) from error


def _kind_named(name: Any, source: str) -> NoiseScheduleType:
    """A schedule by its value or by the documented spelling: "squared_cosine", "SquaredCosine", "Linear"."""
    plain = {kind.value.replace("_", ""): kind for kind in NoiseScheduleType}
    found = plain.get(str(name).replace("_", "").lower())
    if found is None:
        raise ConfigError(
            f"{source}: noise_schedule={name!r} is not known", f"one of {', '.join(k.value for k in NoiseScheduleType)}"
        )
    return found


def _schedule_of(diffusion: dict[str, Any], source: str) -> NoiseSchedule:
    """The schedule an export was trained with; linear, as LLaDA, where config.json names none."""
    try:
        values = dict(diffusion.get("schedule") or {})
        if isinstance(values.get("betas"), list):
            values["betas"] = tuple(values["betas"])
        return NoiseSchedule(Schedule(**values))
    except (TypeError, ValueError, AttributeError, errors.ConfigError) as error:
        raise ModelError.ConfigError(f"{source}: bad diffusion settings: {error}", "export the model again") from error


@cache
def forward_of(network: Transformer, block_size: int, impl: str | None) -> Forward:
    """`(params, tokens, time, carry) -> (Output, carry)`; `carry` is int32 segments, or None without padding."""

    def forward(params: Any, tokens: jax.Array, time: jax.Array, carry: Any) -> tuple[Output, Any]:
        mask = Mask(segments=carry, block=block_size)
        return network.apply(params, tokens, mask=mask, time=time, impl=impl), carry

    return forward


@cache
def cached_forward_of(network: Transformer, sampler: Sampler, block_size: int, impl: str | None) -> Forward:
    """The forward of a `sampler` with a cache; its carry is a `diffusion.cache.BlockCache`."""

    def run(params: Any, tokens: jax.Array, time: jax.Array, segments: Any, held: Held) -> tuple[jax.Array, Held]:
        return network.over(params, tokens, held, mask=Mask(segments=segments, block=block_size), time=time, impl=impl)

    return cached(sampler, run, network.head, shift=network.shift)


_run_forward = jax.jit(lambda forward, *inputs: forward(*inputs)[0], static_argnums=0)


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A network with its parameters, schedule and tokenizer.

    mask_id is None for a checkpoint that was never trained to denoise: it can run forward and cannot generate.
    end_ids: tokens beside eos_id that end a text. block_size: that of a model trained block by block, else 0.
    impl: the attention implementation (None: best).
    """

    network: Transformer
    params: Any
    noise: NoiseSchedule = field(default_factory=NoiseSchedule)
    tokenizer: Tokenizer | None = None
    mask_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    end_ids: tuple[int, ...] = ()
    block_size: int = 0
    impl: str | None = None
    model_type: str = ""
    weights: str = ""

    @classmethod
    def load_f16(cls, path: str | os.PathLike[str]) -> "DiffusionModel":
        """Load unquantized weights (16 or 32 bits, kept as stored) from a model folder, or a run that exported one;
        or a GGUF file, whose weights become 16 bits.

        Raises ModelError.LoadError for files that are missing or damaged, ModelError.ConfigError for diffusion settings
        that cannot be used.
        """
        return cls._of(read_files(Path(path).expanduser(), four_bits=False))

    @classmethod
    def load_q4(cls, path: str | os.PathLike[str]) -> "DiffusionModel":
        """Load with quantized matrices, which every product multiplies by without dequantizing them first.

        A GGUF file keeps the blocks it holds (Q4_0, Q4_K, Q8_0). The matrices of anything that `load_f16` reads are
        quantized on loading, to Q4_K, or Q4_0 where a row is no multiple of 256 weights; embeddings and head to Q8_0.
        Raises as `load_f16` does, and ModelError.QuantizationError for rows that are no multiple of 32.
        """
        return cls._of(read_files(Path(path).expanduser(), four_bits=True))

    @classmethod
    def _of(cls, read: Read) -> "DiffusionModel":
        files = read.files
        block_size = files.diffusion.get("block_size", 0)
        if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 0:
            raise ModelError.ConfigError(f"{read.source}: block_size={block_size!r}", "export the model again")
        return cls(
            network=read.network,
            params=read.params,
            noise=_schedule_of(dict(files.diffusion), read.source),
            tokenizer=read.tokenizer,
            mask_id=files.mask_token_id,
            eos_id=files.eos_token_id,
            pad_id=files.pad_token_id,
            end_ids=tuple(end for end in files.eos_token_ids if end not in (files.eos_token_id, files.mask_token_id)),
            block_size=block_size,
            model_type=files.model_type,
            weights=files.weights,
        )

    def forward(
        self,
        input_ids: Int[Array, "batch length"] | Any,
        timestep: int,
        attention_mask: Int[Array, "batch length"] | Any | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Logits, float32. `attention_mask` holds 1 for tokens and 0 for padding, which nothing attends to.

        Raises ConfigError for a timestep outside 0..num_timesteps, GenerationError.ContextLengthExceeded for too many
        tokens, ModelError.ConfigError for ids that are no matrix of tokens of this vocabulary.
        """
        logits = self._output(input_ids, timestep, attention_mask).logits
        assert logits is not None
        return logits

    def forward_with_hidden(
        self, input_ids: Int[Array, "batch length"] | Any, timestep: int
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "batch length vocab"]]:
        """(hidden states after the last norm, logits)."""
        output = self._output(input_ids, timestep, None)
        assert output.logits is not None
        return output.hidden, output.logits

    def config(self) -> DiffusionConfig:
        """The configuration of this model."""
        return DiffusionConfig.of(self.network, self.noise)

    def schedule(self) -> NoiseSchedule:
        """The schedule it was trained with."""
        return self.noise

    def check_tokens(self, input_ids: Any) -> Int[np.ndarray, "batch length"]:
        """`input_ids` as int32 [batch, length]; raises as `forward` does."""
        ids = np.asarray(input_ids)
        vocabulary = self.network.vocab_size
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ModelError.ConfigError(f"input_ids of shape {ids.shape} and type {ids.dtype} are no token matrix")
        if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
            raise ModelError.ConfigError(f"input_ids hold a token outside the vocabulary of {vocabulary}")
        if ids.shape[1] > self.network.max_length:
            raise GenerationError.ContextLengthExceeded(
                f"{ids.shape[1]} tokens, the model holds {self.network.max_length}", "give a shorter text"
            )
        return ids.astype(np.int32)

    def _output(self, input_ids: Any, timestep: int, attention_mask: Any | None) -> Output:
        ids = self.check_tokens(input_ids)
        segments = None
        if attention_mask is not None:
            segments = np.asarray(attention_mask).astype(np.int32)
            if segments.shape != ids.shape or not np.isin(segments, (0, 1)).all():
                raise ModelError.ConfigError(f"attention_mask must hold 0 and 1 in the shape {ids.shape}")
        time = jnp.full(ids.shape[0], self.noise.time(timestep), jnp.float32)
        forward = forward_of(self.network, self.block_size, self.impl)
        return _run_forward(forward, self.params, ids, time, segments)
