"""The benchmark runner: what it refuses, what it writes, and that the torch peer is the same network as ours."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import (
    make_models,
    measure,
    ours_decode,
    ours_denoise,
    ours_kernels,
    ours_micro,
    rows,
    rows_banks,
    rows_decode,
)
from experiments.settings import ModelPath
from experiments.wiring import Loaded, export, load
from kernels_pallas.attention import Mask
from ruvjax.core.params import abstract, init, unstack
from ruvjax.data.puzzles.solver import Box, candidates, search
from ruvjax.data.tokenize import TokenizerConfig, train_tokenizer
from ruvjax.errors import ConfigError, InputError, RunError
from ruvjax.io.huggingface import load_model
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


@pytest.mark.parametrize("native, device", [(True, "cpu"), (False, "cpu"), (False, "NVIDIA H200")])
def test_bfloat16_is_not_tried_beside_float32_where_a_cpu_emulates_it(monkeypatch, native, device):
    tried = []

    def launch(program, job, settings, python):
        tried.append(job["dtype"])
        return {"seconds": [1.0], "first": 0.0, "parameters": 1, "device": device, "versions": {}}

    monkeypatch.setattr(measure, "allocators", lambda: {"glibc": {}})
    monkeypatch.setattr(measure, "launch", launch)
    monkeypatch.setattr(measure, "cpu_multiplies_bfloat16", lambda: native)
    measure.alternate([(rows.OURS, {})], ("float32", "bfloat16"), 1, "python")
    assert tried == (["float32"] if device == "cpu" and not native else ["float32", "bfloat16"])
    tried.clear()
    measure.alternate([(rows.OURS, {})], ("bfloat16",), 1, "python")
    assert tried == ["bfloat16"]


def test_of_settings_alike_in_speed_the_leanest_is_kept():
    tried = [({"seconds": [s], "step_bytes": b}, name) for s, b, name in ((1.0, 9, "a"), (1.04, 3, "b"), (1.2, 1, "c"))]
    assert measure.best_of(tried)[1] == "b"
    assert measure.best_of([({"seconds": [s]}, name) for s, name in ((1.01, "a"), (1.0, "b"))])[1] == "b"


@pytest.mark.slow
def test_the_plain_forms_of_the_kernel_rows_compute_what_the_ops_do():
    job = {"form": "product", "dtype": "float32", "batch": 2, "length": 9, "width": 4, "state": 3, "rows": 5}
    job |= {"vocab_size": 40, "size": 256}
    for work, tolerance in (("scan_fwd", 1e-5), ("scan_grad", 1e-4), ("q8_matvec", 0.3)):
        ours, operands, _ = ours_kernels.work_of({**job, "work": work})
        plain, others, _ = ours_kernels.work_of({**job, "work": work, "form": "plain"})
        for one, other in zip(jax.tree.leaves(ours(*operands)), jax.tree.leaves(plain(*others)), strict=True):
            np.testing.assert_allclose(one, other, atol=tolerance, rtol=1e-3)
    job |= {"heads": 2, "kv_heads": 2, "dim": 8, "selected": 2, "bank": 6, "rank": 2, "batch": 1, "kept": 64}
    cases = {"masked_loss_grad": {}, "kv_attention_int8": {"length": 150}, "kv_attention_int4": {"length": 150}}
    cases |= {work: {"width": 16} for work in ("lora_sequences", "lora_positions", "lora_dense")}
    for work, more in cases.items():
        ours, operands, needed = ours_kernels.work_of({**job, **more, "work": work})
        plain, others, _ = ours_kernels.work_of({**job, **more, "work": work, "form": "plain"})
        for one, other in zip(jax.tree.leaves(ours(*operands)), jax.tree.leaves(plain(*others)), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-3)
        assert needed["bytes"] > 0
    ours, operands, _ = ours_kernels.work_of({**job, "work": "unmask"})
    for one, other in zip(ours(*operands)[2:], ours_kernels.naive_unmask(*operands)[2:]):  # the draws differ in noise
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_row_of_online_adaptation(monkeypatch, capsys):
    row = rows_banks.banks()[-1]
    job = {**row.job, "threads": 1, "dtype": "float32"}
    assert (job["hidden"], job["calls"], job["limit_s"]) == (4096, 10_000, 0.001)
    reports = []
    for side in (row.ours, row.theirs):
        monkeypatch.setattr(sys, "argv", ["", json.dumps({**job, **side, "hidden": 32, "calls": 20, "warmup": 2})])
        ours_micro.main()
        reports.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    ours, limit = reports
    assert limit["seconds"] == [0.001] and len(ours["seconds"]) == 1 and ours["parameters"] == 2 * 2 * 64
    assert ours["facts"]["p50_us"] <= ours["facts"]["p99_us"] == pytest.approx(1e6 * ours["seconds"][0])


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


def script(name, monkeypatch=None):
    """A peer's program as a module; it finds its neighbours as a script does."""
    spec = importlib.util.spec_from_file_location(name, measure.HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if monkeypatch is not None:
        monkeypatch.syspath_prepend(str(measure.HERE))
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("torch", reason="the torch peer needs torch: install the extra `parity`")
    return script("peer_torch")


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


def test_the_rows_of_decode():
    found = {row.name: row for row in rows_decode.decode()}
    assert (
        list(found)
        == (
            "decode_f32 decode_q8_vs_f32 dual_cache_vs_uncached dual_cache_puzzle dual_cache_vs_llada_loop llama_cpp_q8"
        ).split()
    )
    model = Transformer(**rows_decode.LLAMA)
    assert 60e6 < sum(np.prod(spec.shape) for spec in jax.tree.leaves(abstract(model))) < 66e6
    assert found["decode_f32"].tokens == 128 and found["decode_f32"].job["prompt"] == 64
    assert found["dual_cache_vs_uncached"].tokens == 8 * 256  # half of 8 rows of 512
    assert found["dual_cache_puzzle"].tokens == 16 * 8 * 20  # 20 cells of each board
    assert found["decode_q8_vs_f32"].peer.title == "ruvjax float32" and found["decode_q8_vs_f32"].peer.is_ours


def test_files_are_made_once_and_named_to_both_sides(tmp_path, monkeypatch):
    made, told = [], []
    monkeypatch.setattr(bench, "launch", lambda program, job, *rest: made.append((program.title, job["make"])))
    monkeypatch.setattr(bench, "available", lambda *arguments: "")
    console = bench.Console(quiet=True)
    for row in rows_decode.decode():
        told.append(bench.prepared(row, tmp_path, console)["folder"])
    assert made == [("the model", name) for name in ("llama", "trained", "puzzles")]
    kinds = ("llama", "llama", "trained", "puzzles", "trained", "llama")
    assert told == [str(tmp_path / name) for name in kinds]
    assert bench.prepared(rows.diffusion()[0], tmp_path, console) == {}

    def alternate(sides, *rest):
        assert all(job["folder"] == told[0] for _, job in sides)
        facts = [{"accuracy": 0.5}, {"accuracy": 0.25}]
        return [
            measure.Side((1.0,), 1.0, "malloc, float32", 10, "cpu", {}, facts=fact, tokens=tokens)
            for fact, tokens in zip(facts, ((1, 2, 3, 4), (1, 2, 3, 5)))
        ]

    monkeypatch.setattr(bench, "alternate", alternate)
    record, _ = bench.measure(rows_decode.decode()[0], bench.Job("decode"), console, {"folder": told[0]})
    assert (record["ours_accuracy"], record["theirs_accuracy"], record["same_tokens"]) == (0.5, 0.25, 0.75)


def test_rows_of_puzzles_hold_boards_with_one_solution(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), [])
    given = {}

    def trained(job, folder):
        given["settings"] = job["settings"]
        return Loaded(None, None, tokenizer)

    monkeypatch.setattr(make_models, "_train", trained)
    monkeypatch.setattr(make_models, "BOARDS", 30)
    make_models.puzzles({"rows": 2, "length": 74, "block": 37, "masked": 20, "settings": []}, tmp_path)
    text = (tmp_path / "boards.txt").read_text()
    assert len(text.splitlines()) == 30 and given["settings"][-1] == f"data.path={tmp_path / 'boards.txt'}"
    canvas = np.load(tmp_path / make_models.CANVAS)
    assert canvas["text"].shape == (2, 74)
    for row, masked in zip(canvas["text"].reshape(-1, 37), canvas["masked"].reshape(-1, 37)):
        free = masked == tokenizer.mask_id
        assert free.sum() == 20 and not free[36] and (row[~free] == masked[~free]).all()
        board = np.array([int(digit) for digit in tokenizer.decode(row[:36])])
        clues = np.where(free[:36], 0, board)[None]
        found = search(candidates(clues, Box(2, 3)), Box(2, 3))
        assert found.solutions[0] == 1


