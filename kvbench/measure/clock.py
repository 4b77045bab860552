"""Seconds of what really ran: the devices are waited for before and after."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """`with stopwatch: ...` adds to `seconds`; it may be entered again."""

    def __init__(self, *devices: torch.device) -> None:
        self.seconds = 0.0
        self._devices = devices
        self._start = 0.0

    def _now(self) -> float:
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return time.perf_counter()

    def __enter__(self) -> Stopwatch:
        self._start = self._now()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.seconds += self._now() - self._start
