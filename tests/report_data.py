"""A results folder as a sweep leaves it, without a model: effects are known, texts are hostile to HTML and LaTeX.

    write_results(tmp_path)  # 96 cells: 3 tasks, 2 protocols, 5 methods, 3 budgets, the full cache; 2 did not end
    write_results(tmp_path, methods={"snapkv": -0.2}, tasks=("niah",), protocols=("blind",), budgets=("0.1",))

The same examples are asked of every cell, and one draw of an example counts for all methods: what they differ by is
their loss, and a little noise of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvbench.cell import slug
from kvbench.store import EXAMPLES, FORMAT, HEADER, SOLO, TIMING

# What each method loses: its score's probability of 1 and its answer's NLL move by this over `10 * budget`.
LOSSES = {
    "random": 0.5,
    "snapkv": 0.2,
    "keydiff": 0.1,
    "vector(base=keydiff)": 0.02,
    "compose(scorer=keydiff,tiers=['exact', 'int4'])": 0.0,
}
SETS = ("niah_single_1", "qa_1", "vt")  # RULER's, as sub-tasks; vt's scores are shares, the others' 0 or 1
HOSTILE = (
    '<script>alert("x")</script> & 50% of $x_1$ \\textbf{#~^} \'quoted\' "quoted" <img src=x onerror=alert(1)> ключ'
)
REASON = "budget 0.05 can't hold 10 % of <b>a_b</b> & $c$: 100,000 bytes needed"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FULL_BYTES = 46_333_440


def write_results(
    results: Path,
    n: int = 40,
    *,
    methods: Mapping[str, float] = LOSSES,
    budgets: Sequence[str] = ("0.05", "0.1", "0.5"),
    tasks: Sequence[str] = ("niah", "ruler", "lm"),
    protocols: Sequence[str] = ("blind", "aware"),
    clusters: int = 8,
    seed: int = 0,
    unfinished: bool = True,
) -> list[Path]:
    """Writes cells of `n` examples each, and the full cache's; returns their folders.

    niah's examples lie in `clusters` documents, ruler's are of three sub-tasks and clusters of their own, lm has
    no score. With `unfinished` two more cells of the first method exist, one failed, one infeasible.
    """
    folders = []
    for task in tasks:
        for protocol in protocols:
            drawn = Drawn(task, n, clusters, seed)
            folders.append(write_cell(results, drawn, "full", "1", 0.0, protocol))
            for label, loss in methods.items():
                for budget in budgets:
                    share = loss * 0.1 / float(budget)
                    folders.append(write_cell(results, drawn, label, budget, share, protocol))
    if unfinished:
        drawn, label = Drawn(tasks[0], n, clusters, seed), next(iter(methods))
        for budget, status, keep in (("0.02", "infeasible", 0), ("0.03", "failed", n // 4)):
            ended = {"status": status, "reason": REASON}
            folders.append(write_cell(results, drawn, label, budget, 0.9, protocols[0], keep=keep, header=ended))
    return folders


class Drawn:
    """What the cells of a task share: how hard each example is, and where it comes from."""

    def __init__(self, task: str, n: int, clusters: int, seed: int) -> None:
        rng = np.random.default_rng([seed, len(task), n])
        self.task, self.n = task, n
        cluster = rng.permutation(n) % clusters if task == "niah" else np.arange(n)
        self.clusters = [f"{'essays' if task == 'niah' else task}-{c}" for c in cluster]
        self.hard = rng.random(n)
        self.nll = 1.5 + 0.3 * rng.standard_normal(n)[cluster] + 0.2 * rng.standard_normal(n)

    def identity(self) -> dict[str, Any]:
        task = {"name": self.task}
        if self.task == "ruler":
            task |= {"sets": list(SETS)}
        return task

    def info(self, i: int) -> dict[str, Any]:
        return {
            "niah": {"haystack": "essays", "context": 2048, "depths": [round(i / self.n, 4)]},
            "ruler": {"set": SETS[i % 3], "context": 4096},
            "lm": {"text": "essays", "context": 2048, "documents": 1},
        }[self.task]


def write_cell(
    results: Path,
    drawn: Drawn,
    label: str,
    budget: str,
    loss: float,
    protocol: str = "blind",
    *,
    seed: int = 0,
    keep: int | None = None,
    header: Mapping[str, Any] | None = None,
    segment: Mapping[str, Any] | None = None,
    solo: bool = True,
) -> Path:
    """One cell's folder. `keep`: only so many examples; `header`, `segment`: what differs in the header."""
    name, _, rest = label.partition("(")
    options = {"options": rest.removesuffix(")")} if rest else {}
    model = {"name": "smollm2-135m-q4_1", "path": "embedded:smollm2-135m-q4_1", "revision": None, "dtype": "bfloat16"}
    identity = {
        "model": model | {"chat": True, "template": {}},
        "method": options | {"name": name},
        "budget": budget,
        "task": drawn.identity(),
        "protocol": protocol,
        "seed": seed,
        "generate": drawn.task != "lm",
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = results / slug(drawn.task) / slug(str(model["name"])) / slug(f"{name}-{budget}-{digest}")
    folder.mkdir(parents=True)
    records = _records(drawn, label, budget, loss, protocol)[:keep]
    about = {"model": {"source": "embedded", "weights": "a672150fb4f99d7c", "compute": "float32"}}
    process = _process() | dict(segment or {})
    facts = {
        "format": FORMAT,
        "status": "done",
        "label": label,
        "digest": digest,
        "identity": identity,
        "about": about | {"data": f"data-of-{drawn.task}", "artefacts": [], "storage": "decoded"},
        "segments": [{"started": "2026-01-02T03:04:05+00:00", "limit": drawn.n, "first_example": "0"} | process],
        "examples": len(records),
        "exhausted": False,
        "timed": min(3, len(records)),
        "finished": "2026-01-02T03:14:05+00:00",
    }
    (folder / HEADER).write_text(json.dumps(facts | dict(header or {}), indent=1), encoding="utf-8")
    _lines(folder / EXAMPLES, records)
    share = _share(label, budget)
    _lines(folder / TIMING, [_timing(record["id"], share) for record in records[:3]])
    if solo and drawn.task == "niah" and records:
        found = {"digest": digest, "label": label, "format": FORMAT, "identity": identity, "process": process}
        (folder / SOLO).write_text(json.dumps(found | _solo(share)), encoding="utf-8")
    return folder


def _records(drawn: Drawn, label: str, budget: str, loss: float, protocol: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(list(f"{drawn.task}{label}{budget}{protocol}".encode()))
    own = rng.random((3, drawn.n)) * (label != "full")
    held, offloaded = _share(label, budget) * FULL_BYTES, 0
    found = []
    for i in range(drawn.n):
        name = f"{drawn.task}-0-{i:05d}"
        # Sooner or later the noise tips an example either way: flips are not all losses.
        right = float(drawn.hard[i] + loss + 0.06 * (own[0, i] - 0.5) * (own[0, i] > 0) < 0.8)
        if drawn.info(i).get("set") == "vt":
            right = round(max(0.0, 0.6 + 0.4 * (1 - drawn.hard[i]) - loss), 1)
        record = {
            "id": name,
            "context_id": name,
            "cluster_id": drawn.clusters[i],
            "answer_nll": drawn.nll[i] + loss + 0.02 * own[1, i],
            "kl_full": loss + 0.05 * own[2, i],
            "agree_full": 1 - min(0.9, loss + 0.05 * own[2, i]),
            "tokens_target": 9,
            "tokens_out_full": 10,
            "bytes_held": int(held) + 64 * (i % 5) * (label != "full"),
            "bytes_full": FULL_BYTES,
            "bytes_budget": int(float(budget) * FULL_BYTES) + 256,
            "bytes_shared": 4_000_000 if label.startswith("vector") else 0,
            "bytes_offloaded": offloaded,
            "bytes_read": held + 1e5,
            "bytes_moved": 0.0,
            "tokens_context": 2011,
            "tokens_kept": 2011.0 * _share(label, budget),
            "tiers": _tiers(label, 2011.0 * _share(label, budget)),
            "info": drawn.info(i),
        }
        if drawn.task != "lm":
            answer = f" {i}51. {HOSTILE}" if i % 4 == 0 else f" {i}51."
            record |= {"score": right, "answer": answer, "tokens_out": 5}
        found.append(record)
    return found


def _share(label: str, budget: str) -> float:
    return 1.0 if label == "full" else 0.99 * float(budget)


def _tiers(label: str, kept: float) -> dict[str, float]:
    if label.startswith("vector"):
        return {"exact": 0.5 * kept, "from_key": 0.5 * kept}
    return {"exact": 0.25 * kept, "int4": 0.75 * kept} if label.startswith("compose") else {"exact": kept}


def _timing(name: str, share: float) -> dict[str, Any]:
    return {
        "id": name,
        "prefill_s": 2.5,
        "statistics_s": 0.4,
        "compress_s": 0.1,
        "ttft_s": 3.1,
        "tpot_s": 0.02 + 0.05 * share,
        "tpot_p95_s": 0.03 + 0.05 * share,
        "total_s": 4.0,
        "joules": 900.0,
        "joules_token": 1.0 + share,
        "bytes_peak": 10**9,
        "segment": 0,
    }


def _solo(share: float) -> dict[str, Any]:
    return {
        "measured": "2026-01-02T04:04:05+00:00",
        "path": "tiered",
        "own_s": 0.016 * share,
        "own_full_s": 0.016,
        "own_ratio": share,
        "own_ratio_low": 0.9 * share,
        "own_ratio_high": 1.1 * share,
        "prefill_s": 5.0,
        "compress_s": 0.1,
        "ttft_s": 8.0,
        "tpot_s": 0.05 + 0.016 * share,
        "tpot_p95_s": 0.06 + 0.016 * share,
        "bytes_held": int(share * FULL_BYTES),
        "bytes_full": FULL_BYTES,
        "tokens_context": 2011,
    }


def _process() -> dict[str, Any]:
    return {
        "commit": COMMIT,
        "dirty": False,
        "python": "3.11.7",
        "versions": {"kvbench": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "numpy": "2.4.6"},
        "hardware": {"platform": "Linux", "cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "device": "cpu"},
    }


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
