"""The commands of ARTIFACT.md exist: scripts, targets, tests, options that parse. CITATION.cff, the container file."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import kvbench
from kvbench import experiment
from kvbench.config import convert
from kvbench.report.published import load
from kvbench.run import main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "ARTIFACT.md").read_text()
ROWS = [re.split(r"\s*\|\s*", line.strip().strip("|").strip()) for line in TEXT.splitlines() if line.startswith("| ")]
COMMANDS = [row[1].strip("`") for row in ROWS if row[1].startswith("`")]


def options_of(script: Path) -> set[str]:
    """The options that a script declares with argparse, read without running it."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    added = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    return {word.value for call in added for word in call.args if isinstance(word, ast.Constant)}


def test_a_claim_has_a_command_minutes_and_a_tolerance():
    assert len(COMMANDS) > 15
    for row in ROWS:
        assert len(row) == 4, row
        assert all(row), row


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_targets_are_there(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [command for command in COMMANDS if re.match(r"python \w+/", command)])
def test_scripts_have_the_options(command):
    _, script, *words = shlex.split(command)
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= options_of(ROOT / script)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python -m kvbench.run ")])
def test_runs_compose(command):
    jobs: list[str] = []

    def collect(configs, tell):
        jobs.extend(convert(config).cell.label for config in configs)

    assert main(shlex.split(command)[3:], collect) == 0
    assert jobs


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python -m pytest ")])
def test_tests_are_there(command):
    words = shlex.split(command)[3:]
    files = [ROOT / word for word in words if word.endswith(".py")]
    names = [
        node.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    chosen = words[words.index("-k") + 1] if "-k" in words else "test"
    assert any(chosen in name for name in names)
    assert words == [str(file.relative_to(ROOT)) for file in files] + (["-k", chosen] if "-k" in words else [])


@pytest.mark.parametrize("command", [command for command in COMMANDS if "kvbench.experiment " in command])
def test_studies_are_there(command, capsys):
    words = [word for word in shlex.split(command)[3:] if word not in ("--jobs", "2")]
    assert experiment.main([*words, "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_every_command_is_checked():
    kinds = (r"make \w", r"python \w+/\w+\.py", r"python -m kvbench\.(run|experiment) ", r"python -m pytest tests/")
    assert all(any(re.match(kind, command) for kind in kinds) for command in COMMANDS)


def test_minutes_of_published_checks_are_those_of_their_files():
    checks = load().values()
    for tier in ("quick", "full"):
        minutes = sum(check.tiers[tier].gpu_minutes for check in checks if tier in check.tiers)
        assert f"| `make check-published TIER={tier}` | {minutes} GPU minutes, estimated |" in TEXT


def test_the_citation_is_of_this_version():
    cited = OmegaConf.load(ROOT / "CITATION.cff")
    assert cited.version == kvbench.__version__
    assert cited.license == "Apache-2.0"
    assert [author.name for author in cited.authors] == ["The kvbench developers"]


def test_the_container_is_made_of_what_is_there():
    """Its steps are shell, its files exist, and it takes the locked versions. It is not built here."""
    text = (ROOT / "Containerfile").read_text()
    steps = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)$", text, re.M)
    assert {step for step, _ in steps} == {"FROM", "RUN", "WORKDIR", "ENV", "COPY", "ARG", "VOLUME", "CMD"}
    for step, words in steps:
        if step == "RUN":
            subprocess.run(["sh", "-n", "-c", words.replace("\\\n", " ")], check=True)
        elif step == "COPY":
            assert all((ROOT / word).exists() for word in words.split()[:-1])
    assert "ARG TORCH=cpu" in text
    assert "\ntorch==" in (ROOT / "constraints.txt").read_text()
    target = (ROOT / "Makefile").read_text()
    assert re.search(r"RUN make (\S+)", text)[1] in target
    assert ".venv" in (ROOT / ".dockerignore").read_text().split()
