"""Rows of a data set: from local files, or from the Hugging Face hub at a pinned revision, downloaded once.

A source is a .jsonl or .parquet file, a folder of them, or `hub:<id>@<revision>[:<configuration>]`. The hub's files are
read from its own cache, not through `datasets`, whose second cache does not see what `hf download` brought.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import socket
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from kvbench.errors import UsageError
from kvbench.fetch import file_hash

PATIENCE = 2.5  # seconds until the hub counts as out of reach: the library itself tries for 23
_SUFFIXES = (".jsonl", ".parquet")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")


def rows(source: str, split: str = "test") -> Iterator[dict[str, Any]]:
    """The rows of a source in file order. Of a local source `split` is not asked: it is all test, or all train."""
    for file in files(source, split):
        yield from _parquet(file) if file.suffix == ".parquet" else _jsonl(file)


def data_hash(sources: Iterable[str], split: str = "test") -> str:
    """SHA-256 over the contents of the sources' files: the same for a local copy of what the hub has."""
    hashes = [file_hash(file) for source in sources for file in files(source, split)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def files(source: str, split: str = "test") -> list[Path]:
    """The files of a source, sorted; downloads what is missing. Raises UsageError that says how to get the data."""
    if source.startswith("hub:"):
        return _HubSource.parse(source).files(split)
    place = Path(source).expanduser()
    found = [file for suffix in _SUFFIXES for file in place.rglob(f"*{suffix}")] if place.is_dir() else [place]
    if not found or found[0].suffix not in _SUFFIXES or not found[0].is_file():
        raise UsageError(
            f"{source} is neither a .jsonl or .parquet file, nor a folder of them, nor hub:<id>@<revision>[:<config>]"
        )
    return sorted(found)


def _jsonl(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UsageError(f"{file}:{number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise UsageError(f"{file}:{number} is not a JSON object")
                yield row


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowInvalid, parquet  # takes a second

    try:
        table = parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise UsageError(f"{file} is not a parquet file: {error}") from error
    for batch in table.iter_batches(batch_size=64):
        yield from batch.to_pylist()


@dataclass(frozen=True)
class _HubSource:
    id: str
    revision: str
    configuration: str

    @classmethod
    def parse(cls, source: str) -> _HubSource:
        match = re.fullmatch(r"hub:([^@:\s]+)@([^@:\s]+)(?::([^@:\s]+))?", source)
        if not match:
            raise UsageError(f"{source}: write hub:<id>@<revision>, and :<configuration> where there are several")
        return cls(*match.groups(default=""))

    def files(self, split: str) -> list[Path]:
        """From the cache where it has them all: a revision's files do not change, so no network is asked."""
        with suppress(UsageError):
            if found := self._find(split, cached=True):
                return found
        if found := self._find(split, cached=False):
            return found
        what = f"{self.configuration or 'data'} ({split})"
        raise UsageError(f"{self.id}@{self.revision} has not all .parquet or .jsonl files of {what}: {self._advice}")

    def _find(self, split: str, cached: bool) -> list[Path]:
        """The files, sorted; none if one is missing."""
        patterns = self._patterns(self._snapshot(["README.md"], cached) / "README.md", split)
        folder = self._snapshot(patterns, cached)
        names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix in _SUFFIXES)
        found = sorted(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
        shards = [int(match[1]) for name in found if (match := _SHARD.search(name))]
        whole = not shards or len(shards) == shards[0]  # not so after a download that was interrupted
        return [folder / name for name in found] if whole else []

    def _patterns(self, readme: Path, split: str) -> list[str]:
        """Where the data set's card says the files of this configuration and split are; else where they usually are."""
        from huggingface_hub.repocard import metadata_load

        card = (metadata_load(readme) if readme.exists() else None) or {}
        configurations = {str(entry["config_name"]): entry for entry in card.get("configs", [])}
        if not configurations:
            return [f"*{self.configuration}*{split}*", f"{split}*"] if self.configuration else [f"*{split}*"]
        name = self.configuration or "default"
        if name not in configurations:
            raise UsageError(f"{self.id} has no configuration {name}; it has {', '.join(configurations)}")
        places = configurations[name].get("data_files", [])
        if isinstance(places, str):  # one file for everything
            return [places]
        found = [entry["path"] for entry in places if entry.get("split") == split]
        if not found:
            raise UsageError(f"{self.id} ({name}) has no split {split}")
        return [path for entry in found for path in ([entry] if isinstance(entry, str) else entry)]

    def _snapshot(self, patterns: list[str], cached: bool) -> Path:
        """The folder in the hub's cache; unless `cached`, the files that fit the patterns are downloaded first."""
        import huggingface_hub as hub
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        host = urlsplit(hub.constants.ENDPOINT).hostname
        if not cached and hub.constants.HF_HUB_OFFLINE:
            raise UsageError(f"{self.id} is not on this machine, and HF_HUB_OFFLINE is set: {self._advice}")
        if not cached and not reachable(hub.constants.ENDPOINT):
            raise UsageError(f"{self.id} is not on this machine, and {host} can't be reached: {self._advice}")
        quiet = are_progress_bars_disabled()  # as a model is loaded; data sets can take minutes
        if quiet:
            enable_progress_bars()
        try:
            folder = hub.snapshot_download(
                self.id, repo_type="dataset", revision=self.revision, allow_patterns=patterns, local_files_only=cached
            )
        except GatedRepoError as error:
            raise UsageError(f"{self.id} wants its terms accepted on {host} and a token: `hf auth login`") from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise UsageError(f"{host} has no data set {self.id} at revision {self.revision}") from error
        except (OSError, ValueError) as error:  # the library's own errors are OSErrors
            raise UsageError(f"{self.id} was not downloaded: {self._advice}") from error
        finally:
            if quiet:
                disable_progress_bars()
        return Path(folder)

    @property
    def _advice(self) -> str:
        command = f"hf download {self.id} --repo-type dataset --revision {self.revision}"
        return f"run `{command}`, or name a local folder instead of hub:..."


def reachable(url: str) -> bool:
    """Does a TCP connection to the host of `url`, or to its proxy, open within `PATIENCE` seconds?"""
    place = urlsplit(url)
    proxy = urllib.request.getproxies().get(place.scheme)
    if proxy and place.hostname and not urllib.request.proxy_bypass(place.hostname):
        place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = place.port or {"http": 80}.get(place.scheme, 443)
    opened: list[bool] = []

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((place.hostname or "", port), PATIENCE).close()
            opened.append(True)

    thread = Thread(target=connect, daemon=True)  # a name server that is silent blocks for longer than any time-out
    thread.start()
    thread.join(PATIENCE)
    return bool(opened)
