"""Are published figures met here? Runs the cells of the checks in conf/published/ and gives a verdict on each claim.

    python scripts/check_published.py --tier quick --model qwen3-8b     make check-published TIER=quick MODEL=qwen3-8b
    python scripts/check_published.py ruler4k_knorm_qwen3_8b --tier full

PASS: the interval lies inside the margin; FAIL: outside; INCONCLUSIVE: neither, with the number of examples that would
decide; or the check of the full cache that must pass first has not. SKIPPED says why: models of the hub want a GPU and
the hub, or its cache. The cells are kvbench's own and are kept in the results folder: the same command continues, and
cells that are complete are only read. A verdict is kept in <results>/published/<check>.json. Checks that are gates
of chosen ones are run with them. Exit code: 0, 1 if a claim fails, 2 if the request can't be met.

docs/published.md says how a check is written, and what a PASS changes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvbench.published import run_checks
from kvbench.report.published import TIERS, chosen, load
from kvbench.run import guarded


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="check", help="default: all of the tier and model")
    parser.add_argument("--tier", default="quick", choices=TIERS)
    parser.add_argument("--model", help="only what is claimed of this model, as kvbench names it")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--folder", type=Path, help="checks of your own, instead of conf/published")
    asked = parser.parse_args(argv)
    return guarded(
        lambda: run_checks(chosen(load(asked.folder), asked.checks, asked.tier, asked.model), asked.tier, asked.results)
    )


if __name__ == "__main__":
    sys.exit(main())
