"""Joules that an NVIDIA GPU spent while something ran."""

from __future__ import annotations

from types import TracebackType

import torch


class Energy:
    """`with energy: ...` leaves in `joules` what the GPU of `device` spent, the whole board's, by NVML's counter.

    Where there is none, `joules` is None and `why` says so: a figure is never made up. The counter moves every 20 to
    100 ms, so what is measured should last a second.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
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
        if self._device.type != "cuda" or torch.version.hip:
            self.why = "not measured: no NVIDIA GPU"
            return None
        import pynvml

        torch.cuda.synchronize(self._device)
        try:
            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(self._device).uuid}")
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        except pynvml.NVMLError as error:
            self.why = f"not measured: NVML says {error}"
            return None
