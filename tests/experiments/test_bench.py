"""The benchmark runner: what it refuses, what it writes, and that the torch peer is the same network as ours."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import measure, ours_kernels, rows
from ruvjax.core.params import init
from ruvjax.errors import ConfigError, InputError, RunError
from ruvjax.models.transformer import Transformer

WANTED = (
    "train_f32_4x128 train_bf16_4x128 train_f32_6x256 train_bf16_6x256 train_tiny_diffusion sample_llada_loop".split()
)


def test_the_rows_and_their_sizes():
    found = {row.name: row for row in rows.diffusion()}
    assert list(found) == WANTED
    for name, layers, width, vocab in (("train_f32_4x128", 4, 128, 512), ("train_bf16_6x256", 6, 256, 4096)):
        job = found[name].job
        assert (job["layers"], job["width"], job["vocab_size"], job["batch"], job["length"]) == (
            layers,
            width,
            vocab,
            16,
            256,
        )
    assert found["train_bf16_4x128"].dtypes == ("bfloat16",) and found["train_tiny_diffusion"].peer.checkout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name is missing"),
        (["name=difusion"], "no benchmark"),
        (["name=diffusion", "peer.pth=x"], "peer.pth is not a setting"),
        (["name=diffusion", "rounds=0"], "rounds=0"),
        (["name=diffusion", "rounds"], "not key=value"),
        (["name=diffusion", "rows=train_f32"], "no row"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(arguments, message, capsys):
    assert bench.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
    with pytest.raises(ConfigError):
        bench.parse(arguments)


def side(seconds, device="cpu"):
    return measure.Side(tuple(seconds), 1.0, "malloc, float32", 10, device, {"jax": "0"})


def test_ratios_are_of_medians_and_above_one_when_ours_is_faster(monkeypatch):
    monkeypatch.setattr(bench, "available", lambda *arguments: "")
    monkeypatch.setattr(bench, "alternate", lambda *arguments: [side([1.0, 2.0, 9.0]), side([4.0, 4.0])])
    record, _ = bench.measure(rows.diffusion()[0], bench.Job("diffusion"), bench.Console(quiet=True))
    assert (record["ours"], record["theirs"], record["ratio"]) == (2048, 1024, 2.0)
    monkeypatch.setattr(bench, "alternate", lambda *arguments: [side([1.0]), side([1.0], "NVIDIA H200")])
    with pytest.raises(RunError, match="NVIDIA"):
        bench.measure(rows.diffusion()[0], bench.Job("diffusion"), bench.Console(quiet=True))


def test_a_missing_peer_leaves_null(monkeypatch):
    monkeypatch.setattr(bench, "alternate", lambda sides, *arguments: [side([1.0]) for _ in sides])
    job = bench.Job("diffusion", python=sys.executable)
    monkeypatch.setattr(bench, "available", lambda *arguments: "no torch")
    record, _ = bench.measure(rows.diffusion()[4], job, bench.Console(quiet=True))
    assert record["ours"] > 0 and record["theirs"] is None and record["ratio"] is None


def test_a_checkout_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.subprocess, "run", lambda *a, **k: measure.subprocess.CompletedProcess(a, 0))
    with pytest.raises(InputError, match="peer.path"):
        measure.available(rows.TINY, sys.executable, str(tmp_path))
    assert "peer.path" in measure.available(rows.TINY, sys.executable, "")
    (tmp_path / "training.py").touch()
    assert measure.available(rows.TINY, sys.executable, str(tmp_path)) == ""


def test_each_side_keeps_its_fastest_settings(monkeypatch):
    """The first round tries all, the others only the best; a slow first round does not enter the result."""
    calls = []
    monkeypatch.setattr(measure, "allocators", lambda: {"slow": {"A": "1"}, "fast": {"A": "2"}})

    def launch(program, job, settings, python):
        calls.append((program.title, settings["A"]))
        best = (program.title == "ours") == (settings["A"] == "2")
        report = {"first": 0.0, "parameters": 1, "device": "cpu", "versions": {}}
        return {"seconds": [1.0 if best else 5.0], **report}

    monkeypatch.setattr(measure, "launch", launch)
    ours, theirs = measure.alternate([(rows.OURS, {}), (rows.TORCH, {})], ["float32"], 3, "python")
    assert (ours.settings, theirs.settings) == ("fast, float32", "slow, float32")
    assert ours.seconds == theirs.seconds == (1.0, 1.0, 1.0)
    assert calls[4:] == [("ours", "2"), ("plain torch", "1")] * 2


def test_of_settings_alike_in_speed_the_leanest_is_kept():
    tried = [({"seconds": [s], "step_bytes": b}, name) for s, b, name in ((1.0, 9, "a"), (1.04, 3, "b"), (1.2, 1, "c"))]
    assert measure.best_of(tried)[1] == "b"
    assert measure.best_of([({"seconds": [s]}, name) for s, name in ((1.01, "a"), (1.0, "b"))])[1] == "b"


def test_the_plain_forms_of_the_kernel_rows_compute_what_the_ops_do():
    job = {"form": "product", "dtype": "float32", "batch": 2, "length": 9, "width": 4, "state": 3, "rows": 5}
    job |= {"vocab_size": 40, "size": 256}
    for work, tolerance in (("scan_fwd", 1e-5), ("scan_grad", 1e-4), ("q8_matvec", 0.3)):
        ours, operands, _ = ours_kernels.work_of({**job, "work": work})
        plain, others, _ = ours_kernels.work_of({**job, "work": work, "form": "plain"})
        for one, other in zip(jax.tree.leaves(ours(*operands)), jax.tree.leaves(plain(*others)), strict=True):
            np.testing.assert_allclose(one, other, atol=tolerance, rtol=1e-3)
    ours, operands, _ = ours_kernels.work_of({**job, "work": "unmask"})
    for one, other in zip(ours(*operands)[2:], ours_kernels.naive_unmask(*operands)[2:]):  # the draws differ in noise
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_program_that_fails_or_computes_nonsense_is_no_measurement(tmp_path, monkeypatch):
    script = tmp_path / "peer.py"
    program = measure.Program("peer", str(script))
    report = {"seconds": [1.0], "values": [1.0]}
    for body, message in (
        ("raise SystemExit('no such device')", "no such device"),
        ("print('hello')", "no report"),
        (f"print({json.dumps(report)!r}.replace('[1.0]}}', '[NaN]}}'))", "its time says nothing"),
    ):
        script.write_text(body)
        with pytest.raises(RunError, match=message):
            measure.launch(program, {"work": "train"}, {}, sys.executable)
    script.write_text(f"print({json.dumps(report)!r})")
    assert measure.launch(program, {"work": "train"}, {}, sys.executable) == report
    with pytest.raises(RunError, match="says nothing"):  # a sample in which a mask was left
        measure.launch(program, {"work": "sample"}, {}, sys.executable)


def test_rows_measured_before_are_kept(tmp_path):
    path = tmp_path / "cpu" / "diffusion.json"
    bench.keep(path, {"rows": [{"name": "b", "ours": 1}]}, ["a", "b"])
    bench.keep(path, {"rows": [{"name": "a", "ours": 2}]}, ["a", "b"])
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["a", "b"]
    assert bench.slug("NVIDIA H200") == "nvidia-h200"


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("torch", reason="the torch peer needs torch: install the extra `parity`")
    spec = importlib.util.spec_from_file_location("peer_torch", measure.HERE / "peer_torch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = {"vocab_size": 20, "layers": 2, "width": 16, "heads": 2, "mlp_width": 24}


def test_the_torch_peer_is_our_network(peer):
    import torch

    model = Transformer(**SMALL, max_length=12)
    params = init(model, jax.random.key(0))
    network = peer.Network(**SMALL, length=12)

    def given(x):
        return torch.from_numpy(np.array(x))

    with torch.no_grad():
        network.embedding.weight.copy_(given(params.embedding))
        for i, block in enumerate(network.blocks):
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                getattr(block, name).weight.copy_(given(getattr(params.layers, name)[i].T))
        tokens = np.arange(24).reshape(2, 12) % 20
        answer = network.logits(network(torch.from_numpy(tokens))).numpy()
    expected = model.apply(params, jnp.asarray(tokens, jnp.int32), positions=jnp.tile(jnp.arange(12), (2, 1))).logits
    np.testing.assert_allclose(answer, np.asarray(expected), atol=1e-5)


def test_the_peers_sampling_loop_reveals_evenly_and_keeps_the_prompt(peer):
    import torch

    torch.manual_seed(0)
    network = peer.Network(**SMALL, length=12)
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0] == 19).sum(1).tolist()))
    prompt = torch.randint(0, 19, (3, 4))
    out = peer.llada_sample(network, prompt, 8, 4, 4, 1.0, 19, False)
    assert (out[:, :4] == prompt).all() and (out != 19).all()
    assert seen == [[8] * 3, [6] * 3, [4] * 3, [2] * 3]
