import dataclasses
import json
import shutil
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest

from ruvjax.data.repair.codec import Codec
from ruvjax.data.repair.functions import similarity
from ruvjax.data.repair.pairs import RepairBatch, RepairSource
from ruvjax.data.repair.sandbox import Limits
from ruvjax.data.repair.syntax import parse
from ruvjax.data.sources import SPLITS, StdlibSource
from ruvjax.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small library: some files of each split, under their names, so that they stay in it."""
    folder = tmp_path_factory.mktemp("library")
    for documents in StdlibSource().splits().values():
        fitting = [document for document in documents if 2000 < len(document.data) < 16000]
        for document in fitting[:8]:
            (folder / document.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(sysconfig.get_path("stdlib"), document.name), folder / document.name)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(root):
    return RepairSource(root=root, height=24, width=32, vocab_size=700).load()


def same(first: RepairBatch, second: RepairBatch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)))


def test_batches_hold_grids_that_read_back(corpus):
    stream = corpus.stream(8, seed=1)
    batch = next(stream)
    assert batch.inputs.shape == batch.labels.shape == batch.changed.shape == (8, 24, 32)
    assert (batch.inputs.dtype, batch.changed.dtype, batch.index.dtype) == (np.int32, np.bool_, np.int32)
    assert batch.index.tolist() == list(range(8))
    assert np.array_equal(batch.changed, batch.inputs != batch.labels) and batch.changed.any((1, 2)).all()
    texts = {function.text for function in corpus.functions["train"]}
    for number in range(8):
        pair = stream.pair(number)
        assert corpus.codec.decode(batch.inputs[number]) == pair.broken
        assert corpus.codec.decode(batch.labels[number]) == pair.fixed and pair.fixed in texts
        assert pair.parses == (parse(pair.broken) is not None)
    assert max(batch.labels.max(), batch.inputs.max()) < corpus.codec.vocab_size


def test_samples_depend_on_seed_and_number_alone(corpus):
    first, second = corpus.stream(4, 7), corpus.stream(8, 7)
    parts = [next(first), next(first)]
    joined = RepairBatch(*(np.concatenate(part) for part in zip(*(jax.tree.leaves(part) for part in parts))))
    assert same(joined, next(second))
    assert not same(next(corpus.stream(8, 8)), joined)


def test_each_process_gets_its_share(corpus):
    whole = next(corpus.stream(4, 2))
    shares = [next(corpus.stream(4, 2, index, 2)) for index in range(2)]
    assert same(whole, RepairBatch(*(np.concatenate(part) for part in zip(*(jax.tree.leaves(s) for s in shares)))))


def test_an_epoch_is_every_function_and_the_next_has_other_faults(corpus):
    stream = corpus.stream(1, 3)
    count = len(corpus.functions["train"])
    epochs = [[stream.pair(epoch * count + place) for place in range(count)] for epoch in range(2)]
    for pairs in epochs:
        assert len({pair.name for pair in pairs}) == count
    assert [pair.name for pair in epochs[0]] != [pair.name for pair in epochs[1]]
    broken = {pair.name: pair.broken for pair in epochs[0]}
    assert np.mean([broken[pair.name] != pair.broken for pair in epochs[1]]) > 0.7


def test_the_state_goes_on_bit_for_bit(corpus):
    stream = corpus.stream(4, 5)
    for _ in range(3):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    wanted = [next(stream) for _ in range(2)]
    other = corpus.stream(4, 5)
    other.set_state(state)
    assert all(same(next(other), batch) for batch in wanted)
    two = corpus.stream(2, 5)  # 12 samples are whole batches of this size too
    two.set_state(state)
    assert next(two).index.tolist() == [12, 13]


def test_a_state_of_another_stream_is_refused(corpus, root):
    state = next(iter([corpus.stream(4, 5)])).get_state()
    with pytest.raises(ConfigError, match="seed was 5 and is 6"):
        corpus.stream(4, 6).set_state(state)
    with pytest.raises(ConfigError, match="inside a batch of 4"):
        corpus.stream(4, 5).set_state(state | {"next_sample": 6})
    other = dataclasses.replace(corpus, source=dataclasses.replace(corpus.source, tree_share=0.3))
    with pytest.raises(ConfigError, match="digest"):
        other.stream(4, 5).set_state(state)


@pytest.mark.parametrize(("batch", "index", "count"), [(0, 0, 1), (3, 0, 2), (4, 2, 2)])
def test_a_batch_that_does_not_divide_is_refused(corpus, batch, index, count):
    with pytest.raises(ConfigError, match="batch="):
        corpus.stream(batch, 0, index, count)


def test_splits_share_no_function(corpus):
    texts = {split: [function.text for function in corpus.functions[split]] for split in SPLITS}
    assert all(texts.values())
    for held in [*texts["valid"][:10], *texts["test"][:10]]:
        assert max(similarity(held, text) for text in texts["train"][:150]) < 0.8


def test_held_out_pairs_have_one_fault_each_and_the_tests_that_show_it(corpus):
    limits = Limits(cpu_seconds=0.2, memory_mb=256)
    pairs = corpus.held_out("test", 0, 0, limits=limits)
    assert len(pairs) == len(corpus.functions["test"]) == len({pair.name for pair in pairs})
    assert [dataclasses.replace(pair, tests=None) for pair in pairs] == corpus.held_out("test", 0, 0)
    for pair in pairs:
        assert pair.broken != pair.fixed and corpus.codec.fits(pair.broken)
        assert pair.parses == (parse(pair.broken) is not None)
        assert 1 <= pair.line <= pair.broken.count("\n")
    # which functions are pure depends on the interpreter's library: few of any split, so all three are asked
    pairs += [pair for split in ("train", "valid") for pair in corpus.held_out(split, 0, 0, limits=limits)]
    assert any(pair.tests is not None for pair in pairs) and any(pair.tests is None for pair in pairs)
    assert corpus.held_out("test", 0, 1) != corpus.held_out("test", 0, 0)


def test_held_out_kinds_can_be_drawn_alike(corpus):
    count = 2 * len(corpus.functions["valid"])
    plain, alike = (corpus.held_out("valid", count, 0, equal_kinds=equal) for equal in (False, True))
    assert len(plain) == len(alike) == count
    rare = {"naming", "unused_import", "wrong_variable"}
    assert sum(pair.kind in rare for pair in alike) > 1.5 * sum(pair.kind in rare for pair in plain)


def test_kinds_restrict_the_faults(corpus):
    source = dataclasses.replace(corpus.source, kinds=["missing_colon", "wrong_bound"])
    pairs = dataclasses.replace(corpus, source=source).held_out("test", 0, 0)
    assert source.kinds == ("missing_colon", "wrong_bound")
    assert pairs and {pair.kind for pair in pairs} <= set(source.kinds)


def test_a_saved_codec_is_used_again(corpus):
    again = corpus.source.load(corpus.codec)
    assert again.codec is corpus.codec and again.functions == corpus.functions
    with pytest.raises(ConfigError, match="the codec is for 24 x 31"):
        corpus.source.load(Codec(24, 31, ()))


def test_a_grid_that_nothing_fits_is_refused(root):
    with pytest.raises(InputError, match="no function of the train split fits"):
        RepairSource(root=root, height=2, width=3, vocab_size=512).load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 1}, "data.height=1"),
        ({"width": "48"}, "data.width='48'"),
        ({"vocab_size": 511}, "data.vocab_size=511"),
        ({"keep_comments": 1}, "keep_comments=1"),
        ({"kinds": "comma"}, "kinds='comma'"),
        ({"kinds": ["coma"]}, "no kind of fault"),
        ({"tree_share": 2.0}, "tree_share=2.0"),
        ({"valid_share": 0.0}, "valid_share=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        RepairSource(**change)


def test_a_split_that_is_none_is_refused(corpus):
    for split, count in (("dev", 1), ("test", -1)):
        with pytest.raises(ConfigError, match="no held-out pairs"):
            corpus.held_out(split, count, 0)
