"""The documented SONA on a small causal model of random weights, and without a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Mask
from ruvjax.api.ruvllm import (
    AdaptFeedback,
    ConsolidationStrategy,
    DeviceType,
    GenerateParams,
    JaxBackend,
    MicroLoraConfig,
    ModelConfig,
    Precision,
    RuvLLMError,
    SonaConfig,
    SonaLlm,
    SonaLlmConfig,
    TargetModule,
    TrainingConfig,
    TrainingSample,
)
from ruvjax.api.ruvllm_sona_samples import groups, order, text_features
from ruvjax.core.params import init
from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.io.huggingface import save_model
from ruvjax.models.transformer import Transformer

TINY = Transformer(vocab_size=264, layers=1, width=32, heads=2, mlp_width=64, max_length=128, tied_head=False)
HIDDEN = TargetModule.Hidden
EAGER = SonaLlmConfig(instant_lr=0.5, background_min_samples=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sona")
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), []).save(root / "tokenizer")
    params = init(TINY, jax.random.key(0))
    marks = {"length": 128, "autoregressive": True}
    return save_model(root / "model", TINY, params, tokenizer, eos_token_id=256, diffusion=marks)


@pytest.fixture
def backend(folder):
    backend = JaxBackend.with_device(DeviceType.Cpu)
    backend.load_model(folder, ModelConfig(quantization=Precision.FP32))
    return backend


def likelihood(backend, sona, request, response) -> float:
    """Mean log-likelihood per token in numpy, from the handle's own `forward`."""
    sample = backend.read(request, response)
    head, params = backend.readout()
    hidden = np.asarray(sample.hidden, np.float32)
    hidden = hidden + np.stack([sona.forward(row, HIDDEN) for row in hidden])
    logits = np.asarray(head(params, jnp.asarray(hidden)), np.float64)
    told = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return told[np.arange(len(hidden)), np.asarray(sample.targets)][np.asarray(sample.counted)].mean()


GOOD = [(f"say {word}", "xyxyxyx") for word in ("one", "two", "three", "four", "five", "six")]


def test_a_held_back_response_of_the_same_kind_follows_the_quality(backend):
    change = {}
    for quality in (0.95, 0.05):
        sona = SonaLlm.new(EAGER, backend=backend)
        before = likelihood(backend, sona, "say seven", "xyxyxyxy")
        for request, response in GOOD:
            result = sona.instant_adapt(request, response, quality)
            assert result.applied and result.samples_used == 1 and result.quality_delta is None
        change[quality] = likelihood(backend, sona, "say seven", "xyxyxyxy") - before
    assert change[0.95] > 0.05 and change[0.05] < -0.02


def test_what_was_learned_is_what_the_backend_says(backend):
    ask = GenerateParams(max_tokens=8, temperature=0.0, top_p=1.0, repetition_penalty=1.0)
    plain = backend.generate("say seven", ask)
    sona = SonaLlm(SonaLlmConfig(instant_lr=0.05), backend=backend)
    for _ in range(20):
        for request, response in GOOD:
            sona.instant_adapt(request, response, AdaptFeedback(0.9, reward=1.0))
    assert set(backend.generate("say seven", ask)) <= {"x", "y"} and not set(plain) <= {"x", "y"}
    sona.reset()
    assert backend.generate("say seven", ask) == plain
    assert not np.any(sona.forward(np.ones(32), HIDDEN)) and sona.stats().instant_runs == 0


def test_hidden_states_are_those_that_predict(backend):
    sample = backend.read("ab", "cde")
    model = backend._model
    tokens = jnp.int32([*[model.start_id] * (model.start_id >= 0), *model.tokenizer.encode("abcde")])
    output = model.network.apply(model.params, tokens[None], mask=Mask(causal=True))
    np.testing.assert_allclose(sample.hidden[:3], output.hidden[0, -4:-1], atol=1e-5)
    assert (
        np.asarray(sample.targets[:3]).tolist() == np.asarray(tokens[-3:]).tolist() and int(sample.counted.sum()) == 3
    )


@pytest.mark.parametrize("strategy", ConsolidationStrategy)
def test_consolidation_moves_what_was_learned_and_measures_what_it_did(backend, strategy):
    config = SonaLlmConfig(instant_lr=0.2, background_min_samples=5, consolidation_strategy=strategy)
    sona = SonaLlm(config, backend=backend)
    for request, response in GOOD:
        sona.instant_adapt(request, response, 0.9)
    held = [GOOD[4]]  # one in five
    before = np.mean([likelihood(backend, sona, *pair) for pair in held])
    result = sona.background_consolidate()
    after = np.mean([likelihood(backend, sona, *pair) for pair in held])
    assert result.applied and result.samples_used == 5 and result.latency_us > 0
    np.testing.assert_allclose(result.quality_delta, after - before, atol=1e-4)
    assert result.quality_delta > 0 and sona.stats().pending_samples == 0
    assert sona.stats().last_quality_delta == result.quality_delta
    again = sona.background_consolidate()
    assert not again.applied and again.quality_delta is None and "0 samples wait" in again.reason


