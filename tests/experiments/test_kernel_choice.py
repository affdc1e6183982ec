"""The doctor's line of each op: that of the call which is really made, for this machine and for pretended ones."""

import json
from pathlib import Path

import pytest

import kernels_pallas
from experiments import doctor, runner
from experiments.kernel_choice import describe, examples, kernel_rows
from kernels_pallas import compat, dispatch, native


def test_every_op_has_a_line():
    folders = {path.parent.name for path in Path(kernels_pallas.__file__).parent.glob("*/reference.py")}
    assert {name.split("/")[0] for name in examples(None)} == folders
    rows = dict(kernel_rows(None))
    assert len(rows) == len(examples(None)) and not any("\n" in text for text in rows.values())
    assert all(text.startswith("xla") for text in rows.values())  # the tests run on a CPU
    assert "pallas_tpu needs a TPU" in rows["selective_scan"]
    assert "no GPU kernel" in rows["kv_attention"] and "needs a GPU" not in rows["kv_attention"]


def test_the_native_kernel_is_named_or_the_reason_why_not(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda source, targets: "")
    assert dict(kernel_rows(None))["attention"].startswith("xla by C++: compiled for this processor")
    monkeypatch.undo()
    monkeypatch.setenv("RUVJAX_NATIVE", "0")
    rows = dict(kernel_rows(None))
    for name in ("attention", "quant_matmul"):
        assert rows[name].startswith("xla: no C++ kernel: switched off by RUVJAX_NATIVE=0")


@pytest.mark.skipif(bool(compat.missing("tpu")), reason=compat.missing("tpu"))
def test_another_machine_takes_its_kernels(monkeypatch):
    """What each op would take where a TPU or a GPU is; the fixed example for this machine says otherwise."""
    assert dict(kernel_rows(None))["unmask"].startswith("xla")
    monkeypatch.setattr(dispatch, "platforms", lambda: ("tpu", "cpu"))
    rows = dict(kernel_rows(None))
    for name in ("unmask", "masked_cross_entropy", "selective_scan", "lora_bank", "quant_matmul", "kv_attention"):
        assert rows[name] == "pallas_tpu: the best body for this device"
    assert rows["attention"].startswith("xla: the C++ kernel runs where there is a CPU alone")
    monkeypatch.setattr(dispatch, "platforms", lambda: ("cuda", "cpu"))
    rows = dict(kernel_rows(None))
    assert rows["kv_attention"].startswith("xla: pallas_gpu cannot run: no GPU kernel is written")
    assert rows["lora_bank"].startswith("xla: pallas_gpu cannot run: no GPU kernel is written")


def test_a_named_body_is_said_and_one_that_cannot_run_is_no_traceback():
    rows = dict(kernel_rows("reference"))
    assert rows["attention"] == "reference: asked for by kernels.attention"
    assert rows["unmask"].startswith("xla")
    call = examples("nothing")["attention/attention"]
    assert describe("attention", call, "nothing").startswith("none: attention: impl='nothing' is not known")


def test_the_summary_holds_the_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert runner.main("doctor", doctor.run, (f"run.dir={tmp_path / 'run'}",)) == 0
    summary = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert json.loads(summary.read_text())["metrics"]["kernels"] == dict(kernel_rows(None))
