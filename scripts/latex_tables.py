"""Tables for a paper: methods by budgets of each task, and methods by tasks at each budget (booktabs).

python scripts/latex_tables.py results/ --out tables/
python scripts/latex_tables.py results/ --task niah --methods snapkv vector --metric kl_full --out tables/
cd tables && pdflatex tables.tex                                     all of them in one document

A table is a file to be \\input: <task>-<protocol>-<metric>.tex, tasks-<protocol>-<budget>-<metric>.tex. It needs
\\usepackage{booktabs}. Best is bold; underlined is what can't be told from it on the same examples; captions state n,
intervals, protocol, metric and bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvbench.errors import UsageError
from kvbench.report import latex
from kvbench.report.aggregate import aggregate
from kvbench.report.tidy import chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--task", nargs="+", default=(), help="names or labels; default: all")
    parser.add_argument("--methods", nargs="+", default=(), help="names or labels; default: all")
    parser.add_argument("--metric", default="score", help=f"default: score; or {', '.join(list(latex.METRICS)[1:])}")
    parser.add_argument("--out", type=Path, default=Path("tables"), help="a folder (default: tables)")
    arguments = parser.parse_args()
    try:
        table = chosen(aggregate(arguments.results), arguments.task, arguments.methods)
        files = latex.write(latex.tables(table, arguments.results, arguments.metric), arguments.out)
    except UsageError as error:
        print(f"latex_tables: {error}", file=sys.stderr)
        return 2
    print(*files, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
