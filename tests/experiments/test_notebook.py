"""The notebook handle: the same job as on the command line, in any order of cells, and across an interrupt."""

import _thread
import threading

import pytest
from hydra.core.global_hydra import GlobalHydra

from experiments.notebook import Experiment
from ruvjax.errors import ConfigError
from ruvjax.training.runfolder import read_metrics

FEW = ("data=text", "pipeline.batch=8", "samples.length=32", "mesh=auto")


@pytest.fixture
def experiment(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in range(40):
        text = f"def f_{name}(x):\n    return x + {name}\n\n\ndef g_{name}(x):\n    return x * {name}\n"
        (corpus / f"part_{name}.py").write_text(text)

    def make(*overrides: str) -> Experiment:
        return Experiment.from_config("smoke", *FEW, f"data.path={corpus}", f"run.root={tmp_path / 'runs'}", *overrides)

    return make


def test_fit_evaluate_sample_plot(experiment):
    run = experiment().fit()
    assert run.folder.summary.is_file()
    held_out = run.evaluate()
    assert 0 < held_out.metrics()["bits_per_byte"] < 20
    texts = run.sample("def h(x):<mask>return", gap=3)
    assert len(texts) == 1 and texts[0].startswith("def h(x):") and texts[0].endswith("return")
    assert "<iframe" in texts._repr_html_() and "<svg" in run.plot()._repr_html_()
    page = run._repr_html_()
    assert "bits per byte" in page and "smoke" in page and "configuration" in page
    assert "smoke" in repr(run)


def test_cells_may_be_run_again(experiment):
    assert not GlobalHydra.instance().is_initialized()
    first, second = experiment(), experiment("seed=3")
    assert first.job != second.job and experiment().job == first.job
    assert not GlobalHydra.instance().is_initialized()
    again = first.fit().fit()  # nothing is left to do
    assert [r["step"] for r in read_metrics(again.folder.metrics) if r["kind"] == "train"] == [2, 4, 6]


def test_the_model_before_training_can_be_used(experiment):
    assert len(experiment().sample(length=12)[0]) >= 0


def test_an_interrupt_keeps_what_is_trained(experiment):
    run = experiment(
        "trainer.steps=100000", "trainer.eval_every=0", "trainer.checkpoint_every=0", "trainer.log_every=20"
    )
    folder = run.folder

    def interrupt() -> None:
        while not folder.metrics.exists():
            if stop.wait(0.05):
                return
        _thread.interrupt_main()

    stop = threading.Event()
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        run.fit()
    finally:
        stop.set()
        thread.join()
    steps = read_metrics(folder.metrics)[-1]["step"]
    assert steps >= 20
    assert run.evaluate().metrics()["bits_per_byte"] > 0
    assert int(max(path.name for path in folder.checkpoints.iterdir())) >= steps


def test_mistakes_are_told_as_on_the_command_line():
    with pytest.raises(ConfigError, match="trainer.stepz"):
        Experiment.from_config("smoke", "trainer.stepz=3")
    with pytest.raises(ConfigError) as caught:
        Experiment.from_config("smok")
    assert "smoke" in caught.value.hint
