import json

import jax
import numpy as np
import pytest

from ruvjax.data import pipeline
from ruvjax.data.pack import Packed, pack
from ruvjax.data.pipeline import Batch, Pipeline, evaluation_batches, load_corpus
from ruvjax.data.sources import SPLITS, TextSource
from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.errors import ConfigError, InputError
from ruvjax.training.evaluate import score

ROWS = 11


@pytest.fixture(scope="module")
def packed() -> Packed:
    document = np.arange(3, 3 + ROWS * 4 - 1, dtype=np.int32)
    return pack([document], 4, eos_id=0, pad_id=2, token_lengths=np.ones(60, np.int32))


def assert_equal(one: Batch, other: Batch) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def stream(pipeline: Pipeline, packed: Packed, samples: int, **options) -> Batch:
    """The first `samples` samples, joined."""
    batches = pipeline.batches(packed, **options)
    size = pipeline.batch // options.get("process_count", 1)
    taken = [next(batches) for _ in range(samples // size)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *taken)


def test_batches_are_int32_and_counted(packed):
    batches = Pipeline(batch=4, length=4).batches(packed)
    for number in range(8):
        batch = next(batches)
        np.testing.assert_array_equal(batch.index, np.arange(4 * number, 4 * number + 4))
        assert batch.tokens.shape == batch.segments.shape == batch.fixed.shape == (4, 4)
        assert [leaf.dtype for leaf in jax.tree.leaves(batch)] == [np.int32, np.int32, bool, np.int32]


def test_every_epoch_is_a_new_permutation(packed):
    first = stream(Pipeline(batch=1, length=4), packed, 4 * ROWS).tokens[:, 0].reshape(4, ROWS)
    for epoch in first:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(packed.tokens[:, 0]))
    assert len({tuple(epoch) for epoch in first}) == 4
    other = stream(Pipeline(batch=1, length=4, seed=1), packed, 4 * ROWS).tokens[:, 0].reshape(4, ROWS)
    assert not {tuple(epoch) for epoch in first} & {tuple(epoch) for epoch in other}, "seeds share no epoch"


def test_the_sample_stream_does_not_depend_on_the_batch_size(packed):
    samples = 48  # several epochs of 11 rows, none a multiple of a batch
    whole = stream(Pipeline(batch=8, length=4), packed, samples)
    for batch in (1, 2, 4, 16):
        assert_equal(whole, stream(Pipeline(batch=batch, length=4), packed, samples))
    other = stream(Pipeline(batch=8, length=4, seed=5), packed, samples)
    assert (whole.tokens != other.tokens).any(), "negative control: another seed is another stream"


def test_hosts_share_the_batches_out(packed):
    single = Pipeline(batch=8, length=4).batches(packed)
    hosts = [Pipeline(batch=8, length=4).batches(packed, process_index=i, process_count=4) for i in range(4)]
    for _ in range(6):
        parts = [next(host) for host in hosts]
        assert all(part.tokens.shape == (2, 4) for part in parts)
        assert_equal(next(single), jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts))
    assert hosts[3].get_state() == single.get_state()


