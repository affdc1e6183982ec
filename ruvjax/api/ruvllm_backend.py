"""The language-model backend of RuvLLM: a checkpoint of any causal family from a folder, a GGUF file or the hub.

    backend = JaxBackend.new()
    backend.load_model("Qwen/Qwen2.5-0.5B-Instruct")
    print(backend.generate("def main():", GenerateParams(max_tokens=64)))

Diffusion checkpoints are run by `ruvjax.api.ruvdllm`.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ruvjax import errors
from ruvjax.api.ruvllm_errors import RuvLLMError
from ruvjax.api.ruvllm_hidden import forward_with_update, predicting
from ruvjax.api.ruvllm_precision import Precision
from ruvjax.api.ruvllm_types import DeviceType, GenerateParams, MemoryStats, ModelConfig, ModelInfo, ModelSize
from ruvjax.api.tokenizer_files import read_tokenizer
from ruvjax.core import backend
from ruvjax.core.adapted import Lora
from ruvjax.core.params import count, unstack
from ruvjax.core.tiered import Tiers
from ruvjax.data.tokenize import Tokenizer
from ruvjax.decoding.autoregressive import Decoding
from ruvjax.decoding.batching import Request, Token, stream
from ruvjax.decoding.text import Held, Pieces, add, rest, until
from ruvjax.io.hub import download, model_path
from ruvjax.io.huggingface import load_model
from ruvjax.io.quantize import quantize_params
from ruvjax.lora.sona import Sample
from ruvjax.models.causal import LanguageModel, forward_left_of
from ruvjax.models.transformer import Transformer

CHUNK = 64  # tokens of a prompt that are read in one pass


@dataclass(frozen=True, eq=False)
class _Model:
    """What is loaded. params: with layers apart, as decoding wants them. start_id: stands before every text, or -1."""

    network: LanguageModel
    params: Any
    tokenizer: Tokenizer
    config: ModelConfig
    info: ModelInfo
    ends: tuple[int, ...]
    start_id: int

    @property
    def never_drawn(self) -> tuple[int, ...]:
        """Tokens that no text holds: the mask, and the padding where that is not an end token as well."""
        return tuple(i for i in (self.tokenizer.mask_id, self.tokenizer.pad_id) if i >= 0 and i not in self.ends)

    def empty_cache(self, rows: int, capacity: int) -> Any:
        if not isinstance(self.network, Transformer):
            return self.network.empty_cache(rows)
        if (kept := self.config.kv_cache_config) is None:
            return self.network.empty_cache(rows, capacity)
        tiers = Tiers(kept.store.value, kept.tail_length, kept.migration_batch)
        return self.network.empty_tiered_cache(tiers, rows, capacity, chunk=CHUNK, dtype=kept.tail_dtype)


class JaxBackend:
    """One model on one device, for one thread at a time.

    The only state is the loaded model and the size of the last caches; a failing `load_model` leaves both as they were.
    """

    def __init__(self, device: DeviceType = DeviceType.Best):
        self._device = _find(device)
        self._model: _Model | None = None
        self._update: Lora | None = None
        self._cache_bytes = 0

    @classmethod
    def new(cls) -> "JaxBackend":
        """On the best device here."""
        return cls()

    @classmethod
    def with_device(cls, device: DeviceType) -> "JaxBackend":
        """On this device. Raises RuvLLMError.Backend where it is not there."""
        return cls(device)

    def download_model(
        self, model_id: str, quantization: Precision = Precision.Q4K, cache_dir: str | os.PathLike[str] | None = None
    ) -> Path:
        """Fetch a model of the hub, and return the folder it lies in.

        The hub holds one set of weights whatever the `quantization`: `load_model` quantizes as it reads. cache_dir:
        another place than the hub's own. Raises RuvLLMError.NotFound where the model cannot be had.
        """
        if not isinstance(quantization, Precision):
            raise RuvLLMError.Config(f"quantization={quantization!r} is no Precision", "such as Precision.Q4K")
        cache = None if cache_dir is None else Path(cache_dir).expanduser()
        with _as(RuvLLMError.NotFound):
            return download(model_id, cache=cache)

    def load_model(self, model_id: str | os.PathLike[str], config: ModelConfig | None = None) -> None:
        """Load from a model folder, a .gguf file, or the hub.

        Raises RuvLLMError.NotFound, Model, Tokenization, InvalidOperation (a model that does not decode from left to
        right), Backend (config.device is not there), OutOfMemory; the model that was loaded before then stays.
        """
        config = ModelConfig() if config is None else config
        device = self._device if config.device == DeviceType.Best else _find(config.device)
        with _memory(), jax.default_device(device):
            self._model = _read(model_id, config, device)
        self._device, self._cache_bytes, self._update = device, 0, None

    def generate(self, prompt: str, params: GenerateParams | None = None) -> str:
        """The text that follows `prompt`.

        Raises RuvLLMError.InvalidOperation where no model is loaded or the prompt fills the context, Tokenization,
        Generation (logits that are not finite), OutOfMemory.
        """
        with contextlib.closing(self._pieces(prompt, params or GenerateParams())) as pieces:
            return "".join(pieces)

    def generate_stream(self, prompt: str, params: GenerateParams | None, callback: Callable[[str], Any]) -> None:
        """Call `callback` with each piece of text as soon as it cannot change any more; joined they are what `generate`
        returns. It ends early where the callback returns False, and with RuvLLMError.Generation where it raises."""
        with contextlib.closing(self._pieces(prompt, params or GenerateParams())) as pieces:
            for piece in pieces:
                try:
                    wanted = callback(piece)
                except Exception as error:
                    told = f"the callback raised {type(error).__name__}: {error}"
                    raise RuvLLMError.Generation(told) from error
                if wanted is False:
                    return

    def tokenizer(self) -> Tokenizer | None:
        """That of the loaded model."""
        return None if self._model is None else self._model.tokenizer

    def model_info(self) -> ModelInfo | None:
        """What is loaded."""
        return None if self._model is None else self._model.info

    def is_loaded(self) -> bool:
        """Whether a model is."""
        return self._model is not None

    def device(self) -> DeviceType:
        """Where models run."""
        platform = str(self._device.platform)
        return DeviceType({"gpu": "cuda", "METAL": "metal"}.get(platform, platform), self._device.id)

    def memory_stats(self) -> MemoryStats:
        """Bytes held now."""
        told = self._device.memory_stats() or {}
        weights = 0 if self._model is None else self._model.info.memory_bytes
        return MemoryStats(weights, self._cache_bytes, told.get("bytes_in_use"), told.get("bytes_limit"))

    def attach(self, update: Lora | None) -> None:
        """From now on texts are generated with `update` added to the last hidden states (None: with nothing added). A
        model that is loaded later has none. Raises RuvLLMError.InvalidOperation, Adapter (of another width)."""
        width = self._loaded().network.width
        if update is not None and (update.a.ndim, update.a.shape[0], update.b.shape[-1]) != (2, width, width):
            shapes = f"{update.a.shape} and {update.b.shape}"
            raise RuvLLMError.Adapter(f"an update with factors {shapes} for a model of width {width}")
        self._update = update

    def read(self, request: str, response: str) -> Sample:
        """The last hidden states from which the loaded model, without any update, predicts the tokens of `response`
        after `request`: one row a token, padded to a power of two.

        Raises RuvLLMError.InvalidOperation (no model, an empty response, more tokens than the context), Tokenization.
        """
        model = self._loaded()
        with _as(RuvLLMError.Tokenization):
            asked, said = model.tokenizer.encode(request), model.tokenizer.encode(response)
        before = [model.start_id] * (model.start_id >= 0) + asked.tolist()
        count, length = len(said), len(before) + len(said)
        if not before or not count:
            raise RuvLLMError.InvalidOperation("the request or the response has no tokens", "give both a text")
        if length > model.info.max_context:
            told = f"request and response have {length} tokens, the context {model.info.max_context}"
            raise RuvLLMError.InvalidOperation(told, "shorten them, or load the model with a larger max_context")
        with _memory():
            return predicting(forward_left_of(model.network), model.params, before, said.tolist())

    def readout(self) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
        """The loaded model's head, (params, hidden states [*, width]) -> logits [*, vocabulary], and its params."""
        model = self._loaded()
        return model.network.head, model.params

    def width(self) -> int:
        """The width of the loaded model's hidden states."""
        return self._loaded().network.width

    def _loaded(self) -> _Model:
        if self._model is None:
            raise RuvLLMError.InvalidOperation("no model is loaded", "call load_model first")
        return self._model

    def _pieces(self, prompt: str, params: GenerateParams) -> Generator[str, None, None]:
        model, update = self._loaded(), self._update
        with _as(RuvLLMError.Tokenization):
            tokens = model.tokenizer.encode(prompt).tolist()
        tokens = [model.start_id, *tokens] if model.start_id >= 0 else tokens
        if not tokens:
            raise RuvLLMError.InvalidOperation("the prompt is empty and the model has no first token", "give a prompt")
        room = model.info.max_context - len(tokens)
        if room < 1:
            raise RuvLLMError.InvalidOperation(
                f"the prompt has {len(tokens)} tokens, the context {model.info.max_context}",
                "shorten it, or load the model with a larger max_context (and kv_cache_config.max_tokens)",
            )
        request = Request(tokens, min(params.max_tokens, room))
        seed = int.from_bytes(os.urandom(8)) if params.seed is None else params.seed
        # XLA compiles for a shape: a few capacities serve all lengths.
        capacity = max(CHUNK, 1 << (len(tokens) + request.new_tokens - 1).bit_length())

        def empty(rows: int) -> Any:
            cache = model.empty_cache(rows, capacity)
            self._cache_bytes += sum(x.nbytes for x in jax.tree.leaves(cache))
            return cache

        self._cache_bytes = 0
        told = stream(
            _decoding(params, model),
            forward_left_of(model.network) if update is None else forward_with_update(model.network),
            model.params if update is None else (model.params, update),
            [request],
            jax.random.fold_in(jax.random.key(seed & 0xFFFFFFFF), seed >> 32),  # a key takes 32 bits
            empty=empty,
            vocabulary=model.network.vocab_size,
            slots=1,
            chunk=CHUNK,
            suppressed=model.never_drawn,
        )
        decode, said, held = model.tokenizer.decode, Pieces(), Held()
        while (token := self._next(told)) is not None:
            said, text = add(decode, said, token)
            held, text = until(params.stop_sequences, held, text)
            if text:
                yield text
            if held.stopped:
                return
        held, text = until(params.stop_sequences, held, rest(decode, said))
        if last := text + ("" if held.stopped else held.text):
            yield last

    def _next(self, told: Generator[Token, bool | None, Any]) -> int | None:
        """The next token. The device is the default only meanwhile: what a callback computes is its own affair."""
        with _memory(), _as(RuvLLMError.Generation), jax.default_device(self._device):
            found = next(told, None)
            return None if found is None else found.token


