"""The documented `MambaLM`, `MambaLMConfig` and `MambaCache`: `models.mamba` as a handle that holds its parameters.

Arrays are JAX arrays and devices are named as in `core.backend`. Checkpoints: `ruvjax.api.repair_checkpoint`.
"""

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.unmask import masked_cross_entropy
from ruvjax.core import backend
from ruvjax.core.params import count, init, unstack
from ruvjax.decoding.autoregressive import PADDING, Decoding, Forward, generate
from ruvjax.errors import ConfigError, InputError
from ruvjax.models.mamba import Mamba, MambaParams
from ruvjax.models.ssm import Cache

IGNORED_LABEL = -100  # a label that is not counted


@dataclass(frozen=True)
class MambaLMConfig:
    """Configuration of a `MambaLM`, with the documented names and defaults. Raises ConfigError.

    dt_rank "auto" is d_model / 16, rounded up. dt_init "random" draws the step projection uniformly within
    dt_scale / sqrt(dt_rank), "constant" fills it with that. The vocabulary is rounded up to a multiple of
    pad_vocab_size_multiple. use_fast_path and residual_in_fp32 change nothing: the one path is the compiled one, and
    its residual is float32. dropout must be 0, as in the published models.
    """

    vocab_size: int = 50257
    d_model: int = 768
    n_layers: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    residual_in_fp32: bool = True
    use_fast_path: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        if self.dropout:
            raise ConfigError(f"dropout={self.dropout!r} is not supported", "Mamba trains without dropout: 0.0")
        if self.dt_rank != "auto" and (not isinstance(self.dt_rank, int) or self.dt_rank < 1):
            raise ConfigError(f"dt_rank={self.dt_rank!r} must be a positive integer or 'auto'")
        if self.dt_init not in ("random", "constant"):
            raise ConfigError(f"dt_init={self.dt_init!r} is not known", "one of random, constant")
        for name in ("pad_vocab_size_multiple", "vocab_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a positive integer")
        self.network()

    def network(self) -> Mamba:
        """The hyper-parameters as `models.mamba` takes them."""
        multiple = self.pad_vocab_size_multiple
        return Mamba(
            vocab_size=-(-self.vocab_size // multiple) * multiple,
            layers=self.n_layers,
            width=self.d_model,
            state=self.d_state,
            conv=self.d_conv,
            expand=self.expand,
            dt_rank=0 if isinstance(self.dt_rank, str) else self.dt_rank,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
            dt_floor=self.dt_init_floor,
            bias=self.bias,
            conv_bias=self.conv_bias,
            norm_eps=self.norm_eps,
            tied_head=self.tie_embeddings,
            unroll=self.n_layers <= 8,
        )

    @staticmethod
    def of(network: Mamba) -> "MambaLMConfig":
        """The configuration of a loaded network."""
        return MambaLMConfig(
            vocab_size=network.vocab_size,
            d_model=network.width,
            n_layers=network.layers,
            d_state=network.state,
            d_conv=network.conv,
            expand=network.expand,
            dt_rank=network.dt_rank or "auto",
            dt_min=network.dt_min,
            dt_max=network.dt_max,
            dt_init_floor=network.dt_floor,
            pad_vocab_size_multiple=1,
            tie_embeddings=network.tied_head,
            bias=network.bias,
            conv_bias=network.conv_bias,
            norm_eps=network.norm_eps,
        )


@dataclass
class MambaCache:
    """What the tokens read so far leave behind, of constant size.

    conv_states: per layer, the last d_conv - 1 inputs of the convolution, [batch, d_conv - 1, d_inner]. ssm_states: per
    layer, float32 [batch, d_inner, d_state]. seqlen_offset: how many tokens were read.
    """

    conv_states: list[jax.Array]
    ssm_states: list[jax.Array]
    seqlen_offset: int = 0

    @classmethod
    def empty(
        cls, config: MambaLMConfig, batch_size: int, device: Any = None, dtype: Any = jnp.float32
    ) -> "MambaCache":
        """The cache before the first token. `device` is a kind ("cpu", "cuda:1") or a JAX device."""
        with placed(device):
            return cls._of(config.network().empty_cache(batch_size), 0, dtype)

    @classmethod
    def _of(cls, cache: Cache, offset: int, dtype: Any = None) -> "MambaCache":
        layers = range(cache.conv.shape[1])
        return cls([cache.conv[:, i].astype(dtype) for i in layers], [cache.state[:, i] for i in layers], offset)

    def _stacked(self, network: Mamba) -> Cache:
        batch = self.ssm_states[0].shape[0] if self.ssm_states else 0
        wanted = jax.eval_shape(lambda: network.empty_cache(batch))
        found = (
            [(batch, *shape) for shape in {x.shape[1:] for x in self.conv_states}],
            [(batch, *shape) for shape in {x.shape[1:] for x in self.ssm_states}],
        )
        if (
            found != ([(batch, *wanted.conv.shape[2:])], [(batch, *wanted.state.shape[2:])])
            or not len(self.conv_states) == len(self.ssm_states) == network.layers
        ):
            raise InputError("the cache does not fit the model", "take it from allocate_inference_cache")
        segment = jnp.full((batch,), int(self.seqlen_offset > 0), jnp.int32)
        conv = jnp.stack(self.conv_states, axis=1).astype(wanted.conv.dtype)
        return Cache(conv, jnp.stack(self.ssm_states, axis=1).astype(wanted.state.dtype), segment)

    def update(self, layer_idx: int, conv_state: jax.Array, ssm_state: jax.Array) -> None:
        """Replace the states of one layer. Raises InputError where the shapes are others."""
        old = self.get_layer_cache(layer_idx)
        if (conv_state.shape, ssm_state.shape) != (old[0].shape, old[1].shape):
            raise InputError(f"states of shapes {conv_state.shape} and {ssm_state.shape} do not fit layer {layer_idx}")
        self.conv_states[layer_idx], self.ssm_states[layer_idx] = conv_state, ssm_state

    def get_layer_cache(self, layer_idx: int) -> tuple[jax.Array, jax.Array]:
        """The convolution and the scan state of one layer. Raises InputError for a layer that is not there."""
        if not 0 <= layer_idx < len(self.ssm_states):
            raise InputError(f"layer {layer_idx} is not there", f"0 to {len(self.ssm_states) - 1}")
        return self.conv_states[layer_idx], self.ssm_states[layer_idx]

    def reset(self) -> None:
        """Zero every state, and start counting again."""
        self.conv_states = [jnp.zeros_like(x) for x in self.conv_states]
        self.ssm_states = [jnp.zeros_like(x) for x in self.ssm_states]
        self.seqlen_offset = 0

    def increment_offset(self, n: int = 1) -> None:
        """Count `n` more tokens."""
        self.seqlen_offset += n


class MambaLM:
    """A Mamba language model: `models.mamba` with its parameters."""

    def __init__(
        self, config: MambaLMConfig, params: MambaParams | None = None, seed: int = 0, dtype: Any = jnp.float32
    ):
        """Parameters are drawn from `seed` where none are given; `dtype` is that of the computation."""
        self.config = config
        self.network = dataclasses.replace(config.network(), dtype=jnp.dtype(dtype).name)
        self.params: MambaParams = _draw(config, jax.random.key(seed)) if params is None else params

    def __call__(self, input_ids: Any, **settings: Any) -> Any:
        """`forward`."""
        return self.forward(input_ids, **settings)

    def num_parameters(self) -> int:
        """The number of parameters."""
        return count(self.network)

    def forward(
        self,
        input_ids: Any,
        labels: Any = None,
        cache: MambaCache | None = None,
        return_hidden_states: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array] | dict[str, Any]:
        """Logits, float32 [batch, length, vocabulary]; with `labels` a pair (logits, loss); a dictionary with
        `return_hidden_states` ("logits", "loss" where there are labels, "hidden_states": what enters each layer, and
        the final hidden state).

        loss: mean negative log-likelihood in nats of labels[:, 1:] under the logits before them; a label of -100 is not
        counted. `cache` is advanced by these tokens in place. Raises InputError for tokens out of the vocabulary.
        """
        tokens = self._tokens(input_ids, "input_ids")
        given = None if cache is None else cache._stacked(self.network)
        if given is not None and given.segment.shape[0] != tokens.shape[0]:
            raise InputError(f"the cache holds {given.segment.shape[0]} rows, input_ids {tokens.shape[0]}")
        output = _apply(self.network, self.params, tokens, given, return_hidden_states)
        if cache is not None:
            dtype = cache.conv_states[0].dtype
            after = MambaCache._of(output.aux["cache"], cache.seqlen_offset + tokens.shape[1], dtype)
            cache.conv_states, cache.ssm_states = after.conv_states, after.ssm_states
            cache.seqlen_offset = after.seqlen_offset
        loss = None
        if labels is not None:
            targets = np.asarray(labels)
            counted = np.where(targets == IGNORED_LABEL, 0, targets)
            if targets.shape != tokens.shape:
                raise InputError(f"labels have shape {targets.shape}, input_ids {tokens.shape}")
            self._tokens(counted, "labels")
            loss = _loss(output.logits, jnp.asarray(targets, jnp.int32))
        if return_hidden_states:
            found = {"logits": output.logits, "hidden_states": output.aux["layers"]}
            return found if loss is None else {**found, "loss": loss}
        return output.logits if loss is None else (output.logits, loss)

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 0.9,
        do_sample: bool = True,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        repetition_penalty: float = 1.0,
        use_cache: bool = True,
        *,
        attention_mask: Any = None,
        seed: int = 0,
    ) -> jax.Array:
        """Prompts int32 [batch, length] and what follows them, [batch, length + generated].

        do_sample false, or temperature 0, takes the likeliest token; top_k 0 and top_p 1 are off. A row ends at
        eos_token_id and is filled with pad_token_id (by default eos_token_id); columns in which every row has ended are
        left out. attention_mask: 0 marks padding on the left of shorter prompts, which takes no part. `use_cache`
        false reads everything again for every token. The same seed gives the same tokens.
        """
        tokens = self._tokens(input_ids, "input_ids")
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 0:
            raise InputError(f"max_new_tokens={max_new_tokens!r} must be an integer of at least 0")
        if tokens.shape[1] == 0:
            raise InputError("input_ids are empty", "give at least one token to go on from")
        if max_new_tokens == 0:
            return tokens
        eos = self._token(eos_token_id, "eos_token_id", -1)
        settings = Decoding(
            temperature=temperature if do_sample else 0.0,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            eos_id=eos,
            pad_id=self._token(pad_token_id, "pad_token_id", max(eos, 0)),
            cache=use_cache,
        )
        batch, length = tokens.shape
        prompt = tokens
        if attention_mask is not None:
            mask = np.asarray(attention_mask)
            if mask.shape != tokens.shape or np.any(mask[:, 1:] < mask[:, :-1]) or not np.all(mask[:, -1]):
                raise InputError("attention_mask must be 0 on the left of a prompt and 1 from there on, in every row")
            prompt = jnp.where(jnp.asarray(mask) != 0, tokens, PADDING)
        canvas = jnp.pad(prompt, ((0, 0), (0, max_new_tokens)))
        free = jnp.broadcast_to(jnp.arange(length + max_new_tokens)[None, :] >= length, canvas.shape)
        # Whatever the vocabulary was rounded up to is never drawn.
        unused = tuple(range(self.config.vocab_size, self.network.vocab_size))
        drawn = _generate(settings, self.network, self.params, canvas, free, jax.random.key(seed), length, unused)
        generated = np.asarray(drawn)[:, length:]
        return jnp.concatenate([tokens, jnp.asarray(generated[:, : _longest(generated, eos)])], axis=1)

    def allocate_inference_cache(self, batch_size: int, device: Any = None, dtype: Any = None) -> MambaCache:
        """An empty cache for so many rows; see `MambaCache.empty`."""
        return MambaCache.empty(self.config, batch_size, device, self.network.dtype if dtype is None else dtype)

    def _tokens(self, tokens: Any, name: str) -> jax.Array:
        array = np.asarray(tokens)
        if array.ndim != 2 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise InputError(f"{name} must be integers [batch, length], got {array.dtype} {array.shape}")
        if array.size and not (0 <= array.min() and array.max() < self.config.vocab_size):
            worst = array.max() if array.max() >= self.config.vocab_size else array.min()
            raise InputError(f"{name} hold {worst}, which is no token of a vocabulary of {self.config.vocab_size}")
        return jnp.asarray(array, jnp.int32)

    def _token(self, token: int | None, name: str, default: int) -> int:
        if token is None:
            return default
        if not isinstance(token, int) or not 0 <= token < self.config.vocab_size:
            raise InputError(f"{name}={token!r} is no token of a vocabulary of {self.config.vocab_size}")
        return token


