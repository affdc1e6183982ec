"""The rows of `name=banks` at small sizes: what both sides search is the same, and the step runs with adapters."""

import importlib.util
import json
import sys

import jax
import numpy as np
import pytest

from experiments.bench import bank_keys, measure, ours_banks, rows_banks
from ruvjax.lora.talora import TALoRA

SEARCH = {**rows_banks.SEARCH, "count": 2000, "dim": 16, "k": 8, "warmup": 1, "repeats": 2}


def test_the_rows_and_their_sizes():
    found = {row.name: row for row in rows_banks.banks()}
    assert list(found)[:2] == ["retrieve_100k", "talora_dgr_step"]
    assert (found["retrieve_100k"].job["count"], found["retrieve_100k"].job["dim"]) == (100_000, 256)
    step = found["talora_dgr_step"].job
    assert (step["layers"], step["width"], step["vocab_size"], step["length"]) == (6, 256, 8192, 256)
    documented = TALoRA(256)
    assert (
        tuple(map(tuple, step["banks"])) == documented.banks and found["talora_dgr_step"].tokens == step["steps"] == 64
    )
    assert tuple(step["boundaries"]) == documented.boundaries


def test_the_search_finds_all_and_says_where_it_does_not():
    report = ours_banks.search(SEARCH)
    facts = report["facts"]
    assert {facts[f"recall_{size}_{kind}"] for size in ("0k", "1k", "2k") for kind in ("iid", "clustered")} == {1.0}
    assert len(report["seconds"]) == 2 and len(report["tokens"]) == 6 * 64 * 8
    keys = bank_keys.keys("iid", 500, 16)
    queries = bank_keys.queries("iid", keys, 4)
    assert ours_banks.recalled(np.tile(np.arange(8), (4, 1)), keys, queries) < 0.3
    assert not np.array_equal(keys, bank_keys.keys("clustered", 500, 16))
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-5)


def test_faiss_finds_the_same(monkeypatch, capsys):
    pytest.importorskip("faiss", reason="the peer needs faiss: install the extra `ann`")
    monkeypatch.syspath_prepend(str(measure.HERE))
    spec = importlib.util.spec_from_file_location("peer_faiss", measure.HERE / "peer_faiss.py")
    assert spec is not None and spec.loader is not None
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    monkeypatch.setattr(sys, "argv", ["peer", json.dumps({**SEARCH, "threads": 1})])
    peer.main()
    theirs = json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]
    assert np.mean(np.asarray(theirs) == np.asarray(ours_banks.search(SEARCH)["tokens"])) > 0.999


@pytest.mark.slow
def test_the_step_runs_with_adapters_and_without():
    small = {"vocab_size": 30, "layers": 2, "width": 16, "heads": 2, "mlp_width": 24, "length": 12, "steps": 4}
    job = {**rows_banks.STEP, **small, "banks": [[40, 3], [50, 2], [60, 1]], "layer": 1, "dtype": "float32"}
    job |= {"warmup": 0, "repeats": 1}
    plain = ours_banks.step({**job, "form": "plain"})
    adapted = ours_banks.step({**job, "form": "adapted"})
    assert plain["values"] == adapted["values"] == [0.0]  # no mask is left
    assert adapted["facts"]["adapter_bytes"] == 2 * 2 * 16 * (40 * 3 + 50 * 2 + 60 * 1)
    assert {f"step_ms_{name}_alone" for name in ("coarse", "domain", "fine")} < adapted["facts"].keys()
    assert all(np.isfinite(value) for value in jax.tree.leaves((plain["facts"], adapted["facts"])))
