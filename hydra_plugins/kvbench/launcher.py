"""What `-m` does with the jobs it has composed: cells that differ only in method and budget share every prefill.

Hydra imports this module at every start: nothing here imports torch or submitit before they are needed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from kvbench.errors import UsageError
from kvbench.side_by_side import Group, free_devices, side_by_side

Elsewhere = Callable[[Sequence[Group], Path], None]  # runs groups in other processes, and waits; their results folder


class SharedPrefill(Launcher):
    """The default: groups run one after the other in this process, or side by side, one on each of several GPUs."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.config, self.context, self.task_function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        load = self.context.config_loader.load_sweep_config
        configs = [load(self.config, list(overrides)) for overrides in job_overrides]
        words = [[*self._flags(), *overrides] for overrides in job_overrides]
        self.task_function(*configs, words=words, elsewhere=self.elsewhere(configs))
        return [JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED) for overrides in job_overrides]

    def elsewhere(self, configs: Sequence[Any]) -> Elsewhere | None:
        """How groups are run in other processes; None: in this one."""
        devices = free_devices(configs)
        if len(devices) < 2:
            return None
        workers = [{"CUDA_VISIBLE_DEVICES": device} for device in devices]
        return lambda groups, results: side_by_side(groups, workers)

    def _flags(self) -> list[str]:
        """What another process must be told to find the same configuration."""
        hydra = self.config.hydra
        flags = [] if hydra.job.config_name == "config" else ["--config-name", hydra.job.config_name]
        folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
        return [*flags, *(word for folder in folders for word in ("--config-dir", folder))]


class Slurm(SharedPrefill):
    """Submits the groups as one job array and waits for it. The options: conf/hydra/launcher/slurm.yaml."""

    def __init__(self, max_num_timeout: int, additional: DictConfig, **options: Any) -> None:
        self.max_num_timeout = max_num_timeout
        # A cluster may be set not to requeue what does not ask for it.
        self.additional = {"requeue": True} | _plain(additional)
        self.options = {name: _plain(value) for name, value in options.items() if value is not None}

    def elsewhere(self, configs: Sequence[Any]) -> Elsewhere:
        if any(config.redo for config in configs):
            raise UsageError(
                "redo=true would start over whenever SLURM requeues a job: remove the cells' folders instead"
            )
        return self._run

    def _run(self, groups: Sequence[Group], results: Path) -> None:
        logs = results / "slurm"
        job = self._submit(groups, logs)
        look = f"python -m kvbench.status results={results}"
        _tell(f"{len(groups)} groups: SLURM job {job}; logs: {logs}; how far they are: {look}")
        try:
            _wait(job, len(groups))
        except KeyboardInterrupt as stop:
            stop.args = (f"SLURM job {job} goes on without this process: {look}; scancel {job} ends it",)
            raise

    def _submit(self, groups: Sequence[Group], logs: Path) -> str:
        try:
            import submitit
            from submitit.core.utils import FailedJobError, FailedSubmissionError
        except ImportError as error:
            raise UsageError('hydra/launcher=slurm needs submitit: pip install "kvbench[slurm]"') from error
        if shutil.which("sbatch") is None:
            raise UsageError("hydra/launcher=slurm needs a machine that can submit SLURM jobs: there is no sbatch here")
        from kvbench.group import Group as Task

        executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=self.max_num_timeout)
        common = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")
        options = {name if name in common else f"slurm_{name}": value for name, value in self.options.items()}
        if "cpus_per_task" in options:  # SLURM's srun no longer takes it over from the job
            options["slurm_srun_args"] = [f"--cpus-per-task={options['cpus_per_task']}"]
        executor.update_parameters(name="kvbench", slurm_additional_parameters=self.additional, **options)
        try:
            jobs = executor.submit_array([Task(group) for group in groups])
        except (FailedJobError, FailedSubmissionError) as error:
            raise UsageError("sbatch has refused the jobs: see above") from error
        return str(jobs[0].job_id).partition("_")[0]


def _wait(job: str, total: int) -> None:
    """Until SLURM has no job of the array left that waits or runs; a requeued one waits.

    submitit would ask `sacct`, which only clusters with an accounting database have.
    """
    began, ended = time.monotonic(), 0
    while ended < total:
        time.sleep(min(30, 1 + (time.monotonic() - began) / 20))
        command = ["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%i"]
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode == 0:
            left = len(asked.stdout.split())
        elif "Invalid job id" in asked.stderr:  # ended so long ago that SLURM has forgotten it
            left = 0
        else:  # no answer, this time
            continue
        if total - left > ended:
            ended = total - left
            _tell(f"{ended} of {total} groups ended")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _tell(line: str) -> None:
    print(f"kvbench: {line}", file=sys.stderr)
