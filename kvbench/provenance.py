"""Under what a process ran: code, packages, machine. Imports none of the packages it names."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kvbench

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "hydra-core", "numpy")


def segment() -> dict[str, Any]:
    """What this process runs on. GPUs and thread counts are known to whoever loads the model, not here."""
    return copy.deepcopy(_segment())


@cache
def _segment() -> dict[str, Any]:
    return {
        **checkout(Path(kvbench.__file__).parent.parent),
        "python": platform.python_version(),
        "versions": {"kvbench": kvbench.__version__} | {name: version(name) for name in PACKAGES},
        "hardware": {
            "platform": platform.platform(),
            "cpu": cpu_model(),
            "cores": cores(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }


def checkout(root: Path) -> dict[str, Any]:
    """Commit and dirty flag (untracked files count) of the checkout at `root`; nulls where `root` is none."""
    unknown = {"commit": None, "dirty": None}
    try:
        commit, top = git(root, "rev-parse", "HEAD", "--show-toplevel").splitlines()
        # A wheel in some project's virtual environment lies inside that project's checkout, which says nothing of us.
        if Path(top).resolve() != root.resolve():
            return unknown
        return {"commit": commit, "dirty": bool(git(root, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return unknown


def git(root: Path, *arguments: str) -> str:
    # A git hook exports GIT_DIR and friends, which would point at another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=5, check=True).stdout


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    """The cores this process may use: a SLURM job or a container often has fewer than the machine."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
