"""One tidy table from the records of a results folder: a row per cell and metric, with intervals and comparisons.

python scripts/aggregate.py results/ --baseline snapkv --out table
python scripts/aggregate.py results/ --baseline snapkv --family "main=vector* 0.1 * score"

Writes table.parquet and table.csv. Each cell is compared with the full cache and with the baseline on the same
examples, clustered by source document: mean difference, 95 % interval, p. A family is what was meant to be tested
before anything was run: a name, and a pattern of "method budget task model protocol metric", where * stands for any
text. Its p-values are adjusted by Holm, all others by Benjamini-Hochberg. docs/statistics.md defines the columns.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvbench.errors import UsageError
from kvbench.report.aggregate import aggregate
from kvbench.report.tidy import print_table, write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--baseline", default="full", help="a method as tables name it: snapkv, 'vector(base=keydiff)'")
    parser.add_argument("--family", action="append", default=[], metavar="NAME=PATTERN", help="declared beforehand")
    parser.add_argument("--resamples", type=int, help="of p-values; default: as many as the corrections ask for")
    parser.add_argument("--out", type=Path, default=Path("table"), help="the files' name, without its ending")
    arguments = parser.parse_args()
    families = dict(text.partition("=")[::2] for text in arguments.family)
    try:
        table = aggregate(arguments.results, arguments.baseline, families, arguments.resamples)
        files = write(table, arguments.out)
    except UsageError as error:
        print(f"aggregate: {error}", file=sys.stderr)
        return 2
    print_table(table)
    print(*files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
