"""The documented names of the Mamba part: what they compute, and what they refuse in one line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ruvjax.api.repair_checkpoint import load_checkpoint, load_pretrained, save_checkpoint
from ruvjax.api.repair_mamba import MambaCache, MambaLM, MambaLMConfig
from ruvjax.core.params import init
from ruvjax.errors import ConfigError, InputError
from ruvjax.io.huggingface import save_model
from ruvjax.models.mamba2 import Mamba2

CONFIG = MambaLMConfig(vocab_size=30, d_model=16, n_layers=2, d_state=4)
PROMPT = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def model():
    made = MambaLM(CONFIG)
    keys = iter(jax.random.split(jax.random.key(1), 64))
    made.params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), made.params)
    return made


def test_the_documented_defaults():
    config = MambaLMConfig()
    network = config.network()
    assert (config.vocab_size, network.vocab_size, network.width, network.layers) == (50257, 50264, 768, 24)
    assert (network.state, network.conv, network.expand, network.rank) == (16, 4, 2, 48)
    assert config.dt_rank == "auto" and config.initializer_range == 0.02 and config.tie_embeddings


def test_forward_gives_logits_loss_and_hidden_states(model):
    logits = model.forward(PROMPT)
    assert logits.shape == (2, 5, 32) and logits.dtype == jnp.float32  # 30 tokens, rounded up to a multiple of 8
    labels = PROMPT.copy()
    labels[1, 2] = -100
    again, loss = model.forward(PROMPT, labels=labels)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    each = [-log_p[r, t, labels[r, t + 1]] for r in range(2) for t in range(4) if labels[r, t + 1] >= 0]
    assert len(each) == 7
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-5)
    np.testing.assert_array_equal(again, logits)
    found = model(PROMPT, labels=labels, return_hidden_states=True)
    assert set(found) == {"logits", "loss", "hidden_states"} and len(found["hidden_states"]) == CONFIG.n_layers + 1
    np.testing.assert_allclose(model.network.head(model.params, found["hidden_states"][-1]), logits, atol=1e-5)
    assert set(model(PROMPT, return_hidden_states=True)) == {"logits", "hidden_states"}


def test_a_cache_carries_on_where_the_last_call_ended(model):
    whole = model.forward(PROMPT)
    cache = model.allocate_inference_cache(2)
    parts = [model.forward(PROMPT[:, part], cache=cache) for part in (slice(0, 3), slice(3, 4), slice(4, 5))]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
    assert cache.seqlen_offset == 5 and len(cache.conv_states) == len(cache.ssm_states) == 2
    cache.reset()
    np.testing.assert_allclose(model.forward(PROMPT[:, :3], cache=cache), parts[0], atol=1e-6)


def test_the_cache_has_the_documented_methods():
    cache = MambaCache.empty(CONFIG, 3, "cpu", jnp.bfloat16)
    conv, ssm = cache.get_layer_cache(1)
    assert conv.shape == (3, 3, 32) and conv.dtype == jnp.bfloat16
    assert ssm.shape == (3, 32, 4) and ssm.dtype == jnp.float32
    cache.update(1, conv + 1, ssm + 2)
    assert float(cache.get_layer_cache(1)[1].min()) == 2 and float(cache.get_layer_cache(0)[1].max()) == 0
    cache.increment_offset()
    cache.increment_offset(4)
    assert cache.seqlen_offset == 5
    cache.reset()
    assert cache.seqlen_offset == 0 and not np.any(np.asarray(cache.ssm_states[1]))
    for wrong in (lambda: cache.get_layer_cache(2), lambda: cache.update(0, conv, ssm[:1])):
        with pytest.raises(InputError):
            wrong()


def test_greedy_generation_takes_the_likeliest_token_with_and_without_a_cache(model):
    expected = PROMPT
    for _ in range(6):
        best = np.asarray(model.forward(expected))[:, -1, : CONFIG.vocab_size].argmax(-1)
        expected = np.concatenate([expected, best[:, None]], axis=1)
    for settings in ({"do_sample": False}, {"temperature": 0.0}, {"do_sample": False, "use_cache": False}):
        np.testing.assert_array_equal(model.generate(PROMPT, 6, **settings), expected)
    np.testing.assert_array_equal(model.generate(PROMPT, 6, top_k=1), expected)
    assert model.generate(PROMPT, 0).shape == PROMPT.shape


def test_sampling_is_the_same_with_and_without_a_cache_and_other_for_another_seed(model):
    cached = model.generate(PROMPT, 8, temperature=1.5, top_p=0.95, seed=3)
    np.testing.assert_array_equal(
        cached, model.generate(PROMPT, 8, temperature=1.5, top_p=0.95, seed=3, use_cache=False)
    )
    assert np.any(np.asarray(cached) != np.asarray(model.generate(PROMPT, 8, temperature=1.5, top_p=0.95, seed=4)))
    assert int(jnp.max(cached)) < CONFIG.vocab_size


def test_a_shorter_prompt_padded_on_the_left_gives_the_same_tokens(model):
    alone = model.generate(PROMPT[1:, 2:], 6, do_sample=False)
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    both = model.generate(PROMPT, 6, do_sample=False, attention_mask=mask)
    np.testing.assert_array_equal(both[1, 5:], alone[0, 3:])
    with pytest.raises(InputError, match="on the left"):
        model.generate(PROMPT, 2, attention_mask=mask[:, ::-1])


def test_rows_end_at_eos_and_are_padded(model):
    free = np.asarray(model.generate(PROMPT, 8, do_sample=False))
    eos = int(free[0, 6])  # the second token of the first row
    ended = np.asarray(model.generate(PROMPT, 8, do_sample=False, eos_token_id=eos, pad_token_id=7))
    first = int(np.argmax(free[0, 5:] == eos)) + 6
    np.testing.assert_array_equal(ended[0, :first], free[0, :first])
    assert np.all(ended[0, first:] == 7)
    if eos not in free[1, 5:]:
        np.testing.assert_array_equal(ended[1], free[1])
    alone = model.generate(PROMPT[:1], 8, do_sample=False, eos_token_id=eos)
    assert alone.shape == (1, first)  # columns in which all rows have ended are left out


def test_a_penalty_stops_repetition(model):
    plain = np.asarray(model.generate(PROMPT[:1], 12, do_sample=False))[0]
    other = np.asarray(model.generate(PROMPT[:1], 12, do_sample=False, repetition_penalty=50.0))[0]
    assert len(set(other)) > len(set(plain)) or len(set(plain)) == len(plain)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.forward([[1, 30]]), "30, which is no token"),
        (lambda m: m.forward([[-1, 3]]), "-1, which is no token"),
        (lambda m: m.forward([1, 2]), "integers"),
        (lambda m: m.forward([[1.5]]), "integers"),
        (lambda m: m.forward(PROMPT, labels=PROMPT[:1]), "labels have shape"),
        (lambda m: m.forward(PROMPT, cache=m.allocate_inference_cache(1)), "the cache holds 1 rows"),
        (
            lambda m: m.forward(PROMPT, cache=MambaCache.empty(dataclasses.replace(CONFIG, d_state=2), 2)),
            "does not fit",
        ),
        (lambda m: m.generate(PROMPT, -1), "max_new_tokens=-1"),
        (lambda m: m.generate(PROMPT, eos_token_id=99), "eos_token_id=99"),
        (lambda m: m.generate(np.zeros((1, 0), int)), "empty"),
    ],
)
def test_bad_input_is_one_clear_line(model, call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(model)
    assert "\n" not in caught.value.line()


@pytest.mark.parametrize(
    "change", [{"dropout": 0.1}, {"dt_rank": "big"}, {"dt_init": "zeros"}, {"d_model": 0}, {"vocab_size": 0}], ids=str
)
def test_a_configuration_that_cannot_be_is_refused(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(CONFIG, **change)


def test_a_checkpoint_comes_back_whole(model, tmp_path):
    optimizer = optax.adam(1e-3).init(model.params)
    optimizer = jax.tree.map(lambda x: x + 1, optimizer)
    save_checkpoint(model, optimizer, tmp_path / "c", step=7, epoch=2, note="x")
    empty = optax.adam(1e-3).init(model.params)
    found = load_checkpoint(tmp_path / "c", optimizer=empty)
    assert (found["step"], found["epoch"], found["note"]) == (7, 2, "x")
    assert found["model"].config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, found["optimizer"], optimizer)
    jax.tree.map(np.testing.assert_array_equal, found["model"].params, model.params)
    other = MambaLM(CONFIG, seed=5)
    assert load_checkpoint(tmp_path / "c", model=other)["model"] is other
    np.testing.assert_array_equal(other.forward(PROMPT), model.forward(PROMPT))
    save_checkpoint(model, None, tmp_path / "c")  # and may be replaced
    assert load_checkpoint(tmp_path / "c")["step"] is None
    np.testing.assert_array_equal(load_pretrained(tmp_path / "c", "cpu").forward(PROMPT), model.forward(PROMPT))
    narrow = load_pretrained(tmp_path / "c", dtype="bfloat16")
    assert (
        narrow.network.dtype == "bfloat16" and narrow.allocate_inference_cache(1).conv_states[0].dtype == jnp.bfloat16
    )
    assert not [path for path in (tmp_path / "c").rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]


def test_a_checkpoint_that_does_not_fit_is_refused(model, tmp_path):
    save_checkpoint(model, optax.adam(1e-3).init(model.params), tmp_path / "c")
    with pytest.raises(InputError, match="another configuration"):
        load_checkpoint(tmp_path / "c", MambaLM(dataclasses.replace(CONFIG, d_state=2)))
    with pytest.raises(InputError, match="does not fit the optimizer"):
        load_checkpoint(tmp_path / "c", optimizer=optax.sgd(1e-3, momentum=0.9).init(model.params))
    with pytest.raises(InputError, match="no such model folder|No such file|training.json"):
        load_checkpoint(tmp_path / "nowhere")
    state = json.loads((tmp_path / "c" / "training.json").read_text())
    (tmp_path / "c" / "training.json").write_text(json.dumps(state | {"format_version": 9}))
    with pytest.raises(InputError, match="format_version=9"):
        load_checkpoint(tmp_path / "c")
    second = Mamba2(vocab_size=8, layers=1, width=8, state=2, head_dim=4)
    save_model(tmp_path / "two", second, init(second, jax.random.key(0)))
    with pytest.raises(InputError, match="holds Mamba2, MambaLM is Mamba-1"):
        load_pretrained(tmp_path / "two")
