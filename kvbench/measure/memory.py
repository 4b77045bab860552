"""The most memory that was in use while something ran."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch


class Peak:
    """`with peak: ...` leaves in `nbytes` the peak of CUDA's allocator, or of the whole process on a CPU.

    `grown` is by how much that is more than what was in use at the beginning. Both are None where the system can't tell
    (a CPU without Linux's /proc), and sums over several GPUs, whose peaks need not be at one time.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._gpus = [device for device in devices if device.type == "cuda"]
        self.nbytes: int | None = None
        self.grown: int | None = None

    def __enter__(self) -> Peak:
        if self._gpus:
            for gpu in self._gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
            self._before: int | None = sum(map(torch.cuda.memory_allocated, self._gpus))
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self._before = _of_process("VmRSS")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.nbytes = sum(map(torch.cuda.max_memory_allocated, self._gpus)) if self._gpus else _of_process("VmHWM")
        self.grown = None if self.nbytes is None or self._before is None else max(self.nbytes - self._before, 0)


def _of_process(what: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    return None