TINY_LLAMA = {
    "vocab_size": 64,
    "layers": 2,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 64,
    "tied_head": False,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_models.llama({"model": {**TINY_LLAMA, "max_length": 64}}, folder)
    return {"folder": str(folder), "prompt": 6, "generated": 9}


@pytest.mark.slow
def test_decoding_gives_the_tokens_of_the_whole_forward_pass(llama):
    model, params, weights = ours_decode.loaded({**llama, "form": "float32"})
    row = ours_decode.prompt_of(llama, 64)
    for _ in range(9):
        logits = model.apply(params, jnp.asarray([row], jnp.int32), mask=Mask(causal=True)).logits
        row.append(int(jnp.argmax(logits[0, -1])))
    assert ours_decode.continued(llama, model, params) == row[6:]
    assert weights == sum(x.size for x in jax.tree.leaves(params))
    assert ours_decode.bytes_per_token(params) == 4 * (weights - 64 * 32)


def test_the_q8_form_holds_a_quarter_of_the_bytes_and_the_gguf_file_the_same_blocks(llama):
    _, wide, _ = ours_decode.loaded({**llama, "form": "float32"})
    model, blocks, _ = ours_decode.loaded({**llama, "form": "Q8_0"})
    assert 0.25 < ours_decode.bytes_of(blocks) / ours_decode.bytes_of(wide) < 0.3
    _, read, _ = load_model(f"{llama['folder']}/Q8_0/{make_models.GGUF}", quantized=True)
    for one, other in zip(jax.tree.leaves(blocks), jax.tree.leaves(unstack(read, model.layers)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_transformers_decodes_the_same_tokens(llama, capsys, monkeypatch):
    pytest.importorskip("transformers", reason="the peer needs transformers: install the extra `parity`")
    pytest.importorskip("torch", reason="the peer needs torch: install the extra `parity`")
    peer = script("peer_transformers")
    job = {**llama, "work": "decode", "dtype": "float32", "threads": 1, "warmup": 0, "repeats": 1}
    monkeypatch.setattr(sys, "argv", ["peer", json.dumps(job)])
    peer.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    model, params, weights = ours_decode.loaded({**llama, "form": "float32"})
    assert report["tokens"] == ours_decode.continued(llama, model, params)
    assert report["parameters"] == weights and report["facts"]["weight_bytes"] == ours_decode.bytes_of(params)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """As `make_models.trained` leaves it, after no training at all."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer(TokenizerConfig(kind="bytes", vocab_size=259), [])
    model = Transformer(vocab_size=tokenizer.vocab_size, layers=2, width=16, heads=2, mlp_width=24, max_length=32)
    params = init(model, jax.random.key(0))
    export(folder / make_models.RUN / "model", Loaded(model, params, tokenizer))
    rows_ = np.random.default_rng(0).integers(3, 259, (3, 16), np.int32)
    free = make_models.half_masked(rows_.shape, 8, 4)
    assert (free.reshape(3, 2, 8).sum(-1) == 4).all()
    masked = np.where(free, tokenizer.mask_id, rows_)
    np.savez(folder / make_models.CANVAS, text=rows_, masked=masked)
    return {"folder": str(folder), "work": "sample", "length": 16, "block": 8, "masked": 4, "threshold": 0.9}


def filled(job, form):
    """The tokens, the text and the model of the canvas in `trained`."""
    loaded = load(ModelPath(f"{job['folder']}/{make_models.RUN}"))
    canvas, sampler = np.load(f"{job['folder']}/{make_models.CANVAS}"), ours_denoise.sampler_of({**job, "form": form})
    states = [ours_denoise.filled(sampler, loaded, row) for row in canvas["masked"]]
    return states, canvas, loaded


def test_both_forms_fill_every_mask_and_keep_the_text(trained):
    for form in ("uncached", "dual"):
        states, canvas, loaded = filled(trained, form)
        for state, masked in zip(states, canvas["masked"], strict=True):
            given = masked != loaded.tokenizer.mask_id
            tokens = np.asarray(state.tokens[0])
            assert (tokens[given] == masked[given]).all() and (tokens != loaded.tokenizer.mask_id).all()
            assert int(state.nfe[0]) <= 8 and (form == "dual" or int(state.nfe[0]) == 8)


def test_lladas_loop_over_our_weights_is_our_uncached_sampler(trained, monkeypatch):
    torch = pytest.importorskip("torch", reason="the torch peer needs torch: install the extra `parity`")
    peer = script("peer_llada", monkeypatch)
    states, canvas, loaded = filled(trained, "uncached")
    network, mask_id = peer.read(f"{trained['folder']}/run/model", 16)
    assert mask_id == loaded.tokenizer.mask_id
    for state, masked in zip(states, canvas["masked"], strict=True):
        answer = peer.llada_fill(network, torch.from_numpy(masked)[None].long(), 0, 8, 8, 0.0, mask_id, False)
        np.testing.assert_array_equal(answer[0].numpy(), state.tokens[0])
