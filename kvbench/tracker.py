"""The W&B mirror of ended cells. A mirror is made from a cell's folder alone, and can be re-made at any time.

    python -m kvbench.tracker results/                  # all finished cells, offline
    python -m kvbench.tracker results/ --mode online

A sweep is a group, a cell a run whose job type is the method's label; its records are a series, a summary of means and
a table of examples (docs/wandb.md). Nothing that W&B, the network or a missing key does ends a run: trouble is one line
on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import sys
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvbench import plugins
from kvbench.errors import UsageError
from kvbench.store import cells, read_cell

MODES = ("online", "offline", "disabled")

STEP = "example"  # 0, 1, ... in file order: the x axis of every series
TABLE = "examples"
LONGEST = 128  # letters of a group's name, for W&B
# What a reader looks for in an example, as far as records have it; the other fields are series.
COLUMNS = (
    *("id", "cluster_id", "answer", "score", "answer_nll", "kl_full", "agree_full", "diverges_at"),
    *("bytes_held", "bytes_full", "tokens_kept", "tokens_context", "tokens_out", "info"),
)


def mirror(folder: Path, results: Path, mode: str, project: str = "kvbench", group: str | None = None) -> str:
    """Mirrors one ended cell as one run, with its files under `<results>/wandb`.

    Returns the mode for the next cell: `offline` after online mode has failed, so that a sweep waits for a dead network
    once. Mirroring a cell again replaces its run. Without a `group` it stays in the one it has, or is in that of its
    results folder's name.
    """
    plugins.known("tracker mode", mode, MODES)
    if mode == "disabled":
        return mode
    try:
        return _mirror(folder, results, mode, project, group)
    except Exception as error:  # W&B's, the network's, the disk's: none of them is worth a run
        _warn(f"{folder} is not mirrored ({_line(error)})")
        return mode


def _mirror(folder: Path, results: Path, mode: str, project: str, group: str | None) -> str:
    # W&B's telemetry on itself: offline runs send it too, and a process ends 10 s late where a firewall swallows it.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # 0.5 s, and never for `disabled`

    header, records = read_cell(folder)
    run_id, group = _run_and_group(folder, results, header["digest"], group)
    for older in (results / "wandb").glob(f"*run-*-{run_id}"):
        shutil.rmtree(older)  # a mirror is whole: `wandb sync` must not find the same cell twice
    wandb.setup(settings=wandb.Settings(silent=True))
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        symlink=False,  # several processes share the folder
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,  # the header has what matters
        init_timeout=15,
        finish_timeout=30,  # the default waits for ever for a network that went away
        finish_timeout_raises=True,
    )
    identity = header["identity"]
    traits = _traits(identity["method"]["name"])
    tags = [identity["task"]["name"], identity["model"]["name"], identity["protocol"], traits.get("family", "")]
    arguments: dict[str, Any] = {
        "dir": results,
        "project": project,
        "group": group if len(group) <= LONGEST else f"{group[: LONGEST - 3]}...",
        "tags": [tag[:64] for tag in dict.fromkeys(tags) if tag],
        "id": run_id,
        "job_type": header["label"],
        "name": f"{identity['task']['name']} {identity['model']['name']} {header['label']} {identity['budget']}",
        "config": flat(identity) | traits | flat({key: header[key] for key in ("label", "digest", "about")}),
        "settings": settings,
        "reinit": "create_new",  # the caller may have a run of its own
    }
    if mode == "online":
        failure = _no_way_online(wandb)
        if failure is None:
            try:
                _log(wandb.init(mode="online", **arguments), header, records)
                return mode
            except Exception as error:
                failure = _line(error)
                with suppress(Exception):
                    wandb.teardown()  # the service still holds the run's id
        _warn(f"offline from here on ({failure}); later: wandb sync {results / 'wandb'}/offline-run-*")
    _log(wandb.init(mode="offline", **arguments), header, records)
    return "offline"


def _log(run: Any, header: dict[str, Any], records: list[dict[str, Any]]) -> None:
    run.define_metric(STEP, summary="none")
    run.define_metric("*", step_metric=STEP, summary="none")  # ours is written below
    rows = [numbers(record) for record in records]
    for index, row in enumerate(rows):
        run.log(row | {STEP: index})
    summary: dict[str, Any] = means(rows) | {"n": len(rows), "status": header["status"]}
    if summary.get("bytes_full"):
        summary["share"] = summary["bytes_held"] / summary["bytes_full"]
    if records:
        summary[TABLE] = _table(run, records)
        run.log({TABLE: summary[TABLE]})
    run.summary.update(summary)
    run.finish(exit_code=0 if header["status"] == "done" else 1)


def _table(run: Any, records: list[dict[str, Any]]) -> Any:
    """The records as rows to read. A file of the run's alone.

    W&B would also make an artifact of a table: two more copies, kept in the user's home and found by their absolute
    paths when an offline run is synced. One that is bound to its run already stays out of that.
    """
    import wandb

    columns: list[Any] = [name for name in COLUMNS if any(name in record for record in records)]
    rows: list[Any] = [[_cell(record.get(name)) for name in columns] for record in records]
    table = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
    table.bind_to_run(run, TABLE, len(records))
    return table


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def numbers(record: dict[str, Any]) -> dict[str, int | float]:
    """A record's numeric fields, under their own names; a null is left out."""
    return {key: value for key, value in record.items() if isinstance(value, int | float)}


