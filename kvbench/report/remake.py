"""The command that makes a cell's records again, from what its header says. Imports no torch."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from kvbench.cell import ModelConfig
from kvbench.list import presets
from kvbench.sweep import words


def command(header: dict[str, Any], limit: int | None, results: str) -> str:
    """`python -m kvbench.run ...` for the first `limit` examples (None: all) of the cell that a header describes."""
    identity = header["identity"]
    given = [*_plugin("method", identity["method"]), f"budget={identity['budget']}"]
    given += _plugin("task", identity["task"])
    given += [_word(name, identity[name]) for name in ("protocol", "seed", "generate")]
    given += [*_model(identity["model"]), *_computed(identity["model"], header["about"]["model"])]
    given += [_word("limit", limit), _word("results", results)]
    return shlex.join(["python", "-m", "kvbench.run", *given])


def _plugin(kind: str, described: dict[str, Any]) -> Iterator[str]:
    name, _, inner = described["name"].partition(":")
    yield _word(kind, name)
    if inner:  # one of many tasks of another harness: the plugin's own option `name`
        yield _word(f"{kind}.name", inner)
    for option, value in described.items():
        if option != "name":
            yield _word(f"{kind}.{option}", value)


def _model(identity: dict[str, Any]) -> Iterator[str]:
    """The preset of that name and path, and what differs from it."""
    plain = {"weights": "trained"} | ModelConfig().identity()
    base = plain
    for choice, preset in _model_presets().items():
        found = plain | preset
        if all(found[key] == identity[key] for key in ("name", "path", "template")):
            base = found
            yield _word("model", choice)
            break
    for key, value in ({"weights": "trained"} | identity).items():
        if base[key] != value:
            yield _word(f"model.{key}", value)


def _computed(identity: dict[str, Any], made: dict[str, Any]) -> Iterator[str]:
    """In which dtype the layers computed, which `auto` would choose by the machine; and long contexts' chunks."""
    usual = {"compute": identity["dtype"], "prefill_chunk": ModelConfig.prefill_chunk}
    for key, value in usual.items():
        if made.get(key, value) != value:
            yield _word(f"model.{key}", made[key])


@functools.cache
def _model_presets() -> dict[str, dict[str, Any]]:
    return {name: dict(OmegaConf.load(file)) for name, file in sorted(presets("models").items())}


@functools.lru_cache(maxsize=4096)
def _reads_back(word: str, text: str) -> bool:
    """Whether Hydra reads a bare `name=text` as just that text, no number, list or quotation."""
    try:
        return OverridesParser.create().parse_override(word).value() == text
    except HydraException:
        return False


def _word(name: str, value: Any) -> str:
    """`name=value` as one writes it by hand; quoted where it would not read back as the same."""
    if isinstance(value, bool):
        return f"{name}={str(value).lower()}"
    if isinstance(value, str) and _reads_back(f"{name}={value}", value):
        return f"{name}={value}"
    return words({name: tuple(value) if isinstance(value, list) else value})[0]  # words() sweeps over lists
