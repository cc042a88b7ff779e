"""The wheel contains every module, and the shipped prompt sets and traits."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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