def test_a_figure_can_be_negative(backend):
    """Measured, not assumed: a consolidation that overshoots says so."""
    sona = SonaLlm(SonaLlmConfig(instant_lr=60.0, background_min_samples=5), backend=backend)
    for word in "abcdef":
        sona.instant_adapt("say", word * 4, AdaptFeedback(0.9, reward=0.0))
    assert sona.background_consolidate().quality_delta < 0


def test_deep_optimisation(backend):
    sona = SonaLlm(SonaLlmConfig(deep_trigger_threshold=2.0, training=TrainingConfig(epochs=20)), backend=backend)
    for request, response in GOOD[:3]:
        assert not sona.should_trigger_deep()
        sona.instant_adapt(request, response, 0.9)
    assert sona.should_trigger_deep()
    held = ("say five", "xyxyxyx")
    before = likelihood(backend, sona, *held)
    result = sona.deep_optimize([TrainingSample(*pair) for pair in GOOD])
    np.testing.assert_allclose(result.quality_delta, likelihood(backend, sona, *held) - before, atol=1e-4)
    assert result.applied and result.quality_delta > 0.05
    stats = sona.stats()
    assert not sona.should_trigger_deep() and (stats.deep_runs, stats.tasks, stats.accumulated_quality) == (1, 1, 0.0)
    few = sona.deep_optimize([TrainingSample("a", "b")])
    assert few.applied and few.quality_delta is None


