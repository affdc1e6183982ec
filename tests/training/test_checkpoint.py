"""Checkpoints: bit-equal round trips, safe beside donation, and a clear error for every way of being damaged."""

import gc
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.core.params import shardings
from ruvjax.core.sharding import RULES, MeshConfig, make_mesh
from ruvjax.errors import InputError, RunError
from ruvjax.training import checkpoint
from ruvjax.training.checkpoint import Checkpoints, latest, restore, saved_steps
from ruvjax.training.step import compile_step

# Where one array cannot be read or written, Orbax drops the others, and Python tells when they are collected.
dropped_work = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)


def save(run_dir, state, keep=2, **extra):
    checkpoints = Checkpoints(run_dir, keep)
    checkpoints.save(state, extra)
    checkpoints.close()
    return latest(run_dir)


def at(state, step):
    return state.replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def saved(toy, tmp_path_factory):
    """A run folder with checkpoints of steps 3 and 5, and the state they hold."""
    run_dir, state = tmp_path_factory.mktemp("run"), toy.setup()[0]
    for step in (3, 5):
        save(run_dir, at(state, step), data={"position": step})
    return run_dir, at(state, 5)


def test_round_trip_is_bit_equal_and_keeps_what_came_along(toy, saved):
    run_dir, state = saved
    fresh, step = toy.setup()
    read, extra = restore(latest(run_dir), jax.tree.map(lambda leaf: leaf, fresh))
    assert toy.digests(read) == toy.digests(state)
    assert jax.tree.structure(read) == jax.tree.structure(state)
    assert (extra["data"], extra["step"], extra["format"]) == ({"position": 5}, 5, 1)
    np.testing.assert_array_equal(jax.random.uniform(read.key), jax.random.uniform(state.key))
    batch = next(toy.Batches())
    compile_step(step, read, batch)(read, batch)


def test_it_keeps_the_newest(toy, tmp_path):
    checkpoints, state = Checkpoints(tmp_path, 2), toy.setup()[0]
    for step in (1, 2, 3):
        checkpoints.save(at(state, step), {})
    checkpoints.save(at(state, 3), {})  # a step that is there is not written again
    checkpoints.close()
    assert saved_steps(tmp_path) == [2, 3]
    assert latest(tmp_path) == tmp_path / "checkpoints" / "3"
    assert latest(tmp_path / "elsewhere") is None


def test_steps_that_follow_do_not_reach_into_a_write_under_way(toy, tmp_path):
    state, step = toy.setup(lr=0.5)
    batch = next(toy.Batches())
    compiled = compile_step(step, state, batch)
    state, _ = compiled(state, batch)
    before = toy.digests(state)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(state, {})
    for _ in range(5):  # each donates the buffers of the state before
        state, _ = compiled(state, batch)
    jax.block_until_ready(state)
    checkpoints.close()
    assert toy.digests(state) != before
    assert toy.digests(restore(latest(tmp_path), toy.setup()[0])[0]) == before


