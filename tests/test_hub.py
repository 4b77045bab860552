"""Rows from local files and from a hub: here a small server that speaks the hub's protocol, or nobody at all."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest
from pyarrow import parquet

from kvbench import hub
from kvbench.errors import UsageError

ROWS = [{"a": 1, "b": ["x", "y"]}, {"a": 2, "b": []}]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: first
  data_files:
  - split: test
    path: first/test-*
  - split: train
    path: first/train-*
- config_name: second
  data_files:
  - split: test
    path: [second/a.jsonl, second/b.jsonl]
---
Books.
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "notes.txt").write_text("no rows")
    return tmp_path


def test_local_files_and_folders(folder):
    assert list(hub.rows(str(folder / "b.jsonl"))) == ROWS
    assert list(hub.rows(str(folder / "a.parquet"))) == ROWS
    assert list(hub.rows(str(folder))) == ROWS + ROWS
    assert [file.name for file in hub.files(str(folder))] == ["a.parquet", "b.jsonl"]


def test_hash_is_of_contents_in_order(folder):
    first, second = str(folder / "a.parquet"), str(folder / "b.jsonl")
    assert hub.data_hash([first, second]) == hub.data_hash([str(folder)]) != hub.data_hash([second, first])
    before = hub.data_hash([second])
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    assert hub.data_hash([str(folder / "c.jsonl")]) == before
    (folder / "c.jsonl").write_text('{"a": 3}\n')
    assert hub.data_hash([str(folder / "c.jsonl")]) != before


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.jsonl", '{"a": 1}\n{"a":\n', r"x\.jsonl:2 is not JSON"),
        ("x.jsonl", "[1]\n", r"x\.jsonl:1 is not a JSON object"),
        ("x.parquet", "nonsense, and long enough", r"x\.parquet is not a parquet file"),
        ("x.txt", "a", r"is neither a \.jsonl or \.parquet file"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=says):
        list(hub.rows(str(tmp_path / name)))


def test_missing_and_malformed_sources(tmp_path):
    for source in (str(tmp_path), str(tmp_path / "none.jsonl")):
        with pytest.raises(UsageError, match="is neither"):
            list(hub.rows(source))
    for source in ("hub:me/books", "hub:@1", "hub:me/books@1:", "hub:me/books@1:a:b"):
        with pytest.raises(UsageError, match="write hub:<id>@<revision>"):
            list(hub.rows(source))


class FakeHub(BaseHTTPRequestHandler):
    """The two calls a download takes: which files there are, and each file. Counts what it is asked."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def _answer(self, body):
        self.asked.append(self.path)
        _, _, name = self.path.partition(f"/resolve/{COMMIT}/")
        if self.path.startswith("/api/datasets/me/books/"):
            content, kind = json.dumps(self._about()).encode(), "application/json"
        elif name in self.files:
            content, kind = self.files[name], "application/octet-stream"
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if name else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _about(self):
        if "/tree/" in self.path:
            return [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
        return {"id": "me/books", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(folder):
    table = (folder / "a.parquet").read_bytes()
    FakeHub.files = {
        "README.md": CARD.encode(),
        "first/test-00000-of-00002.parquet": table,
        "first/test-00001-of-00002.parquet": table,
        "first/train-00000-of-00001.parquet": table,
        "second/a.jsonl": b'{"a": 5}\n',
        "second/b.jsonl": b'{"a": 6}\n',
    }
    FakeHub.asked = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.fixture
def ask(tmp_path):
    """Rows as a new process sees them: the hub's library reads its settings when it is imported."""

    def ask(source, endpoint, split="test", **settings):
        code = (
            "import sys, json, time; from kvbench import hub; from kvbench.errors import UsageError\n"
            "import huggingface_hub\nbegan = time.perf_counter()\n"
            "try: found = list(hub.rows(sys.argv[1], sys.argv[2]))\n"
            "except UsageError as error: found = str(error)\n"
            "print(json.dumps([found, time.perf_counter() - began]))"
        )
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", code, source, split]
        done = subprocess.run(command, env=kept | own | settings, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found, seconds = json.loads(done.stdout)
        return found, seconds, done.stderr

    return ask


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_downloaded_once_and_read_without_a_network(server, ask, tmp_path):
    source = f"hub:me/books@{COMMIT}:first"
    found, _, shown = ask(source, server)
    assert found == ROWS + ROWS
    assert "Fetching" in shown or "Download" in shown  # its progress bar
    assert [name for name in FakeHub.asked if name.endswith(".parquet")], FakeHub.asked
    assert not [name for name in FakeHub.asked if "train-" in name and "/resolve/" in name]
    FakeHub.asked.clear()
    assert ask(source, server)[0] == ROWS + ROWS
    assert FakeHub.asked == []
    assert ask(source, closed_port())[0] == ROWS + ROWS
    assert ask(source, server, HF_HUB_OFFLINE="1")[0] == ROWS + ROWS
    assert ask(f"hub:me/books@{COMMIT}:second", server)[0] == [{"a": 5}, {"a": 6}]
    # Another part of it: not there, and nobody to ask. Likewise one of two files.
    assert ask(source, closed_port(), split="train")[0].startswith(
        "me/books is not on this machine, and 127.0.0.1 can't"
    )
    (gone,) = tmp_path.glob("home/**/snapshots/*/first/test-00001-of-00002.parquet")
    gone.unlink()
    assert "is not on this machine" in ask(source, closed_port())[0]
    assert ask(source, server)[0] == ROWS + ROWS


def test_wrong_names_are_told(server, ask):
    assert ask(f"hub:me/books@{COMMIT}:third", server)[0] == "me/books has no configuration third; it has first, second"
    assert ask(f"hub:me/books@{COMMIT}:second", server, split="train")[0] == "me/books (second) has no split train"
    assert "has no data set me/none at revision" in ask(f"hub:me/none@{COMMIT}", server)[0]


def test_without_a_network_it_is_refused_at_once(ask):
    command = f"run `hf download me/books --repo-type dataset --revision {COMMIT}`, or name a local folder"
    found, seconds, _ = ask(f"hub:me/books@{COMMIT}", closed_port())
    assert found == f"me/books is not on this machine, and 127.0.0.1 can't be reached: {command} instead of hub:..."
    assert seconds < 3
    found, seconds, _ = ask(f"hub:me/books@{COMMIT}", closed_port(), HF_HUB_OFFLINE="1")
    assert found == f"me/books is not on this machine, and HF_HUB_OFFLINE is set: {command} instead of hub:..."
    assert seconds < 3


def test_reachable_gives_up_and_asks_the_proxy(monkeypatch):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        here = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr("urllib.request.getproxies", dict)
        assert hub.reachable(here)
        assert not hub.reachable(closed_port())
        monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": here})
        monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: False)
        assert hub.reachable("https://hub.invalid")
    monkeypatch.setattr("urllib.request.getproxies", dict)

    def silent(*_: object) -> None:
        time.sleep(30)
        raise TimeoutError  # in its thread, long after the test

    monkeypatch.setattr(socket, "create_connection", silent)
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    began = time.perf_counter()
    assert not hub.reachable("https://silent.invalid")
    assert time.perf_counter() - began < 2


def test_calibration_reads_the_column_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbench import corpora

    texts = [f"Text number {i}." for i in range(40)]
    monkeypatch.setattr(hub, "rows", lambda source, split: ({"text": t, "split": split} for t in texts))
    found = corpora.documents("hub:some/texts@1", "calibration")
    assert found == tuple(text for text in texts if corpora.calibration_part(text))
    monkeypatch.setattr(hub, "rows", lambda source, split: iter([{"body": "x"}]))
    with pytest.raises(UsageError, match="no column `text`"):
        corpora.documents("hub:other/texts@1", "calibration")
