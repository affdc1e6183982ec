"""The documented backend of RuvLLM: a small Llama that a test can foretell, from a folder and from a GGUF file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from ruvjax import errors
from ruvjax.api import ruvllm
from ruvjax.api.ruvllm import (
    CacheQuantization,
    CandleBackend,
    DeviceType,
    GenerateParams,
    JaxBackend,
    KvCacheConfig,
    LlmBackend,
    ModelConfig,
    ModelSize,
    Precision,
    RuvLLMError,
)
from ruvjax.core.params import init
from ruvjax.io.gguf_export import save_gguf
from ruvjax.io.huggingface import load_model, save_model, save_pretrained
from ruvjax.models.mamba import Mamba
from ruvjax.models.transformer import Transformer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TINY = Transformer(vocab_size=264, layers=2, width=32, heads=2, mlp_width=64, max_length=96, tied_head=False)
AR = {"length": 96, "autoregressive": True}
GREEDY = GenerateParams(max_tokens=12, temperature=0.0, top_p=1.0, repetition_penalty=1.0)


def tokenizer_of_bytes(folder: Path) -> Path:
    names = ["<s>", "</s>", *LETTERS]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:2]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder / "tokenizer.json"


def saying(text: str) -> Any:
    """Parameters with which each byte of `text` is followed by the next one, and the last by the first."""
    letters = dict(zip(sorted(range(256), key=_letter), LETTERS))
    params = jax.tree.map(jnp.zeros_like, init(TINY, jax.random.key(0)))
    ids = [2 + LETTERS.index(letters[byte]) for byte in text.encode()]
    embedding, head = np.zeros((264, 32), np.float32), np.zeros((264, 32), np.float32)
    for at, (here, there) in enumerate(zip(ids, ids[1:] + ids[:1])):
        embedding[here, at], head[there, at] = 1.0, 1.0
    embedding[0, 0] = 1.0  # after the first token as after the first byte
    ones = jnp.ones_like(params.final_norm)
    return params.replace(embedding=jnp.asarray(embedding), head=jnp.asarray(head), final_norm=ones)


def _letter(byte: int) -> str:
    """GPT-2's letter of a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    return save_pretrained(
        root / "model", TINY, saying("xyz"), tokenizer_of_bytes(root / "tokenizer"), eos_token_id=1, bos_token_id=0
    )


@pytest.fixture(scope="module")
def loaded(folder):
    backend = JaxBackend.with_device(DeviceType.Cpu)
    backend.load_model(str(folder), ModelConfig(quantization=Precision.FP32))
    return backend


def test_the_documented_names_are_there():
    assert CandleBackend is JaxBackend
    assert isinstance(JaxBackend.new(), LlmBackend)
    assert set(ruvllm.__all__) <= set(vars(ruvllm))
    assert [p.bytes_per_element() for p in Precision] == [4, 2, 2, 1, 1, 1]
    assert [p.bits_per_weight for p in Precision] == [32, 16, 16, 8.5, 4.5, 4.5]
    assert [ModelSize.of(n).name for n in (10**8, 10**9, 7 * 10**9, 7 * 10**10)] == ["TINY", "SMALL", "MEDIUM", "LARGE"]
    defaults = GenerateParams()
    assert (defaults.max_tokens, defaults.temperature, defaults.top_p) == (256, 0.7, 0.9)
    assert (defaults.top_k, defaults.repetition_penalty, defaults.stop_sequences, defaults.seed) == (0, 1.1, (), None)
    config = ModelConfig()
    assert (config.max_context, config.use_flash_attention, config.quantization) == (4096, True, Precision.Q4K)
    assert config.device == DeviceType.Best


def test_every_documented_error_is_there():
    names = "Storage Session KvCache PagedAttention Adapter Sona Config OutOfMemory InvalidOperation NotFound Backend"
    for name in (*names.split(), "Model", "Tokenization", "Generation", "Io"):
        variant = getattr(RuvLLMError, name)
        assert issubclass(variant, RuvLLMError) and issubclass(variant, errors.RuvjaxError) and variant.__doc__
        assert variant("what", "hint").line() == "what (hint)"


