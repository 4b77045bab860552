"""Joules that NVIDIA GPUs spent while something ran."""

from __future__ import annotations

from types import TracebackType

import torch


class Energy:
    """`with energy: ...` leaves in `joules` what the GPUs spent, the whole boards', by NVML's counters.

    Where there is none, `joules` is None and `why` says so: a figure is never made up. A counter moves every 20 to
    100 ms, so what is measured should last a second.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._devices = devices
        self.joules: float | None = None
        self.why = ""

    def __enter__(self) -> Energy:
        self._start = self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        end = self._read()
        self.joules = None if end is None or self._start is None else (end - self._start) / 1000

    def _read(self) -> int | None:
        """Millijoules since the driver was loaded."""
        if any(device.type != "cuda" for device in self._devices) or torch.version.hip:
            self.why = "not measured: no NVIDIA GPU"
            return None
        import pynvml

        for device in self._devices:
            torch.cuda.synchronize(device)
        names = [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in self._devices]
        try:
            pynvml.nvmlInit()
            gpus = map(pynvml.nvmlDeviceGetHandleByUUID, names)
            return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, gpus))
        except pynvml.NVMLError as error:
            self.why = f"not measured: NVML says {error}"
            return None
