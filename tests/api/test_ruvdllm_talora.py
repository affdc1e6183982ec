"""The documented handles on banks: every name, what they compute, and what each way of failing raises."""

import dataclasses
import inspect
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax import errors
from ruvjax.api import ruvdllm as api
from ruvjax.core.params import init
from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.diffusion.likelihood import nelbo_samples
from ruvjax.diffusion.sampler import Sampler
from ruvjax.io.huggingface import save_model
from ruvjax.lora import ann, guided, talora
from ruvjax.lora import bank as banking
from ruvjax.models.transformer import Transformer

HIDDEN = 16
SIZES = {"coarse_capacity": 6, "domain_capacity": 5, "fine_capacity": 7, "coarse_rank": 3, "domain_rank": 2}
CONFIG = api.TALoRAConfig(HIDDEN, **SIZES, fine_rank=1, top_k=2)
TINY = Transformer(vocab_size=259, layers=2, width=HIDDEN, heads=2, mlp_width=32, max_length=48, tied_head=False)
FEW = Sampler(order="confidence", steps=4, temperature=0.0)

DOCUMENTED = {
    "TALoRAManager": "new retrieve store remove apply stats save load",
    "MicroLoRA": "new from_matrices apply rank size_bytes merge compress",
    "DGRSystem": "new process apply get_uncertainty_map set_threshold set_max_retrievals",
    "UncertaintyMetric": "ENTROPY CONFIDENCE_GAP VARIANCE LEARNED",
    "TALoRAConfig": "",
    "TALoRARetrievalResult": "",
    "TALoRAStats": "",
    "AdapterId": "",
    "CompressedMicroLoRA": "",
    "DGRConfig": "",
    "DGRResult": "",
    "LearningConfig": "",
    "RuvDLLM": "enable_learning disable_learning",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_documented_name_is_there(name):
    found = getattr(api, name)
    assert name in api.__all__ and found.__doc__
    for part in DOCUMENTED[name].split():
        assert inspect.getdoc(getattr(found, part))


def test_the_documented_defaults():
    config = api.TALoRAConfig(hidden_dim=256)
    assert dataclasses.astuple(config)[:9] == (256, 10_000, 8, 50_000, 4, 100_000, 2, (700, 300), 50)
    dgr = api.DGRConfig()
    assert (dgr.uncertainty_threshold, dgr.max_retrievals, dgr.top_k) == (0.5, 10, 3)
    assert dgr.metric is api.UncertaintyMetric.ENTROPY


def micro(rank, seed):
    rng = np.random.default_rng(seed)
    return api.MicroLoRA.from_matrices(rng.normal(size=(HIDDEN, rank)), rng.normal(size=(rank, HIDDEN)))


def key(seed):
    return np.random.default_rng(100 + seed).normal(size=HIDDEN).astype(np.float32)


@pytest.fixture
def manager():
    made = api.TALoRAManager.new(CONFIG)
    for seed, (rank, timestep) in enumerate(((3, 900), (3, 701), (2, 700), (2, 301), (1, 300), (1, 0))):
        made.store(micro(rank, seed), key(seed), timestep)
    return made


def test_micro_lora_is_what_its_matrices_say():
    assert not np.asarray(api.MicroLoRA.new(2, 64).apply(np.ones((3, 64), np.float32))).any()
    one, other = micro(3, 0), micro(1, 1)
    x = np.random.default_rng(2).normal(size=(2, 5, HIDDEN)).astype(np.float32)
    delta = np.asarray(one.a, np.float64) @ np.asarray(one.b, np.float64)
    np.testing.assert_allclose(one.apply(x), x @ delta, atol=1e-4)
    assert (one.rank(), one.size_bytes(), one.hidden_dim()) == (3, 4 * 2 * 3 * HIDDEN, HIDDEN)
    whole = delta + 0.5 * np.asarray(other.a, np.float64) @ np.asarray(other.b, np.float64)
    one.merge(other, 0.5)
    assert one.rank() == 3
    u, s, v = np.linalg.svd(whole)
    np.testing.assert_allclose(np.asarray(one.a) @ np.asarray(one.b), (u[:, :3] * s[:3]) @ v[:3], atol=1e-4)
    small = one.compress()
    assert (
        isinstance(small, api.CompressedMicroLoRA)
        and small.size_bytes() == 2 * 3 * HIDDEN + 8 * 3
        and small.rank() == 3
    )
    np.testing.assert_allclose(small.decompress().apply(x), one.apply(x), atol=0.02 * np.abs(one.apply(x)).max())
    for a, b in (
        (np.ones((4, 2)), np.ones((4, 2))),
        (np.ones(4), np.ones(4)),
        (np.full((4, 1), np.nan), np.ones((1, 4))),
    ):
        with pytest.raises(api.TALoRAError):
            api.MicroLoRA.from_matrices(a, b)
    for call in (lambda: one.merge(api.MicroLoRA.new(1, 8), 1.0), lambda: api.MicroLoRA.new(0, 8)):
        with pytest.raises(api.TALoRAError):
            call()


def test_adapters_go_to_the_bank_of_their_timestep_and_are_found_there(manager):
    assert manager.stats().sizes == (2, 2, 2) and manager.stats().total == 6 and manager.stats().capacities == (6, 5, 7)
    found = manager.retrieve(key(1), 800, 2)
    assert [id.bank for id in found.ids] == [0, 0] and found.ids[0].number == 1 and len(found) == 2
    np.testing.assert_allclose(found.similarities[0], 1, atol=1e-6)
    np.testing.assert_allclose(found.adapters[0].a, micro(3, 1).a, atol=0.02)  # held in bfloat16
    assert {id.bank for id in manager.retrieve(key(1), 700, 2).ids} == {0, 1}
    assert [id.bank for id in manager.retrieve(key(1), 10, 1).ids] == [2]
    assert manager.stats().retrievals == 3
    x = np.random.default_rng(9).normal(size=(4, HIDDEN)).astype(np.float32)
    both = manager.retrieve(key(2), 690, 2)
    wanted = x.copy()
    for id, adapter, cosine in zip(both.ids, both.adapters, both.similarities):
        share = (0.4, 0.6)[id.bank]
        wanted += share * max(cosine, 0) * (x @ np.asarray(adapter.a) @ np.asarray(adapter.b))
    np.testing.assert_allclose(manager.apply(x, both, 690), wanted, atol=1e-4)
    np.testing.assert_array_equal(manager.apply(x, both, 100), x)  # neither bank has a share there


def test_a_removed_adapter_is_gone_and_a_full_bank_evicts(manager):
    id = manager.retrieve(key(0), 900, 1).ids[0]
    taken = manager.remove(id)
    np.testing.assert_allclose(taken.b, micro(3, 0).b, atol=0.02)
    assert manager.stats().sizes == (1, 2, 2) and id not in manager.retrieve(key(0), 900, 2).ids
    for wrong in (id, api.AdapterId(7, 0), api.AdapterId(0, -1)):
        with pytest.raises(api.TALoRAError, match="no adapter"):
            manager.remove(wrong)
    kept = manager.retrieve(key(2), 500, 1).ids[0]
    new = [manager.store(micro(2, seed), key(seed), 500) for seed in range(20, 24)]
    assert manager.stats().sizes[1] == 5 and [item.number for item in new] == [2, 3, 4, 5]
    assert manager.retrieve(key(2), 500, 1).ids[0] == kept  # used since, so that another one left
    with pytest.raises(api.TALoRAError, match="no adapter"):
        manager.record(api.AdapterId(1, 1), 1.0)
    manager.record(kept, 0.25)
    with pytest.raises(api.TALoRAError, match="outcome"):
        manager.record(kept, 1.5)


def test_what_cannot_be_used_is_named_and_changes_nothing(manager):
    before = jax.tree.map(np.array, manager.banks)
    broken = micro(3, 0)
    broken.a = broken.a.at[0, 0].set(jnp.nan)
    calls = {
        "a has shape": lambda: manager.store(micro(2, 0), key(0), 900),
        "a is not finite": lambda: manager.store(broken, key(0), 900),
        "key has shape": lambda: manager.store(micro(3, 0), key(0)[:4], 900),
        "key is not finite": lambda: manager.store(micro(3, 0), key(0) * np.nan, 900),
        "key is zero": lambda: manager.store(micro(3, 0), key(0) * 0, 900),
        "timestep=1001": lambda: manager.store(micro(3, 0), key(0), 1001),
        "timestep=-1": lambda: manager.retrieve(key(0), -1, 1),
        "top_k=6": lambda: manager.retrieve(key(0), 900, 6),
        "top_k=0": lambda: manager.retrieve(key(0), 900, 0),
        "a query of shape": lambda: manager.retrieve(key(0)[:3], 900, 1),
        "not finite": lambda: manager.retrieve(key(0) * np.inf, 900, 1),
        "an output of shape": lambda: manager.apply(np.ones(3), manager.retrieve(key(0), 900, 1), 900),
    }
    for message, call in calls.items():
        with pytest.raises(api.TALoRAError, match=message) as caught:
            call()
        assert "\n" not in caught.value.line()
    for name in ("ids", "a", "b", "next_id"):
        for one, other in zip(before, manager.banks):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert len(api.TALoRAManager(CONFIG).retrieve(key(0), 900, 1)) == 0
    for settings in (
        {"hidden_dim": 0},
        {"fine_rank": 0},
        {"boundaries": (300, 700)},
        {"eviction": "oldest"},
        {"layer": -2},
    ):
        with pytest.raises(api.ConfigError):
            api.TALoRAConfig(**{"hidden_dim": 8, **settings})


def test_a_manager_comes_back_from_its_file(manager, tmp_path):
    manager.save(tmp_path / "banks")
    loaded = api.TALoRAManager.load(tmp_path / "banks")
    assert loaded.config == CONFIG and loaded.stats().sizes == (2, 2, 2)
    one, other = manager.retrieve(key(3), 320, 2), loaded.retrieve(key(3), 320, 2)
    assert one.ids == other.ids and one.similarities == other.similarities
    assert loaded.store(micro(2, 0), key(0), 500) == manager.store(micro(2, 0), key(0), 500)
    data = bytearray((tmp_path / "banks").read_bytes())
    data[-5] ^= 4
    (tmp_path / "flipped").write_bytes(data)
    for name in ("flipped", "absent"):
        with pytest.raises(api.TALoRAError, match=name):
            api.TALoRAManager.load(tmp_path / name)
    with pytest.raises(api.TALoRAError, match="cannot be written"):
        manager.save(tmp_path / "banks" / "below")


def test_a_bank_above_the_limit_is_searched_by_an_index_that_follows_its_changes(monkeypatch, manager):
    built = []

    class Exact(ann.Index):
        def search(self, bank, queries, k):
            return banking.retrieve(bank, queries, k)

    def build(bank):
        built.append(int(bank.next_id))
        return Exact(None, bank.capacity, 1, 1)

    monkeypatch.setattr("ruvjax.api.ruvdllm_talora.EXACT", 1)
    monkeypatch.setattr(ann, "build", build)
    assert manager.retrieve(key(1), 800, 1).ids[0].number == 1
    manager.retrieve(key(1), 800, 1)
    assert built == [2, 2, 2]
    assert manager.recall(np.stack([key(0), key(1)]), 2) == (1.0, 1.0, 1.0)
    manager.store(micro(3, 7), key(7), 800)
    assert manager.retrieve(key(7), 800, 1).ids[0].number == 2 and built == [2, 2, 2, 3]
    monkeypatch.undo()
    assert manager.recall(key(0)[None], 2) == (None, None, None)


def test_dgr_finds_and_adapts_the_unsure_positions(manager):
    rng = np.random.default_rng(4)
    hidden, logits = rng.normal(size=(2, 6, HIDDEN)), 4 * rng.normal(size=(2, 6, 9))
    logits[0, 2], logits[1, 5], logits[1, 0] = 0, 0.01 * rng.normal(size=9), 0.1 * rng.normal(size=9)
    system = api.DGRSystem.new(manager, api.DGRConfig(uncertainty_threshold=0.9, max_retrievals=1, top_k=2))
    found = system.process(logits.astype(np.float32), hidden.astype(np.float32), 1000)
    assert found.positions == ((0, 2), (1, 5)) and found.timestep == 1000
    unsure = np.asarray(system.get_uncertainty_map(logits.astype(np.float32), 1000))
    np.testing.assert_allclose([unsure[place] for place in found.positions], found.uncertainty, rtol=1e-6)
    late = np.asarray(system.get_uncertainty_map(logits.astype(np.float32), 250))
    np.testing.assert_allclose(late, np.minimum(2 * unsure, 1), atol=1e-5)
    assert np.isfinite(system.get_uncertainty_map(logits.astype(np.float32), 0)).all()
    x = rng.normal(size=(2, 6, HIDDEN)).astype(np.float32)
    wanted = x.copy()
    for place in found.positions:
        result = manager.retrieve(hidden[place], 1000, 2)
        wanted[place] = manager.apply(x[place], result, 1000)
    np.testing.assert_allclose(system.apply(x, found), wanted, atol=1e-5)
    assert (wanted != x).any()
    system.set_max_retrievals(6)
    assert system.process(logits, hidden, 1000).positions == ((0, 2), (1, 5), (1, 0))
    system.set_threshold(1.0)
    assert system.process(logits, hidden, 1000).positions == ()
    for call in (lambda: system.set_threshold(2.0), lambda: system.set_max_retrievals(0)):
        with pytest.raises(api.ConfigError):
            call()
    for call in (
        lambda: system.process(logits, hidden[:, :2], 500),
        lambda: system.process(logits, hidden[..., :3], 500),
        lambda: system.get_uncertainty_map(logits, 1200),
    ):
        with pytest.raises(api.TALoRAError):
            call()


def test_the_learned_head_needs_hidden_states(manager):
    with pytest.raises(api.ConfigError, match="needs a head"):
        api.DGRConfig(metric=api.UncertaintyMetric.LEARNED)
    with pytest.raises(api.ConfigError, match="UncertaintyMetric"):
        api.DGRConfig(metric="entropy")
    head = guided.Head(jnp.zeros(HIDDEN), jnp.float32(3.0))
    system = api.DGRSystem(manager, api.DGRConfig(metric=api.UncertaintyMetric.LEARNED, head=head))
    logits, hidden = np.zeros((1, 3, 5), np.float32), np.ones((1, 3, HIDDEN), np.float32)
    assert len(system.process(logits, hidden, 1000).positions) == 3
    with pytest.raises(api.TALoRAError, match="hidden"):
        system.get_uncertainty_map(logits, 1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), [])
    ids = {"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    params = jax.tree.map(lambda x: 8 * x, init(TINY, jax.random.key(3)))
    saved = tokenizer.save(root / "tokenizer")
    return save_model(root / "model", TINY, params, saved, **ids, diffusion={}).parent


def test_text_is_generated_with_adapters_and_without_any_it_is_the_same(folder, caplog):
    model = api.DiffusionModel.load_f16(folder / "model")
    sampler = api.MDLMSampler.with_config(FEW)
    manager = api.TALoRAManager(CONFIG)
    plain = sampler.generate(model, "def", 20)
    system = api.DGRSystem(manager, api.DGRConfig(uncertainty_threshold=0.0))
    talora._said.clear()
    with caplog.at_level(logging.WARNING):
        assert sampler.generate_with_talora(model, "def", 20, manager) == plain
        assert sampler.generate_with_dgr(model, "def", 20, system) == plain
    assert sum("all banks are empty" in record.message for record in caplog.records) == 1
    for seed, (rank, timestep) in enumerate(((3, 900), (2, 500), (1, 100))):
        large = api.MicroLoRA(micro(rank, seed).a * 4, micro(rank, seed).b * 4)
        for sign in (1, -1):  # one of them is similar to any query
            manager.store(large, sign * key(seed), timestep)
    adapted = sampler.generate_with_talora(model, "def", 20, manager)
    guided_text = sampler.generate_with_dgr(model, "def", 20, system)
    assert adapted != plain and guided_text not in (plain, adapted)
    assert adapted == sampler.generate_with_talora(model, "def", 20, manager)
    wide = api.TALoRAManager(api.TALoRAConfig(8, **SIZES, top_k=2))
    deep = api.TALoRAManager(dataclasses.replace(CONFIG, layer=2))
    cached = api.MDLMSampler.with_config(Sampler(block_size=8, cache="dual"))
    for chosen, given, message in ((sampler, wide, "width"), (sampler, deep, "layer=2"), (cached, manager, "cache")):
        with pytest.raises(api.ConfigError, match=message):
            chosen.generate_with_talora(model, "def", 20, given)


def test_the_high_level_interface_holds_the_banks(folder):
    plain = api.RuvDLLM.with_config(folder, api.RuvDLLMConfig(api.BackendType.SIMD, sampler_config=FEW))
    config = api.RuvDLLMConfig(
        api.BackendType.SIMD, True, True, CONFIG, api.DGRConfig(uncertainty_threshold=0.0), sampler_config=FEW
    )
    llm = api.RuvDLLM.with_config(folder, config)
    assert llm.generate("def", 12) == plain.generate("def", 12)
    for rank, timestep in ((3, 900), (2, 500), (1, 100)):
        for sign in (1, -1):
            llm.talora.store(api.MicroLoRA(micro(rank, 1).a * 4, micro(rank, 1).b * 4), sign * key(1), timestep)
    pieces = []
    llm.generate_stream("def", 12, lambda piece: pieces.append(piece) or True)
    assert "".join(pieces) == llm.generate("def", 12) != plain.generate("def", 12)
    with pytest.raises(api.ConfigError, match="without adapters"):
        plain.talora.stats()
    for settings, message in (
        ({"talora_config": CONFIG}, "TALoRA is off"),
        ({"dgr_config": api.DGRConfig()}, "DGR is off"),
        ({"enable_talora": True, "talora_config": 3}, "talora_config"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            api.RuvDLLMConfig(**settings)


def test_a_text_that_was_judged_good_is_learned(folder):
    config = api.RuvDLLMConfig(api.BackendType.SIMD, enable_talora=True, talora_config=CONFIG, sampler_config=FEW)
    llm = api.RuvDLLM.with_config(folder, config)
    with pytest.raises(api.ConfigError, match="not enabled"):
        llm.learn("def", " f(): pass", 1.0)
    llm.enable_learning(api.LearningConfig(steps=30, learning_rate=0.05, samples=32, min_quality=0.4))
    learned = llm.learn("def", " f(): return 1", 0.9)
    assert [id.bank for id in learned.ids] == [0, 1, 2] and llm.talora.stats().sizes == (1, 1, 1)
    assert all(after < 0.8 * before for before, after in zip(learned.before, learned.after))
    # The three intervals of time together are the NELBO.
    model = api.DiffusionModel.load_f16(folder / "model")
    assert model.tokenizer is not None and model.mask_id is not None
    tokens = jnp.asarray(model.tokenizer.encode("def f(): return 1"))[None]

    def forward(params, tokens, time, carry):
        return TINY.apply(params, tokens, time=time), carry

    fixed = jnp.arange(tokens.shape[1])[None] < 3
    draws = nelbo_samples(
        forward, model.params, tokens, jax.random.key(1), mask_id=model.mask_id, samples=256, fixed=fixed
    )
    whole = 0.3 * learned.before[0] + 0.4 * learned.before[1] + 0.3 * learned.before[2]
    assert whole == pytest.approx(float(draws.mean()) / 14, rel=0.1)
    assert llm.learn("def", " f(): return 1", 0.3) == api.Learned() and llm.talora.stats().sizes == (1, 1, 1)
    other = llm.learn("class", " A: pass", 0.5)
    assert llm.talora.stats().sizes == (2, 2, 2) and set(other.ids).isdisjoint(learned.ids)
    for prompt, response, quality, message in (
        ("a", "b", 1.5, "quality"),
        ("a", "b", float("nan"), "quality"),
        ("a", "", 1.0, "no token"),
        ("a", "b" * 48, 1.0, "context is 48"),
        (None, "b", 1.0, "the prompt is a NoneType"),
        ("a", b"b", 1.0, "the response is a bytes"),
    ):
        with pytest.raises(api.ConfigError, match=message):
            llm.learn(prompt, response, quality)
    with pytest.raises(api.GenerationError):
        llm.learn("a", "\ud800", np.float32(0.9))
    assert llm.talora.stats().sizes == (2, 2, 2)
    llm.enable_learning(api.LearningConfig(steps=30, learning_rate=1e3, samples=32, min_quality=0.4))
    worse = llm.learn("class", " A: pass", 0.5)
    helped = [after < before for before, after in zip(worse.before, worse.after)]
    assert not all(helped) and [id.bank for id in worse.ids] == [i for i, good in enumerate(helped) if good]
    sizes = tuple(2 + good for good in helped)
    assert llm.talora.stats().sizes == sizes
    llm.disable_learning()
    with pytest.raises(api.ConfigError, match="not enabled"):
        llm.learn("def", " f(): pass", 1.0)
    assert llm.talora.stats().sizes == sizes


def test_learning_needs_banks_and_sound_settings(folder):
    plain = api.RuvDLLM.with_config(folder, api.RuvDLLMConfig(api.BackendType.SIMD, sampler_config=FEW))
    with pytest.raises(api.ConfigError, match="without adapters"):
        plain.enable_learning(api.LearningConfig())
    for change, message in (({"hidden_dim": 8}, "width"), ({"layer": 7}, "layers")):
        other = api.RuvDLLMConfig(
            api.BackendType.SIMD, enable_talora=True, talora_config=dataclasses.replace(CONFIG, **change)
        )
        with pytest.raises(api.ConfigError, match=message):
            api.RuvDLLM.with_config(folder, other).enable_learning(api.LearningConfig())
    for settings in ({"steps": 0}, {"samples": 2.5}, {"learning_rate": 0.0}, {"min_quality": 1.1}):
        with pytest.raises(api.ConfigError, match=next(iter(settings))):
            api.LearningConfig(**settings)
