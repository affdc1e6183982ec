"""The documented TRM and TRMConfig."""

import dataclasses

import jax
import numpy as np
import pytest

from ruvjax.api.repair_trm import TRM, TRMConfig
from ruvjax.errors import ConfigError, InputError
from ruvjax.training.optimizer import OptimizerConfig

SMALL = TRMConfig(
    grid_size=2, vocab_size=4, max_seq_len=4, embed_dim=16, n_heads=2, n_layers=1, T_cycles=2, n_cycles=1,
    max_supervision_steps=5,
)  # fmt: skip


def test_the_documented_defaults():
    config = TRMConfig()
    given = dataclasses.asdict(config)
    assert given == {
        "grid_size": 9, "vocab_size": 10, "max_seq_len": 81, "embed_dim": 512, "n_layers": 2, "n_heads": 8,
        "mlp_ratio": 4.0, "dropout": 0.0, "T_cycles": 3, "n_cycles": 6, "max_supervision_steps": 16,
        "use_attention": True, "use_rotary": True, "use_swiglu": True, "use_stable_max": True, "q_threshold": 0.0,
    }  # fmt: skip
    assert config.model().mlp_width == 2048 and config.model().mixer == "attention"


def test_the_presets():
    sudoku, maze, arc = TRMConfig.for_sudoku(), TRMConfig.for_maze(12), TRMConfig.for_arc_agi(30)
    assert (sudoku.grid_size, sudoku.use_attention, sudoku.model().mixer) == (9, False, "mlp")
    assert (maze.model().length, maze.vocab_size, maze.use_attention) == (144, 6, True)
    assert (arc.model().length, arc.vocab_size) == (900, 12)


@pytest.mark.parametrize("attention", [True, False])
def test_it_trains_and_solves(attention):
    quick = OptimizerConfig(
        kind="adam_atan2", lr=2e-2, b2=0.95, weight_decay=0.0, clip=0.0, schedule="constant", warmup_steps=0
    )
    trm = TRM(dataclasses.replace(SMALL, use_attention=attention), optimizer=quick)
    grids = np.random.default_rng(0).integers(1, 4, (6, 2, 2))
    first = trm.train_step(grids, grids)
    assert first["steps"] == len(first["losses"]) == 5
    assert first["loss"] == pytest.approx(sum(first["losses"]))
    for _ in range(24):
        last = trm.train_step(grids, grids)
    assert last["losses"][0] < 0.6 * first["losses"][0] and last["accuracy"] > 0.8 > first["accuracy"]
    solved = trm.solve(grids, return_trajectory=True)
    assert solved["solution"].shape == (6, 4) and solved["confidence"].shape == (6,)
    assert len(solved["trajectory"]) == solved["steps"] <= 5
    np.testing.assert_array_equal(solved["trajectory"][-1], solved["solution"])
    assert "trajectory" not in trm.solve(grids, max_steps=1)
    alone = trm.solve(grids[2:3])["solution"]  # whatever its neighbours
    np.testing.assert_array_equal(alone[0], solved["solution"][2])
    assert trm.num_parameters() == sum(x.size for x in jax.tree.leaves(trm.params))


def test_a_confident_row_is_frozen():
    trm = TRM(SMALL)
    trm.params = trm.params.replace(halt_bias=trm.params.halt_bias + 10.0)
    assert trm.solve(np.ones((1, 4), int))["steps"] == 1
    strict = TRM(dataclasses.replace(SMALL, q_threshold=1e9), params=trm.params)
    assert strict.solve(np.ones((1, 4), int))["steps"] == 5


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (np.ones((1, 3, 3), int), "3x3 cells, the model takes 2x2"),
        (np.full((1, 4), 4), "token 4 is out of the vocabulary of 4"),
        (np.full((1, 4), -1), "token -1"),
        (np.ones((1, 4)), "whole numbers"),
        (np.ones(4, int), "whole numbers"),
    ],
)
def test_bad_grids_are_one_clear_line(grid, message):
    with pytest.raises(InputError, match=message):
        TRM(SMALL).solve(grid)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match=r"dropout=0\.1"):
        TRMConfig(dropout=0.1)
    with pytest.raises(ConfigError, match="max_seq_len=81"):
        TRMConfig(grid_size=10)
    with pytest.raises(InputError, match="max_steps=0"):
        TRM(SMALL).solve(np.ones((1, 4), int), max_steps=0)
    with pytest.raises(InputError, match="labels has shape"):
        TRM(SMALL).train_step(np.ones((2, 4), int), np.ones((1, 4), int))
