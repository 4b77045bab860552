"""What the benchmarks share: processes with a fixed number of threads, facts of the machine, tables, intervals."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
LABEL = "CPU, 135M"  # stands over every table


def run_worker(python: Path | str, script: str, job: Any, threads: int) -> tuple[list[dict[str, Any]], float]:
    """A worker's rows, and the seconds of its whole process. What it prints is shown only if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, rows_file = Path(folder, "job.json"), Path(folder, "rows.jsonl")
        job_file.write_text(json.dumps(job))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        start = time.perf_counter()
        command = [str(python), str(HERE / script), str(job_file), str(rows_file)]
        done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return [json.loads(line) for line in rows_file.read_text().splitlines()], seconds


def sweep(methods: Sequence[str], budgets: Sequence[float], results: str, *options: str, limit: int) -> list[str]:
    """The command line of a sweep; of one cell, if there is one method and one budget."""
    several = ["-m"] if len(methods) * len(budgets) > 1 else []
    axes = [f"method={','.join(methods)}", f"budget={','.join(map(str, budgets))}"]
    # Latency has a pass of its own after the sweep, which is not what is compared here.
    always = ["model.device=cpu", f"limit={limit}", f"results={results}", "timed=0", "tracker.mode=disabled"]
    return [*several, *axes, "task=niah", *options, *always]


def cells(methods: Sequence[str], budgets: Sequence[float]) -> list[tuple[str, float]]:
    """(method, budget) of each cell of a sweep; the full cache, which ignores budgets, once."""
    return [(m, b) for m in methods for b in ([1.0] if m == "full" else budgets)]


def machine(threads: int) -> dict[str, str]:
    """Where and with what something was measured, as lines of a list."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True).stdout
    return {
        "machine": f"{names[0]}, {len(names)} cores, {memory:.0f} GiB, {platform.system()}",
        "threads": f"{threads} in each process",
        "kvbench": f"{commit.strip()}, torch {version('torch')}, transformers {version('transformers')}",
    }


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def ratio(above: Sequence[float], below: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """sum(above) / sum(below) of values in pairs, and its 95 % interval: bootstrap over the pairs, nan for one pair."""
    a, b = np.asarray(above), np.asarray(below)
    if len(a) < 2:
        return float(a.sum() / b.sum()), float("nan"), float("nan")
    pick = np.random.default_rng(0).integers(len(a), size=(draws, len(a)))
    low, high = np.quantile(a[pick].sum(1) / b[pick].sum(1), [0.025, 0.975])
    return float(a.sum() / b.sum()), float(low), float(high)


def shown(found: tuple[float, float, float]) -> str:
    """`7.1 (6.8 to 7.4)`."""
    middle, low, high = found
    return f"{middle:.2f}" if np.isnan(low) else f"{middle:.2f} ({low:.2f} to {high:.2f})"
