"""What a decoding step costs in two checkouts of kvbench, and in this one with methods that act in time.

    git worktree add /tmp/before 660ba34
    python benchmarks/decode_step.py --before /tmp/before          ten minutes
    python benchmarks/decode_step.py                               this checkout alone

Both sides run side by side and step in turn, one waiting while the other works, so that a pair of times differs by the
code alone. Writes decode_step.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from common import HERE, LABEL, machine, ratio, table

PLAIN = ("full", "snapkv", "vector")
IN_TIME = ("streamingllm:decode", "h2o:decode", "tova:decode", "lazyeviction", "treekv", "kivi:decode", "mikv:decode")
IN_TIME += ("arkv", "quest", "tokenselect", "fasa", "sentencekv", "louiskv")
WARM = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the folder of another checkout")
    parser.add_argument("--tokens", type=int, default=2048, help="of the context")
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--in-time", nargs="*", default=IN_TIME, help="methods, `:decode` for method.decode=true")
    parser.add_argument("--out", type=Path, default=HERE / "decode_step", help="without an ending")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.tokens, arguments.budget)
    os.environ["OMP_NUM_THREADS"] = "1"
    here = HERE.parent
    text = [
        f"# A decoding step ({LABEL})",
        f"Written by `benchmarks/decode_step.py`: a batch of one after {arguments.tokens:,} tokens, budget "
        f"{arguments.budget}, {arguments.steps} steps after {WARM}, one thread.",
        "\n".join(f"- {name}: {value}" for name, value in machine(1).items()),
    ]
    if arguments.before:
        text += beside(arguments.before, here, arguments)
    text += alone(here, arguments)
    Path(f"{arguments.out}.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


class Side:
    """A process that holds caches of some methods and takes a step of one when asked."""

    def __init__(self, checkout: Path, methods: Sequence[str], tokens: int, budget: str) -> None:
        line = [sys.executable, __file__, "--tokens", str(tokens), "--budget", budget, "--serve", *methods]
        environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
        )
        self.ready = json.loads(self._line())
        assert Path(self.ready["package"]).is_relative_to(checkout), self.ready["package"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def step(self, method: str) -> float:
        assert self._process.stdin is not None
        print(method, file=self._process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def beside(before: Path, here: Path, arguments: argparse.Namespace) -> list[str]:
    sides = [Side(folder, PLAIN, arguments.tokens, arguments.budget) for folder in (before, here)]
    rows = []
    for method in PLAIN:
        pairs = []
        for i in range(WARM + arguments.steps):
            order = (0, 1) if i % 2 == 0 else (1, 0)
            times = {side: sides[side].step(method) for side in order}
            pairs.append((times[0], times[1]))
        pairs = pairs[WARM:]
        old, new = zip(*pairs, strict=True)
        share, low, high = ratio(new, old)
        medians = [f"{median(column) * 1e3:.2f}" for column in (old, new)]
        rows.append([method, *medians, f"{share:.3f}", f"{low:.3f} to {high:.3f}"])
    for side in sides:
        side.close()
    commit = subprocess.run(["git", "-C", before, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return [
        f"## Methods that do not act in time, at {commit.stdout.strip()} and now",
        table(["method", "before, ms", "now, ms", "now / before", "95 % interval"], rows),
        "Medians; the ratio is that of the sums, its interval a bootstrap over pairs of steps taken in turn.",
    ]


def alone(here: Path, arguments: argparse.Namespace) -> list[str]:
    side = Side(here, ["full", "snapkv", *arguments.in_time], arguments.tokens, arguments.budget)
    rows = []
    for method in side.ready["methods"]:
        times = [side.step(method) for _ in range(WARM + arguments.steps)][WARM:]
        rows.append([method, f"{median(times) * 1e3:.2f}", f"{sorted(times)[int(0.95 * len(times))] * 1e3:.2f}"])
    side.close()
    refused = side.ready["refused"]
    return [
        "## Methods that act in time",
        table(["method", "median, ms", "95th percentile, ms"], rows),
        "Attention runs over decoded rows: the harness's own cost, no claim about a method's speed."
        + "".join(f" {name}: {why}." for name, why in refused.items()),
    ]


def serve(methods: Sequence[str], tokens: int, budget: str) -> None:
    """Holds a fork of each method; for every name on stdin takes one step of it and prints the seconds."""
    import torch

    import kvbench
    from kvbench.budget import Budget
    from kvbench.cache.fork import Fork
    from kvbench.cell import Cell, ModelConfig
    from kvbench.config import build_plugin
    from kvbench.decode import feed
    from kvbench.errors import UsageError
    from kvbench.model import load_model
    from kvbench.prefill import read_exactly

    try:
        from kvbench.compressor import Compressor
    except ImportError:  # an older checkout
        from kvbench.compress import Compressor

    torch.set_num_threads(1)
    model = load_model(ModelConfig("smollm2-135m-q4_1", "embedded:smollm2-135m-q4_1", device="cpu"))
    task = build_plugin("tasks", "niah", {"context": tokens})
    context = next(iter(task.contexts(model.writer, 0)))
    forks, refused = {}, {}
    with torch.inference_mode():
        for name in methods:
            plugin, _, decode = name.partition(":")
            method = build_plugin("methods", plugin, {"decode": True} if decode else {})
            cell = Cell(model.config, method, Budget.parse(budget), task)
            seen = read_exactly(model.network, torch.tensor(context.ids), method.needs, context.id)
            try:
                made = Compressor(cell, model).compress(seen)
            except UsageError as error:
                refused[name] = str(error)
                continue
            forks[name] = Fork(made[1] if isinstance(made, tuple) else made, method)  # with its plan, in older versions
        print(json.dumps({"package": kvbench.__file__, "methods": list(forks), "refused": refused}), flush=True)
        token = torch.tensor([[11]])
        for line in sys.stdin:
            start = time.perf_counter()
            feed(model.network, [forks[line.strip()]], token, last_only=True)
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
