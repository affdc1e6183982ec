"""The verbs from end to end, as processes: files of the run folder, the last line, resuming, streams."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
SMOKE = ("experiment=smoke", "data=text")


def command(verb: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{verb}", *arguments]


def call(folder: Path, verb: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(verb, *arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def summary_of(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[-1])
    assert path.is_absolute() and path.name == "summary.json"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a Python corpus in it, apart from the checkout."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "corpus").mkdir()
    for name in range(60):
        functions = [f"def add_{n}(a, b):\n    total = a + b * {n + name}\n    return total\n\n\n" for n in range(4)]
        (folder / "corpus" / f"part_{name}.py").write_text("".join(functions))
    return folder


@pytest.fixture(scope="module")
def trained(workplace) -> subprocess.CompletedProcess:
    return call(workplace, "train", *SMOKE, "data.path=corpus", "run.dir=trained", "samples.length=64")


def test_a_training_run_leaves_everything(workplace, trained):
    summary = summary_of(trained)
    folder = workplace / "trained"
    assert (summary["status"], summary["verb"], summary["run_dir"]) == ("done", "train", str(folder))
    for name in (
        "run.json",
        "config.yaml",
        "overrides.txt",
        "provenance.json",
        "metrics.jsonl",
        "report.html",
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
    ):
        assert (folder / name).is_file(), name
    assert (folder / "checkpoints" / "6").is_dir()
    assert not (workplace / "outputs").exists() and not (folder / ".hydra").exists()
    metrics = summary["metrics"]
    assert len(metrics["params_sha256"]) == 64
    assert metrics["steps"] == 6 and metrics["tokens_per_s"] > 0 and metrics["resumed_from"] is None
    assert metrics["bits_per_byte_low"] < metrics["bits_per_byte_mean"] < metrics["bits_per_byte"]
    assert 0 < metrics["order1_bits_per_byte"] < metrics["order0_bits_per_byte"] and metrics["xz_bits_per_byte"] > 0
    assert 0 <= metrics["parse_share_generated"] <= 1 and 0 <= metrics["parse_share_infilled"] <= 1
    assert "experiment=smoke" in (folder / "overrides.txt").read_text().splitlines()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [2, 4, 6]
    assert [record["step"] for record in records if record["kind"] == "eval"] == [3, 6]


def test_the_report_needs_no_network_and_holds_the_samples(workplace, trained):
    page = (workplace / "trained" / "report.html").read_text()
    assert "generated 1" in page and "infilled 1" in page and 'src="http' not in page
    assert "A gap being filled" in page and "order-1 tokens" in page


def test_a_second_run_in_the_folder_of_another_is_refused(workplace, trained):
    before = (workplace / "trained" / "summary.json").read_bytes()
    again = call(workplace, "train", *SMOKE, "data.path=corpus", "run.dir=trained", "seed=7")
    assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith("error: ")
    assert (workplace / "trained" / "summary.json").read_bytes() == before


def test_sample_fills_gaps_and_streams_its_events(workplace, trained):
    prompt = "def add(a, b):\n    total = <mask>\n    return total"
    done = call(
        workplace, "sample", "model.path=trained", f"sample.prompt={prompt}", "sample.gap=4", "sampler.steps=4",
        "sample.count=2", "sample.stream=events.jsonl", "run.dir=drawn",
    )  # fmt: skip
    assert summary_of(done)["metrics"]["tokens"] == 8
    records = [json.loads(line) for line in (workplace / "events.jsonl").read_text().splitlines()]
    start, events, end = records[0], records[1:-1], records[-1]
    assert start["kind"] == "start" and end["kind"] == "end" and len(end["texts"]) == 2
    tokens = start["tokens"]
    for event in events:
        assert event["kind"] == "commit" and tokens[event["row"]][event["position"]] == start["mask_id"]
        tokens[event["row"]][event["position"]] = event["token"]
    assert not any(start["mask_id"] in row for row in tokens)
    for text in end["texts"]:
        assert text.startswith("def add(a, b):\n    total = ") and text.endswith("\n    return total")
        assert text in done.stdout


@pytest.mark.slow
def test_a_stream_on_stdout_ends_before_the_last_line(workplace, trained):
    done = call(workplace, "sample", "model.path=trained", "sample.length=12", "sampler.steps=2", "sample.stream=-")
    summary_of(done)
    kinds = [json.loads(line)["kind"] for line in done.stdout.splitlines()[:-1]]
    assert kinds[0] == "start" and kinds[-1] == "end" and set(kinds[1:-1]) == {"commit"}


def test_a_prompt_longer_than_the_context(workplace, trained):
    done = call(workplace, "sample", "model.path=trained", f"sample.prompt={'x' * 3000}", "sample.stream=never.jsonl")
    assert done.returncode == 2 and done.stdout == "" and not (workplace / "never.jsonl").exists()
    assert len(done.stderr.splitlines()) == 1 and "3000 tokens" in done.stderr and "1024" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to stand for a full disk")
def test_a_full_disk_is_one_line_and_exit_code_1(workplace, trained):
    done = call(
        workplace, "sample", "model.path=trained", "sample.length=12", "sample.stream=/dev/full", "run.dir=full"
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: the disk is full") and "Traceback" not in done.stderr
    assert json.loads((workplace / "full" / "summary.json").read_text())["status"] == "failed"


def test_evaluate_agrees_with_the_training_run(workplace, trained):
    done = call(
        workplace, "evaluate", "model.path=trained", "data=text", "data.path=corpus", "evaluation.samples=1",
        "evaluation.batch=8", "evaluation.rows=16",
    )  # fmt: skip
    ours, theirs = summary_of(done)["metrics"], summary_of(trained)["metrics"]
    assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-6)
    assert ours["order1_bits_per_byte"] == theirs["order1_bits_per_byte"]


@pytest.mark.slow
def test_a_checkpoint_that_is_cut_short(workplace, trained):
    call(workplace, "train", *SMOKE, "data.path=corpus", "run.dir=cut", "samples.generated=0", "samples.infilled=0")
    for path in (workplace / "cut" / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    (workplace / "cut" / "summary.json").unlink()
    done = call(workplace, "train", *SMOKE, "data.path=corpus", "run.dir=cut", "trainer.resume=auto")
    assert done.returncode == 2 and "cut short" in done.stderr and "4" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


LONG = (*SMOKE, "data.path=corpus", "trainer.steps=300", "trainer.checkpoint_every=40", "trainer.eval_every=0",
        "samples.generated=0", "samples.infilled=0", "optimizer.ema=0.9")  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(workplace):
    whole = summary_of(call(workplace, "train", *LONG, "run.dir=whole"))
    arguments = command("train", *LONG, "run.dir=broken", "trainer.resume=auto")
    process = subprocess.Popen(arguments, cwd=workplace, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_for(workplace / "broken" / "checkpoints" / "80", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = summary_of(subprocess.run(arguments, cwd=workplace, env=ENVIRONMENT, capture_output=True, text=True))
    assert resumed["metrics"]["resumed_from"] >= 80
    assert resumed["metrics"]["params_sha256"] == whole["metrics"]["params_sha256"]
    assert resumed["metrics"]["bits_per_byte"] == whole["metrics"]["bits_per_byte"]
    steps = [json.loads(line)["step"] for line in (workplace / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 300
    other = summary_of(call(workplace, "train", *LONG, "run.dir=other", "seed=1"))
    assert other["metrics"]["params_sha256"] != whole["metrics"]["params_sha256"]


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_ends_with_143(workplace):
    arguments = command("train", *LONG, "trainer.steps=100000", "trainer.checkpoint_every=0", "run.dir=stopped")
    process = subprocess.Popen(arguments, cwd=workplace, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for(workplace / "stopped" / "metrics.jsonl", process)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "checkpoint saved" in errors.splitlines()[-1]
    assert json.loads((workplace / "stopped" / "summary.json").read_text())["status"] == "interrupted"
    assert len(list((workplace / "stopped" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_the_certificates_hold(workplace):
    done = call(workplace, "evaluate", "certify=true", "run.dir=certified")
    assert summary_of(done)["metrics"]["certificates"] > 5
    lines = done.stderr.splitlines()
    assert sum(line.startswith("holds: ") for line in lines) > 5 and "FAILS" not in done.stderr
