"""What a cache costs a decoding step on the fast path, beside the full cache as stock attention reads it.

    python benchmarks/fast_path.py                     ten minutes; 7.9k tokens, one thread
    python benchmarks/fast_path.py --tokens 2048 --out /tmp/fast_path

Runs `measure=solo` for each cell and writes fast_path.md. Steps over the cell's cache, the full cache and no cache at
all are taken in turn, so that a busy machine slows down all three.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import HERE, LABEL, machine, table

CELLS = (
    "full:1",
    "snapkv:0.1",
    "adakv:0.1",
    "snapkv_4bit:0.1",
    "vector:0.1",
    "vector_paper:0.1",
    "tiered:0.1",
    "kivi:0.35",
)
GOALS = {"snapkv": 0.25, "vector": 1.0, "snapkv_4bit": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=7900, help="of the context")
    parser.add_argument("--cells", nargs="+", default=CELLS, help="method:budget")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "fast_path", help="without an ending")
    arguments = parser.parse_args()
    from kvbench.store import read_solo

    rows = []
    for cell in arguments.cells:
        method, _, budget = cell.partition(":")
        with tempfile.TemporaryDirectory() as results:
            options = [f"method={method}", f"budget={budget}", "task=niah", f"task.context={arguments.tokens}"]
            always = ["measure=solo", "model.device=cpu", f"results={results}", "tracker.mode=disabled"]
            environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-m", "kvbench.run", *options, *always]
            subprocess.run(command, check=True, env=environment, cwd=HERE.parent)
            (folder,) = (file.parent for file in Path(results).glob("*/*/*/solo.json"))
            found = read_solo(folder)
        ratio = f"{found['own_ratio']:.3f} ({found['own_ratio_low']:.3f} to {found['own_ratio_high']:.3f})"
        milliseconds = (f"{found[name] * 1e3:.2f}" for name in ("own_s", "own_full_s"))
        steps = (f"{found[name] * 1e3:.2f}" for name in ("tpot_s", "tpot_p95_s", "tpot_full_s", "tpot_empty_s"))
        mebibytes = (f"{found[name] / 2**20:.1f}" for name in ("bytes_held", "bytes_working"))
        seconds = (f"{found[name]:.2f}" for name in ("prefill_s", "compress_s", "ttft_s"))
        rows.append([method, budget, *milliseconds, ratio, GOALS.get(method, ""), *steps, *mebibytes, *seconds])
    head = [
        "method",
        "budget",
        "own, ms",
        "full's own, ms",
        "ratio (95 %)",
        "goal",
        "step, ms",
        "95th pct",
        "full's step",
    ]
    head += ["empty step", "held, MiB", "working, MiB", "prefill, s", "compress, s", "TTFT, s"]
    text = [
        f"# What a cache costs a step ({LABEL})",
        f"Written by `benchmarks/fast_path.py`: `measure=solo` after {found['tokens_context']:,} tokens in a batch of "
        f"one, {found['steps']} steps of each cache in turn after {found['warm']}; docs/metrics.md says what columns "
        "mean.",
        "\n".join(f"- {name}: {value}" for name, value in machine(arguments.threads).items()),
        table(head, rows),
        "The full cache is read by stock attention from rows in float32, in which the layers compute here; `full` is "
        "the same cache on the fast path, which widens its bfloat16 rows at every step.",
    ]
    Path(f"{arguments.out}.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
