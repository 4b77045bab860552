"""The wheel: one package, plugins and configuration inside, that works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (path,) = folder.glob("*.whl")
    return path


def files_under(folder: str, pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "kvbench",
        "hydra_plugins",  # where Hydra looks for launchers: a namespace that packages share
        f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info",
    }
    assert names >= files_under("kvbench", "*.py") | {"kvbench/embedded-requirements.txt"}
    plugins = files_under("methods", "*.py") | files_under("tasks", "*.py") | files_under("conf", "*.yaml")
    assert names >= {f"kvbench/{name}" for name in plugins}
    assert any(name.startswith("kvbench/conf/") for name in names)


def test_the_installed_package_lists_its_plugins_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(target),
            str(wheel),
        ],
        check=True,
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    where = "import kvbench, kvbench.methods, kvbench.tasks as t; print(kvbench.__file__, t.__file__, sep='\\n')"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=elsewhere, env=environment, check=True, capture_output=True, text=True
    )
    assert all(Path(file).is_relative_to(target) for file in found.stdout.split())

    listed = subprocess.run(
        [sys.executable, "-m", "kvbench.list"], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    assert "snapkv" in listed.stdout
