"""The W&B mirror says what the records say, and whatever goes wrong with it, the run goes on.

W&B keeps settings and a service per process, so each case has a process of its own, where warnings are errors too.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from test_store import ABOUT, a_cell

from kvbench import tracker
from kvbench.errors import UsageError
from kvbench.store import CellStore

RECORDS: list[dict[str, Any]] = [
    {
        "id": "a",
        "score": 1.0,
        "answer": "x",
        "kl_full": 0.5,
        "bytes_held": 10,
        "bytes_full": 60,
        "tiers": {"exact": 3},
        "info": {},
    },
    {
        "id": "b",
        "score": 0.0,
        "answer": "y",
        "kl_full": None,
        "bytes_held": 20,
        "bytes_full": 60,
        "tiers": {"exact": 4},
        "info": {},
    },
]
SUMMARY = {"score": 0.5, "kl_full": 0.5, "bytes_held": 15, "bytes_full": 60, "share": 0.25, "n": 2, "status": "done"}


def results_of(folder: Path, windows: tuple[int, ...] = (32,), finish: bool = True) -> Path:
    for window in windows:
        with CellStore.open(a_cell(window), folder, ABOUT, None) as opened:
            for record in RECORDS:
                opened.append(record)
            if finish:
                opened.finish(exhausted=True)
    return folder


def python(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with warnings as errors, in a home without a key of the developer's."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    ours = {name: value for name, value in ours.items() if not name.lower().endswith("_proxy")}
    ours |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent)}
    folder = "ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"  # W&B's own, for its media
    command = [sys.executable, "-W", "error", "-W", folder, *arguments]
    return subprocess.run(command, env=ours | environment, capture_output=True, text=True, timeout=60)


def mirrored(home: Path, results: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Mirrors the first cell in a process that then says which mode comes next, and that it is alive."""
    code = """
import sys
from pathlib import Path
from kvbench.store import cells
from kvbench.tracker import mirror
results = Path(sys.argv[1])
mode = mirror(next(cells(results)), results, sys.argv[2], group="nightly")
print("next:", mode, "wandb" in sys.modules, "torch" in sys.modules)
"""
    return python(home, "-c", code, str(results), mode, **environment)


def log_records(data: bytes) -> Iterator[bytes]:
    """The payloads of a .wandb file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_run(path: Path) -> tuple[Any, dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """(run, config, history, summary) of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    def items(found: Any) -> dict[str, Any]:
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in found}

    run, history, summary = None, [], {}
    for payload in log_records(path.read_bytes()):
        record = Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        elif kind == "history":
            history.append(items(record.history.item))
        elif kind == "summary":
            summary |= items(record.summary.update)
    assert run is not None
    return run, items(run.config.update), history, summary


def runs(results: Path) -> list[Path]:
    return sorted((results / "wandb").glob("offline-run-*/*.wandb"))


def test_an_offline_mirror_says_what_the_records_say(tmp_path: Path) -> None:
    results = results_of(tmp_path / "results")
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        ended = mirrored(tmp_path, results, "offline", **environment)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody asked the server anything
            server.accept()
    assert (ended.stdout, ended.stderr) == ("next: offline True False\n", "")
    (path,) = runs(results)
    run, config, history, summary = read_run(path)
    assert config["method.name"] == "test_store"
    assert config["method.window"] == 32
    assert config["budget"] == "0.1"
    assert config["about.weights_hash"] == "ab12"
    assert run.job_type == "test_store(window=32)"
    assert run.display_name == "test_store tiny test_store(window=32) 0.1"
    assert (run.project, run.run_group) == ("kvbench", "nightly")
    assert list(run.tags) == ["test_store", "tiny", "blind"]
    assert (next(tracker.cells(results)) / "wandb-id").read_text() == f"{run.run_id}\nnightly\n"
    assert run.run_id.startswith(a_cell(32).digest)
    fields = {"example", "score", "kl_full", "bytes_held", "answer", "tiers", "tiers.exact", "id"}
    *series, shown = history
    assert [{key: value for key, value in row.items() if key in fields} for row in series] == [
        {"example": 0, "score": 1.0, "kl_full": 0.5, "bytes_held": 10},
        {"example": 1, "score": 0.0, "bytes_held": 20},
    ]
    assert {key: summary[key] for key in SUMMARY} == SUMMARY
    assert not {"id", "answer", "example"} & summary.keys()
    assert shown["examples.path"] == summary["examples"]["path"]
    table = json.loads((path.parent / "files" / summary["examples"]["path"]).read_text())
    assert table["columns"] == ["id", "answer", "score", "kl_full", "bytes_held", "bytes_full", "info"]
    assert table["data"] == [["a", "x", 1.0, 0.5, 10, 60, "{}"], ["b", "y", 0.0, None, 20, 60, "{}"]]
    assert not list(tmp_path.rglob("staging"))  # nothing that an offline run needs is elsewhere