def means(rows: list[dict[str, int | float]]) -> dict[str, int | float]:
    """The mean of each field over the rows that have it."""
    columns: dict[str, list[int | float]] = {}
    for row in rows:
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return {key: sum(column) / len(column) for key, column in columns.items()}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"method": {"name": "snapkv"}}` as `{"method.name": "snapkv"}`: W&B filters and groups by flat names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _run_and_group(folder: Path, results: Path, digest: str, group: str | None) -> tuple[str, str]:
    """The cell's run and its group, kept in its folder.

    The run is not the digest alone: another results folder's cell is another run.
    """
    path = folder / "wandb-id"
    before = path.read_text().splitlines() if path.exists() else []
    after = before[:1] or [f"{digest}-{secrets.token_hex(3)}"]
    after += [group] if group else before[1:] or [results.resolve().name]
    if after != before:
        path.write_text("".join(f"{line}\n" for line in after))
    return after[0], after[1]


def _traits(method: str) -> dict[str, str]:
    """What a method's file says of it; nothing where the file is not here."""
    file = plugins.files("methods").get(method)
    declared = plugins.about(file).traits if file else {}
    return {name: declared[name] for name in ("family", "trust") if name in declared}


def _no_way_online(wandb: Any) -> str | None:
    """Why online mode can't work, found out within seconds: `wandb.init` alone would block for minutes, or ask."""
    try:
        failure = _unreachable(wandb.setup().settings.base_url)
        if failure is None and not wandb.login(prompt=False, verify=False):
            failure = "no API key is configured"
        return failure
    except Exception as error:
        return _line(error)


def _unreachable(url: str, seconds: float = 3.0) -> str | None:
    """Why no connection to `url`, or to the proxy on the way, opens within `seconds`; None when one does."""
    target = urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (target.hostname or "", target.port or (443 if target.scheme == "https" else 80))
    answers: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            answers.append(None)
        except (OSError, UnicodeError) as error:  # a name may also be no name
            answers.append(f"{address[0]}: {_line(error)}")

    # In a thread: looking up a name has no timeout, and takes long exactly where there is no network.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"{address[0]}: no connection within {seconds:g} s"


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _warn(text: str) -> None:
    print(f"W&B: {text}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvbench.tracker", description="Mirror finished cells to W&B.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--mode", choices=("offline", "online"), default="offline")
    parser.add_argument("--project", default="kvbench")
    parser.add_argument(
        "--group", help="default: the sweep that a cell was mirrored with, or the results folder's name"
    )
    options = parser.parse_args()
    mode, code = options.mode, 0
    try:
        finished = [folder for folder in cells(options.results) if read_cell(folder)[0]["status"] == "done"]
        if not finished:
            raise UsageError(f"no finished cell in {options.results}")
        for folder in finished:
            try:
                mode = _mirror(folder, options.results, mode, options.project, options.group)
                print(f"{folder}: {mode}")
            except Exception as error:
                print(f"{folder}: not mirrored ({_line(error)})")
                code = 1
    except UsageError as error:
        print(error, file=sys.stderr)
        code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
