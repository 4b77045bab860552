"""What the harness costs: `generate` inside `kvbench.compress(model, "full")` against the same model's own `generate`.

    python benchmarks/harness_vs_generate.py               five minutes

The two take turns on the same prompt, greedy, a fixed number of new tokens, one thread. Writes harness_vs_generate.md.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median

from common import HERE, LABEL, machine, ratio, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE / "harness_vs_generate", help="without an ending")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    import kvbench
    from kvbench import corpora

    torch.set_num_threads(1)
    model, tokenizer = kvbench.load("embedded:smollm2-135m-q4_1", dtype="float32")
    text = "\n\n".join(corpora.documents("essays", "task")[:8])
    prompt = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens]
    lengths = (1, arguments.new_tokens)

    def run() -> tuple[list[float], list[int]]:
        """Seconds of the whole answer, until its first token, and for each token after it; the answer."""
        seconds, answer = [], []
        for new in lengths:
            start = time.perf_counter()
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
            seconds.append(time.perf_counter() - start)
            answer = out[0, prompt.shape[1] :].tolist()
        first, whole = seconds
        return [whole, first, (whole - first) / (arguments.new_tokens - 1)], answer

    pairs = []
    for i in range(arguments.pairs + 1):
        sides = {}
        for side in ("stock", "kvbench") if i % 2 else ("kvbench", "stock"):
            if side == "stock":
                sides[side] = run()
            else:
                with kvbench.compress(model, method="full", budget=1):
                    sides[side] = run()
        assert sides["stock"][1] == sides["kvbench"][1], "the answers differ"
        pairs.append((sides["stock"][0], sides["kvbench"][0]))
    pairs = pairs[1:]  # the first warms up
    rows = []
    for j, what in enumerate(("whole answer", "first token", "each further token")):
        stock, ours = ([side[j] for side in column] for column in zip(*pairs, strict=True))
        share, low, high = ratio(ours, stock)
        medians = [f"{median(column) * 1e3:.1f}" for column in (stock, ours)]
        rows.append([what, *medians, f"{share:.3f}", f"{low:.3f} to {high:.3f}"])
    text = "\n\n".join(
        [
            f"# The harness beside stock `generate` ({LABEL})",
            f"Written by `benchmarks/harness_vs_generate.py`: the full cache, a prompt of {prompt.shape[1]:,} tokens, "
            f"{arguments.new_tokens} new ones, greedy, {len(pairs)} pairs in turn, one thread; equal answers. Goal: a "
            "whole answer in at most 1.05.",
            "\n".join(f"- {name}: {value}" for name, value in machine(1).items()),
            table(["", "stock, ms", "kvbench, ms", "kvbench / stock", "95 % interval"], rows),
        ]
    )
    Path(f"{arguments.out}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