@pytest.mark.parametrize("batch", [1, 3, 8, 25])
def test_resume_is_exact_at_every_position(packed, batch):
    pipeline = Pipeline(batch=batch, length=4)
    batches = pipeline.batches(packed)
    expected = [next(batches) for _ in range(3 * ROWS // batch + 6)]
    walk = pipeline.batches(packed)
    for position in range(len(expected) - 3):
        state = json.loads(json.dumps(walk.get_state()))
        resumed = pipeline.batches(packed)
        resumed.set_state(state)
        for following in expected[position : position + 3]:
            assert_equal(next(resumed), following)
        next(walk)
    walk.set_state(state)  # backwards, on a stream already under way
    assert_equal(next(walk), expected[position])


def test_resume_with_another_batch_size_or_host_count(packed):
    batches = Pipeline(batch=4, length=4).batches(packed)
    for _ in range(4):
        next(batches)
    halves = Pipeline(batch=8, length=4).batches(packed, process_index=1, process_count=2)
    halves.set_state(batches.get_state())
    np.testing.assert_array_equal(next(halves).index, [20, 21, 22, 23])
    with pytest.raises(ConfigError, match="inside a batch of 5"):
        Pipeline(batch=5, length=4).batches(packed).set_state(batches.get_state())


def test_a_position_of_other_data_is_refused(packed):
    state = Pipeline(batch=4, length=4).batches(packed).get_state()
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        Pipeline(batch=4, length=4, seed=1).batches(packed).set_state(state)
    changed = Packed(packed.tokens + 1, packed.segments, packed.fixed, packed.bytes, packed.document)
    with pytest.raises(ConfigError, match="digest"):
        Pipeline(batch=4, length=4).batches(changed).set_state(state)


def test_index_stays_int32_after_two_billion_samples(packed):
    pipeline = Pipeline(batch=4, length=4)
    batches = pipeline.batches(packed)
    batches.set_state({**batches.get_state(), "next_sample": 2**31 - 4})
    np.testing.assert_array_equal(next(batches).index, np.arange(2**31 - 4, 2**31))
    np.testing.assert_array_equal(next(batches).index, np.arange(4))


def test_evaluation_sees_every_row_once(packed):
    batches = list(evaluation_batches(packed, 4))
    assert all(batch.tokens.shape == (4, 4) for batch in batches)
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
    np.testing.assert_array_equal(joined.index, np.arange(12))
    np.testing.assert_array_equal(joined.tokens[:ROWS], packed.tokens)
    np.testing.assert_array_equal(joined.segments[:ROWS], packed.segments)
    assert not joined.segments[ROWS:].any()


def test_long_rows_are_evaluated_in_smaller_batches_with_the_same_scores(packed, monkeypatch):
    def likelihood(batch, key):
        """Of what an estimator may look at: the tokens and the random numbers of each row."""
        noise = jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number)))(batch.index)
        return (batch.tokens * (batch.segments != 0)).sum(axis=1) + noise

    def scores():
        return score(likelihood, evaluation_batches(packed, 4), jax.random.key(0))[: packed.rows]

    wide = scores()
    for most, rows in ((11, 2), (3, 1)):  # rows of 4 tokens
        monkeypatch.setattr(pipeline, "EVALUATED", most)
        assert {batch.tokens.shape for batch in evaluation_batches(packed, 4)} == {(rows, 4)}
        np.testing.assert_array_equal(scores(), wide)


def test_load_corpus(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line number {i}\n" for i in range(400)))
    source = TextSource(path=str(tmp_path), valid_share=0.1, test_share=0.1)
    corpus = load_corpus(source, TokenizerConfig("bpe", 300), Pipeline(batch=2, length=16))
    assert corpus.tokenizer.vocab_size <= 300
    for split in ("valid", "test"):
        assert getattr(corpus, split).bytes.sum() == sum(len(document.data) for document in corpus.documents[split])
    again = load_corpus(source, corpus.tokenizer, Pipeline(batch=2, length=16))
    assert all(getattr(again, split).digest == getattr(corpus, split).digest for split in SPLITS)
    learned = train_tokenizer(TokenizerConfig("bpe", 300), [document.data for document in corpus.documents["train"]])
    assert corpus.tokenizer.digest == learned.digest, "the tokenizer has seen the training split alone"
    with pytest.raises(InputError, match="too few for one row"):
        load_corpus(source, corpus.tokenizer, Pipeline(length=1 << 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch": 0}, "batch=0"), ({"length": 1}, "length=1"), ({"seed": -1}, "seed=-1"), ({"batch": 2.0}, "batch=2.0"),
     ({"batch": True}, "batch=True"), ({"mode": "rows"}, "mode='rows'")],
)  # fmt: skip
def test_bad_configuration(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Pipeline(**options)
    assert caught.value.hint


@pytest.mark.parametrize(("index", "count"), [(0, 3), (2, 2), (-1, 2)])
def test_bad_process_layout(packed, index, count):
    with pytest.raises(ConfigError, match="does not divide"):
        Pipeline(batch=4, length=4).batches(packed, index, count)