def test_text_whole_and_in_pieces(loaded):
    assert loaded.generate("x", GREEDY) == "yzxyzxyzxyzx"
    pieces: list[str] = []
    loaded.generate_stream("x", GREEDY, pieces.append)
    assert len(pieces) > 4 and "".join(pieces) == "yzxyzxyzxyzx"
    pieces.clear()
    loaded.generate_stream("x", GREEDY, lambda piece: pieces.append(piece) or len(pieces) < 3)
    assert len(pieces) == 3


def test_stop_sequences_across_tokens(loaded):
    params = GenerateParams(12, 0.0, 1.0, repetition_penalty=1.0, stop_sequences=["zxy"])
    assert loaded.generate("x", params) == "y"
    told: list[str] = []
    loaded.generate_stream("x", params, told.append)
    assert "".join(told) == "y"
    never = GenerateParams(3, 0.0, 1.0, repetition_penalty=1.0, stop_sequences=["zxQ"])
    assert loaded.generate("x", never) == "yzx"  # what was held back is given out at the end


def test_half_characters_are_never_told(tmp_path):
    folder = save_pretrained(
        tmp_path / "model", TINY, saying("é"), tokenizer_of_bytes(tmp_path / "t"), eos_token_id=1, bos_token_id=0
    )
    backend = JaxBackend()
    backend.load_model(folder, ModelConfig(quantization=Precision.FP32))
    pieces: list[str] = []
    backend.generate_stream("é", GenerateParams(5, 0.0, 1.0, repetition_penalty=1.0), pieces.append)
    assert pieces == ["é", "é", "\N{REPLACEMENT CHARACTER}"]  # the fifth token is half of a third one


def test_seeds(tmp_path):
    params = init(TINY, jax.random.key(0))
    folder = save_pretrained(
        tmp_path / "model", TINY, params, tokenizer_of_bytes(tmp_path / "t"), eos_token_id=1, bos_token_id=0
    )
    backend = JaxBackend()
    backend.load_model(folder, ModelConfig(quantization=Precision.FP32))
    ask = GenerateParams(max_tokens=12, temperature=1.0, seed=5)
    assert backend.generate("ab", ask) == backend.generate("ab", ask)
    assert backend.generate("ab", GenerateParams(max_tokens=12, temperature=1.0, seed=6)) != backend.generate("ab", ask)
    unseeded = GenerateParams(max_tokens=12, temperature=1.0)
    assert backend.generate("ab", unseeded) != backend.generate("ab", unseeded)
    high = GenerateParams(max_tokens=12, temperature=1.0, seed=5 + 2**32)
    assert backend.generate("ab", high) != backend.generate("ab", ask)


@pytest.mark.parametrize("precision", list(Precision))
def test_every_precision_says_the_same(folder, precision):
    backend = JaxBackend()
    backend.load_model(folder, ModelConfig(quantization=precision))
    assert backend.generate("x", GREEDY) == "yzxyzxyzxyzx"
    info = backend.model_info()
    assert info is not None and backend.is_loaded()
    expected = {"Q8": "Q8_0", "Q4": "Q4_0/Q8_0", "Q4K": "Q4_0/Q8_0"}.get(precision.name)  # rows of 32: no Q4_K
    assert info.weights == expected or not precision.quantized
    assert backend.memory_stats().weights == info.memory_bytes < info.parameters * 4 + 1


# One of each kind; the others are among the slow tests.
STORES = [
    store if store in (CacheQuantization.INT4_ROTATED, Precision.Q8) else pytest.param(store, marks=pytest.mark.slow)
    for store in (*CacheQuantization, Precision.Q8, Precision.Q4K)
]


@pytest.mark.parametrize("store", STORES)
def test_a_cache_in_two_tiers(folder, loaded, store):
    cache = KvCacheConfig(tail_length=8, migration_batch=4, store_precision=store, max_tokens=80)
    backend = JaxBackend()
    backend.load_model(folder, ModelConfig(quantization=Precision.FP32, kv_cache_config=cache))
    long = GenerateParams(60, 0.0, 1.0, repetition_penalty=1.0)
    assert backend.generate("x", long) == loaded.generate("x", long)
    info = backend.model_info()
    assert info is not None and info.max_context == 80
    assert backend.memory_stats().cache > 0


