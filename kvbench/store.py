"""A cell's folder: `header.json` says how its records were made, `examples.jsonl` holds them, one line each, and
`timing.jsonl` the seconds and peak memory of the few examples that were timed alone. `solo.json` is what `measure=solo`
leaves, and has nothing to do with the others.

The header is written first (`status: running`) and replaced atomically; `done` comes last. A line is on disk before the
next example starts, so a process killed at any moment loses at most the example it was working on.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from kvbench import provenance
from kvbench.cell import Cell, Settings
from kvbench.errors import UsageError

FORMAT = 2  # of a cell's folder; raise it when older records can no longer be read the same way

HEADER = "header.json"
EXAMPLES = "examples.jsonl"
TIMING = "timing.jsonl"
SOLO = "solo.json"


class CellStore:
    """One process's exclusive hold on a cell's folder, from `open` to the end of the `with` block.

        with CellStore.open(cell, results, about, limit) as store:
            for example in ...:
                if example.id not in store.done:
                    store.append({"id": example.id, ...})
            store.finish(exhausted=True)

    A block left without `finish` or `fail` leaves `status: running`, exactly as a killed process does.
    """

    def __init__(self, folder: Path, header: dict[str, Any], examples: _Lines, timing: _Lines, lock: int):
        """Use `open`. `lock` is a descriptor that this store closes."""
        self.folder = folder
        self.header = header
        self._examples, self._timing = examples, timing
        self._lock = lock

    @property
    def done(self) -> set[str]:
        """The examples that have a record."""
        return self._examples.ids

    @property
    def timed(self) -> set[str]:
        """The examples that were timed."""
        return self._timing.ids

    @classmethod
    def open(cls, cell: Cell, results: Path, about: dict[str, Any], limit: int | None, redo: bool = False) -> CellStore:
        """Takes the folder and continues what is in it; `redo` deletes the examples and starts over.

        `about` are facts that hold for every record (hashes of weights, data and artefacts, parameter counts, ...):
        a cell can't be continued with other ones. Its key `hardware`, if any, is this process's alone (GPU names, ...)
        and joins the hardware of the process's segment.

        Raises UsageError when another process holds the folder or what lies in it can't be continued.
        """
        folder = cell.folder(results)
        with _disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        files: list[_Lines] = []
        try:
            _take(lock, folder)
            if redo:
                # The examples go first: if this process is killed in between, `is_done` sees that they are missing.
                with _disk(folder):
                    (folder / EXAMPLES).unlink(missing_ok=True)
                    (folder / TIMING).unlink(missing_ok=True)
                    (folder / HEADER).unlink(missing_ok=True)
            facts = json.loads(json.dumps({key: value for key, value in about.items() if key != "hardware"}))
            header = _continued(folder, cell, facts, started=bool(_parse(folder / EXAMPLES)[0]))
            files.append(_Lines(folder / EXAMPLES))
            files.append(_Lines(folder / TIMING))
            segment = provenance.segment()
            segment["hardware"] |= about.get("hardware", {})
            header["segments"].append({"started": _now(), "limit": limit, "first_example": None} | segment)
            store = cls(folder, header, files[0], files[1], lock)
            store._save(status="running")
            return store
        except BaseException:
            for file in files:
                file.close()
            os.close(lock)
            raise

    def __enter__(self) -> CellStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._examples.close()
        self._timing.close()
        os.close(self._lock)

    def append(self, record: dict[str, Any]) -> None:
        """Adds one example; it is on disk when this returns. NaN and infinities become null.

        Raises UsageError when the disk refuses; the file then ends with the example before.
        """
        segment = self.header["segments"][-1]
        if segment["first_example"] is None:
            # Before the example itself: no record is ever without the segment that made it.
            segment["first_example"] = record["id"]
            self._save()
        self._examples.append(record)

    def append_timing(self, record: dict[str, Any]) -> None:
        """Adds the seconds of an example, and the segment (the process) that measured them."""
        self._timing.append(record | {"segment": len(self.header["segments"]) - 1})

    def finish(self, exhausted: bool, timed: int = 0) -> None:
        """Marks the cell done. `exhausted`: the task has no further example, so no larger limit would add one.

        `timed` is how many examples were to be timed.
        """
        self._save(status="done", examples=len(self.done), exhausted=exhausted, timed=timed, finished=_now())

    def fail(self, reason: str, status: str = "failed") -> None:
        """Marks the cell as ended without a full result (another such status: `infeasible`); `open` continues it."""
        self._save(status=status, examples=len(self.done), reason=reason, finished=_now())

    def _save(self, **changes: Any) -> None:
        self.header.update(changes)
        _replace(self.folder / HEADER, self.header)


class _Lines:
    """A file of records, one JSON object a line, each with an `id` of its own; a torn last line is cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        records, length = _parse(path)
        self.ids = {record["id"] for record in records}
        with _disk(path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, length)

    def append(self, record: dict[str, Any]) -> None:
        if record["id"] in self.ids:
            raise ValueError(f"{self._path} already has example {record['id']}")
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with _disk(self._path):
            length = os.fstat(self._file).st_size
            try:
                _write(self._file, line)
            except BaseException:
                os.ftruncate(self._file, length)
                raise
        self.ids.add(record["id"])

    def close(self) -> None:
        os.close(self._file)


