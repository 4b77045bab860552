"""Heat map of needles in a haystack: context length x depth, one panel per method and budget.

python -m kvbench.run -m method=full,snapkv task.context=1024,2048 task.depths=[0,.25,.5,.75,1] limit=20
python scripts/niah_heatmap.py results/ --out niah.pdf
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvbench.errors import UsageError
from kvbench.report.heatmap import heatmap, needles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("niah.png"), help="a .png, .pdf or .svg file")
    parser.add_argument("--field", default="score", help="the record's field: score, answer_nll, kl_full, ...")
    arguments = parser.parse_args()
    try:
        heatmap(needles(arguments.results, arguments.field), arguments.field).savefig(arguments.out, dpi=200)
    except UsageError as error:
        print(f"niah_heatmap: {error}", file=sys.stderr)
        return 2
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
