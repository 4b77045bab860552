"""The leaderboard of a results folder: one HTML file that opens from disk, with everything in it.

python -m kvbench.run -m method=full,snapkv,vector budget=0.05,0.1,0.25 task=niah limit=32
python scripts/leaderboard.py results/ --out leaderboard.html

Sort and filter the cells, see bytes against quality, open a cell for its provenance, some of its answers, and the
commands that make its records and numbers again. The numbers are those of scripts/aggregate.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvbench.errors import UsageError
from kvbench.report.leaderboard import leaderboard


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("leaderboard.html"))
    parser.add_argument(
        "--baseline", default="full", help="the method that others are compared with, as tables name it"
    )
    parser.add_argument("--examples", type=int, default=3, help="of each cell, its first ones (0: none)")
    arguments = parser.parse_args()
    try:
        text = leaderboard(arguments.results, arguments.baseline, arguments.examples)
    except UsageError as error:
        print(f"leaderboard: {error}", file=sys.stderr)
        return 2
    arguments.out.write_text(text, encoding="utf-8")
    print(f"{arguments.out} ({len(text.encode()) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
