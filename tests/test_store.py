"""A cell's folder survives kills, full disks and second processes, and never mixes what doesn't belong together."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvbench import cell as cells_module
from kvbench import provenance, store
from kvbench.budget import Budget
from kvbench.cell import Cell, ModelConfig, Settings
from kvbench.errors import UsageError
from kvbench.store import CellStore, cells, is_done, read_cell

ABOUT = {"weights_hash": "ab12", "parameters": 134_515_008}


@dataclass(frozen=True)
class FakeMethod:
    window: int = 64
    budgeted: ClassVar[bool] = True


@dataclass(frozen=True)
class FakeTask:
    tokens: int = 1024


def a_cell(window: int = 64, name: str = "tiny") -> Cell:
    model = ModelConfig(name=name, path="nowhere")
    return Cell(model=model, method=FakeMethod(window), budget=Budget(Fraction(1, 10), ""), task=FakeTask())


def record(index: int) -> dict[str, Any]:
    return {"id": f"e{index}", "score": index % 2, "answer": "ключ " * (index % 40), "answer_nll": 1.5}


def write(results: Path, indices: range, limit: int | None = None, exhausted: bool = False) -> Path:
    with CellStore.open(a_cell(), results, ABOUT, limit) as opened:
        for index in indices:
            if f"e{index}" not in opened.done:
                opened.append(record(index))
        opened.finish(exhausted)
    return opened.folder


def child(code: str, results: Path) -> subprocess.Popen[str]:
    """Another process with this module at hand; `results` is its argument."""
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]; from test_store import *\n{code}"
    command = [sys.executable, "-c", code, str(results)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def append_for_ever(results: Path) -> None:
    """Until it is killed, or a failed test has left it alone for long."""
    signal.alarm(30)
    with CellStore.open(a_cell(), results, ABOUT, None) as opened:
        print("open", flush=True)
        for index in itertools.count(len(opened.done)):
            opened.append(record(index))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = write(tmp_path, range(5), limit=5)
    header, records = read_cell(folder)
    assert records == [record(i) for i in range(5)]
    assert header["status"] == "done"
    assert header["examples"] == 5
    assert header["identity"] == a_cell().identity()
    assert header["about"] == ABOUT
    (segment,) = header["segments"]
    assert segment["first_example"] == "e0"
    assert segment["limit"] == 5
    assert segment["versions"]["transformers"]
    assert list(cells(tmp_path)) == [folder]


def test_numbers_json_has_no_word_for_become_null(tmp_path: Path) -> None:
    with CellStore.open(a_cell(), tmp_path, ABOUT, None) as opened:
        opened.append({"id": "a", "kl_full": math.nan, "tiers": {"exact": [math.inf, 1.0]}})
    expected = {"id": "a", "kl_full": None, "tiers": {"exact": [None, 1.0]}}
    assert opened.done == {expected["id"]}
    assert read_cell(opened.folder)[1] == [expected]


def test_an_example_is_recorded_once(tmp_path: Path) -> None:
    with CellStore.open(a_cell(), tmp_path, ABOUT, None) as opened:
        opened.append(record(0))
        with pytest.raises(ValueError, match="already has example e0"):
            opened.append(record(0))


def test_a_torn_last_line_is_cut_off_wherever_it_tore(tmp_path: Path) -> None:
    examples = write(tmp_path, range(3)) / store.EXAMPLES
    whole = examples.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole), 5):
        examples.write_bytes(whole[:end])
        assert len(read_cell(examples.parent)[1]) == 2
        assert examples.stat().st_size == end  # reading changed nothing
        write(tmp_path, range(3))
        assert examples.read_bytes() == whole
    examples.write_bytes(whole[:-20] + b"\0" * 19 + b"\n")  # what a power cut leaves
    write(tmp_path, range(3))
    assert examples.read_bytes() == whole


def test_a_broken_line_elsewhere_is_refused_by_name(tmp_path: Path) -> None:
    examples = write(tmp_path, range(3)) / store.EXAMPLES
    lines = examples.read_text().splitlines(keepends=True)
    examples.write_text(lines[0] + lines[1][:9] + "\n" + lines[2])
    for attempt in (lambda: write(tmp_path, range(3)), lambda: read_cell(examples.parent)):
        with pytest.raises(UsageError, match=r"examples\.jsonl, line 2,"):
            attempt()


def test_a_killed_process_leaves_a_cell_that_continues(tmp_path: Path) -> None:
    rng, kills = random.Random(0), 10
    folder = a_cell().folder(tmp_path)
    for kill in range(kills):
        process = child("append_for_ever(Path(sys.argv[1]))", tmp_path)
        if kill % 3:  # the others die at any moment of `open`, too
            assert process.stdout
            assert process.stdout.readline() == "open\n"
            time.sleep(rng.uniform(0, 0.05))
        else:
            deadline = time.monotonic() + 20
            while not (folder / ".lock").exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        if (folder / store.HEADER).exists():
            header, records = read_cell(folder)
            assert header["status"] == "running"
            assert records == [record(i) for i in range(len(records))]
    assert len(records) > kills
    write(tmp_path, range(len(records) + 5))
    header, final = read_cell(folder)
    assert final == [record(i) for i in range(len(records) + 5)]
    assert header["status"] == "done"
    firsts = [segment["first_example"] for segment in header["segments"]]
    begun = [int(first[1:]) for first in firsts if first]
    assert begun[0] == 0
    assert begun == sorted(begun)
    assert begun[-1] == len(records)


def test_an_exception_leaves_the_cell_running_and_unlocked(tmp_path: Path) -> None:
    def interrupted() -> None:
        with CellStore.open(a_cell(), tmp_path, ABOUT, None) as opened:
            opened.append(record(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_cell(a_cell().folder(tmp_path))[0]["status"] == "running"
    assert not is_done(a_cell(), Settings(tmp_path, 1))
    assert len(read_cell(write(tmp_path, range(2)))[0]["segments"]) == 2


def test_a_failed_cell_says_why_and_continues(tmp_path: Path) -> None:
    with CellStore.open(a_cell(), tmp_path, ABOUT, None) as opened:
        opened.append(record(0))
        opened.fail("out of memory")
    header, _ = read_cell(opened.folder)
    assert (header["status"], header["reason"], header["examples"]) == ("failed", "out of memory", 1)
    header, records = read_cell(write(tmp_path, range(2)))
    assert "reason" not in header
    assert records == [record(0), record(1)]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    process = child("append_for_ever(Path(sys.argv[1]))", tmp_path)
    assert process.stdout
    assert process.stdout.readline() == "open\n"
    with pytest.raises(UsageError, match="another process is writing"):
        CellStore.open(a_cell(), tmp_path, ABOUT, None)
    CellStore.open(a_cell(window=1), tmp_path, ABOUT, None).__exit__(None, None, None)  # another cell is free
    process.kill()
    process.communicate()
    with CellStore.open(a_cell(), tmp_path, ABOUT, None) as opened:  # the lock died with its owner
        assert opened.done
        with pytest.raises(UsageError, match="another process"):
            CellStore.open(a_cell(), tmp_path, ABOUT, None)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, range(1)) / store.HEADER
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    before = path.read_bytes()
    for attempt in (
        lambda: CellStore.open(a_cell(), tmp_path, ABOUT, None),
        lambda: read_cell(path.parent),
        lambda: is_done(a_cell(), Settings(tmp_path, 1)),
    ):
        with pytest.raises(UsageError, match=r"^.*has format 7, .*format 2; use another results= folder$") as caught:
            attempt()
        assert str(path.parent) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_broken_header_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, range(1)) / store.HEADER
    path.write_text(text)
    with pytest.raises(UsageError, match=r"header\.json is not the header"):
        CellStore.open(a_cell(), tmp_path, ABOUT, None)


def test_examples_of_an_unknown_origin_are_refused(tmp_path: Path) -> None:
    (write(tmp_path, range(1)) / store.HEADER).unlink()
    with pytest.raises(UsageError, match=r"no header\.json; redo=true"):
        CellStore.open(a_cell(), tmp_path, ABOUT, None)


def test_other_weights_never_continue_a_cell(tmp_path: Path) -> None:
    folder = write(tmp_path, range(1))
    with pytest.raises(UsageError, match=r"another weights_hash \(ab12, now cd34\); redo=true"):
        CellStore.open(a_cell(), tmp_path, ABOUT | {"weights_hash": "cd34"}, None)
    with pytest.raises(UsageError, match="another data_hash"):
        CellStore.open(a_cell(), tmp_path, ABOUT | {"data_hash": "x"}, None)
    with CellStore.open(a_cell(), tmp_path, ABOUT | {"hardware": {"gpus": ["H200"]}}, None):
        pass  # another machine does
    header, _ = read_cell(folder)
    assert header["about"] == ABOUT
    assert header["segments"][1]["hardware"]["gpus"] == ["H200"]
    assert header["segments"][1]["hardware"]["cores"] >= 1


def test_redo_starts_over(tmp_path: Path) -> None:
    folder = write(tmp_path, range(3))
    (folder / store.HEADER).write_text("broken")
    with CellStore.open(a_cell(), tmp_path, {"weights_hash": "new"}, None, redo=True) as opened:
        assert not opened.done
        assert opened.done == set()
        opened.append(record(9))
    header, records = read_cell(folder)
    assert records == [record(9)]
    assert len(header["segments"]) == 1
    assert header["about"] == {"weights_hash": "new"}


def test_done_means_nothing_left_to_do(tmp_path: Path) -> None:
    assert not is_done(a_cell(), Settings(tmp_path, 0))
    folder = write(tmp_path, range(3), limit=3)
    assert [is_done(a_cell(), Settings(tmp_path, limit)) for limit in (2, 3, 4, None)] == [True, True, False, False]
    write(tmp_path, range(3), exhausted=True)
    assert [is_done(a_cell(), Settings(tmp_path, limit)) for limit in (2, 3, 4, None)] == [True, True, True, True]
    (folder / store.EXAMPLES).unlink()  # `redo` killed at the worst moment
    assert not is_done(a_cell(), Settings(tmp_path, None))


def test_a_larger_limit_continues(tmp_path: Path) -> None:
    write(tmp_path, range(3), limit=3)
    header, records = read_cell(write(tmp_path, range(5), limit=5))
    assert records == [record(i) for i in range(5)]
    assert [segment["first_example"] for segment in header["segments"]] == ["e0", "e3"]


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def nearly_full(file: int, data: bytes) -> int:
        if len(data) > 30:
            return real(file, data[:30])
        raise OSError(28, "No space left on device")

    with CellStore.open(a_cell(), tmp_path, ABOUT, None) as opened:
        opened.append(record(0))
        before = (opened.folder / store.EXAMPLES).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", nearly_full)
            with pytest.raises(UsageError, match=r"examples\.jsonl: No space left on device; the same command cont"):
                opened.append(record(1))
            assert (opened.folder / store.EXAMPLES).read_bytes() == before
            with pytest.raises(UsageError, match=r"header\.json: No space left"):
                opened.finish(exhausted=True)
        assert read_cell(opened.folder)[0]["status"] == "running"
        assert opened.done == {"e0"}
    write(tmp_path, range(2))
    assert read_cell(opened.folder)[1] == [record(0), record(1)]


def test_a_results_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"could not write .*: Not a directory"):
        CellStore.open(a_cell(), tmp_path / "file", ABOUT, None)


@pytest.mark.parametrize("name", ["..", "../../x", "/etc", "a/b", "", ".", "...", "~", "a\0b", "a\nb", "мир", "CON "])
def test_no_name_leads_out_of_the_results_folder(tmp_path: Path, name: str) -> None:
    slug = cells_module.slug(name)
    assert slug not in ("", ".", "..")
    assert not set(slug) & set("/\\\0\n ")
    folder = a_cell(name=name).folder(tmp_path)
    assert folder.resolve().relative_to(tmp_path.resolve()).parts == folder.relative_to(tmp_path).parts
    assert len(folder.relative_to(tmp_path).parts) == 3


def test_provenance_knows_a_checkout_from_a_folder_in_one(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    unknown = {"commit": None, "dirty": None}
    assert provenance.checkout(tmp_path) == unknown
    git("init", "-q")
    assert provenance.checkout(tmp_path) == unknown  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    assert provenance.checkout(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "method.py").write_text("")  # a new method is not in the commit
    assert provenance.checkout(tmp_path)["dirty"] is True
    (tmp_path / "site-packages").mkdir()
    assert provenance.checkout(tmp_path / "site-packages") == unknown
    assert provenance.checkout(tmp_path / "nowhere") == unknown


def test_provenance_is_complete_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = provenance._segment.__wrapped__()
    assert found["commit"] is None
    assert found["versions"]["kvbench"]
    assert found["hardware"]["memory_bytes"] > 2**20
    json.dumps(found, allow_nan=False)
