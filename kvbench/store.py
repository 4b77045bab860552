"""A cell's folder: `header.json` says how its records were made, `examples.jsonl` holds them, one line each.

The header is written first (`status: running`) and replaced atomically; `done` comes last. A line is on disk before the
next example starts, so a process killed at any moment loses at most the example it was working on.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from kvbench import provenance
from kvbench.cell import Cell
from kvbench.errors import UsageError

FORMAT = 1  # of a cell's folder; raise it when older records can no longer be read the same way

HEADER = "header.json"
EXAMPLES = "examples.jsonl"


class CellStore:
    """One process's exclusive hold on a cell's folder, from `open` to the end of the `with` block.

        with CellStore.open(cell, results, about, limit) as store:
            for example in ...:
                if example.id not in store.done:
                    store.append({"id": example.id, ...})
            store.finish(exhausted=True)

    A block left without `finish` or `fail` leaves `status: running`, exactly as a killed process does.
    """

    def __init__(self, folder: Path, header: dict[str, Any], records: list[dict[str, Any]], lock: int, file: int):
        """Use `open`. `lock` and `file` are descriptors that this store closes."""
        self.folder = folder
        self.header = header
        self.records = records  # in file order
        self.done = {record["id"] for record in records}
        self._lock = lock
        self._file = file

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
        file = -1
        try:
            _take(lock, folder)
            if redo:
                # The examples go first: if this process is killed in between, `is_done` sees that they are missing.
                with _disk(folder):
                    (folder / EXAMPLES).unlink(missing_ok=True)
                    (folder / HEADER).unlink(missing_ok=True)
            facts = json.loads(json.dumps({key: value for key, value in about.items() if key != "hardware"}))
            records, length = _parse(folder / EXAMPLES)
            header = _continued(folder, cell, facts, started=bool(records))
            with _disk(folder / EXAMPLES):
                file = os.open(folder / EXAMPLES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.ftruncate(file, length)  # cuts off the torn line of a killed process
            segment = provenance.segment()
            segment["hardware"] |= about.get("hardware", {})
            header["segments"].append({"started": _now(), "limit": limit, "first_example": None} | segment)
            store = cls(folder, header, records, lock, file)
            store._save(status="running")
            return store
        except BaseException:
            if file >= 0:
                os.close(file)
            os.close(lock)
            raise

    def __enter__(self) -> CellStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        os.close(self._lock)

    def append(self, record: dict[str, Any]) -> None:
        """Adds one example; it is on disk when this returns. NaN and infinities become null.

        Raises UsageError when the disk refuses; the file then ends with the example before.
        """
        record = _finite(record)
        if record["id"] in self.done:
            raise ValueError(f"{self.folder} already has example {record['id']}")
        segment = self.header["segments"][-1]
        if segment["first_example"] is None:
            # Before the example itself: no record is ever without the segment that made it.
            segment["first_example"] = record["id"]
            self._save()
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with _disk(self.folder / EXAMPLES):
            length = os.fstat(self._file).st_size
            try:
                _write(self._file, line)
            except BaseException:
                os.ftruncate(self._file, length)
                raise
        self.records.append(record)
        self.done.add(record["id"])

    def finish(self, exhausted: bool) -> None:
        """Marks the cell done. `exhausted`: the task has no further example, so no larger limit would add one."""
        self._save(status="done", examples=len(self.records), exhausted=exhausted, finished=_now())

    def fail(self, reason: str, status: str = "failed") -> None:
        """Marks the cell as ended without a full result (another such status: `infeasible`); `open` continues it."""
        self._save(status=status, examples=len(self.records), reason=reason, finished=_now())

    def _save(self, **changes: Any) -> None:
        self.header.update(changes)
        path, temporary = self.folder / HEADER, self.folder / f".{HEADER}.tmp"  # ours alone: we hold the lock
        with _disk(path):
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                _write(file, json.dumps(self.header, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            finally:
                os.close(file)
            os.replace(temporary, path)


def read_cell(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A cell's header and records, whatever its status; changes nothing. A torn last line is left out."""
    return _read_header(folder), _parse(folder / EXAMPLES)[0]


def cells(results: Path) -> Iterator[Path]:
    """The folders of all cells in a results folder, sorted, finished or not."""
    yield from sorted(header.parent for header in results.glob(f"*/*/*/{HEADER}"))


def is_done(cell: Cell, results: Path, limit: int | None) -> bool:
    """Whether nothing is left to do for `limit` examples (None: all the task has)."""
    folder = cell.folder(results)
    if not (folder / HEADER).exists():
        return False
    header = _read_header(folder)
    if header["status"] != "done" or header["examples"] != len(_parse(folder / EXAMPLES)[0]):
        return False
    return header["exhausted"] or (limit is not None and header["examples"] >= limit)


def _take(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another process is writing {folder}; wait for it, or stop it") from None
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
