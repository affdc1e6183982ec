"""The doctor's line of each op: that of the call which is really made, for this machine and for pretended ones."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

import kernels_pallas
from experiments import doctor, runner
from experiments.kernel_choice import describe, examples, kernel_rows
from kernels_pallas import dispatch, native
from kernels_pallas.dispatch import Body


def test_every_op_has_a_line():
    folders = {path.parent.name for path in Path(kernels_pallas.__file__).parent.glob("*/reference.py")}
    assert {name.split("/")[0] for name in examples(None)} == folders
    rows = dict(kernel_rows(None))
    assert len(rows) == len(examples(None)) and not any("\n" in text for text in rows.values())
    assert all(text.startswith("xla") for text in rows.values())  # the tests run on a CPU


def test_the_native_kernel_is_named_or_the_reason_why_not(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda source, targets: "")
    rows = dict(kernel_rows(None))
    for name in ("attention", "quant_matmul", "selective_scan"):
        assert rows[name].startswith("xla by C++: compiled for this processor")
    assert rows["state_space_dual"].startswith("xla: ")
    monkeypatch.undo()
    monkeypatch.setenv("RUVJAX_NATIVE", "0")
    rows = dict(kernel_rows(None))
    for name in ("attention", "quant_matmul", "selective_scan"):
        assert rows[name].startswith("xla: no C++ kernel: switched off by RUVJAX_NATIVE=0")


def call(refusal=""):
    """An op with a body for each platform, of which the GPU's refuses its operands for the reason given."""
    bodies = {"xla": Body(jnp.sin), "pallas_gpu": Body(jnp.cos, refusal), "pallas_tpu": Body(jnp.tanh)}
    return lambda: dispatch.dispatch("op", None, bodies, jnp.zeros(2))


def test_the_line_is_that_of_the_machine(monkeypatch):
    # The folder is of an op without a native kernel.
    assert describe("lora_bank", call()) == "xla: pallas_gpu needs a GPU; pallas_tpu needs a TPU"
    assert describe("lora_bank", call("odd")) == "xla: pallas_gpu cannot run: odd; pallas_tpu needs a TPU"
    monkeypatch.setattr(dispatch, "platforms", lambda: ("tpu", "cpu"))
    assert describe("lora_bank", call("odd")) == "pallas_tpu: the best body for this device"
    monkeypatch.setattr(dispatch, "platforms", lambda: ("cuda", "cpu"))
    assert describe("lora_bank", call()) == "pallas_gpu: the best body for this device"
    assert describe("lora_bank", call("odd")).startswith("xla: pallas_gpu cannot run: odd")
    assert describe("quant_matmul", call("odd")).startswith("xla: the C++ kernel runs where there is a CPU alone")
    assert describe("lora_bank", lambda: jnp.zeros(2)) == "a library's kernel: the op itself chose it"


@pytest.mark.pallas
def test_the_examples_are_of_sizes_that_kernels_take(monkeypatch):
    monkeypatch.setattr(dispatch, "platforms", lambda: ("tpu", "cpu"))
    rows = dict(kernel_rows(None))
    for name in ("unmask", "masked_cross_entropy", "selective_scan", "lora_bank", "quant_matmul", "kv_attention"):
        assert rows[name] == "pallas_tpu: the best body for this device"


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
