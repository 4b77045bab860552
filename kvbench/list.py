"""What there is to choose from: `python -m kvbench.list [methods|tasks|models]`. Imports no plugin and no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

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


def options_of_preset(name: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """What a preset among `files` stands for: its plugin's `name` and the options that it sets."""
    found: Any = OmegaConf.to_container(OmegaConf.load(files[name]))
    base, *_ = found.pop("defaults", [""])
    return (options_of_preset(base, files) if base in files else {"name": base}) | found


def choices(kind: str) -> dict[str, Path]:
    """Name -> file of everything that `method=`, `task=` or `model=` accepts, sorted."""
    found = presets(kind) | (plugins.files(kind) if kind in plugins.KINDS else {})
    return dict(sorted(found.items()))


def describe(file: Path) -> str:
    """One line about a choice: a class's docstring, or the comment that a YAML file opens with."""
    if file.suffix == ".py":
        return plugins.about(file).summary
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


COLUMNS = ("family", "trust", "budget bounds", "last queries", "fitted", "holds")


def traits(file: Path) -> tuple[str, ...]:
    """What COLUMNS say of a method; a preset says it of no more than itself."""
    if file.suffix != ".py":
        return ("preset", "", "", "", "", "")
    found = plugins.about(file)
    aware = "seen" if found.traits.get("query_aware") == "True" else ""
    fitted = "per model" if found.fitted else ""
    family, trust = found.traits.get("family", ""), found.traits.get("trust", "")
    return (family, trust, axis(file), aware, fitted, found.traits.get("holds", "exact tokens"))


def axis(file: Path) -> str:
    """What bytes a method's budget bounds, in a word."""
    return plugins.about(file).traits.get("axis", "HELD").lower()


def methods() -> str:
    """Every method: its traits, and below them what it does."""
    found = {name: traits(file) for name, file in choices("methods").items()}
    rows = {"methods (method=)": COLUMNS} | found
    widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    first = max(map(len, rows))
    lines = []
    for name, cells in rows.items():
        padded = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{name:<{first}}  {padded}".rstrip())
        if name in found:
            lines.append(f"    {describe(choices('methods')[name])}")
    return "\n".join(lines)


def page() -> str:
    """docs/methods.md, from the methods' docstrings."""
    files = plugins.files("methods")
    table = ["| method | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    table += [f"| [`{name}`](#{name}) | " + " | ".join(traits(file)) + " |" for name, file in files.items()]
    sections = [f"## {name}\n\n{plugins.about(file).doc}" for name, file in files.items()]
    return "\n".join([PAGE, *table, "", "\n\n".join(sections), ""])


PAGE = """# Methods

Made by `python -m kvbench.list --page > docs/methods.md` from the docstrings in `methods/`; a test checks it.

*Trust*: `published`, a published figure was re-made; `parity`, the kept sets equal those of an independent reference on
the same keys, queries and values; `paper`, written from the paper's formulas; `reconstructed`, details were inferred.
*Budget bounds*: the bytes `held` on the device (everything), on the `device` (the rest is in the host's memory), or
`read` per decoding step (all is held, and more). *Last queries*: the method looks at the context's last queries, so at
the question under `protocol=aware`. *Fitted*: something is calibrated once per model, offline, on text that no task
uses. *Holds*: what a compressed context is made of.
Options are the fields of the class: `python -m kvbench.run method=<name> --cfg job` shows them with their defaults.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvbench.list", description="What there is to choose from.")
    parser.add_argument("kind", nargs="?", choices=KINDS, help="default: all three")
    parser.add_argument("--page", action="store_true", help="the methods as a page of documentation")
    arguments = parser.parse_args(argv)
    try:
        if arguments.page:
            print(page(), end="")
        elif arguments.kind == "methods":
            print(methods())
        elif arguments.kind:
            print(listing((arguments.kind,)))
        else:
            print("\n\n".join([methods(), listing(("tasks", "models"))]))
    except UsageError as error:
        print(f"kvbench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
