"""Fit what a method needs once per model (VECTOR's value maps), and keep it in the user's cache folder.

    python scripts/calibrate.py model=llama3.1-8b method=vector method.texts='[my_corpus.txt]'

Takes the options of `python -m kvbench.run`; a run does the same on first use. Prints where the artefact is and how
well it predicts text that was held out of the fit. The default is the default method, vector.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from kvbench.run import main


def calibrate(configs: Sequence[Any], tell: Callable[[Exception], None]) -> None:
    from kvbench.artefact import load_or_fit, location
    from kvbench.config import convert
    from kvbench.model import load_model

    for config in configs:
        cell = convert(config).cell
        if not cell.method.calibrations:
            print(f"{cell.label} needs no calibration")
            continue
        model = load_model(cell.model)
        for calibration in cell.method.calibrations:
            artefact = load_or_fit(calibration, model)
            print(location(calibration, model))
            for variant, layers in artefact.header.get("held_out_r2", {}).items():
                print(f"{variant:18} held-out R2 {fmean(map(fmean, layers)):.3f}, mean over layers and KV heads")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    sys.exit(main(action=calibrate))
