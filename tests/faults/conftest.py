"""A root for runs that are interrupted, the files of an uninterrupted run, and small disks."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.cli.conftest import make_prompt_set, make_trait
from tests.conftest import quick_evaluations, unrendered_figures
from tests.faults.commands import Command, contents
from tlcapture.cli.main import main
from tlcapture.runs.display import Display
from tlcapture.runs.model_loader import ModelLoader

TEXTS = ["hello there", "tell me more of it"]
ADD_ONS = ("--attention", "--logit-lens", "--layer-internals", "1")
Start = Callable[..., Command]


@pytest.fixture(scope="package", autouse=True)
def _quick_evaluations() -> Iterator[None]:
    with quick_evaluations(), unrendered_figures():
        yield


def run_here(*words: object) -> None:
    """Run a command in this process: what it computes once per process, forks need not compute again."""
    done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A root with a prompt set, two traits and their vectors, and no captures."""
    ModelLoader(str(tiny_folder), Display())()  # so that a fork has everything imported, and the model
    root = tmp_path_factory.mktemp("template")
    make_prompt_set(root, "short", TEXTS)
    make_trait(root, "tone/loud", "LOUD", "soft")
    make_trait(root, "tone/warm", "warm", "cold")
    traits = ("--traits", "tone/loud,tone/warm")
    run_here("extract", "--root", root, "--experiment", "exp", "--model", tiny_folder, *traits)
    return root


@pytest.fixture(scope="session")
def uninterrupted(template: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The files of a capture that is not interrupted."""
    root = tmp_path_factory.mktemp("uninterrupted") / "root"
    shutil.copytree(template, root)
    run_here(*capture_words(root, tiny_folder))
    return contents(root / "experiments" / "exp")


def capture_words(root: Path, model: Path) -> tuple[object, ...]:
    return (
        "capture", "--root", root, "--experiment", "exp", "--model", model, "--prompt-set", "short",
        "--max-new-tokens", 6, *ADD_ONS,
    )  # fmt: skip


@pytest.fixture
def fresh(template: Path, tmp_path: Path) -> Path:
    """A copy of the template."""
    return Path(shutil.copytree(template, tmp_path / "root"))


@pytest.fixture
def start(fresh: Path, tiny_folder: Path, tmp_path: Path) -> Start:
    """Starts the capture of `uninterrupted` in `fresh`, or in another root."""

    def start(*words: object, root: Path = fresh, before: Callable[[], object] = lambda: None) -> Command:
        return Command(tmp_path / "output", *capture_words(root, tiny_folder), *words, before=before)

    return start


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts disks of the given number of KB."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)
