"""Full and read-only disks and quotas: no incomplete files, an error of one line, and the run can be resumed."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.evidence import Evidence
from tests.faults.commands import Ended, contents
from tests.faults.conftest import Start

Disk = Callable[[int], Path]
LITTLE_SPACE = (
    r"about [\d.]+ KiB would be written if responses have 6 tokens \(--max-new-tokens\), [\d.]+ KiB are free on its "
    r"device \(--dry-run shows the sum\)"
)


def refused(ended: Ended, message: str) -> None:
    assert ended.code == 1, ended
    assert "Traceback" not in ended.stderr
    assert re.search(message, ended.stderr), ended.stderr


def fill_at_first_capture(disk: Path) -> None:
    """Another program takes all free space when the run is about to write its first file."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith(".unfinished") and not (disk / "hog").exists():
            (disk / "hog").touch()
            with open(disk / "hog", "wb", buffering=0) as hog:
                try:
                    while True:
                        hog.write(bytes(4096))
                except OSError:
                    pass
            with open(disk / "hog", "r+b") as hog:
                hog.truncate((disk / "hog").stat().st_size - 3 * 4096)  # enough to start a file, but not to finish it

    sys.addaudithook(hook)


def test_a_disk_that_fills_up_ends_the_run_which_can_be_resumed(
    start: Start, fresh: Path, small_disk: Disk, uninterrupted: dict[str, Any], evidence: Evidence
) -> None:
    disk = small_disk(3000)
    root = Path(shutil.copytree(fresh, disk / "root"))
    full = start(root=root, before=lambda: fill_at_first_capture(disk)).end()
    refused(full, r"short/\d\.pt: cannot be written: No space left on device: it needs [\d.]+ KiB, [\d.]+ KiB are free")
    assert "resume: tlcapture capture" in full.stderr
    (disk / "hog").unlink()
    assert not list(root.rglob("*.tmp"))
    assert start("--skip-existing", root=root).end().code == 0
    assert contents(root / "experiments" / "exp") == uninterrupted
    evidence.survived(
        "the disk fills up in the middle of a file",
        "a 3 MiB disk that another program fills",
        "an error of one line with the file and the bytes needed and free; no incomplete file; exit status 1; a "
        "resumed run completes the files of an uninterrupted run",
    )


def test_a_capture_that_does_not_fit_is_refused_before_it_starts(
    start: Start, fresh: Path, small_disk: Disk, evidence: Evidence
) -> None:
    disk = small_disk(300)
    root = Path(shutil.copytree(fresh, disk / "root"))
    before = sorted(root.rglob("*"))
    refused(start(root=root).end(), LITTLE_SPACE)
    assert sorted(root.rglob("*")) == before
    dry = start("--dry-run", root=root).end()
    assert dry.code == 0
    assert "2 prompts to capture" in dry.stdout
    assert sorted(root.rglob("*")) == before
    evidence.survived(
        "less space than the capture needs", "a 300 KiB disk", "refused before anything is written, with both sizes"
    )


def test_a_read_only_folder_is_refused(start: Start, fresh: Path, small_disk: Disk, evidence: Evidence) -> None:
    disk = small_disk(8000)
    root = Path(shutil.copytree(fresh, disk / "root"))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ended = start(root=root).end()
    refused(ended, r"experiments/exp: cannot be written to")
    assert "loading" not in ended.stdout
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)

    assert start(root=root).end().code == 0
    evidence.survived(
        "a read-only folder",
        "a disk mounted read-only",
        "refused with a one-line error before the model is loaded, exit status 1",
    )


def test_a_file_size_limit_fails_the_prompt_of_the_file(
    start: Start, fresh: Path, uninterrupted: dict[str, Any], evidence: Evidence
) -> None:
    sizes = [path.stat().st_size for path in (fresh / "experiments").rglob("*.pt")]
    limit = 40_000
    assert max(sizes) < limit
    ended = start(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))).end()
    refused(ended, r"failed: short/1: .*1\.pt: cannot be written: File too large: it needs [\d.]+ KiB, .* are free")
    assert "failed: short/2" in ended.stderr
    assert not list(fresh.rglob("*.tmp"))
    assert start("--skip-existing").end().code == 0
    assert contents(fresh / "experiments" / "exp") == uninterrupted
    evidence.survived(
        "a file size limit that is reached in the middle of a file",
        "a limit of 40 KiB per file",
        "each prompt fails by name, no incomplete file, exit status 1; a resumed run completes the files of an "
        "uninterrupted run",
    )
