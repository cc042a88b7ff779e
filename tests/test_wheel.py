"""The wheel contains every module, and the shipped prompt sets and traits."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement

TOP = Path(__file__).parents[1]


def test_the_wheel_contains_the_datasets_and_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building creates folders next to the source
    for name in ("tlcapture", "datasets"):
        shutil.copytree(TOP / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    shipped = set(archive.namelist())
    data = {f"tlcapture/{path.relative_to(source)}" for path in (source / "datasets").rglob("*") if path.is_file()}
    modules = {str(path.relative_to(source)) for path in (source / "tlcapture").rglob("*.py")}
    assert len(data) > 40
    assert data | modules | {"tlcapture/py.typed"} <= shipped
    (metadata,) = (name for name in shipped if name.endswith(".dist-info/METADATA"))
    needed = HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    _check_transformers(needed)


def test_the_newest_versions_of_transformers_are_allowed() -> None:
    config = configparser.ConfigParser()
    config.read(TOP / "setup.cfg")
    _check_transformers(config["options"]["install_requires"].split())


def _check_transformers(lines: list[str]) -> None:
    """5.24 renamed the cache, which `engines/newer_transformers` translates; before 5.17 nothing was tried."""
    (transformers,) = (each for each in map(Requirement, lines) if each.name == "transformers")
    allowed = list(transformers.specifier.filter(["5.9.0", "5.16.0", "5.17.0", "5.23.0", "5.24.0", "5.24.1"]))
    assert allowed == ["5.17.0", "5.23.0", "5.24.0", "5.24.1"]