CandleBackend = JaxBackend
"""The documented name of the backend."""


def _decoding(params: GenerateParams, model: _Model) -> Decoding:
    known = model.tokenizer.vocab_size
    with _as(RuvLLMError.Config):
        return Decoding(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            eos_id=model.ends[0] if model.ends else -1,
            end_ids=model.ends[1:],
            vocabulary=known if known < model.network.vocab_size else 0,
        )


def _find(device: DeviceType) -> jax.Device:
    try:
        found = backend.devices(device.kind)
    except errors.BackendError as error:
        raise RuvLLMError.Backend(str(error), error.hint) from error
    if device.index >= len(found):
        raise RuvLLMError.Backend(f"{device.kind} has no device {device.index}", f"0 to {len(found) - 1}")
    return found[device.index]


def _read(model_id: str | os.PathLike[str], config: ModelConfig, device: jax.Device) -> _Model:
    with _as(RuvLLMError.NotFound):
        path = model_path(model_id, token=config.hf_token)
    path = path / "model" if (path / "model" / "config.json").is_file() else path
    is_file = path.suffix == ".gguf" and path.is_file()
    wanted = config.quantization
    with _as(RuvLLMError.Model):
        plain = None if wanted.quantized else wanted.value
        network, params, files = load_model(path, plain, quantized=is_file and wanted.quantized)
        if not files.causal:
            raise RuvLLMError.InvalidOperation(
                f"{path}: this model does not decode from left to right", "ruvjax.api.ruvdllm runs diffusion models"
            )
        weights = files.weights
        if wanted.quantized:
            if not isinstance(network, Transformer):
                raise RuvLLMError.Config(f"{path}: a Mamba is not quantized", "quantization=Precision.BF16")
            params, weights = quantize_params(network, params, wanted.value, str(path))
        if config.kv_cache_config is not None:
            if not isinstance(network, Transformer):
                raise RuvLLMError.Config(f"{path}: a Mamba has no keys and values", "leave kv_cache_config out")
            if network.window:
                raise RuvLLMError.Config(
                    f"{path}: attention within a window has no cache in two tiers", "leave kv_cache_config out"
                )
    with _as(RuvLLMError.Tokenization):
        tokenizer = read_tokenizer(path, files)
    if tokenizer.vocab_size > network.vocab_size:
        sizes = f"{tokenizer.vocab_size} entries, the model {network.vocab_size}"
        raise RuvLLMError.Tokenization(f"{path}: the tokenizer has {sizes}", "copy the right one")
    params = jax.device_put(params, device)
    cache = config.kv_cache_config
    limits = [config.max_context] + ([cache.max_tokens] if cache else [])
    limits += [network.max_length] if isinstance(network, Transformer) else []
    info = ModelInfo(
        path=path,
        architecture=files.model_type,
        parameters=count(network),
        size=ModelSize.of(count(network)),
        weights=weights,
        memory_bytes=sum(x.nbytes for x in jax.tree.leaves(params)),
        vocab_size=network.vocab_size,
        max_context=min(limits),
    )
    ours = bool(files.diffusion)  # such models were trained on texts that follow the end of another
    ends = tuple(dict.fromkeys((*files.eos_token_ids, tokenizer.eos_id)))
    start = tokenizer.eos_id if ours else tokenizer.start_id
    params = unstack(params, network.layers)
    return _Model(network, params, tokenizer, config, info, ends, start)


@contextlib.contextmanager
def _as(variant: type[RuvLLMError]) -> Iterator[None]:
    """Errors of ruvjax as one documented variant, of the system as RuvLLMError.Io."""
    try:
        yield
    except RuvLLMError:
        raise
    except errors.RuvjaxError as error:
        raise variant(str(error), error.hint) from error
    except OSError as error:
        raise RuvLLMError.Io(f"{error.filename or ''}: {error.strerror or error}") from error


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    """What the runtime says of memory that is gone, as RuvLLMError.OutOfMemory."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            first = str(error).splitlines()[0] if str(error) else "no memory is left"
            hint = "a smaller max_context, or a quantization of fewer bits"
            raise RuvLLMError.OutOfMemory(first, hint) from error
        raise