def test_the_background_waits_for_its_interval_and_its_samples(backend, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ruvjax.api.ruvllm_sona.time.monotonic", lambda: now[0])
    sona = SonaLlm(SonaLlmConfig(background_interval_ms=100, background_min_samples=2), backend=backend)
    sona.instant_adapt("a", "bc", 0.9)
    now[0] = 101.0
    assert sona.maybe_background() is None  # one sample
    sona.instant_adapt("a", "bc", 0.9)
    now[0] = 100.05
    assert sona.maybe_background() is None  # 50 ms
    now[0] = 100.2
    result = sona.maybe_background()
    assert result is not None and result.applied and result.quality_delta is None  # nothing held back of two


def test_bad_responses_are_not_kept_and_the_oldest_make_room(backend):
    config = SonaLlmConfig(max_pending_samples=10, sona=SonaConfig(quality_threshold=0.4))
    sona = SonaLlm(config, backend=backend)
    assert sona.instant_adapt("a", "bc", 0.39).applied
    assert sona.stats().pending_samples == 0
    for _ in range(12):
        sona.instant_adapt("a", "bc", 0.8)
    assert (sona.stats().pending_samples, sona.stats().dropped_samples) == (10, 2)


def test_without_a_backend():
    sona = SonaLlm(SonaLlmConfig(micro_lora=MicroLoraConfig.for_hidden_dim(16), background_min_samples=5))
    result = sona.instant_adapt("What is machine learning?", "Machine learning is...", 0.9)
    assert not result.applied and "no direction is known" in result.reason and result.quality_delta is None
    g = np.linspace(-1, 1, 16)
    x = text_features("a request\0a response", 16)
    for _ in range(6):
        result = sona.instant_adapt("a request", "a response", AdaptFeedback(0.9, gradient_estimate=g))
        assert result.applied
    before = sona.forward(x, TargetModule.QProj)
    assert before @ g < 0
    consolidated = sona.background_consolidate()
    assert consolidated.applied and consolidated.quality_delta is None
    assert sona.forward(x, TargetModule.QProj) @ g < before @ g
    other = SonaLlm(SonaLlmConfig(micro_lora=MicroLoraConfig.for_hidden_dim(16)))
    only = AdaptFeedback(0.9, gradient_estimate=g, source_module=TargetModule.VProj)
    other.instant_adapt("a request", "a response", only)
    assert np.any(other.forward(x, TargetModule.VProj)) and not np.any(other.forward(x, TargetModule.QProj))
    assert not np.allclose(text_features("a request\0another", 16), x)
    with pytest.raises(RuvLLMError.Sona, match="with a model"):
        sona.deep_optimize([TrainingSample("a", "b")])


def test_clear_refusals(backend, folder):
    sona = SonaLlm(EAGER, backend=backend)
    sona.instant_adapt("a", "bc", 0.9)
    known = sona.forward(np.ones(32), HIDDEN)
    for quality in (1.5, -1.0, np.nan):
        with pytest.raises(RuvLLMError.Adapter, match="quality"):
            sona.instant_adapt("a", "b", quality)
    with pytest.raises(RuvLLMError.Sona, match="texts"):
        sona.instant_adapt(np.ones(3), "b", 0.5)
    with pytest.raises(RuvLLMError.Sona, match="no effect"):
        sona.instant_adapt("a", "b", AdaptFeedback(0.9, np.ones(32)))
    with pytest.raises(RuvLLMError.InvalidOperation, match="no tokens"):
        sona.instant_adapt("a", "", 0.9)
    with pytest.raises(RuvLLMError.InvalidOperation, match="the context 128"):
        sona.instant_adapt("a" * 100, "b" * 100, 0.9)
    with pytest.raises(RuvLLMError.Adapter, match="QProj"):
        sona.forward(np.ones(32), TargetModule.QProj)
    with pytest.raises(RuvLLMError.Adapter, match="shape"):
        sona.forward(np.ones(31), HIDDEN)
    for dataset in ([], ["text"]):
        with pytest.raises(RuvLLMError.Sona, match="at least one"):
            sona.deep_optimize(dataset)
    with pytest.raises(RuvLLMError.Sona, match="TrainingSample.quality"):
        TrainingSample("a", "b", 0.0)
    np.testing.assert_array_equal(sona.forward(np.ones(32), HIDDEN), known)
    assert sona.stats().instant_runs == 1
    with pytest.raises(RuvLLMError.Config, match="width 32"):
        SonaLlm(SonaLlmConfig(micro_lora=MicroLoraConfig.for_hidden_dim(64)), backend=backend)
    with pytest.raises(RuvLLMError.InvalidOperation, match="no model"):
        SonaLlm(EAGER, backend=JaxBackend())
    backend.load_model(folder, ModelConfig(quantization=Precision.FP32))
    with pytest.raises(RuvLLMError.Sona, match="another model"):
        sona.instant_adapt("a", "b", 0.9)


def test_learning_that_is_not_finite_is_refused(backend):
    sona = SonaLlm(SonaLlmConfig(instant_lr=3e38, background_min_samples=5), backend=backend)
    for request, response in GOOD:
        sona.instant_adapt(request, response, AdaptFeedback(0.9, reward=0.0))
    with pytest.raises(RuvLLMError.Sona, match="not finite"):
        sona.background_consolidate()
    assert not np.any(sona.forward(np.ones(32), HIDDEN)) and sona.stats().pending_samples == 6


def test_the_presets_are_those_of_the_table():
    wanted = {
        "default": (2, 8, 0.002, 2000, 100, 10_000, 3600, 0.15),
        "throughput": (2, 4, 0.0005, 2000, 100, 5_000, 7200, 0.4),
        "quality": (2, 16, 0.002, 2000, 100, 20_000, 1800, 0.2),
        "edge": (1, 4, 0.001, 1000, 50, 200, 3600, 0.5),
        "batch": (2, 8, 0.001, 2000, 100, 10_000, 3600, 0.3),
        "ephemeral": (2, 4, 0.002, 1000, 50, 500, 60, 0.3),
        "coordinator": (2, 16, 0.001, 2000, 200, 50_000, 300, 0.4),
    }
    assert SonaConfig.preset("default") == SonaConfig()
    for name, row in wanted.items():
        c = SonaConfig.preset(name)
        sizes = (c.micro_lora_rank, c.base_lora_rank, c.micro_lora_lr, c.ewc_lambda, c.pattern_clusters)
        assert (*sizes, c.trajectory_capacity, c.background_interval_ms / 1000, c.quality_threshold) == row
    config = SonaLlmConfig(sona=SonaConfig.preset("edge"))
    assert (config.rate, config.capacity, config.interval_s, config.deep_lambda) == (0.001, 200, 3600, 1000)
    assert SonaLlm(config)._lora.rank == 1
    config = SonaLlmConfig(instant_lr=0.01, background_interval_ms=100, max_pending_samples=50)
    assert (config.rate, config.capacity, config.interval_s) == (0.01, 50, 0.1)
    assert (TrainingConfig.realtime().learning_rate, TrainingConfig.stable().ewc_lambda) == (0.001, 5000)
    with pytest.raises(RuvLLMError.Config, match="no preset 'edgy'") as caught:
        SonaConfig.preset("edgy")
    assert caught.value.hint == "did you mean edge?"
    for kind, wrong in (
        (SonaConfig, {"micro_lora_rank": 3}),
        (SonaConfig, {"quality_threshold": 2.0}),
        (TrainingConfig, {"min_learning_rate": 1.0}),
        (TrainingConfig, {"fisher_decay": 1.0}),
        (SonaLlmConfig, {"consolidation_strategy": "average"}),
        (SonaLlmConfig, {"max_pending_samples": 3}),
        (SonaLlmConfig, {"micro_lora": MicroLoraConfig(dropout=0.1)}),
    ):
        with pytest.raises(RuvLLMError.Config):
            kind(**wrong)


def test_groups_and_orders():
    means = np.r_[np.zeros((6, 3)), np.ones((4, 3))] + 0.01 * np.random.default_rng(0).normal(size=(10, 3))
    found = groups(np.float32(means), 2, 16)
    assert len(set(found[:6])) == 1 and len(set(found[6:10])) == 1 and found[0] != found[6]
    assert groups(np.float32(means), 16, 16)[:10].tolist() == list(range(10))
    steps = order(10, TrainingConfig(batch_size=4, epochs=2))
    assert steps.shape == (6, 4) and sorted(steps.ravel()[:10]) == list(range(10))
    assert order(10, TrainingConfig(batch_size=4, epochs=2, max_steps=3)).shape == (3, 4)
    assert order(3, TrainingConfig(batch_size=8)).shape == (3, 3)