def test_mirroring_again_replaces_the_run(tmp_path: Path) -> None:
    results = results_of(tmp_path / "results", windows=(32, 48))
    for _ in range(2):
        ended = python(tmp_path, "-m", "kvbench.tracker", str(results))
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout == "".join(f"{folder}: offline\n" for folder in tracker.cells(results))
        ids = sorted(read_run(path)[0].run_id for path in runs(results))
        assert ids == sorted((folder / "wandb-id").read_text().split()[0] for folder in tracker.cells(results))
    assert len(list(tracker.cells(results))) == 2  # W&B's files are not taken for cells


def test_a_group_is_kept_until_another_is_asked_for(tmp_path: Path) -> None:
    results = results_of(tmp_path / "results")
    (cell,) = tracker.cells(results)
    run = tracker._run_and_group(cell, results, "ab", None)
    assert run == (run[0], "results")
    assert tracker._run_and_group(cell, results, "ab", "method=full,snapkv") == (run[0], "method=full,snapkv")
    assert tracker._run_and_group(cell, results, "ab", None) == (run[0], "method=full,snapkv")


def test_what_a_methods_file_says_of_it_can_be_filtered_by() -> None:
    assert tracker._traits("snapkv") == {"family": "scorer", "trust": "parity"}
    assert tracker._traits("of another folder") == {}


def test_disabled_writes_nothing_and_imports_nothing(tmp_path: Path) -> None:
    results = results_of(tmp_path / "results")
    before = sorted(tmp_path.rglob("*"))
    ended = mirrored(tmp_path, results, "disabled")
    assert (ended.stdout, ended.stderr) == ("next: disabled False False\n", "")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", ["no network", "no key"])
def test_online_mode_falls_back_within_seconds(tmp_path: Path, case: str) -> None:
    results = results_of(tmp_path / "results")
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        if case == "no network":
            server.close()
            environment["WANDB_API_KEY"] = "0" * 40
        started = time.monotonic()
        ended = mirrored(tmp_path, results, "online", **environment)
        seconds = time.monotonic() - started
    assert ended.stdout == "next: offline True False\n"
    assert {"no network": "Connection refused", "no key": "no API key"}[case] in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert f"wandb sync {results}/wandb/offline-run-*" in ended.stderr
    assert seconds < 30  # 1.5 on an idle machine; W&B alone would block for 100
    assert len(read_run(runs(results)[0])[2]) == 3


