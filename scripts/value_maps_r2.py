"""How much of the values VECTOR's maps explain on a text: R² of each layer and KV head, in and out of the maps' domain.

    python scripts/value_maps_r2.py -m task=lm task.text=squad seed=7 limit=8 \
        method.texts='[squad],[essays],[essays,hotpotqa,pydoc,stdlib]'

Takes the options of `python -m kvbench.run`; the contexts are the task's. For each set of texts that maps are fitted
to, R² is 1 - (squared error) / (squared distance from the head's mean) over the contexts' tokens but the sinks: of
every kind of map, without and with the intercept that a context holds. Prints means over layers and KV heads, as the
paper's R2_global is one; <results>/value_maps_r2.csv has each of them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvbench.run import main


def measure(configs: Sequence[Any], tell: Callable[[Exception], None]) -> None:
    import pandas as pd
    import torch

    from kvbench.artefact import load_or_fit
    from kvbench.cache.codecs.base import Context
    from kvbench.config import convert
    from kvbench.model import load_model
    from kvbench.prefill import read_exactly
    from kvbench.toolbox.tiers import every_row
    from kvbench.toolbox.value_maps import SINKS, VARIANTS

    runs = [convert(config) for config in configs]
    cell, limit = runs[0].cell, runs[0].settings.limit
    model = load_model(cell.model)
    methods = [run.cell.method for run in runs]
    artefacts = {maps: load_or_fit(maps, model) for method in methods for maps in method.calibrations}
    sums: dict[tuple[Any, ...], Any] = {}
    contexts = cell.task.contexts(model.writer, cell.seed)
    with torch.inference_mode():
        for context in itertools.islice(contexts, limit):
            seen = read_exactly(model.network, torch.tensor(context.ids, device=model.network.device))
            seen = replace(seen, artefacts=artefacts)
            tables = Context.of(seen.token_ids, seen.next_position, model.network.devices)
            for layer, x in enumerate(seen.layers):
                value = x.value.float()[:, SINKS:]
                spread = (value - value.mean(1, keepdim=True)).square().sum((1, 2))
                for method, (features, maps), intercept in itertools.product(methods, VARIANTS, (False, True)):
                    one = replace(method, features=features, maps=maps, intercept=intercept)
                    codec = one.approximate(seen, layer).value
                    error = codec.squared_error(x.value.flatten(0, 1), every_row(x, tables)).view(x.key.shape[:2])
                    for head, numbers in enumerate(zip(error[:, SINKS:].sum(1).tolist(), spread.tolist(), strict=True)):
                        key = (" + ".join(method.texts), features.name, maps.name, intercept, layer, head)
                        sums[key] = sums.get(key, 0) + torch.tensor(numbers, dtype=torch.float64)
    rows = [(*key, float(1 - error / spread)) for key, (error, spread) in sums.items()]
    table = pd.DataFrame(rows, columns=["fitted to", "features", "maps", "intercept", "layer", "head", "r2"])
    print(table.groupby(["features", "maps", "intercept", "fitted to"], sort=False)["r2"].mean().to_string())
    out = runs[0].settings.results / "value_maps_r2.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(out, index=False)
    print(out)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    sys.exit(main(action=measure))
