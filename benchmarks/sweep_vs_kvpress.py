"""A sweep of methods and budgets: kvbench beside kvpress's text-generation pipeline, in turn, on the same token ids.

    python benchmarks/sweep_vs_kvpress.py                                             hours; 16 contexts
    python benchmarks/sweep_vs_kvpress.py --contexts 1 --blocks 1 --new-tokens 12 --methods full snapkv \
        --budgets 0.1 0.5 --out /tmp/small                                            two minutes

kvpress gets one press and one ratio after the other, each with its own prefill, as its pipeline does it. kvbench gets
one command. A block is some contexts on one side, in a process of its own, then the same ones on the other side.
Writes <out>.jsonl, one line for each process; the same command continues it. Then <out>.md, which --table writes anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from common import HERE, LABEL, cells, machine, ratio, run_worker, shown, sweep, table
from transformers import AutoTokenizer

from kvbench import fetch, store
from kvbench.config import build_plugin
from kvbench.prompt import Writer

KVPRESS = "0.5.5"
TRANSFORMERS = "5.2.0"  # the newest that kvpress 0.5.5 takes
METHODS = ("full", "random", "streamingllm", "snapkv", "knorm", "keydiff")
BUDGETS = (0.05, 0.1, 0.25, 0.5)
SIDES = {  # what is measured, as the second table calls it
    "kvpress": "kvpress: one cell after the other",
    "alone": "kvbench: a command for each cell (`model.together=1`)",
    "unbatched": "kvbench: one sweep, answers one by one (`model.together=1`)",
    "kvbench": "kvbench: one sweep, several cells' answers in one batch",
}

Row = dict[str, Any]


def main() -> None:
    arguments = parse()
    raw = Path(f"{arguments.out}.jsonl")
    if not arguments.table:
        names = ("contexts", "tokens", "blocks", "new_tokens", "methods", "budgets", "apart", "dtype", "threads")
        measure({name: getattr(arguments, name) for name in names}, raw, environment(Path(arguments.venv)))
    head, *rows = map(json.loads, raw.read_text().splitlines())
    text = report(head, rows)
    Path(f"{arguments.out}.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="of each prompt")
    parser.add_argument("--blocks", type=int, default=4, help="they share the contexts evenly")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[12, 128], help="at most, of each answer")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--apart", type=int, default=1, help="contexts of each block for the second table; 0: none")
    parser.add_argument("--dtype", default="float32", help="of kvpress's layers and cache")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--venv", default=HERE / ".venv-kvpress", help="kvpress's environment, made if it is not there")
    parser.add_argument("--out", default=HERE / "sweep_vs_kvpress", help="without an ending")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table from <out>.jsonl")
    arguments = parser.parse_args()
    if arguments.contexts % arguments.blocks or arguments.apart > arguments.contexts // arguments.blocks:
        parser.error("--blocks must divide --contexts, and --apart is at most the contexts of a block")
    return arguments


def environment(folder: Path) -> Path:
    """The python of an environment with kvpress and the same torch as ours."""
    python = folder / "bin" / "python"
    check = f"from importlib.metadata import version as v; assert v('kvpress') == '{KVPRESS}'"
    if python.exists() and subprocess.run([python, "-c", check], capture_output=True).returncode == 0:
        return python
    print(f"making {folder}: kvpress {KVPRESS} (1.4 GB, a minute)", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    torch = version("torch").partition("+")[0]
    pins = [f"kvpress=={KVPRESS}", f"transformers=={TRANSFORMERS}", f"torch=={torch}"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
    return python


def measure(settings: Row, raw: Path, python: Path) -> None:
    """Adds to `raw` what it lacks."""
    if not raw.exists():
        raw.write_text(json.dumps({"settings": settings, "machine": machine(settings["threads"])}) + "\n")
    head, *rows = map(json.loads, raw.read_text().splitlines())
    if head["settings"] != json.loads(json.dumps(settings)):
        sys.exit(f"{raw} was measured with other settings: choose another --out, or delete it")
    done = {(row["new_tokens"], row["block"], row["side"]) for row in rows}
    sides = ["kvpress", "kvbench", *(["unbatched", "alone"] if settings["apart"] else [])]
    for new_tokens in settings["new_tokens"]:
        for block in range(settings["blocks"]):
            for side in sides if block % 2 == 0 else reversed(sides):  # no side is always the first
                if (new_tokens, block, side) in done:
                    continue
                if side == "kvpress":
                    measured = theirs(settings, block, new_tokens, python)
                else:
                    measured = ours(settings, block, new_tokens, side)
                row = {"new_tokens": new_tokens, "block": block, "side": side} | measured
                with raw.open("a") as file:
                    print(json.dumps(row), file=file)
                print(f"{new_tokens} new tokens, block {block}, {side}: {row['process_s']:.0f} s", file=sys.stderr)


def theirs(settings: Row, block: int, new_tokens: int, python: Path) -> Row:
    """One process of kvpress: a block's contexts, all cells."""
    writer = Writer(AutoTokenizer.from_pretrained(fetch.embedded_model()))
    task = build_plugin("tasks", "niah", {"context": settings["tokens"], "max_new_tokens": new_tokens})
    contexts, examples = [], {}
    for context in islice(task.contexts(writer, block), settings["contexts"] // settings["blocks"]):
        (example,) = context.examples
        examples[context.id] = example
        read, asked = writer.prompt(context.ids, example.question, example.answer_prefix).split("blind")
        contexts.append({"id": context.id, "read": read, "asked": asked})
    job = {"model": str(fetch.embedded_model()), "dtype": settings["dtype"], "new_tokens": new_tokens}
    job |= {"contexts": contexts, "cells": cells(settings["methods"], settings["budgets"])}
    (about, *rows), seconds = run_worker(python, "kvpress_worker.py", job, settings["threads"])
    for row in rows:
        row["score"] = task.score(examples[row["context"]], row.pop("answer"))
    lengths = {context["id"]: len(context["read"]) for context in contexts}
    return {"process_s": seconds, "about": about, "tokens": lengths, "calls": rows}


def ours(settings: Row, block: int, new_tokens: int, side: str) -> Row:
    """One process of kvbench: a block's contexts (other sides than `kvbench`: the first ones), all cells.

    In a sweep the call is the whole of it.
    """
    methods, budgets = settings["methods"], settings["budgets"]
    limit = settings["contexts"] // settings["blocks"] if side == "kvbench" else settings["apart"]
    options = [f"task.context={settings['tokens']}", f"task.max_new_tokens={new_tokens}", f"seed={block}"]
    options += ["model.together=1"] if side in ("alone", "unbatched") else []
    with tempfile.TemporaryDirectory() as results:
        if side == "alone":
            called = cells(methods, budgets)
            lines = [sweep([m], [b], results, *options, limit=limit) for m, b in called]
        else:
            called = [("", 0.0)]
            lines = [sweep(methods, budgets, results, *options, limit=limit)]
        rows, seconds = run_worker(sys.executable, "kvbench_worker.py", lines, settings["threads"])
        found = [store.read_cell(folder) for folder in store.cells(Path(results))]
    records = [{"method": head["identity"]["method"]["name"]} | record for head, records in found for record in records]
    if len(records) != limit * len(cells(methods, budgets)):
        sys.exit(f"{side}: {len(records)} records")
    kept = ("method", "context_id", "score", "tokens_out", "tokens_kept", "tokens_context")
    calls = [
        {"context": f"niah-{block}-{i:05d}", "method": method, "budget": budget, "seconds": s, "cpu": cpu}
        for (method, budget), row in zip(called, rows, strict=True)
        for i, (s, cpu) in enumerate(zip(row["contexts"], row["cpu"], strict=True))
    ]
    records = [{name: record[name] for name in kept} for record in records]
    return {"process_s": seconds, "calls": calls, "records": records}


def report(head: Row, rows: list[Row]) -> str:
    """The Markdown that says what was measured, and how."""
    settings = head["settings"]
    about = next(row["about"] for row in rows if row["side"] == "kvpress")
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    count = len(cells(settings["methods"], settings["budgets"]))
    lines = [
        f"# A sweep beside kvpress ({LABEL})",
        "Written by `benchmarks/sweep_vs_kvpress.py`. "
        f"{settings['contexts']} NIAH prompts of {settings['tokens']:,} tokens, {count} cells each: "
        f"{', '.join(settings['methods'])}; budgets {', '.join(map(str, settings['budgets']))} (the full cache once). "
        f"In turn, in {settings['blocks']} blocks, each in a process of its own.",
        "\n".join(f"- {name}: {value}" for name, value in (head["machine"] | {"kvpress": versions}).items()),
        "- Both sides read the same token ids, answer greedily and stop at the end of turn. kvpress removes "
        "1 - budget of the tokens; kvbench keeps the budget in bytes, which is the same or some tokens fewer.\n"
        f"- kvpress: layers and cache in {about['dtype'].removeprefix('torch.')} (bfloat16 is emulated on a CPU "
        f"without its instructions, and slower), {about['attention']} attention, one untimed call first. kvbench: "
        "`model.compute=auto`, cache in bfloat16, nothing untimed first. kvbench's seconds include NLL, KL and the "
        "records; its pass that times latency is off.\n"
        "- Seconds are per cell and context, without starting Python, loading the model and drawing contexts; what "
        "whole processes took is said below. A context's seconds in a sweep are shared evenly by its cells. Intervals: "
        "95 %, bootstrap over contexts, in pairs.",
    ]
    for new_tokens in settings["new_tokens"]:
        chosen = [row for row in rows if row["new_tokens"] == new_tokens]
        lines += compared(chosen, new_tokens, count)
        if settings["apart"]:
            lines += taken_apart(chosen, new_tokens, count)
    return "\n\n".join(lines) + "\n"


def compared(rows: list[Row], new_tokens: int, count: int) -> list[str]:
    """kvpress and the sweep, for each method and for all."""
    theirs, ours = seconds(rows, "kvpress"), seconds(rows, "kvbench")
    share = {context: total / count for context, total in ours.items()}
    calls = [call for row in rows if row["side"] == "kvpress" for call in row["calls"]]
    records = [record for row in rows if row["side"] == "kvbench" for record in row["records"]]
    lengths = {k: v for row in rows if row["side"] == "kvpress" for k, v in row["tokens"].items()}
    if any(record["tokens_context"] != lengths[record["context_id"]] for record in records):
        sys.exit("the two sides have read contexts of different lengths")
    lines = []
    for method in [*dict.fromkeys(call["method"] for call in calls), "all"]:
        here = [call for call in calls if method in (call["method"], "all")]
        mine = [record for record in records if method in (record["method"], "all")]
        each = {context: fmean(call["seconds"] for call in here if call["context"] == context) for context in share}
        lines.append(
            [
                method,
                len(here) // len(share),
                f"{fmean(each.values()):.2f}",
                f"{fmean(share.values()):.3f}",
                shown(ratio(list(each.values()), list(share.values()))),
                f"{fmean(call['tokens_out'] for call in here):.1f} / {fmean(r['tokens_out'] for r in mine):.1f}",
                f"{fmean(call['score'] for call in here):.2f} / {fmean(r['score'] for r in mine):.2f}",
            ]
        )
    sides = {"kvpress": theirs, "kvbench": ours}
    done = count * len(share)
    hourly = [3600 * done / sum(side.values()) for side in sides.values()]
    whole = [sum(row["process_s"] for row in rows if row["side"] == side) for side in sides]
    cpu = [sum(seconds(rows, side, "cpu").values()) for side in sides]
    totals = [
        ["cells x contexts per hour", *(f"{x:,.0f}" for x in hourly), f"{hourly[1] / hourly[0]:.2f}"],
        ["seconds of whole processes", *(f"{x:,.0f}" for x in whole), f"{whole[0] / whole[1]:.2f}"],
        [
            "the processor's seconds, without starting and loading",
            *(f"{x:,.0f}" for x in cpu),
            f"{cpu[0] / cpu[1]:.2f}",
        ],
    ]
    head = ["method", "cells", "kvpress, s", "kvbench sweep, s", "ratio", "tokens answered", "score"]
    return [
        f"## {new_tokens} new tokens ({LABEL})",
        table(head, lines),
        "Tokens answered and scores: kvpress / kvbench.",
        table(["", "kvpress", "kvbench", "ratio"], totals),
    ]


def taken_apart(rows: list[Row], new_tokens: int, count: int) -> list[str]:
    """What sharing gives, and what answering together gives, on the contexts that all sides have run."""
    sides = {side: seconds(rows, side) for side in SIDES}
    contexts = sorted(set.intersection(*map(set, sides.values())))
    lines, above = [], []
    for side, found in sides.items():
        here = [found[context] / count for context in contexts]
        cpu = seconds(rows, side, "cpu")
        lines.append([SIDES[side], f"{fmean(here):.3f}", f"{fmean(cpu[context] for context in contexts) / count:.3f}"])
        lines[-1].append(shown(ratio(above, here)) if above else "")
        above = here
    return [
        f"### What sharing gives, and what answering together ({LABEL}, {new_tokens} new tokens)",
        table(["", "s per cell and context", "the processor's", "times faster than the line above"], lines),
        f"On {len(contexts)} of the contexts, all cells.",
    ]


def seconds(rows: list[Row], side: str, clock: str = "seconds") -> dict[str, float]:
    """Seconds of all cells, by context; with `clock="cpu"` of the processor."""
    found: dict[str, float] = defaultdict(float)
    for row in rows:
        for call in row["calls"] if row["side"] == side else []:
            found[call["context"]] += call[clock]
    return found


if __name__ == "__main__":
    main()
