"""Groups of a sweep in processes of their own on this machine, several at a time. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

Group = Sequence[Sequence[str]]  # per cell: the words of its own command line


def free_devices(configs: Sequence[Any]) -> list[str]:
    """The GPUs that workers may share out among them: none if a cell's `model.device` says where it runs."""
    return cuda_devices() if all(config.model.device == "auto" for config in configs) else []


def cuda_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(index) for index in range(count)])[:count]


def side_by_side(groups: Sequence[Group], workers: Sequence[Mapping[str, str]]) -> None:
    """Runs each group as soon as a worker is free; a worker is what it adds to the environment, such as a device."""
    waiting = list(groups)
    running: dict[int, subprocess.Popen[bytes]] = {}
    ended = 0
    try:
        while waiting or running:
            for worker, extra in enumerate(workers):
                if waiting and worker not in running:
                    command = [sys.executable, "-m", "kvbench.group", *(json.dumps(words) for words in waiting.pop(0))]
                    # Bars of several processes would overwrite each other.
                    running[worker] = subprocess.Popen(command, env={**os.environ, "TTY_COMPATIBLE": "0", **extra})
            for worker in [worker for worker, process in running.items() if process.poll() is not None]:
                del running[worker]
                ended += 1
                print(f"kvbench: {ended} of {len(groups)} groups ended", file=sys.stderr)
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
