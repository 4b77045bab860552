"""Bytes and KL along a long answer of the full cache, for methods that act while decoding, and others.

python scripts/decode_curves.py full snapkv h2o:decode=true kivi:decode=true quest --budget 0.25 --out curves.png

A method's options follow its name: name:option=value:option=value. The answer is the full cache's greedy continuation
of a stretch of text (task lm); all methods read it teacher-forced. Writes the picture and, beside it, a .csv with a row
for each token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from kvbench.errors import UsageError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the compressed text")
    parser.add_argument("--tokens", type=int, default=512, help="of the answer, at most")
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--model", default="embedded:smollm2-135m-q4_1", help="or a hub id or folder")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="a .png, .pdf or .svg file")
    arguments = parser.parse_args()
    try:
        table = measure(arguments)
    except UsageError as error:
        print(f"decode_curves: {error}", file=sys.stderr)
        return 2
    from kvbench.report.curves import curves, summary

    table.to_csv(arguments.out.with_suffix(".csv"), index=False)
    curves(table).savefig(arguments.out, dpi=200)
    print(summary(table).to_markdown())
    print(arguments.out)
    return 0


def measure(arguments: argparse.Namespace) -> pd.DataFrame:
    from rich.progress import track

    from kvbench.config import build_plugin, cell_of
    from kvbench.measure.along import along
    from kvbench.model import load_model

    task = build_plugin("tasks", "lm", {"context": arguments.context, "max_new_tokens": arguments.tokens})
    cells = [cell_of(arguments.model, text, arguments.budget, task) for text in arguments.methods]
    model = load_model(cells[0].model)
    rows = along(model, cells, arguments.contexts)
    most = len(cells) * arguments.contexts * arguments.tokens
    return pd.DataFrame(track(rows, "decoding", most, transient=True))


if __name__ == "__main__":
    sys.exit(main())
