"""What there is to choose from: `python -m kvbench.list [methods|tasks|models]`. Imports no plugin and no torch."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import kvbench
from kvbench import plugins
from kvbench.errors import UsageError

KINDS = ("methods", "tasks", "models")


def conf_folder() -> Path:
    """conf/ of the checkout, or inside the installed package."""
    return next(folder for base in kvbench.__path__ if (folder := Path(base) / "conf").joinpath("config.yaml").exists())


def user_conf_folder() -> Path | None:
    """conf/ in $KVBENCH_PLUGINS: a user's own models and presets."""
    folder = Path(os.environ.get("KVBENCH_PLUGINS") or ".") / "conf"
    return folder if "KVBENCH_PLUGINS" in os.environ and folder.is_dir() else None


def presets(kind: str) -> dict[str, Path]:
    """Name -> YAML file: every model, and the named variants of methods and tasks."""
    found = {}
    for folder in filter(None, (conf_folder(), user_conf_folder())):
        found.update({file.stem: file for file in folder.joinpath(kind.removesuffix("s")).glob("*.yaml")})
    return found


def choices(kind: str) -> dict[str, Path]:
    """Name -> file of everything that `method=`, `task=` or `model=` accepts, sorted."""
    found = presets(kind) | (plugins.files(kind) if kind in plugins.KINDS else {})
    return dict(sorted(found.items()))


def describe(file: Path) -> str:
    """One line about a choice: a class's docstring, or the comment that a YAML file opens with."""
    if file.suffix == ".py":
        return plugins.summary(file)
    lines = file.read_text().splitlines() or [""]
    return lines[0].removeprefix("#").strip() if lines[0].startswith("#") else ""


def listing(kinds: tuple[str, ...] = KINDS) -> str:
    """A block per kind: a title, then one line each, the name first."""
    blocks = []
    for kind in kinds:
        found = choices(kind)
        width = max(map(len, found), default=0)
        lines = [f"{name:<{width}}  {describe(file)}".rstrip() for name, file in found.items()]
        blocks.append("\n".join([f"{kind} ({kind.removesuffix('s')}=):", *lines]))
    return "\n\n".join(blocks)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvbench.list", description="What there is to choose from.")
    parser.add_argument("kind", nargs="?", choices=KINDS, help="default: all three")
    kind = parser.parse_args(argv).kind
    try:
        print(listing((kind,) if kind else KINDS))
    except UsageError as error:
        print(f"kvbench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
