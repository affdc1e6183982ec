"""The tables of tiles: what is looked up, what a miss does, and what a file may hold."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import compat, tiles
from kernels_pallas.selective_scan import chunk, gpu, selective_scan, tpu


class Blocks(NamedTuple):
    rows: int
    columns: int


KERNEL = tiles.Kernel("some", Blocks, ("length", "width"), lambda x: "rows is odd" if x.rows % 2 else "")
ENTRY = {"device": "NVIDIA H200", "dtype": "bfloat16", "shape": {"length": 512, "width": 64}}
ENTRY |= {"tiles": {"rows": 8, "columns": 128}}
FALLBACK = Blocks(2, 2)


def table(tmp_path, *entries, **changes):
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"format_version": 1, "kernel": "some", "entries": list(entries)} | changes))
    return path


@pytest.mark.parametrize(("size", "expected"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (1000, 1024)])
def test_a_bucket_ends_at_a_power_of_two(size, expected):
    assert tiles.bucket(size) == expected


def test_an_entry_serves_its_device_dtype_and_bucket_only(tmp_path):
    found = tiles.load(KERNEL, table(tmp_path, ENTRY))

    def chosen(device="NVIDIA H200", dtype=jnp.bfloat16, length=300, width=64, mode="heuristic"):
        return tiles.choose(KERNEL, found, device, dtype, {"length": length, "width": width}, FALLBACK, mode)

    assert chosen() == chosen(length=257) == chosen(length=512, mode="error") == Blocks(8, 128)
    others = {"device": "NVIDIA H100", "dtype": jnp.float32, "length": 256, "width": 65}
    for name, other in others.items():
        assert chosen(**{name: other}) == FALLBACK
        with pytest.raises(tiles.TileError, match="no tiles of some are recorded for NVIDIA H"):
            chosen(**{name: other}, mode="error")
    assert chosen(device="", mode="error") == FALLBACK  # nothing was measured without a device
    with pytest.raises(tiles.TileError, match="RUVJAX_TILES='strict' is not known"):
        chosen(mode="strict")


WRONG = {
    "a key too many": (ENTRY | {"note": 1}, "entry 0 must hold device, dtype, shape, tiles"),
    "no device": (ENTRY | {"device": ""}, "entry 0: device is ''"),
    "no dtype": (ENTRY | {"dtype": "bf16"}, "entry 0: 'bf16' is no dtype"),
    "another spelling": (ENTRY | {"dtype": "f4"}, "entry 0: 'f4' is no dtype"),
    "a size that is missing": (ENTRY | {"shape": {"length": 4}}, "entry 0, shape must hold length, width"),
    "no bucket": (ENTRY | {"shape": {"length": 500, "width": 64}}, "length is 500, not a power of two"),
    "a fraction": (ENTRY | {"tiles": {"rows": 8.0, "columns": 1}}, "rows is 8.0, not a whole number"),
    "a truth value": (ENTRY | {"tiles": {"rows": 2, "columns": True}}, "columns is True"),
    "zero": (ENTRY | {"tiles": {"rows": 0, "columns": 1}}, "rows is 0"),
    "what the kernel cannot take": (ENTRY | {"tiles": {"rows": 3, "columns": 1}}, "entry 0, tiles: rows is odd"),
    "no object": ("tiles", "entry 0 must hold"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_entry_is_one_line_that_names_it(tmp_path, wrong):
    entry, expected = WRONG[wrong]
    with pytest.raises(tiles.TileError, match=expected) as error:
        tiles.load(KERNEL, table(tmp_path, entry))
    assert "some.json" in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_file_is_refused(tmp_path):
    for changes, expected in (
        ({"format_version": 2}, "format_version is 2, not 1"),
        ({"kernel": "other"}, "kernel is 'other', not 'some'"),
        ({"entries": {}}, "entries is not a list"),
        ({"more": 1}, "the file must hold"),
    ):
        with pytest.raises(tiles.TileError, match=expected):
            tiles.load(KERNEL, table(tmp_path, **changes))
    with pytest.raises(tiles.TileError, match="entry 1 repeats NVIDIA H200"):
        tiles.load(KERNEL, table(tmp_path, ENTRY, ENTRY))
    (tmp_path / "cut.json").write_text('{"format_version": 1,')
    for name in ("cut.json", "absent.json"):
        with pytest.raises(tiles.TileError, match=f"{name} cannot be read"):
            tiles.load(KERNEL, tmp_path / name)


def test_every_file_is_read_by_a_kernel():
    assert {path.stem for path in tiles.FOLDER.iterdir()} == {gpu.KERNEL.name, tpu.KERNEL.name}
    tiles.load(gpu.KERNEL, tiles.FOLDER / f"{gpu.KERNEL.name}.json")
    tiles.load(tpu.KERNEL, tiles.FOLDER / f"{tpu.KERNEL.name}.json")


def test_the_heuristics_are_tiles_that_a_table_may_hold():
    for state in (8, 16, 32, 64):
        assert not gpu.KERNEL.unfit(gpu.heuristic(state))
        assert not tpu.KERNEL.unfit(tpu.heuristic(2048, state))
    assert gpu.KERNEL.unfit(gpu.Tiles(chunk.CHUNK - 1)) and tpu.KERNEL.unfit(tpu.Tiles(100))


@pytest.mark.skipif(bool(compat.missing("tpu")), reason=compat.missing("tpu"))
def test_the_scan_takes_what_its_table_says(tmp_path, monkeypatch):
    """Interpreted, as on a device that the table knows: a block of 128 of 256 channels, and an error for a miss."""
    entry = {"device": "TPU v6", "dtype": "float32", "shape": {"width": 256, "state": 2}, "tiles": {"width": 128}}
    (tmp_path / "selective_scan_tpu.json").write_text(
        json.dumps({"format_version": 1, "kernel": "selective_scan_tpu", "entries": [entry]})
    )
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles._table.cache_clear()
    x = jax.random.normal(jax.random.key(0), (1, 4, 256))
    a, b = -jnp.ones((256, 2)), jax.random.normal(jax.random.key(1), (1, 4, 2))

    def scan(impl, b=b, a=a):
        return selective_scan(x, jnp.ones_like(x), a, b, b, jnp.ones(256), impl=impl)[0]

    def block():
        return tpu._Plan.of(x, 2, None).block

    try:
        assert block() == 256  # no TPU here: the heuristic
        monkeypatch.setattr(tiles, "device_kind", {"tpu": "TPU v6"}.get)
        assert block() == 128
        np.testing.assert_allclose(scan("interpret"), scan("reference"), atol=1e-5)
        monkeypatch.setenv("RUVJAX_TILES", "error")
        assert block() == 128
        with pytest.raises(tiles.TileError, match="selective_scan_tpu are recorded for TPU v6, float32, width 256"):
            scan("interpret", b[..., :1], a[:, :1])
    finally:
        tiles._table.cache_clear()
