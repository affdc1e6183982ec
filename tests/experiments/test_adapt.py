"""The comparison of banks of adapters, at a size that learns nothing: every arm runs, and nothing leaks."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import adapt, adaptation, evidence, forgetting, retrieving, train
from experiments.adapt_settings import Domains
from experiments.domains import read_domains
from experiments.evidence import Record
from experiments.runner import main
from experiments.wiring import Loaded
from ruvjax.core.params import init
from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.errors import InputError
from ruvjax.lora import bank as bank_of
from ruvjax.lora import talora
from ruvjax.lora.layout import layout
from ruvjax.models.transformer import Transformer
from ruvjax.training.optimizer import OptimizerConfig

MASK = train_tokenizer(TokenizerConfig("bytes"), []).mask_id


@pytest.fixture(scope="module")
def loaded():
    model = Transformer(vocab_size=259, layers=2, width=16, heads=2, mlp_width=32, max_length=64)
    return Loaded(model, init(model, jax.random.key(0)), train_tokenizer(TokenizerConfig("bytes"), []), length=32)


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    root = tmp_path_factory.mktemp("domains")
    for name, line in (("one", "alpha = beta + 1\n"), ("two", "zzz qqq www\n")):
        (root / name).mkdir()
        (root / name / "text.txt").write_text(line * 400)
    texts = {name: str(root / name) for name in ("one", "two")}
    settings = Domains(texts=texts, valid_share=0.2, test_share=0.2)
    return read_domains(settings, train_tokenizer(TokenizerConfig("bytes"), []), 32)


@pytest.mark.parametrize("sites", [(), ("layers.0.q", "down")], ids=["residual", "sites"])
def test_adapters_of_known_domains_are_trained_on_their_own_rows_alone(loaded, domains, sites):
    chosen = layout(loaded.model, sites) if sites else None
    config = adaptation.banks_of(2, 16, 2, 8, 1, 2, 0.1, chosen)
    rate = OptimizerConfig(lr=1e-2, warmup_steps=1)
    adapters, losses = adaptation.train(config, loaded, domains, rate, updates=6, rows=2, seed=0)
    assert adapters.a.shape == (4, config.rows, 2) and config.rows == (80 if sites else 16) and len(losses) == 6
    assert all(float(jnp.abs(adapters.b[i]).max()) > 0 for i in range(4))
    # Another text of the second domain changes its two adapters and not those of the first.
    other = [domains[0], domains[1].__class__("two", domains[0].train, domains[1].valid, domains[1].test)]
    changed, _ = adaptation.train(config, loaded, other, rate, updates=1, rows=2, seed=0)
    first, _ = adaptation.train(config, loaded, domains, rate, updates=1, rows=2, seed=0)
    same = [bool(jnp.array_equal(changed.b[i], first.b[i])) for i in range(4)]
    # the global norm is clipped, so directions are compared
    assert not (same[1] and same[3])
    for i in (0, 2):
        a, b = (np.asarray(x.b[i]).ravel() for x in (changed, first))
        assert a @ b >= 0.99 * np.linalg.norm(a) * np.linalg.norm(b)


def test_the_query_never_sees_what_is_to_be_predicted():
    tokens = jnp.asarray([[5, MASK, 7, 8, MASK, 9, 10, 11]])
    place, real = jax.random.uniform(jax.random.key(0), tokens.shape), jnp.ones(tokens.shape, bool)
    for when in ("step", "once"):
        earlier, share = retrieving.hidden_before(tokens, place, real, MASK, when, 4)
        visible = np.asarray(earlier[0] != MASK)
        assert (np.asarray(earlier)[0, visible] == np.asarray(tokens)[0, visible]).all()
        assert not visible[1] and not visible[4]
        assert visible.sum() == {"step": 4, "once": 1}[when] and share[0] == 1 - visible.sum() / 8
    nothing, share = retrieving.hidden_before(jnp.full((1, 8), MASK), place, real, MASK, "step", 4)
    assert (nothing == MASK).all() and share[0] == 1


def right_share(config, banks, keys, asked):
    """For each bank, the weight that falls on adapters of the right domain: `asked` holds queries of each domain in
    turn, [domains * n, width], relative to the centre."""
    shares: list[float] = []
    for bank, rows in zip(banks, asked):
        slots, similarity = bank_of.retrieve(bank, jnp.asarray(rows, jnp.float32), config.k)
        hits = talora.Hits(slots[None], similarity[None], jnp.ones(1))
        weights = np.asarray(talora.weigh(config, hits))[0]
        owners = np.concatenate([keys.domain, np.full(bank.capacity - len(keys.domain), -1)])[np.asarray(slots)]
        right = np.repeat(np.arange(int(keys.domain.max()) + 1), len(rows) // (int(keys.domain.max()) + 1))
        shares.append(float((weights * (owners == right[:, None])).sum() / weights.sum()))
    return shares


def test_banks_find_the_adapter_of_the_domain_and_random_ones_do_not(loaded, domains):
    config = adaptation.banks_of(1, 16, 2, 16, 1, 3, 0.05)
    rng = np.random.default_rng(0)
    adapters = adaptation.Adapters(jnp.asarray(rng.normal(size=(2, 16, 2))), jnp.asarray(rng.normal(size=(2, 2, 16))))
    others = domains[0].train
    keys = retrieving.make_keys(config, loaded, [d.train for d in domains], others, 8, 0)
    asked = [keys.of_domains[0]]
    found = retrieving.make_banks(config, adapters, keys)
    assert right_share(config, found, keys, asked)[0] > 0.9
    dealt = retrieving.make_banks(config, adapters, keys, dealt=True)
    np.testing.assert_array_equal(np.asarray(dealt[0].keys.values), np.asarray(found[0].keys.values))
    assert not np.array_equal(np.asarray(dealt[0].a, np.float32), np.asarray(found[0].a, np.float32))
    more = retrieving.make_banks(config, adapters, keys, distractors=5)
    assert more[0].capacity == found[0].capacity + 5


def test_the_shares_of_banks_are_those_of_the_documents():
    config = adaptation.banks_of(3, 16, 2, 8, 1, 2, 0.1)
    assert config.boundaries == (700, 300)
    shares = talora.blend(config, jnp.asarray([900.0, 700.0, 500.0, 10.0]))
    np.testing.assert_allclose(shares.T, [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]])


def test_a_course_forgets_and_the_strength_is_chosen_among_those_that_still_learn():
    def course(new, end):
        return forgetting.Course(np.array([[5.0, 5.0], [new, 5.0], [end, new]]))

    courses = {0.0: course(4.0, 4.8), 1.0: course(4.02, 4.4), 10.0: course(4.3, 4.31)}
    np.testing.assert_allclose(courses[0.0].forgetting, [0.8])
    assert forgetting.choose_strength(courses, 0.01) == 1.0
    assert forgetting.choose_strength(courses, 0.2) == 10.0


def test_gains_and_what_is_kept_of_them_are_paired_by_seed():
    records = [
        record
        for seed, base in enumerate((2.0, 3.0))
        for record in (
            Record("base", seed, base, 1.0),
            Record("oracle", seed, 0.9 * base, 1.0, banks=1),
            Record("retrieved each step", seed, 0.92 * base, 1.0, banks=1),
        )
    ]
    gain = evidence.gains(records, "oracle, 1 bank")
    assert abs(gain.mean - 0.1) < 1e-9 and gain.high - gain.low < 1e-6
    kept = evidence.kept(records, "retrieved each step, 1 bank", "oracle, 1 bank")
    assert abs(kept.mean - 0.8) < 1e-9


def test_a_domain_too_small_and_one_that_is_missing_are_named(tmp_path):
    (tmp_path / "t.txt").write_text("x\n" * 9)
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), [])
    with pytest.raises(InputError, match="'small'"):
        read_domains(Domains(texts={"small": str(tmp_path), "other": str(tmp_path)}), tokenizer, 64)
    with pytest.raises(InputError, match="nopackage"):
        read_domains(Domains(packages=("json", "nopackage")), tokenizer, 64)


@pytest.mark.slow
def test_every_arm_runs_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "tokenizer=bytes tokenizer.vocab_size=259 model.layers=2 model.width=16 model.heads=2 model.mlp_width=32"
    rows = "pipeline.batch=8 pipeline.length=64 evaluation.rows=16 evaluation.samples=1 evaluation.valid_rows=8"
    steps = "trainer.steps=4 trainer.eval_every=0 trainer.flat=0 samples.generated=0 samples.infilled=0 run.dir=base"
    assert main("train", train.run, ["experiment=talora_base", *small.split(), *rows.split(), *steps.split()]) == 0
    arms = "arms.rank=6 arms.updates=3 arms.seeds=2 arms.banks=[1,3] arms.keys=4 arms.k=2 arms.distractors=[0,20]"
    turn = "sequence.domains=2 sequence.updates=2 sequence.rank=2 sequence.strengths=[0.1] sequence.fisher=4"
    asked = [
        *arms.split(),
        *turn.split(),
        "evaluation.rows=4",
        "evaluation.samples=1",
        "domains.packages=[turtle,email]",
    ]
    capsys.readouterr()
    assert main("adapt", adapt.run, ["model.path=base", "run.dir=out", *asked]) == 0
    summary = json.loads(Path(capsys.readouterr().out.splitlines()[-1]).read_text())
    names = [arm["arm"] for arm in summary["metrics"]["arms"]]
    assert names[:3] == ["base", "one adapter", "oracle, 1 bank"] and len(names) == 10
    assert Path("out/report.html").stat().st_size > 10_000
    sites = ["arms.sites=[q,layers.1.down]", "sequence.domains=0", "arms.banks=[3]"]
    assert main("adapt", adapt.run, ["model.path=base", "run.dir=sites", *asked, *sites]) == 0
    summary = json.loads(Path(capsys.readouterr().out.splitlines()[-1]).read_text())
    assert len(summary["metrics"]["arms"]) == 7  # DGR acts on the residual stream
    assert main("adapt", adapt.run, ["model.path=base", "run.dir=no", *asked, "domains.packages=[json,email]"]) == 2
    assert "was trained on a library that holds json" in capsys.readouterr().err