def test_a_gguf_file(folder, tmp_path):
    network, params, files = load_model(folder)
    path = save_gguf(tmp_path / "tiny.gguf", network, params, "Q8_0", files.tokenizer)
    backend = JaxBackend()
    backend.load_model(path, ModelConfig(quantization=Precision.Q8))
    assert backend.generate("x", GREEDY) == "yzxyzxyzxyzx"


def test_a_mamba(tmp_path):
    model = Mamba(vocab_size=264, layers=1, width=16, state=4)
    params = init(model, jax.random.key(1))
    folder = save_model(tmp_path / "model", model, params, tokenizer_of_bytes(tmp_path / "t"), eos_token_id=1)
    backend = JaxBackend()
    backend.load_model(folder, ModelConfig(quantization=Precision.FP32))
    assert isinstance(backend.generate("ab", GREEDY), str)
    with pytest.raises(RuvLLMError.Config, match="Mamba is not quantized"):
        backend.load_model(folder)
    with pytest.raises(RuvLLMError.Config, match="no keys"):
        backend.load_model(folder, ModelConfig(quantization=Precision.FP32, kv_cache_config=KvCacheConfig()))
    assert backend.is_loaded()


def test_bad_input(loaded, folder, tmp_path):
    empty = JaxBackend()
    assert not empty.is_loaded() and empty.model_info() is None and empty.tokenizer() is None
    with pytest.raises(RuvLLMError.InvalidOperation, match="no model is loaded"):
        empty.generate("x")
    with pytest.raises(RuvLLMError.NotFound, match="no such folder"):
        empty.load_model(tmp_path / "nothing")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RuvLLMError.Model, match="model.safetensors"):
        loaded.load_model(broken)
    assert loaded.generate("x", GREEDY) == "yzxyzxyzxyzx"  # the model before is still there
    (broken / "tokenizer.json").unlink()
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(RuvLLMError.Tokenization, match="tokenizer.json"):
        empty.load_model(broken)
    assert not empty.is_loaded()
    with pytest.raises(RuvLLMError.InvalidOperation, match="the context 96"):
        loaded.generate("x" * 96, GREEDY)
    with pytest.raises(RuvLLMError.Generation, match="KeyError: 'no'"):
        loaded.generate_stream("x", GREEDY, lambda piece: {}["no"])
    with pytest.raises(RuvLLMError.Backend):
        JaxBackend.with_device(DeviceType.Cuda(99))
    for name, value in (("temperature", -1.0), ("top_p", 0.0), ("min_p", 2), ("repetition_penalty", 0), ("top_k", -1)):
        with pytest.raises(RuvLLMError.Config, match=f"GenerateParams.{name}"):
            GenerateParams(**{name: value})
    for wrong in ({"max_tokens": 0}, {"seed": -1}, {"stop_sequences": ("",)}, {"stop_sequences": "abc"}):
        with pytest.raises(RuvLLMError.Config):
            GenerateParams(**wrong)
    for wrong in ({"max_context": 0}, {"quantization": "Q4"}, {"device": "cpu"}, {"kv_cache_config": 8}):
        with pytest.raises(RuvLLMError.Config):
            ModelConfig(**wrong)
    with pytest.raises(RuvLLMError.Config):
        DeviceType("gpu")


def test_a_window_has_no_cache_in_two_tiers(tmp_path):
    model = dataclasses.replace(TINY, window=16)
    params = init(model, jax.random.key(0))
    folder = save_model(tmp_path / "m", model, params, tokenizer_of_bytes(tmp_path / "t"), eos_token_id=1, diffusion=AR)
    with pytest.raises(RuvLLMError.Config, match="window"):
        JaxBackend().load_model(folder, ModelConfig(quantization=Precision.FP32, kv_cache_config=KvCacheConfig()))


def test_logits_that_are_not_finite(tmp_path):
    params = init(TINY, jax.random.key(0))
    folder = save_pretrained(
        tmp_path / "model", TINY, params, tokenizer_of_bytes(tmp_path / "t"), eos_token_id=1, bos_token_id=0
    )
    backend = JaxBackend()
    backend.load_model(folder, ModelConfig(quantization=Precision.FP32))
    model = backend._model
    assert model is not None
    object.__setattr__(model, "params", jax.tree.map(lambda x: x * jnp.nan, model.params))
    with pytest.raises(RuvLLMError.Generation, match="not finite"):
        backend.generate("x", GREEDY)
