"""Quality against bytes (or seconds, or energy): a line a method, the Pareto frontier, and the area it dominates.

python scripts/pareto.py results/ --out figures/pareto                            score against bytes held, all tasks
python scripts/pareto.py results/ --task niah --metric kl_full --x bytes_read     KL against bytes read per token
python scripts/pareto.py results/ --methods snapkv vector --reference 1 0.2       some methods; the corner of areas
python scripts/pareto.py results/ --task niah --bytes 0.25 --out figures/bytes    where the bytes went at a budget

Writes a figure for each task, protocol, model and seed, and of more than one task their mean, as PNG, PDF and SVG:
<out>-<task>-<protocol>.pdf. Beside them <out>-points.csv has what was drawn, <out>-area.csv the area that each method
dominates, in decades of x times the metric, with an interval. docs/figures.md says how to read them; needles by
depth are scripts/niah_heatmap.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvbench.errors import UsageError
from kvbench.report import anatomy, pareto
from kvbench.report.aggregate import aggregate
from kvbench.report.frontier import COSTS, QUALITIES, panels, summary
from kvbench.report.tidy import chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--task", nargs="+", default=(), help="names or labels; default: all")
    parser.add_argument("--methods", nargs="+", default=(), help="names or labels; default: all")
    parser.add_argument("--metric", default="score", help=f"default: score; or {', '.join(list(QUALITIES)[1:])}")
    parser.add_argument("--x", default="share", help=f"default: share; or {', '.join(list(COSTS)[1:])}")
    parser.add_argument(
        "--reference",
        nargs=2,
        type=float,
        metavar=("X", "METRIC"),
        help="the corner where areas end, as the axes show it (default: the full cache's x; of the metric 0, or where "
        "lower is better the worst shown)",
    )
    parser.add_argument("--bytes", metavar="BUDGET", help="where the bytes went instead: bars at this budget")
    parser.add_argument("--out", type=Path, default=Path("pareto"), help="how files begin (default: pareto)")
    arguments = parser.parse_args()
    try:
        table = chosen(aggregate(arguments.results), arguments.task, arguments.methods)
        if arguments.bytes:
            files = anatomy.write(table, arguments.results, arguments.bytes, arguments.out)
        else:
            reference = tuple(arguments.reference) if arguments.reference else None
            found = panels(table, arguments.metric, arguments.x, reference)
            files = pareto.write(found, arguments.out)
            print(summary(found))
    except UsageError as error:
        print(f"pareto: {error}", file=sys.stderr)
        return 2
    print(*files, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
