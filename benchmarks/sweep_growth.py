"""How the cost of a sweep grows with contexts, tokens and cells, and what plan and pack add to a prefill.

    python benchmarks/sweep_growth.py                                                        half an hour
    python benchmarks/sweep_growth.py --tokens 1024 --contexts 1 2 --methods full snapkv --out /tmp/growth    a minute

Writes <out>.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

from common import HERE, LABEL, cells, machine, run_worker, sweep, table

BUDGETS = (0.05, 0.1, 0.25, 0.5)
LONE = ("snapkv", 0.1)  # the cell that is run alone
LONGEST = 8192  # tokens that the model reads, answer included
GOAL = {"vector": 10}  # per cent of a prefill that plan and pack may take
GOAL_OF_OTHERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="of each prompt")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1, 2, 4, 8], help="of the sweeps at 2,048 tokens")
    parser.add_argument("--each", type=int, default=2, help="contexts at each length")
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument(
        "--methods", nargs="+", default=["full", "random", "streamingllm", "snapkv", "knorm", "keydiff"]
    )
    parser.add_argument("--planned", nargs="*", default=["vector"], help="further methods for the last table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=HERE / "sweep_growth", help="without an ending")
    arguments = parser.parse_args()
    methods, each, threads = arguments.methods, arguments.each, arguments.threads
    tokens = [min(length, LONGEST - arguments.new_tokens) for length in arguments.tokens]
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    text = [
        f"# What a sweep costs ({LABEL})",
        "Written by `benchmarks/sweep_growth.py`. NIAH, budgets "
        f"{', '.join(map(str, BUDGETS))}, at most {arguments.new_tokens} new tokens; NLL and KL included, the pass "
        "that times latency left out. Methods: " + ", ".join(methods) + ".",
        "\n".join(f"- {name}: {value}" for name, value in machine(threads).items()),
        *by_cells(methods, tokens, each, arguments.new_tokens, threads),
        *by_contexts(methods, arguments.contexts, arguments.new_tokens, threads),
        *by_method(list(dict.fromkeys([*methods, *arguments.planned])), tokens, each, threads),
    ]
    Path(f"{arguments.out}.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


def timed(lines: Sequence[Sequence[str]], threads: int) -> list[dict]:
    """The rows of command lines that one process runs, after a short one that is not counted."""
    print(f"{len(lines)} commands", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        first = sweep(["full"], [1.0], folder, "task.context=512", "task.max_new_tokens=2", limit=1)
        return run_worker(sys.executable, "kvbench_worker.py", [first, *lines], threads)[0][1:]


def by_cells(methods: Sequence[str], tokens: Sequence[int], each: int, new_tokens: int, threads: int) -> list[str]:
    """A lone cell, a method's budgets, and everything, at each length."""
    method, budget = LONE
    axes = [([method], [budget]), ([method], BUDGETS), (methods, BUDGETS)]
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for length in tokens:
            options = f"task.context={length}", f"task.max_new_tokens={new_tokens}"
            lines += [sweep(*of, f"{folder}/{len(lines) + i}", *options, limit=each) for i, of in enumerate(axes)]
        rows = timed(lines, threads)
    numbers = [len(cells(*of)) for of in axes]
    found = []
    for i, length in enumerate(tokens):
        lone, some, every = (fmean(row["contexts"]) for row in rows[3 * i : 3 * i + 3])
        more = [(some - lone) / (numbers[1] - 1), (every - lone) / (numbers[2] - 1)]
        found.append([f"{length:,}", f"{lone:.2f}", f"{some:.2f}", f"{every:.2f}"])
        found[-1] += [f"{each_more:.3f} ({each_more / lone:.0%})" for each_more in more]
    head = [
        "tokens",
        *(f"{n} cell{'s' * (n > 1)}, s" for n in numbers),
        *(f"further cell of {n}, s" for n in numbers[1:]),
    ]
    return [
        f"## Cells and tokens ({LABEL})",
        table(head, found),
        f"Seconds per context, mean of {each}. The lone cell is {method} at {budget}; the further cells of "
        f"{numbers[1]} are its other budgets. In brackets: of a lone cell.",
    ]


def by_contexts(methods: Sequence[str], contexts: Sequence[int], new_tokens: int, threads: int) -> list[str]:
    """The whole sweep on more and more contexts."""
    with tempfile.TemporaryDirectory() as folder:
        options = "task.context=2048", f"task.max_new_tokens={new_tokens}"
        rows = timed([sweep(methods, BUDGETS, f"{folder}/{n}", *options, limit=n) for n in contexts], threads)
    number = len(cells(methods, BUDGETS))
    found = [
        [n, f"{row['wall_s']:.1f}", f"{row['wall_s'] - sum(row['contexts']):.1f}", f"{row['wall_s'] / n / number:.3f}"]
        for n, row in zip(contexts, rows, strict=True)
    ]
    return [
        f"## Contexts ({LABEL})",
        table(["contexts", "command, s", "outside of contexts, s", "per cell and context, s"], found),
        f"{number} cells, 2,048 tokens, each command whole but for Python's imports: outside of contexts are loading, "
        "drawing them and the table at the end. Each command tokenises the haystack once.",
    ]


def by_method(methods: Sequence[str], tokens: Sequence[int], each: int, threads: int) -> list[str]:
    """Prefill, statistics, plan and pack of each method."""
    import torch

    from kvbench.budget import Budget
    from kvbench.cell import Cell, ModelConfig
    from kvbench.compressor import Compressor
    from kvbench.config import build_plugin
    from kvbench.model import load_model
    from kvbench.prefill import read_exactly

    torch.set_num_threads(threads)
    model = load_model(ModelConfig("smollm2-135m-q4_1", "embedded:smollm2-135m-q4_1", device="cpu"))
    found = []
    for length in tokens:
        task = build_plugin("tasks", "niah", {"context": length})
        contexts = [(c.id, torch.tensor(c.ids)) for c in islice(task.contexts(model.writer, 0), each)]
        for name in methods:
            cell = Cell(model.config, build_plugin("methods", name, {}), Budget.parse("0.1"), task)
            compressor = Compressor(cell, model)
            parts = []
            for context_id, ids in contexts:
                with torch.inference_mode():
                    start = time.perf_counter()
                    seen = read_exactly(model.network, ids, cell.method.needs, context_id)
                    read, statistics = time.perf_counter() - start, sum(seen.seconds.values())
                    compressor.compress(seen)  # the first call allocates
                    start = time.perf_counter()
                    compressor.compress(seen)
                    parts.append((read - statistics, statistics, time.perf_counter() - start))
            prefill, statistics, packing = (fmean(part) for part in zip(*parts, strict=True))
            goal = GOAL.get(name, GOAL_OF_OTHERS)
            shares = f"{statistics / prefill:.1%}", f"{packing / prefill:.1%}"
            found.append(
                [name, f"{length:,}", f"{prefill:.2f}", f"{statistics:.3f}", f"{packing:.3f}", *shares, f"{goal} %"]
            )
    head = ["method", "tokens", "prefill, s", "statistics, s", "plan and pack, s"]
    head += ["statistics / prefill", "plan and pack / prefill", "goal"]
    return [
        f"## What a method adds to a prefill ({LABEL})",
        table(head, found),
        "Budget 0.1, in one process. Statistics are gathered once for all cells that ask for the same, plan and pack "
        "are each cell's own, and are timed the second time.",
    ]


if __name__ == "__main__":
    main()