class FakeServer(http.server.BaseHTTPRequestHandler):
    """As much of a W&B server as one run needs; keeps what is sent to it, or refuses everything."""

    refuses: ClassVar[bool] = False
    got: ClassVar[list[tuple[str, str]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        text = (gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body).decode()
        self.got.append((self.path, text))
        self.send_response(403 if self.refuses else 200)
        self.end_headers()
        self.wfile.write(json.dumps(self.answer(text) if self.path == "/graphql" else {}).encode())

    do_PUT = do_POST

    def answer(self, text: str) -> dict[str, Any]:
        variables = json.loads(text)["variables"]
        if "UpsertBucket" in text:
            project = {"id": "p", "name": "kvbench", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "x", "name": variables["name"], "displayName": "", "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "CreateRunFiles" in text:
            url = f"http://{self.headers['Host']}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def wandb_server(answers: bool) -> Iterator[tuple[dict[str, str], list[tuple[str, str]]]]:
    """(environment that leads to it, what it got) of a fake server."""
    handler = type("Handler", (FakeServer,), {"refuses": not answers, "got": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        yield {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}, handler.got
        server.shutdown()


def test_online_mode_sends_what_the_records_say(tmp_path: Path) -> None:
    results = results_of(tmp_path / "results")
    with wandb_server(answers=True) as (environment, got):
        ended = mirrored(tmp_path, results, "online", **environment)
    assert (ended.stdout, ended.stderr) == ("next: online True False\n", "")
    (summary,) = (json.loads(text) for path, text in got if path == "/upload/wandb-summary.json")
    assert {key: summary[key] for key in SUMMARY} == SUMMARY
    sent = "".join(text for path, text in got if path.endswith("/file_stream"))
    assert (next(tracker.cells(results)) / "wandb-id").read_text().split()[0] in got[0][1]
    assert '"complete":true' in sent
    assert "wandb-history.jsonl" in sent
    (table,) = (text for path, text in got if path.endswith(".table.json"))
    assert json.loads(table)["data"][0][:3] == ["a", "x", 1.0]


def test_a_server_that_refuses_leaves_an_offline_run_of_the_same_id(tmp_path: Path) -> None:
    results = results_of(tmp_path / "results")
    with wandb_server(answers=False) as (environment, got):
        ended = mirrored(tmp_path, results, "online", **environment)
    assert got
    assert ended.stdout == "next: offline True False\n"
    assert ended.stderr.startswith("W&B: offline from here on (")
    assert ended.stderr.count("\n") == 1
    (path,) = runs(results)
    run, _, history, _ = read_run(path)
    assert len(history) == 3
    assert run.run_id == (next(tracker.cells(results)) / "wandb-id").read_text().split()[0]


def test_a_proxy_is_where_the_connection_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        assert tracker._unreachable("https://nowhere.invalid") is None
    failure = tracker._unreachable("https://nowhere.invalid")
    assert failure is not None
    assert "127.0.0.1" in failure


def test_a_name_that_is_never_resolved_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker.urllib.request, "getproxies", dict)
    over = threading.Event()

    def never(*_: Any, **__: Any) -> None:
        over.wait(60)
        raise OSError

    monkeypatch.setattr(tracker.socket, "create_connection", never)
    started = time.monotonic()
    assert tracker._unreachable("https://nowhere.invalid", seconds=0.1) == "nowhere.invalid: no connection within 0.1 s"
    assert time.monotonic() - started < 30
    over.set()


def test_trouble_of_any_kind_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: Any) -> str:
        raise RuntimeError("disk\nfull")

    monkeypatch.setattr(tracker, "_mirror", explode)
    assert tracker.mirror(tmp_path / "cell", tmp_path, "offline") == "offline"
    assert capsys.readouterr().err == f"W&B: {tmp_path}/cell is not mirrored (RuntimeError: disk full)\n"


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown tracker mode 'on'; known: online, offline, disabled"):
        tracker.mirror(tmp_path, tmp_path, "on")


def test_the_command_line_wants_finished_cells(tmp_path: Path) -> None:
    results = results_of(tmp_path / "results", finish=False)
    ended = python(tmp_path, "-m", "kvbench.tracker", str(results))
    assert (ended.returncode, ended.stderr) == (2, f"no finished cell in {results}\n")


def test_an_offline_run_is_synced_from_wherever_it_lies(tmp_path: Path) -> None:
    mirrored(tmp_path, results_of(tmp_path / "results"), "offline")
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    folder = str(next((tmp_path / "elsewhere" / "wandb").glob("offline-run-*")))
    with wandb_server(answers=True) as (environment, got):
        environment["WANDB_ERROR_REPORTING"] = "false"
        ended = python(tmp_path, "-W", "default", "-m", "wandb", "sync", folder, **environment)
    assert ended.returncode == 0, ended.stderr
    (table,) = (text for path, text in got if path.endswith(".table.json"))
    assert json.loads(table)["data"][0][:3] == ["a", "x", 1.0]
    (summary,) = (json.loads(text) for path, text in got if path == "/upload/wandb-summary.json")
    assert {key: summary[key] for key in SUMMARY} == SUMMARY
    assert summary["examples"]["_type"] == "table-file"
