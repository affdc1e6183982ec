"""What the user gets wrong ends with exit code 2, one line with a hint, and nothing written over."""

import errno
import os

import pytest

from experiments import doctor, evaluate, runner, sample, train
from experiments.complaints import explain
from ruvjax.errors import RunError

SMOKE = ("experiment=smoke", "pipeline.batch=8")  # a batch that divides among the devices the tests force
VERBS = {"train": train.run, "evaluate": evaluate.run, "sample": sample.run, "doctor": doctor.run}


@pytest.fixture
def call(capfd, monkeypatch, tmp_path):
    """`call(verb, *arguments)` -> (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(verb: str, *arguments: str) -> tuple[int, str, str]:
        code = runner.main(verb, VERBS[verb], arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return run


def refused(result: tuple[int, str, str], *words: str, code: int = 2) -> None:
    got, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith(("corpus:", "model:", "run folder"))]
    assert got == code, err
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), err
    assert "(" in lines[0] and lines[0].endswith(")"), "no hint"
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0], lines[0]


def nothing_written(folder) -> bool:
    return not [path for path in folder.rglob("*") if path.is_file() and path.name in ("summary.json", "config.yaml")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer.stepz=3"], ["trainer.stepz", "trainer.steps"]),
        (["steps=3"], ["trainer.steps"]),
        (["trainr.steps=3"], ["trainer.steps"]),
        (["modle=mdlm_tiny"], ["did you mean model"]),
        (["+trainer.stepz=3"], ["trainer.stepz", "trainer.steps"]),
        (["+nonsense=3"], ["nonsense is not a setting of Train"]),
        (["model=mdlm_tny"], ["model=mdlm_tny", "mdlm_tiny"]),
        (["experiment=stdlib"], ["experiment=stdlib", "stdlib_5min"]),
        (["trainer.steps=many"], ["trainer.steps='many'", "an integer"]),
        (["model.layers=2.5"], ["model.layers=2.5", "an integer", "float"]),
        (["seed=yes please"], ["seed="]),
        (["optimizer.kind=adam"], ["optimizer", "adamw"]),
        (["objective.kind=exact"], ["exact_k"]),
        (["sampler.order=best"], ["sampler", "confidence"]),
        (["data=text"], ["data.path"]),
        (["model.layers=[1,2]"], ["model.layers", "list"]),
        (["model._target_=os.system"], ["os.system", "not allowed"]),
        (["pipeline.length=4096"], ["pipeline.length", "model.max_length"]),
        (["pipeline.batch=0"], ["batch"]),
        (["model.width=(("], ["cannot read"]),
        (["justtext"], ["justtext"]),
        (["--nonsense"], ["wrong usage"]),
        (["run.trackers=[wandbb]"], ["wandbb", "wandb"]),
        (["trainer.steps=1e3"], ["write trainer.steps=1000"]),
        (["trainer.steps=1,2"], ["-m"]),
        (["seed=${nowhere}"], ["nowhere"]),
    ],
)
def test_configuration_mistakes(call, tmp_path, arguments, words):
    refused(call("train", *arguments), *words)
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["backend=cudda"], ["cudda", "cuda"]),
        (["backend=vulkan"], ["Vulkan"]),
        (["kernels.attention=fast"], ["kernels.attention='fast'", "xla"]),
        (["kernels.attention=pallas_gpu"], ["pallas_gpu"]),
    ],
)
def test_unknown_backend(call, tmp_path, arguments, words):
    refused(call("train", *SMOKE, *arguments), *words)
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["missing.txt"]),
        ("empty.txt", b"", ["empty.txt"]),
        ("binary.bin", b"text\0more" * 100, ["binary.bin", "binary"]),
        ("latin.txt", b"caf\xe9 " * 100, ["latin.txt", "UTF-8"]),
        ("rows.jsonl", b'{"text": "a"}\nnot json\n', ["rows.jsonl", "line 2"]),
        ("tiny.txt", b"a\nb\n", ["too small"]),
    ],
)
def test_unusable_corpus(call, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(call("train", *SMOKE, "data=text", f"data.path={tmp_path / name}"), *words)
    assert nothing_written(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_unreadable_corpus(call, tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("text\n" * 100)
    path.chmod(0)
    refused(call("train", *SMOKE, "data=text", f"data.path={path}"), "secret.txt")


def test_a_folder_of_another_run_is_not_touched(call, tmp_path):
    (tmp_path / "corpus.txt").write_text("some text of several words\n" * 200)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "summary.json").write_text("precious")
    arguments = [*SMOKE, "data=text", f"data.path={tmp_path / 'corpus.txt'}", f"run.dir={folder}"]
    refused(call("train", *arguments), "summary.json")
    assert (folder / "summary.json").read_text() == "precious" and len(list(folder.iterdir())) == 1


def test_run_dir_that_is_a_file(call, tmp_path):
    (tmp_path / "taken").write_text("precious")
    result = call("doctor", f"run.dir={tmp_path / 'taken'}")
    assert result[0] == 2 and (tmp_path / "taken").read_text() == "precious"


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_no_such_model(call, verb):
    refused(call(verb, "model.path=nowhere"), "nowhere")
    assert call(verb)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["certify=true", "choices=q.jsonl"], ["choices", "model.path"]),
        (["certify=true", "quality=true"], ["quality", "model.path"]),
        (["model.path=m", "quality=true", "choices=q.jsonl"], ["exclude each other"]),
    ],
)
def test_what_an_evaluation_would_pass_over_is_refused(call, tmp_path, arguments, words):
    refused(call("evaluate", *arguments), *words)
    assert nothing_written(tmp_path)


def test_help_and_printing_the_configuration_succeed(call):
    code, out, _ = call("train", "--cfg", "job")
    assert code == 0 and "trainer:" in out
    assert call("train", "--help")[0] == 0


def test_debug_shows_the_traceback(call):
    code, _, err = call("train", "trainer.stepz=3", "debug=true")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def test_what_the_system_says():
    full = OSError(errno.ENOSPC, "No space left on device", "/runs/x/metrics.jsonl")
    assert isinstance(explain(full, "train", ()), RunError) and "metrics.jsonl" in str(explain(full, "train", ()))
    wrapped = ValueError("writing chunk failed: No space left on device")
    assert "disk is full" in str(explain(wrapped, "train", ())) and explain(wrapped, "train", ()).exit_code == 1
    crash = explain(ZeroDivisionError("division by zero"), "train", ())
    assert crash.exit_code == 1 and "ZeroDivisionError" in crash.line() and "debug=true" in crash.hint


def test_interruptions_have_their_codes(capfd):
    def stop(error):
        def verb(job, launch):
            raise error

        return verb

    assert runner.main("doctor", stop(KeyboardInterrupt()), ()) == 130
    assert runner.main("doctor", stop(runner.Terminated()), ()) == 143
    assert runner.main("doctor", stop(ZeroDivisionError()), ()) == 1
    assert "Traceback" not in capfd.readouterr().err
