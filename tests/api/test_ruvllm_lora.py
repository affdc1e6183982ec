"""The documented MicroLoRA: what it computes is tests/lora/test_micro.py's; here its names, numbers and refusals."""

import numpy as np
import pytest

from ruvjax.api.ruvllm import (
    AdaptFeedback,
    EwcState,
    MicroLoRA,
    MicroLoraConfig,
    RuvLLMError,
    TargetModule,
)

SMALL = MicroLoraConfig(6, 4, target_modules=(TargetModule.QProj, TargetModule.OProj))
X, G = np.linspace(-1, 1, 6), np.linspace(1, 2, 4)
Q, OUT = TargetModule.QProj, TargetModule.OProj


def test_the_documented_values():
    config = MicroLoraConfig.for_hidden_dim(4096)
    assert (config.in_features, config.out_features, config.rank, config.alpha) == (4096, 4096, 2, 4.0)
    assert MicroLoraConfig(rank=8).rank == 2 and MicroLoraConfig(rank=0).rank == 1
    names = "QProj KProj VProj OProj GateProj UpProj DownProj Hidden"
    assert [m.name for m in TargetModule] == names.split()
    feedback = AdaptFeedback.from_quality(0.85)
    assert (feedback.quality, feedback.reward, feedback.source_module, feedback.latency_us) == (0.85, None, None, 0)


def test_one_request_by_hand():
    lora = MicroLoRA.new(SMALL)
    assert not np.any(lora.forward(X, Q))
    a = np.asarray(lora._state.lora.a[0], np.float64)
    lora.adapt(X.tolist(), AdaptFeedback(0.9, gradient_estimate=G.tolist(), reward=0.5, source_module=Q))
    lora.apply_updates(0.1)
    b = -0.1 * 2.0 * np.outer(a.T @ X, 0.5 * G)  # scale alpha / rank = 2; a gets no gradient from b = 0
    np.testing.assert_allclose(lora.forward(X, Q), 2.0 * (X @ a) @ b, rtol=1e-4)
    assert lora.forward(X, Q) @ G < 0  # against the gradient of the loss
    assert not np.any(lora.forward(X, OUT))
    output = np.ones(4)
    lora.forward_add(X, Q, output)
    np.testing.assert_allclose(output, 1 + 2.0 * (X @ a) @ b, rtol=1e-4)


def test_statistics_and_reset():
    lora = MicroLoRA(SMALL)
    lora.adapt(X, AdaptFeedback(1.0, G))
    lora.adapt(X, AdaptFeedback(1.0, G, source_module=OUT))
    stats = lora.stats()
    assert (stats.adaptations, stats.updates, dict(stats.pending)) == (2, 0, {Q: 1, OUT: 2})
    assert stats.parameters == 2 * 2 * (6 + 4) and stats.memory_bytes == 4 * stats.parameters
    np.testing.assert_allclose(stats.mean_quality, (0.5 + 1 + 1) / 3, rtol=1e-6)
    lora.apply_updates(0.1)
    assert lora.stats().updates == 1 and not any(lora.stats().pending.values())
    lora.reset()
    assert not np.any(lora.forward(X, OUT)) and lora.stats().adaptations == 0


def test_ewc_through_the_handle():
    lora = MicroLoRA(SMALL)
    lora.adapt(X, AdaptFeedback(1.0, G))
    lora.apply_updates(0.1)
    known = lora.forward(X, Q)
    rng = np.random.default_rng(0)
    state = lora.ewc_state(Q, rng.normal(size=(50, 6)), rng.normal(size=(50, 4)))
    assert isinstance(state, EwcState)
    lora.adapt(X, AdaptFeedback(1.0, -3 * G))
    lora.apply_updates_with_ewc(0.1, {Q: state}, 1e9)
    assert np.linalg.norm(lora.forward(X, Q) - known) < 0.5 * np.linalg.norm(lora.forward(X, OUT) - known)


