"""The documented interface: every name, what generation promises, and what each way of failing raises."""

import dataclasses
import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax import errors
from ruvjax.api import ruvdllm as api
from ruvjax.core.events import replay
from ruvjax.core.params import init
from ruvjax.core.rope import RopeScaling
from ruvjax.data.tokenize import MASK_ID, TokenizerConfig, train_tokenizer
from ruvjax.diffusion.sampler import Sampler
from ruvjax.diffusion.schedule import Schedule
from ruvjax.io.huggingface import save_model
from ruvjax.models.transformer import Transformer

TINY = Transformer(vocab_size=259, layers=1, width=16, heads=2, mlp_width=32, max_length=48, tied_head=False)
FEW = api.SamplerConfig(num_steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), [])
    schedule = dataclasses.asdict(Schedule("cosine"))
    saved = tokenizer.save(root / "tokenizer")
    ids = {"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    params = jax.tree.map(lambda x: 8 * x, init(TINY, jax.random.key(3)))  # peaked: a random network is almost uniform
    return save_model(root / "model", TINY, params, saved, **ids, diffusion={"schedule": schedule}).parent


@pytest.fixture(scope="module")
def model(folder):
    return api.DiffusionModel.load_f16(folder / "model")


@pytest.fixture(scope="module")
def llm(folder):
    return api.RuvDLLM.with_config(folder, api.RuvDLLMConfig(api.BackendType.SIMD, sampler_config=FEW))


DOCUMENTED = {
    "RuvDLLM": "load with_config generate generate_with_options generate_stream enable_learning disable_learning "
    "join_federation leave_federation info stats",
    "RuvDLLMConfig": "",
    "GenerationOptions": "",
    "RuvDLLMStats": "",
    "ModelInfo": "",
    "DiffusionModel": "load_q4 load_f16 forward forward_with_hidden config schedule",
    "DiffusionConfig": "from_file llama_7b llama_13b qwen_7b",
    "NoiseSchedule": "",
    "NoiseScheduleType": "LINEAR COSINE",
    "MDLMSampler": "new with_config generate generate_with_talora generate_with_dgr generate_stream",
    "SamplerConfig": "",
    "GenerationStep": "",
    "ComputeBackend": "auto_detect cuda metal vulkan simd scalar name device_info denoise_step batch_forward",
    "CUDABackend": "",
    "MetalBackend": "",
    "VulkanBackend": "",
    "SIMDBackend": "",
    "ScalarBackend": "",
    "BackendType": "CUDA METAL VULKAN SIMD SCALAR",
    "DeviceInfo": "",
    "PrivacyTier": "PRIVATE GROUP TENANT PUBLIC",
    "ModelError": "LoadError ConfigError QuantizationError",
    "GenerationError": "TokenizationError ContextLengthExceeded Interrupted",
    "ConfigError": "",
    "BackendError": "",
    "RuvDLLMError": "",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_names_are_there_and_documented(name):
    cls = getattr(api, name)
    assert name in api.__all__ and inspect.getdoc(cls)
    for member in DOCUMENTED[name].split():
        assert hasattr(cls, member), f"{name}.{member}"


def test_documented_configuration_fields_and_defaults():
    names = [field.name for field in dataclasses.fields(api.DiffusionConfig)]
    assert names[:12] == (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rope_theta rms_norm_eps num_timesteps noise_schedule"
    ).split() + ["head_dim"]
    assert dataclasses.astuple(api.SamplerConfig()) == (8, 1.0, 0.9, 50, 1.0)
    names = [field.name for field in dataclasses.fields(api.SamplerConfig)]
    assert names == ["num_steps", "temperature", "top_p", "top_k", "repetition_penalty"]
    names = [field.name for field in dataclasses.fields(api.RuvDLLMConfig)]
    assert names == ("backend enable_talora enable_dgr talora_config dgr_config sampler_config privacy_tier".split())
    tiers = api.PrivacyTier
    assert tiers.PRIVATE < tiers.GROUP < tiers.TENANT < tiers.PUBLIC


@pytest.mark.parametrize(
    "error, base, code",
    [
        (api.ModelError.LoadError, errors.InputError, 2),
        (api.ModelError.ConfigError, api.ModelError, 2),
        (api.ModelError.QuantizationError, api.ModelError, 2),
        (api.ConfigError, errors.ConfigError, 2),
        (api.BackendError, errors.BackendError, 2),
        (api.GenerationError.TokenizationError, api.GenerationError, 2),
        (api.GenerationError.ContextLengthExceeded, errors.InputError, 2),
        (api.GenerationError.Interrupted, api.GenerationError, 130),
    ],
)
def test_errors_keep_their_families_and_exit_codes(error, base, code):
    assert issubclass(error, base) and issubclass(error, api.RuvDLLMError)
    made = error("what", "hint")
    assert made.exit_code == code and made.line() == "what (hint)"


def test_forward_is_the_network_at_the_time_of_the_timestep(folder):
    network = dataclasses.replace(TINY, time="sinusoidal")
    params = init(network, jax.random.key(0))
    model = api.DiffusionModel(network, params, mask_id=MASK_ID)
    tokens = np.arange(12).reshape(2, 6)
    expected = network.apply(params, jnp.asarray(tokens, jnp.int32), time=jnp.array([0.25, 0.25]))
    hidden, logits = model.forward_with_hidden(tokens, 250)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(hidden, expected.hidden, atol=1e-5)
    np.testing.assert_array_equal(model.forward(tokens, 250), logits)
    assert np.abs(np.asarray(model.forward(tokens, 900)) - np.asarray(logits)).max() > 1e-3


def test_padding_is_not_attended_to(model):
    tokens = np.array([[5, 6, 7, 8, 9, 10]])
    mask = np.array([[1, 1, 1, 1, 0, 0]])
    padded = model.forward(tokens, 500, mask)[:, :4]
    np.testing.assert_allclose(padded, model.forward(tokens[:, :4], 500), atol=1e-4)
    assert np.abs(np.asarray(model.forward(tokens, 500)[:, :4]) - np.asarray(padded)).max() > 1e-3


@pytest.mark.parametrize(
    "arguments, error",
    [
        (([[1, 2]], 1001), api.ConfigError),
        (([[1, 2]], -1), api.ConfigError),
        (([1, 2], 5), api.ModelError.ConfigError),
        (([[0.5]], 5), api.ModelError.ConfigError),
        (([[259]], 5), api.ModelError.ConfigError),
        (([[-1]], 5), api.ModelError.ConfigError),
        (([[1] * 49], 5), api.GenerationError.ContextLengthExceeded),
        (([[1, 2]], 5, [[1, 2]]), api.ModelError.ConfigError),
        (([[1, 2]], 5, [[1]]), api.ModelError.ConfigError),
    ],
)
def test_forward_refuses_what_it_cannot_take(arguments, error, model):
    with pytest.raises(error):
        model.forward(*arguments)


def test_the_schedule_is_the_one_that_was_trained_with(model):
    schedule = model.schedule()
    assert schedule.kind is api.NoiseScheduleType.COSINE and schedule.num_timesteps == 1000
    assert schedule.mask_probability(0) == 0 and schedule.alpha(1000) == pytest.approx(0, abs=1e-6)
    assert schedule.alpha(500) == pytest.approx(np.cos(np.pi / 4), abs=1e-6)
    assert model.config().noise_schedule is api.NoiseScheduleType.COSINE


@pytest.mark.parametrize("kind", api.NoiseScheduleType)
def test_every_schedule_type_can_be_made_and_named(kind):
    betas = (0.1, 0.5, 0.9) if kind is api.NoiseScheduleType.CUSTOM else None
    schedule = api.NoiseSchedule.new(kind, 100, betas)
    assert schedule.kind is kind
    shares = [schedule.alpha(t) for t in range(0, 101, 10)]
    assert all(late < early for early, late in zip(shares, shares[1:]))
    with pytest.raises(api.ConfigError, match="betas"):
        api.NoiseSchedule.new(kind, 100, None if betas else (0.1,))


def test_presets_equal_the_shapes_of_the_configurations():
    yaml = pytest.importorskip("yaml")
    folder = Path(__file__).parents[2] / "configs" / "model"

    def read(name):
        values = yaml.safe_load((folder / f"{name}.yaml").read_text())
        base: dict = {}
        for default in values.pop("defaults", []):
            base |= read(default)
        return base | values

    for name in ("llama_7b", "llama_13b", "qwen_7b"):
        values = read(name)
        values.pop("_target_")
        scaling = values.pop("rope_scaling")
        scaling.pop("_target_")
        values["rope_scaling"] = RopeScaling(**scaling)
        expected = Transformer(**values)
        preset = getattr(api.DiffusionConfig, name)().transformer()
        same = {"kv_heads": preset.kv_heads, "head_dim": preset.head_dim}
        assert (preset.key_heads, preset.dim_per_head) == (expected.key_heads, expected.dim_per_head)
        assert preset == dataclasses.replace(expected, **same), name


def test_config_from_the_documented_file(tmp_path):
    path = tmp_path / "diffusion.json"
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_theta": 5000.0,
        "num_timesteps": 500,
        "noise_schedule": "SquaredCosine",
    }
    path.write_text(json.dumps(values))
    config = api.DiffusionConfig.from_file(path)
    assert (config.hidden_size, config.num_timesteps) == (32, 500)
    assert config.noise_schedule is api.NoiseScheduleType.SQUARED_COSINE
    assert config.transformer().kv_heads == 2
    for change, message in (
        ({"hiden_size": 3}, "hiden_size"),
        ({"noise_schedule": "spiral"}, "spiral"),
        ({"hidden_size": 33}, "multiple"),
        ({"num_timesteps": 0}, "num_timesteps"),
        ({"hidden_size": "32"}, "width='32'"),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(api.ConfigError, match=message):
            api.DiffusionConfig.from_file(path)
    path.write_text("{}")
    with pytest.raises(api.ConfigError, match="vocab_size"):
        api.DiffusionConfig.from_file(path)
    with pytest.raises(api.ConfigError, match="absent"):
        api.DiffusionConfig.from_file(tmp_path / "absent.json")


def test_config_from_a_model_folder(folder, model):
    assert api.DiffusionConfig.from_file(folder / "model") == model.config()
    assert model.config().transformer().apply is not None
    rebuilt = model.config().transformer()
    assert dataclasses.replace(rebuilt, kv_heads=TINY.kv_heads) == TINY


def test_generation_is_the_same_whole_and_in_pieces(llm):
    text = llm.generate("def f(", 16)
    assert text and llm.generate("def f(", 16) == text
    pieces = []
    llm.generate_stream("def f(", 16, lambda piece: pieces.append(piece) or True)
    assert "".join(pieces) == text
    other = llm.generate_with_options("def f(", api.GenerationOptions(16, seed=1))
    assert other != text


def test_steps_replay_to_the_text_and_the_prefix_never_changes(model):
    sampler = api.MDLMSampler.with_config(api.SamplerConfig(num_steps=5))
    steps = []
    sampler.generate_stream(model, "ab", 20, lambda step: steps.append(step) or True)
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert steps[0].timestep == 1000 and all(a.timestep > b.timestep for a, b in zip(steps, steps[1:]))
    assert steps[-1].masked == 0 and steps[-1].text == sampler.generate(model, "ab", 20)
    for before, after in zip(steps, steps[1:]):
        assert after.text.startswith(before.text) and after.masked <= before.masked
    start = np.array([[*model.tokenizer.encode("ab"), *[MASK_ID] * 20]])
    events = [event for step in steps for event in step.events]
    np.testing.assert_array_equal(replay(start, events, MASK_ID)[0], steps[-1].tokens)


def test_a_callback_that_returns_false_ends_the_generation(model, llm):
    calls = []
    api.MDLMSampler(FEW).generate_stream(model, "ab", 8, lambda step: bool(calls.append(step)))
    assert len(calls) == 1
    pieces = []
    llm.generate_stream("ab", 8, lambda piece: bool(pieces.append(piece)))
    assert len(pieces) == 1


def test_a_full_sampler_may_replace_the_documented_settings(model):
    greedy = Sampler(order="confidence", steps=4, temperature=0.0)
    texts = {api.MDLMSampler.with_config(greedy, seed).generate(model, "x", 12) for seed in (0, 1)}
    assert len(texts) == 1


def test_padding_to_a_bucket_does_not_reach_the_text(model):
    """A greedy text is the one that an unpadded row gives."""
    greedy = Sampler(order="confidence", steps=12, temperature=0.0)
    assert api.MDLMSampler.with_config(greedy).generate(model, "ab", 12)
    from ruvjax.api.ruvdllm_model import forward_of
    from ruvjax.diffusion.sampler import sample

    tokens = jnp.array([[*model.tokenizer.encode("ab"), *[MASK_ID] * 12]], jnp.int32)
    bare = sample(greedy, forward_of(TINY, 0, None), model.params, tokens, jax.random.key(0), mask_id=MASK_ID)
    expected = model.tokenizer.decode(np.asarray(bare.tokens)[0, 2:])
    assert api.MDLMSampler.with_config(greedy).generate(model, "ab", 12) == expected


def test_stats_and_info_count(folder):
    llm = api.RuvDLLM.with_config(folder, api.RuvDLLMConfig(api.BackendType.SIMD, sampler_config=FEW))
    assert llm.stats() == api.RuvDLLMStats() and llm.stats().tokens_per_second == 0
    llm.generate("a", 8)
    llm.generate_stream("a", 8, lambda piece: True)
    stats = llm.stats()
    assert stats.generations == 2 and 0 < stats.tokens <= 16 and 0 < stats.forward_passes <= 6
    assert stats.tokens_per_second > 0
    info = llm.info()
    assert (info.vocab_size, info.max_length, info.backend, info.weights) == (259, 48, "simd", "F32")
    assert info.memory_bytes == 4 * info.parameters and info.path == folder


@pytest.mark.parametrize(
    "prompt, length, error",
    [
        ("a" * 40, 9, api.GenerationError.ContextLengthExceeded),
        ("a", 0, api.ConfigError),
        ("\ud800", 4, api.GenerationError.TokenizationError),
    ],
)
def test_generation_refuses_what_it_cannot_do(prompt, length, error, llm):
    with pytest.raises(error):
        llm.generate(prompt, length)


def test_sigint_becomes_interrupted(model):
    def interrupt(step):
        raise KeyboardInterrupt

    steps = api.MDLMSampler(FEW).steps(model, "ab", 8)
    next(steps)
    with pytest.raises(api.GenerationError.Interrupted):
        steps.throw(KeyboardInterrupt())


@pytest.mark.parametrize("name", ["num_steps", "temperature", "top_p", "top_k", "repetition_penalty"])
def test_sampler_settings_are_checked(name):
    with pytest.raises(api.ConfigError, match=name):
        api.SamplerConfig(**{name: -1})


def test_models_that_cannot_be_loaded(tmp_path, folder):
    with pytest.raises(api.ModelError.LoadError, match="nowhere"):
        api.RuvDLLM.load(tmp_path / "nowhere")
    save_model(tmp_path / "causal", TINY, init(TINY, jax.random.key(0)))
    causal = api.DiffusionModel.load_f16(tmp_path / "causal")
    assert causal.forward([[1, 2]], 0).shape == (1, 2, 259)
    with pytest.raises(api.ModelError.ConfigError, match="mask token"):
        api.RuvDLLM.load(tmp_path / "causal")
    with pytest.raises(api.ModelError.ConfigError, match="mask token"):
        api.MDLMSampler.new().generate(causal, "a", 4)
    save_model(tmp_path / "odd", TINY, causal.params, mask_token_id=1, diffusion={"schedule": {"kind": "spiral"}})
    with pytest.raises(api.ModelError.ConfigError, match="spiral"):
        api.DiffusionModel.load_f16(tmp_path / "odd")


@pytest.mark.parametrize(
    "call",
    [
        lambda llm, model: llm.join_federation({}),
        lambda llm, model: llm.leave_federation(),
    ],
)
def test_what_is_not_there_yet_says_so(call, llm, model):
    with pytest.raises(errors.NotYetError, match="not there yet|cannot be read yet") as caught:
        call(llm, model)
    assert caught.value.hint


def test_configurations_of_the_wrong_type_are_refused():
    for settings in ({"backend": "cuda"}, {"sampler_config": {}}, {"privacy_tier": 1}):
        with pytest.raises(api.ConfigError, match=next(iter(settings))):
            api.RuvDLLMConfig(**settings)
