"""A Hydra launcher that runs each job of a sweep in a process of its own, because JAX keeps memory and compiled code.

Choose it with `hydra/launcher=process` (the default of `-m` here). Finished jobs of an earlier call with the same
`hydra.sweep.dir` are not run again; unfinished ones continue from their checkpoint.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class ProcessLauncher(Launcher):
    """Hands the expanded jobs to `experiments.sweep.launch`. `jobs` run at a time; `fail_fast` stops at a failure."""

    def __init__(self, jobs: int, fail_fast: bool):
        self.jobs, self.fail_fast = jobs, fail_fast

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.loader = config, hydra_context.config_loader

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from experiments.sweep import Sweep, launch  # Hydra scans plugins early; the import stays out of that

        hydra = self.config.hydra
        dotted: Any = OmegaConf.select
        sweep = Sweep(
            verb=hydra.job.config_name.partition("_")[0],  # evaluate_puzzle is a configuration of evaluate
            folder=hydra.sweep.dir,
            jobs=self.jobs,
            fail_fast=self.fail_fast,
            resumable=dotted(self.config, "trainer.resume", default=None) is not None,
        )
        overrides = [tuple(filter_overrides(job)) for job in job_overrides]
        launch(sweep, overrides, initial_job_idx)
        return [JobReturn(overrides=job, status=JobStatus.COMPLETED, _return_value=None) for job in overrides]