def test_dropout_takes_part():
    whole, dropped = (MicroLoRA(MicroLoraConfig(6, 4, dropout=p)) for p in (0.0, 0.5))
    for lora in (whole, dropped):
        lora.adapt(X, AdaptFeedback(1.0, G))
        lora.apply_updates(0.1)
    assert not np.allclose(whole.forward(X, Q), dropped.forward(X, Q))


@pytest.mark.parametrize(
    "feedback",
    [AdaptFeedback(0.9, G), AdaptFeedback(0.9)],
)
@pytest.mark.parametrize("x", [X[:5], X * np.nan, X * np.inf, X[None], ["a"] * 6, np.full(6, 1e300)])
def test_input_that_cannot_be_used_changes_nothing(x, feedback):
    lora = MicroLoRA(SMALL)
    with pytest.raises(RuvLLMError.Adapter):
        lora.adapt(x, feedback)
    assert lora.stats().adaptations == 0 and not any(lora.stats().pending.values())
    with pytest.raises(RuvLLMError.Adapter):
        lora.forward(x, Q)


def test_clear_refusals():
    lora = MicroLoRA(SMALL)
    for quality in (-0.1, 1.1, np.nan, "good", True):
        with pytest.raises(RuvLLMError.Adapter, match="AdaptFeedback.quality=.* from 0 to 1"):
            AdaptFeedback(quality)
    with pytest.raises(RuvLLMError.Adapter, match="KProj") as caught:
        lora.adapt(X, AdaptFeedback(0.9, source_module=TargetModule.KProj))
    assert caught.value.hint == "one of QProj, OProj"
    with pytest.raises(RuvLLMError.Adapter, match="KProj"):
        lora.forward(X, TargetModule.KProj)
    with pytest.raises(RuvLLMError.Adapter, match="gradient_estimate has the shape"):
        lora.adapt(X, AdaptFeedback(0.9, G[:3]))
    with pytest.raises(RuvLLMError.Adapter, match="not finite"):
        lora.adapt(X, AdaptFeedback(0.9, G * np.nan))
    with pytest.raises(RuvLLMError.Adapter, match="output is"):
        lora.forward_add(X, Q, np.ones(5))
    with pytest.raises(RuvLLMError.Adapter, match="learning_rate"):
        lora.apply_updates(np.nan)
    with pytest.raises(RuvLLMError.Adapter, match="learning_rate"):
        lora.apply_updates(1e39)
    other = MicroLoRA(MicroLoraConfig(6, 3)).ewc_state(Q, np.ones((2, 6)), np.ones((2, 3)))
    with pytest.raises(RuvLLMError.Adapter, match="another size"):
        lora.apply_updates_with_ewc(0.1, {Q: other}, 1.0)
    with pytest.raises(RuvLLMError.Config, match="gradient_checkpointing.*would change nothing"):
        MicroLoraConfig(gradient_checkpointing=True)
    for wrong in (
        {"in_features": 0},
        {"rank": 1.5},
        {"alpha": 0},
        {"dropout": 1.0},
        {"target_modules": ()},
        {"target_modules": ("q_proj",)},
        {"target_modules": (Q, Q)},
    ):
        with pytest.raises(RuvLLMError.Config, match="MicroLoraConfig"):
            MicroLoraConfig(**wrong)


def test_an_update_that_overflows_is_dropped_and_said():
    lora = MicroLoRA(SMALL)
    lora.adapt(X, AdaptFeedback(1.0, G))
    lora.apply_updates(0.1)
    known = lora.forward(X, Q)
    lora.adapt(X, AdaptFeedback(1.0, G * 1e38, reward=1e30))
    with pytest.raises(RuvLLMError.Adapter, match="dropped"):
        lora.apply_updates(0.1)
    np.testing.assert_array_equal(lora.forward(X, Q), known)
    assert lora.stats().updates == 1
