"""A file in methods/ or tasks/ is a plugin: its name is the name on the command line, its dataclass the options.

User plugins: set `KVBENCH_PLUGINS` to a folder that has its own `methods/` or `tasks/`.
"""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import UsageError

KINDS = ("methods", "tasks")


def _package(kind: str) -> Any:
    package = importlib.import_module(f"kvbench.{kind}")
    if extra := os.environ.get("KVBENCH_PLUGINS"):
        folder = str(Path(extra) / kind)
        if folder not in package.__path__:
            package.__path__.append(folder)
    return package


def files(kind: str) -> dict[str, Path]:
    """Plugin name -> file, sorted; reads folders only, imports no plugin."""
    found: dict[str, Path] = {}
    for folder in _package(kind).__path__:
        for file in sorted(Path(folder).glob("[a-z]*.py")):
            if file.stem in found:
                raise UsageError(f"two plugins are called {file.stem}: {found[file.stem]} and {file}")
            found[file.stem] = file
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class About:
    """What a plugin's file says of it, read without importing it."""

    doc: str  # the class's docstring
    traits: Mapping[str, str]  # class attributes, enums by their name; what the class leaves to its base is absent
    fitted: bool  # has something to calibrate

    @property
    def summary(self) -> str:
        return self.doc.partition("\n")[0]


def about(file: Path) -> About:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and {"Method", "Delegate", "Wrapper", "Task"} & {
            ast.unparse(base) for base in node.bases
        }:
            traits = {
                ast.unparse(line.target): str(ast.literal_eval(line.value))
                if isinstance(line.value, ast.Constant)
                else ast.unparse(line.value).rpartition(".")[2]
                for line in node.body
                if isinstance(line, ast.AnnAssign)
                and line.value
                and ast.unparse(line.annotation).startswith("ClassVar")
            }
            functions = {line.name for line in node.body if isinstance(line, ast.FunctionDef)}
            return About(ast.get_docstring(node) or "", traits, "calibrations" in functions)
    return About("", {}, False)


def known(what: str, name: str, names: Iterable[str]) -> str:
    """`name` if it is one of `names`; otherwise a UsageError that lists them."""
    names = list(names)
    if name not in names:
        raise UsageError(f"unknown {what} '{name}'; known: {', '.join(names)}")
    return name


def load(kind: str, name: str) -> type:
    """The one plugin class that a file defines. A file that defines none, or two, is an error."""
    known(kind.removesuffix("s"), name, files(kind))
    _package(kind)
    module = importlib.import_module(f"kvbench.{kind}.{name}")
    base = {"methods": "kvbench.method:Method", "tasks": "kvbench.task:Task"}[kind]
    where, _, what = base.partition(":")
    parent = getattr(importlib.import_module(where), what)
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, parent) and c.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise UsageError(f"{module.__file__} must define one {what}, it defines {len(classes)}")
    return classes[0]


def name_of(plugin: object) -> str:
    """The command-line name of a plugin instance: its file's name."""
    return type(plugin).__module__.rpartition(".")[2]


def build_method(name: str, **options: Any) -> Any:
    """The method called `name`, its options checked as on the command line: how a wrapper makes its base."""
    from kvbench.config import build_plugin  # which needs this module

    return build_plugin("methods", name, options)
