"""How many sequences fit into a memory budget under each method, and the tokens a second that they decode together.

python scripts/throughput.py full snapkv vector kivi --budget 0.25 --memory 20GiB --context 8192

Memory is for caches, answers included, and what a method shares per model; weights and activations come on top. A
method's options follow its name: name:option=value. Meant for a GPU; on a CPU bound the sequences with --most.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd

from kvbench.errors import UsageError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--memory", default="1GiB", help="bytes, as in 20GiB")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each sequence")
    parser.add_argument("--new-tokens", type=int, default=256, help="of each answer: room is left for them")
    parser.add_argument("--most", type=int, help="sequences that are really decoded, at most")
    parser.add_argument("--model", default="embedded:smollm2-135m-q4_1", help="or a hub id or folder")
    arguments = parser.parse_args()
    try:
        print(measure(arguments).to_markdown(index=False, floatfmt=".3f"))
    except UsageError as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    return 0


def measure(arguments: argparse.Namespace) -> pd.DataFrame:
    import torch
    from rich.progress import track

    from kvbench.budget import Budget
    from kvbench.config import build_plugin, cell_of
    from kvbench.measure.throughput import throughput
    from kvbench.model import load_model

    task = build_plugin("tasks", "lm", {"context": arguments.context})
    cells = [cell_of(arguments.model, text, arguments.budget, task) for text in arguments.methods]
    model = load_model(cells[0].model)
    context = next(iter(task.contexts(model.writer, 0)))
    ids = torch.tensor(context.ids, device=model.network.device)
    memory = Budget.parse(arguments.memory).allow(0, 1).limit
    rows = throughput(model, cells, ids, memory, arguments.new_tokens, most=arguments.most)
    return pd.DataFrame(track(rows, "decoding", len(cells), transient=True))


if __name__ == "__main__":
    sys.exit(main())
