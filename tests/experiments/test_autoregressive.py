"""Autoregressive models from end to end, in one process: train, evaluate, sample; a transformer and both Mambas."""

import json
from pathlib import Path

import pytest

from experiments import evaluate, sample, train
from experiments.runner import main

SMOKE = (
    "experiment=smoke",
    "data=text",
    "objective=next_token",
    "sampler=left_to_right",
    "~sampler.steps",
    "run.dir=trained",
    "pipeline.batch=8",
)
NO_HEADS = ("~model.heads", "~model.mlp_width", "model.layers=1", "model.width=16")
MODELS = {
    "transformer": (),
    "mamba": ("model=mamba_tiny", *NO_HEADS),
    "mamba2": ("model=mamba2_tiny", *NO_HEADS, "model.head_dim=8"),
}


def summary(capsys, code: int) -> dict:
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(Path(captured.out.splitlines()[-1]).read_text())["metrics"]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    (tmp_path / "corpus").mkdir()
    for name in range(60):
        functions = [f"def add_{n}(a, b):\n    total = a + b * {n + name}\n    return total\n\n\n" for n in range(4)]
        (tmp_path / "corpus" / f"part_{name}.py").write_text("".join(functions))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model", [m if m == "mamba" else pytest.param(m, marks=pytest.mark.slow) for m in MODELS])
def test_train_evaluate_and_sample(workplace, capsys, model):
    command = [*SMOKE, "data.path=corpus", "samples.length=24", *MODELS[model]]
    trained = summary(capsys, main("train", train.run, command))
    assert trained["steps"] == 6 and trained["bits_per_byte"] == trained["bits_per_byte_mean"] > 0
    assert trained["documents_bits_per_byte_low"] < trained["bits_per_byte"] < trained["documents_bits_per_byte_high"]
    assert trained["parse_share_generated"] is not None and trained["parse_share_infilled"] is None

    corpus = ["data=text", "data.path=corpus", "evaluation.batch=8", "evaluation.rows=16"]
    again = summary(capsys, main("evaluate", evaluate.run, ["model.path=trained", *corpus]))
    assert again["bits_per_byte"] == pytest.approx(trained["bits_per_byte"], rel=1e-5)

    prompt = ["sample.prompt=def add", "sample.length=20", "sample.count=2", "sample.animate=false"]
    arguments = ["model.path=trained", "sampler=left_to_right", "sample.stream=events.jsonl", *prompt]
    drawn = summary(capsys, main("sample", sample.run, arguments))
    records = [json.loads(line) for line in (workplace / "events.jsonl").read_text().splitlines()]
    positions = [record["position"] for record in records[1:-1] if record["row"] == 0]
    assert positions == sorted(positions) and drawn["events"] == len(records) - 2
    assert all(text.startswith("def add") for text in records[-1]["texts"])


def test_the_wrong_sampler_is_one_clear_line(workplace, capsys):
    assert main("train", train.run, ["experiment=smoke", "data=text", "objective=next_token", "data.path=corpus"]) == 2
    assert "sampler=left_to_right" in capsys.readouterr().err
