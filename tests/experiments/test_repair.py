"""Code repair from end to end, in one process: train, evaluate, sample, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import evaluate, sample, train
from experiments.repair import side_by_side
from experiments.runner import main

SMALL = (
    "experiment=repair_trm", "data.root=library", "data.vocab_size=512", "run.dir=trained", "pipeline.batch=8",
    "model.width=16", "model.heads=2", "model.mlp_width=16", "model.layers=1", "model.updates=1", "model.dtype=float32",
    "trainer.steps=3", "optimizer.warmup_steps=1", "evaluation.pairs=12", "evaluation.valid_pairs=4",
    "evaluation.batch=8", "evaluation.shown=2",
)  # fmt: skip


def function(random: np.random.Generator, name: str) -> str:
    """A function that resembles no other: statements and operators drawn at random."""
    forms = [
        "{0} = {1} {o} {2}", "if {0} {o} {1}:\n        {2} = [{0}, {1}]", "for {0} in {1}:\n        {2} = {0} {o} {1}",
        "{0} = max({1}, {2} {o} 3)", "while {1} {o} {2}:\n        {0} = -{1}", "{0} = [{1}, ({2} {o} 7)]",
    ]  # fmt: skip
    lines = []
    for _ in range(7):
        words = random.choice(["a", "b", "c", "d", "e"], 3, replace=False)
        lines.append("    " + random.choice(forms).format(*words, o=random.choice(["+", "-", "*", "<", "and", "//"])))
    return f"def {name}(a, b, c, d, e):\n" + "\n".join(lines) + "\n    return a\n\n\n"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    (folder / "library").mkdir()
    random = np.random.default_rng(0)
    for name in range(60):
        package = folder / "library" / f"part{name}"
        package.mkdir()
        (package / "__init__.py").write_text("".join(function(random, f"f{name}_{n}") for n in range(3)))
    return folder


def call(capsys, verb: str, module, *arguments: str) -> dict:
    code = main(verb, module.run, list(arguments))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(Path(captured.out.splitlines()[-1]).read_text())["metrics"] | {"out": captured.out}


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        assert main("train", train.run, list(SMALL)) == 0
    return workplace / "trained"


def test_training_leaves_everything(trained):
    metrics = json.loads((trained / "summary.json").read_text())["metrics"]
    assert metrics["pairs"] == 12 and metrics["steps"] == 3 and len(metrics["params_sha256"]) == 64
    assert set(metrics["scores"]) == {"model", "no search", "copy", "heuristic"}
    assert metrics["scores"]["copy"]["all"]["exact"]["count"] == 0
    for name in ("model.safetensors", "config.json", "codec.json"):
        assert (trained / "model" / name).is_file()
    page = (trained / "report.html").read_text()
    assert "Repaired exactly" in page and "original" in page and 'src="http' not in page


def test_evaluate_and_sample_know_the_model(workplace, trained, capsys, monkeypatch):
    monkeypatch.chdir(workplace)
    metrics = json.loads((trained / "summary.json").read_text())["metrics"]
    settings = ("evaluation.pairs=12", "evaluation.batch=8", "evaluation.shown=2")
    again = call(capsys, "evaluate", evaluate, "model.path=trained", *settings)
    assert again["exact"] == metrics["exact"] and again["scores"]["heuristic"] == metrics["scores"]["heuristic"]
    (workplace / "broken.py").write_text("def f(a, b)\n    return a + b\n")
    drawn = call(capsys, "sample", sample, "model.path=trained", "sample.file=broken.py")
    assert drawn["changed_lines"] >= 0 and len(drawn["out"].splitlines()) >= 2


@pytest.mark.slow
def test_resuming_is_bit_exact(workplace, trained, monkeypatch):
    monkeypatch.chdir(workplace)
    whole = json.loads((trained / "summary.json").read_text())["metrics"]["params_sha256"]
    part = [argument for argument in SMALL if not argument.startswith(("run.dir", "trainer.steps"))]
    part += ["run.dir=parts", "trainer.resume=auto", "optimizer.schedule=constant"]
    straight = [argument for argument in part if not argument.startswith("run.dir")] + ["run.dir=straight"]
    assert main("train", train.run, [*part, "trainer.steps=2"]) == 0
    (workplace / "parts" / "summary.json").unlink()
    assert main("train", train.run, [*part, "trainer.steps=3"]) == 0
    assert main("train", train.run, [*straight, "trainer.steps=3"]) == 0
    one, two = (
        json.loads((workplace / name / "summary.json").read_text())["metrics"] for name in ("parts", "straight")
    )
    assert one["params_sha256"] == two["params_sha256"] != whole


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("model.path=trained",), "no function"),
        (("model.path=trained", "sample.file=absent.py"), "absent.py"),
        (("model.path=trained", "sample.file=long.py"), "rows of"),
    ],
)
def test_bad_prompts(workplace, trained, capsys, monkeypatch, arguments, word):
    monkeypatch.chdir(workplace)
    (workplace / "long.py").write_text("x = 1\n" * 99)
    assert main("sample", sample.run, list(arguments)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and word in last


def test_the_diff_is_escaped():
    page = side_by_side("a < b\n", "a > b\n", "a < b\n")
    assert "a &lt; b" in page and "a &gt; b" in page and page.count("background") == 1
