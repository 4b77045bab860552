"""Devices pretended on a CPU: tensors that say where they are, and refuse to meet those of another device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses, such as torch's lazy causal mask, are on no device
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
_STRICT = {torch.cat, torch.stack}


def where(tensor: Tensor) -> torch.device:
    return getattr(tensor, "pretended", CPU)


class Pretended(TorchFunctionMode):
    """Meanwhile `device=`, `.to`, `.cpu` and `.device` are obeyed in name: everything is computed on the CPU.

    An operation on tensors of several devices raises RuntimeError as CUDA's would: only numbers on the CPU go with
    anything, and indices on the CPU go with any tensor.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__get__":
            return _read(func, args[0])
        if func is Tensor.pin_memory:
            return args[0]
        if func in _MOVES:
            return _move(func, *args, **kwargs)
        asked, kwargs = kwargs.get("device"), {k: v for k, v in kwargs.items() if k != "device"}
        given = [*_tensors(args), *_tensors(list(kwargs.values()))]
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            given = [args[0], *(x for x in given[1:] if where(x) != CPU or func is Tensor.__setitem__)]
        device = _together(given, func)  # a new tensor is where those are that it is made of
        if asked is not None:
            device = torch.device("cuda", asked) if isinstance(asked, int) else torch.device(asked)
        found = func(*args, **kwargs)
        for x in _tensors(found):
            if not any(x is y for y in given):
                x.pretended = device  # type: ignore[attr-defined]
        return found


def _read(func: Any, x: Tensor) -> Any:
    """An attribute, such as `.device` or `.mT`."""
    if func.__self__ is Tensor.device:
        return where(x)
    if func.__self__ is Tensor.is_cuda:
        return where(x).type == "cuda"
    found = func(x)
    if isinstance(found, Tensor):
        found.pretended = where(x)  # type: ignore[attr-defined]
    return found


def _tensors(x: Any) -> Iterator[Tensor]:
    if type(x) in _PLAIN:
        yield x
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from _tensors(part)


def _together(given: list[Tensor], func: Any) -> torch.device:
    """Where the operation happens. Raises RuntimeError for tensors of several devices."""
    devices = {where(x) for x in given if x.dim() or where(x) != CPU or func in _STRICT}
    if len(devices) > 1:
        raise RuntimeError(f"{getattr(func, '__name__', func)} mixes {', '.join(sorted(map(str, devices)))}")
    return devices.pop() if devices else CPU


def _move(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`.to` in all its forms, `.cpu` and `.cuda`; what moves is a copy."""
    target, dtype = where(x), kwargs.get("dtype")
    if func is Tensor.cpu:
        target = CPU
    for given in (*args, kwargs.get("device")):
        if isinstance(given, Tensor):
            target, dtype = where(given), given.dtype
        elif isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, (str, torch.device)):
            target = torch.device(given)
        elif isinstance(given, int) and not isinstance(given, bool):
            target = torch.device("cuda", given)
    found = x if dtype is None else x.to(dtype)
    if found is x and (target != where(x) or kwargs.get("copy")):
        found = x.clone()
    if found is not x:
        found.pretended = target  # type: ignore[attr-defined]
    return found


@contextmanager
def pretended() -> Iterator[None]:
    with Pretended(), mock.patch.object(torch.cuda, "synchronize"):
        yield


def spread(model: Any, devices: list[str]) -> None:
    """Hands out a model's parts to pretended devices with accelerate's hooks, as `device_map="auto"` does.

    The embeddings are on the first device, the layers on the others in turn, and on that one again; the last norm, the
    rotary embedding and the logits are on the last.
    """
    layers = {f"model.layers.{i}": devices[(i + 1) % len(devices)] for i in range(len(model.model.layers))}
    ends = {"model.norm": devices[-1], "model.rotary_emb": devices[-1], "lm_head": devices[-1]}
    parts = {"model.embed_tokens": devices[0]} | layers | ends
    if len(devices) > 1:
        with pretended(), torch.no_grad():
            dispatch_model(model, parts, skip_keys=model._skip_keys_device_placement)
    for name, device in parts.items():
        module = model.get_submodule(name)
        for x in (*module.parameters(), *module.buffers()):
            x.pretended = torch.device(device)
