"""Runs the cells of published checks that are not there yet. The verdicts are `kvbench.report.published`'s."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import pandas as pd

from kvbench.cell import ModelConfig
from kvbench.config import Node, Run, convert
from kvbench.errors import UsageError
from kvbench.report import published
from kvbench.report.published import Check
from kvbench.run import one_line, start
from kvbench.store import is_done
from kvbench.sweep import composed

if TYPE_CHECKING:
    from kvbench.model import Model


def run_checks(checks: Mapping[str, Check], tier: str, results: Path) -> int:
    """Runs, judges and prints checks, gates first; returns the exit code."""
    verdicts: dict[str, str] = {}
    for name, check in checks.items():
        gate = verdicts.get(check.gate or "")
        found: dict[str, pd.DataFrame] = {}
        folders: list[Path] = []
        if check.gate and not gate:
            print(f"{'SKIPPED':<12}  {name}: its gate {check.gate} was skipped")
            continue
        if not check.gate or gate == published.PASS:
            found, folders = measure(name, check, tier, results)
            if not found:
                continue
        findings = published.judge(check, found, gate)
        verdicts[name] = published.overall(findings)
        print(*published.lines(name, findings), sep="\n", flush=True)
        file = results / "published" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        said = published.verdict(check, tier, findings, folders)
        file.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if published.FAIL in verdicts.values() else 0


def measure(name: str, check: Check, tier: str, results: Path) -> tuple[dict[str, pd.DataFrame], list[Path]]:
    """The observations of a check's cells, and their folders; what can't be had is told, and left out."""
    metric, _, maps = check.metric.partition(":")
    limit = check.tiers[tier].limit
    nodes = {cell: configurations(check, cell, results, limit) for cell in check.cells}
    runs = {cell: [convert(node) for node in some] for cell, some in nodes.items()}
    missing = [
        node
        for cell in nodes
        for node, run in zip(nodes[cell], runs[cell], strict=True)
        if maps or not is_done(run.cell, run.settings)
    ]
    if reason := missing and obstacle([convert(node).cell.model for node in missing]):
        print(f"{'SKIPPED':<12}  {name}: {reason} ({check.tiers[tier].gpu_minutes} GPU minutes, estimated)")
        return {}, []
    if missing and not maps:
        start(missing, lambda error: print(f"kvbench: {one_line(error)}", file=sys.stderr))
    found: dict[str, pd.DataFrame] = {}
    folders: list[Path] = []
    for cell, some in runs.items():
        mine = [run.cell.folder(results) for run in some]
        try:
            found[cell] = held_out(some, maps) if maps else published.observations(mine, metric, limit)
            folders += [] if maps else mine
        except UsageError as error:
            print(f"{'SKIPPED':<12}  {name}  {cell}: {one_line(error)}")
    return found, folders


def configurations(check: Check, cell: str, results: Path, limit: int | None) -> list[Node]:
    """The composed configurations of a cell. Raises UsageError for names and options that do not exist."""
    settings = {"results": results, "limit": limit, "timed": 0, "tracker.mode": "disabled"}
    return [composed(options | settings) for options in check.configurations(cell)]


def obstacle(models: Sequence[ModelConfig]) -> str:
    """Why models can't be run here; empty if they can. What is embedded runs anywhere."""
    import torch
    from huggingface_hub import constants, try_to_load_from_cache

    from kvbench.hub import reachable

    models = [model for model in models if not model.path.startswith("embedded:")]
    if models and not torch.cuda.is_available():
        return "no GPU"
    for model in models:
        cached = isinstance(try_to_load_from_cache(model.path, "config.json", revision=model.revision), str)
        if not (cached or Path(model.path).exists() or reachable(constants.ENDPOINT)):
            return f"no hub: {model.path} is not on this machine, and {constants.ENDPOINT} can't be reached"
    return ""


def held_out(runs: Sequence[Run], maps: str) -> pd.DataFrame:
    """What the fitted maps of a cell's repeats explain of text held out: the mean over layers and KV heads."""
    from kvbench.artefact import load_or_fit

    rows = []
    for i, run in enumerate(runs):
        model = _loaded(json.dumps(vars(run.cell.model), sort_keys=True))
        for calibration in run.cell.method.calibrations:
            header = load_or_fit(calibration, model).header
            if "held_out_r2" in header:
                rows.append((str(i), fmean(map(fmean, header["held_out_r2"][maps])), str(i), ""))
    return pd.DataFrame(rows, columns=["id", "value", "cluster", "stratum"])


@lru_cache(maxsize=1)
def _loaded(config: str) -> Model:
    """One model at a time: repeats come one after another."""
    from kvbench.model import load_model

    return load_model(ModelConfig(**json.loads(config)))
