"""The default launcher of `-m`: cells that differ only in method and budget share every prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig


class SharedPrefill(Launcher):
    """Composes every job of a sweep and hands all of them to the task function at once, in this process."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.config, self.context, self.task_function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        load = self.context.config_loader.load_sweep_config
        self.task_function(*(load(self.config, list(overrides)) for overrides in job_overrides))
        return [JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED) for overrides in job_overrides]