def test_unfinished_writes_are_no_checkpoints_and_are_cleared(toy, saved, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(saved[0], run_dir)
    partial = run_dir / "checkpoints" / "7.orbax-checkpoint-tmp"
    shutil.copytree(run_dir / "checkpoints" / "5", partial)
    assert saved_steps(run_dir) == [3, 5]
    save(run_dir, at(toy.setup()[0], 6))
    assert not partial.exists()
    assert saved_steps(run_dir) == [5, 6]


@dropped_work
@pytest.mark.parametrize("damage", ["remove", "cut", "empty", "flip"])
def test_every_damage_is_noticed_or_harmless(toy, saved, tmp_path, damage):
    """For each file of a checkpoint: what is read is bit-equal, or the error names the checkpoint and a whole one."""
    source, state = saved
    like, expected, refused = toy.setup()[0], toy.digests(state), []
    files = [path.relative_to(source) for path in sorted((source / "checkpoints" / "5").rglob("*")) if path.is_file()]
    run_dir = tmp_path / "run"
    shutil.copytree(source, run_dir)
    for name in files:
        path = run_dir / name
        data = path.read_bytes()
        middle = len(data) // 2
        path.unlink()
        if damage != "remove":
            flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"x"
            path.write_bytes({"cut": data[:middle], "empty": b"", "flip": flipped}[damage])
        try:
            assert toy.digests(restore(latest(run_dir), like)[0]) == expected
        except InputError as error:
            refused.append(name)
            assert str(run_dir / "checkpoints" / "5") in str(error)
            assert str(run_dir / "checkpoints" / "3") in error.hint
            assert "\n" not in error.line()
        path.write_bytes(data)
    gc.collect()  # so that dropped reads are told here
    assert len(refused) >= 3


@dropped_work
def test_only_the_sums_notice_a_flipped_bit_inside_an_array(toy, tmp_path, monkeypatch):
    like = toy.setup()[0].replace(carry=jax.random.normal(jax.random.key(3), (32, 32)))
    run_dir, expected = tmp_path, np.asarray(like.carry)
    save(run_dir, like)
    read_extra = checkpoint._read_extra

    def without_sums(path):
        extra = read_extra(path)
        return {**extra, "leaves": {name: {**leaf, "crc32": 0} for name, leaf in extra["leaves"].items()}}

    def differs():
        try:
            return not np.array_equal(restore(latest(run_dir), like)[0].carry, expected)
        except InputError:
            return False

    unnoticed = 0
    for path in latest(run_dir).rglob("d/*"):
        data = path.read_bytes()
        for position in range(0, len(data), 1 + len(data) // 4):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            assert not differs()
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "_read_extra", without_sums)
                patch.setattr(checkpoint, "zlib", types.SimpleNamespace(crc32=lambda data: 0))
                unnoticed += differs()
        path.write_bytes(data)
    gc.collect()
    assert unnoticed > 0


def test_another_model_or_optimiser_is_named(toy, saved):
    for other in ({"model": toy.Model(layers=3)}, {"ema": 0.0}, {"kind": "lion"}):
        with pytest.raises(InputError, match="does not fit this model and optimiser"):
            restore(latest(saved[0]), toy.setup(**other)[0])


def test_a_missing_checkpoint_and_a_foreign_format_are_named(toy, saved, tmp_path):
    with pytest.raises(InputError, match="no checkpoint at"):
        restore(tmp_path / "9", toy.setup()[0])
    path = save(tmp_path, toy.setup()[0], format=99)
    with pytest.raises(InputError, match="format 99"):
        restore(path, toy.setup()[0])


def test_a_folder_that_cannot_be_made_is_a_clear_error(toy, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="could not write checkpoint"):
        Checkpoints(tmp_path, 2)


def test_no_room_is_told_before_anything_is_written(toy, tmp_path, monkeypatch):
    state = toy.setup()[0]
    path = save(tmp_path, at(state, 1))
    checkpoints = Checkpoints(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
        with pytest.raises(RunError, match="no room for a checkpoint in .*: it takes 1 MiB of 0 MiB free"):
            checkpoints.save(at(state, 2), {})
    checkpoints.close()
    assert [item.name for item in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert toy.digests(restore(path, state)[0]) == toy.digests(at(state, 1))


@dropped_work
def test_a_full_disk_is_a_clear_error_and_leaves_the_checkpoint_before(toy, tmp_path):
    resource = pytest.importorskip("resource", reason="file size limits are a POSIX feature")
    state = toy.setup()[0]
    path = save(tmp_path, at(state, 1))
    checkpoints, limits = Checkpoints(tmp_path, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))  # Python ignores SIGXFSZ, so writes fail with EFBIG
    try:
        with pytest.raises(RunError, match="could not write checkpoint") as caught:
            checkpoints.save(at(state, 2), {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "trainer.resume=auto" in caught.value.hint
    assert latest(tmp_path) == path
    assert toy.digests(restore(path, state)[0]) == toy.digests(at(state, 1))


def test_a_checkpoint_moves_between_device_layouts(toy, tmp_path):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = shardings(toy.Model(), mesh, RULES)
    one = toy.setup()[0]
    many = toy.setup(place=lambda params: jax.device_put(params, layout))[0]
    read, _ = restore(save(tmp_path / "one", one), many)
    assert read.params.mix.sharding == layout.mix
    assert toy.digests(read) == toy.digests(one)
    back, _ = restore(save(tmp_path / "many", many), one)
    assert back.params.mix.sharding == one.params.mix.sharding
    assert toy.digests(back) == toy.digests(many)