@functools.partial(jax.jit, static_argnums=(0, 4))
def _apply(network: Mamba, params: MambaParams, tokens: jax.Array, cache: Cache | None, trace: bool):
    return network.apply(params, tokens, cache=cache, trace=trace)


@jax.jit
def _loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    each = masked_cross_entropy(logits[:, :-1], labels[:, 1:])  # negative targets cost nothing
    return jnp.sum(each) / jnp.maximum(jnp.sum(labels[:, 1:] >= 0), 1)


@functools.cache
def _forward_of(network: Mamba) -> Forward:
    """From left to right; a negative token is padding. One object per network: jitted loops hold it as static."""

    def forward(params: Any, tokens: jax.Array, time: Any, carry: Any):
        segments = (tokens >= 0).astype(jnp.int32)
        output = network.apply(params, jnp.maximum(tokens, 0), segments=segments, cache=carry)
        return output, None if carry is None else output.aux["cache"]

    return forward


@functools.partial(jax.jit, static_argnums=(0, 1, 6, 7))
def _generate(settings: Decoding, network: Mamba, params, canvas, free, key, start: int, unused: tuple[int, ...]):
    carry = network.empty_cache(canvas.shape[0]) if settings.cache else None
    forward, params = _forward_of(network), unstack(params, network.layers)
    return generate(settings, forward, params, canvas, free, key, start=start, carry=carry, suppressed=unused).tokens