def read_cell(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A cell's header and records, whatever its status; changes nothing. A torn last line is left out.

    The records of examples that were timed have the fields of their timing too.
    """
    timing = {record["id"]: record for record in _parse(folder / TIMING)[0]}
    return _read_header(folder), [record | timing.get(record["id"], {}) for record in _parse(folder / EXAMPLES)[0]]


def cells(results: Path) -> Iterator[Path]:
    """The folders of all cells in a results folder, sorted, finished or not."""
    yield from sorted(header.parent for header in results.glob(f"*/*/*/{HEADER}"))


def is_done(cell: Cell, settings: Settings) -> bool:
    """Whether nothing is left to do for the examples that are wanted, and their timing; or for `measure=solo`."""
    folder = cell.folder(settings.results)
    if settings.measure == "solo":
        return (folder / SOLO).exists()
    if not (folder / HEADER).exists():
        return False
    header = _read_header(folder)
    if header["status"] != "done" or header["examples"] != len(_parse(folder / EXAMPLES)[0]):
        return False
    if header["timed"] < settings.timed:
        return False
    return header["exhausted"] or (settings.limit is not None and header["examples"] >= settings.limit)


def is_infeasible(cell: Cell, settings: Settings) -> bool:
    """Whether it has turned out that the cell's budget is below its method's smallest plan."""
    folder = cell.folder(settings.results)
    marked = settings.measure != "solo" and (folder / HEADER).exists()
    return marked and _read_header(folder)["status"] == "infeasible"


def write_solo(cell: Cell, results: Path, found: dict[str, Any]) -> None:
    """Keeps what was measured of a cell, in place of what was measured before."""
    folder = cell.folder(results)
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, "label": cell.label, "digest": cell.digest, "identity": cell.identity()}
    _replace(folder / SOLO, _finite(about | {"measured": _now()} | found))


def read_solo(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / SOLO).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / SOLO} can't be read ({error!r}); redo=true measures again") from error


def _take(lock: int, folder: Path, patience: float = 1.0) -> None:
    """Locks a cell. `status` looks at locks for a moment, and network disks let go of a dead process's late."""
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise UsageError(f"another process is writing {folder}; wait for it, or stop it") from None
            time.sleep(0.05)
        except OSError as error:
            raise UsageError(f"could not lock {folder}: {error.strerror}; use a results= folder elsewhere") from error


def _continued(folder: Path, cell: Cell, facts: dict[str, Any], started: bool) -> dict[str, Any]:
    """The header to go on with: that of `folder` without its end, or a new one. `started`: there are records."""
    segments = []
    if (folder / HEADER).exists():
        old = _read_header(folder)
        segments = old["segments"]
        if old["digest"] != cell.digest:
            raise UsageError(f"{folder} holds another cell ({old['digest']}, not {cell.digest}); move it away")
        for key in sorted(old["about"].keys() | facts.keys()) if started else ():
            was, now = old["about"].get(key), facts.get(key)
            if was != now:
                raise UsageError(
                    f"{folder} was begun with another {key} ({was}, now {now}); redo=true starts over, "
                    "another results= folder keeps both"
                )
    elif started:
        raise UsageError(f"{folder} has examples but no {HEADER}; redo=true starts over")
    return {
        "format": FORMAT,
        "status": "running",
        "label": cell.label,
        "digest": cell.digest,
        "identity": cell.identity(),
        "about": facts,
        "segments": segments,
    }


def _read_header(folder: Path) -> dict[str, Any]:
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        form = header["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / HEADER} is not the header of a cell ({error!r})") from error
    if form != FORMAT:
        raise UsageError(
            f"{folder} has format {form}, this kvbench reads and writes format {FORMAT}; use another results= folder"
        )
    return header


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of an examples file, and the length of the file without a torn last line."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UsageError(f"could not read {path}: {error.strerror}") from error
    records: list[dict[str, Any]] = []
    length = 0
    lines = data.split(b"\n")  # the last piece is what follows the last newline: nothing, or a torn line
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            whole = isinstance(record, dict) and "id" in record
        except ValueError:
            whole = False
        if whole:
            records.append(record)
            length += len(line) + 1
        elif number < len(lines) - 1 or lines[-1]:
            raise UsageError(f"{path}, line {number}, is not a record; mend it, or redo=true starts over")
    return records, length


def _replace(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with _disk(path):
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _write(file, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        finally:
            os.close(file)
        os.replace(temporary, path)


def _write(file: int, data: bytes) -> None:
    """Without a buffer, which would try again when it is closed."""
    while data:
        data = data[os.write(file, data) :]
    os.fsync(file)


def _finite(value: Any) -> Any:
    """`value` with null for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"could not write {path}: {error.strerror}; the same command continues") from error
