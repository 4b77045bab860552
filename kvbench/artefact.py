"""What a method fits once per model, offline, and keeps: safetensors files in the user's cache folder."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvbench.cell import plain
from kvbench.errors import UsageError
from kvbench.fetch import cache_folder

if TYPE_CHECKING:
    from kvbench.model import Model

_FORMAT = "1"


@dataclass(frozen=True)
class Artefact:
    """Tensors fitted for one model, and the header that says how."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, Any]
    digest: str
    _moved: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """A tensor on the device of the layer that reads it: moved there once."""
        if (name, device) not in self._moved:
            self._moved[name, device] = self.tensors[name].to(device)
        return self._moved[name, device]


class Calibration(ABC):
    """A frozen dataclass: how an artefact is fitted. Its fields, `version` and the model name the artefact."""

    version: ClassVar[int] = 1  # raise it when the same fields fit something else

    @abstractmethod
    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, what to say about them in the header); shows its own progress."""

    def identity(self) -> dict[str, Any]:
        fields = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"calibration": type(self).__name__, "version": self.version} | fields


def location(calibration: Calibration, model: Model) -> Path:
    """Where the artefact is kept: named by the calibration and the model's identity."""
    identity = json.dumps([calibration.identity(), model.identity], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return cache_folder() / "artefacts" / model.config.name / f"{type(calibration).__name__}-{digest}.safetensors"


def load_or_fit(calibration: Calibration, model: Model) -> Artefact:
    """The kept artefact; fitted first if there is none. Processes that want the same one fit it once."""
    file = location(calibration, model)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                _fit(calibration, model, file)
    return load(file, model)


def _fit(calibration: Calibration, model: Model, file: Path) -> None:
    tensors, about = calibration.fit(model)
    header = {"format": _FORMAT, "model": model.identity, **calibration.identity(), **about}
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial, {"kvbench": json.dumps(header)})
    os.replace(partial, file)


def load(file: Path, model: Model) -> Artefact:
    """Raises UsageError for a file of another format or one fitted for another model."""
    with safe_open(file, framework="pt") as opened:
        header = json.loads((opened.metadata() or {}).get("kvbench", "{}"))
        if header.get("format") != _FORMAT:
            raise UsageError(f"{file} is no artefact of this version of kvbench: delete it, it will be fitted again")
        if header["model"] != model.identity:
            raise UsageError(f"{file} was fitted for {header['model']['name']}, not for {model.identity['name']}")
        names = opened.keys()
        tensors = {name: opened.get_tensor(name).to(model.network.device) for name in names}
    return Artefact(tensors, header, hashlib.sha256(file.read_bytes()).hexdigest()[:16])