def _longest(generated: np.ndarray, eos: int) -> int:
    """Columns until the last row has ended."""
    ended = generated == eos
    ends = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, generated.shape[1])
    return int(ends.max())


@functools.partial(jax.jit, static_argnums=0)
def _draw(config: MambaLMConfig, key: jax.Array) -> MambaParams:
    network = config.network()
    params = init(network, key)
    drawn = {"embedding": params.embedding * (config.initializer_range / 0.02)}
    if params.head is not None:
        drawn["head"] = params.head * (config.initializer_range / 0.02)
    bound = config.dt_scale / math.sqrt(network.rank)
    dt = params.layers.scan.dt * config.dt_scale
    if config.dt_init == "constant":
        dt = jnp.full_like(dt, bound)
    scan = dataclasses.replace(params.layers.scan, dt=dt)
    return dataclasses.replace(params, **drawn, layers=dataclasses.replace(params.layers, scan=scan))


def placed(device: Any) -> contextlib.AbstractContextManager[Any]:
    """Make arrays on a kind of device ("cpu", "cuda", "cuda:1") or on a JAX device; None: where JAX would."""
    if device is None:
        return contextlib.nullcontext()
    if not isinstance(device, str):
        return jax.default_device(device)
    kind, _, number = device.partition(":")
    found = backend.devices(kind)
    if number and (not number.isdigit() or int(number) >= len(found)):
        raise InputError(f"device={device!r} is not there", f"{kind}:0 to {kind}:{len(found) - 1}")
    return jax.default_device(found[int(number or 0)])
