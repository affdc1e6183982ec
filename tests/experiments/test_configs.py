"""Every experiment and every option of every group composes and builds, and spells every setting it has."""

import dataclasses
from pathlib import Path

import pytest
from omegaconf import DictConfig

from experiments.adapt_settings import Adapt
from experiments.build import build
from experiments.complaints import CONFIGS, compose_config
from experiments.puzzle_settings import PuzzleEvaluate, PuzzleSample, PuzzleTrain
from experiments.repair_settings import RepairEvaluate, RepairSample, RepairTrain
from experiments.settings import Doctor, Evaluate, Sample, Train

TEXT = ["data.path=README.md"]
# What the default experiment sets of the diffusion objective and sampler has no place in the autoregressive ones.
LANGUAGE_OBJECTIVE = [f"~objective.{name}" for name in ("masked_rows", "t_min", "t_max")] + ["~sampler.steps"]
TASKS = {"trm": PuzzleTrain, "repair": RepairTrain}
VERBS = {"talora_domains": ("adapt", Adapt)}  # experiments of another verb than train


def job_kind(option: str) -> type:
    """What the options of a name build, by the word they begin with."""
    return TASKS.get(option.split("_")[0], Train)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def needs(group: str, option: str) -> list[str]:
    """What an option asks of the command line: the mandatory values, and settings that fit its preset."""
    extra = {
        "data/text": ["data.path=README.md"],
        "data/hub": ["data.name=owner/name"],
        "objective/next_token": ["sampler=left_to_right", *LANGUAGE_OBJECTIVE],
        "sampler/left_to_right": ["objective=next_token", *LANGUAGE_OBJECTIVE],
        "puzzles/arc": ["puzzles.path=tasks"],
        "puzzles/sudoku_extreme": ["puzzles.path=boards"],
        "puzzles/maze_csv": ["puzzles.path=mazes"],
        "experiment/trm_arc": ["puzzles.path=tasks"],
        "experiment/talora_domains": ["model.path=somewhere"],
    }
    task = []
    if group == "experiment":
        return extra.get(f"{group}/{option}", [])
    if group == "puzzles" or option.startswith("trm") or f"{group}/{option}" == "optimizer/adam_atan2":
        task = ["experiment=trm_sudoku4"]
    if option == "trm_repair" or group == "repair":
        task = ["experiment=repair_trm"]
    if group == "model" and option.startswith("mamba"):
        task = ["experiment=mamba_stdlib"]
    return [*task, *extra.get(f"{group}/{option}", [])]


@pytest.mark.parametrize(("verb", "kind"), [("train", Train), ("evaluate", Evaluate), ("doctor", Doctor)])
def test_every_verb_builds_without_overrides(verb, kind):
    overrides = ["model.path=somewhere"] if verb == "evaluate" else []
    assert isinstance(build(compose_config(verb, overrides)), kind)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("sample", Sample),
        ("sample_puzzle", PuzzleSample),
        ("sample_repair", RepairSample),
        ("evaluate_puzzle", PuzzleEvaluate),
        ("evaluate_repair", RepairEvaluate),
    ],
)
def test_the_verbs_of_a_model_build(config, kind):
    assert isinstance(build(compose_config(config, ["model.path=somewhere"])), kind)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_builds_and_has_a_header(experiment):
    verb, kind = VERBS.get(experiment, ("train", job_kind(experiment)))
    job = build(compose_config(verb, [f"experiment={experiment}", *needs("experiment", experiment)]))
    assert isinstance(job, kind) and job.run.name == experiment
    header = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().split("\n\n")[0]
    assert header.startswith(f"# @package _global_\n# python -m experiments.{verb}")
    assert "# Hardware: " in header and "Expected: " in header


GROUPS = (
    "data", "tokenizer", "model", "objective", "optimizer", "trainer", "sampler", "kernels", "mesh",
    "puzzles", "repair",
)  # fmt: skip
CHOICES = [(group, option) for group in GROUPS for option in options(group) if (group, option) != ("model", "exported")]


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_option_of_every_group_builds(group, option):
    place = "repair@data" if group == "repair" else group
    job = build(compose_config("train", [*needs(group, option), f"{place}={option}"]))
    assert isinstance(job, Train | PuzzleTrain | RepairTrain)


@pytest.mark.parametrize("sweep", [name for name in options("sweep") if name != "none"])
def test_every_point_of_every_sweep_builds(sweep):
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    params = OmegaConf.load(CONFIGS / "sweep" / f"{sweep}.yaml").hydra.sweeper.params
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    assert len(jobs) > 1
    for overrides in jobs:
        assert isinstance(build(compose_config("train", overrides)), Train)


def unspelt(node: object, config: DictConfig, path: str = "") -> list[str]:
    """Settings of the dataclass `node` that `config` does not spell, so that overriding them would need a `+`."""
    missing = []
    for field in dataclasses.fields(node):  # pyright: ignore[reportArgumentType]
        here = f"{path}.{field.name}".lstrip(".")
        if field.name not in config:
            missing.append(here)
        elif dataclasses.is_dataclass(getattr(node, field.name)):
            missing += unspelt(getattr(node, field.name), config[field.name], here)
    return missing


@pytest.mark.parametrize("verb", ["train", "evaluate", "sample", "doctor"])
def test_every_setting_is_spelt(verb):
    config = compose_config(verb, ["model.path=x"] if verb in ("evaluate", "sample") else [])
    assert unspelt(build(config), config) == []


@pytest.mark.parametrize("group", ["data", "tokenizer", "model", "objective", "optimizer", "sampler", "mesh"])
def test_every_option_spells_every_setting(group):
    for option in options(group):
        if (group, option) != ("model", "exported"):
            config = compose_config("train", [f"{group}={option}", *needs(group, option)])
            assert unspelt(getattr(build(config), group), config[group], group) == [], option


def test_hydra_writes_nothing_and_stays_in_place(monkeypatch, tmp_path):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        hydra = compose("train", ["run.dir=/tmp/somewhere"], return_hydra_config=True).hydra
    assert hydra.job.chdir is False and hydra.output_subdir is None
    assert Path(CONFIGS / "hydra" / "launcher" / "process.yaml").is_file()
