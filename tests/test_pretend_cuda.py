"""The pretended GPU of `make test-pretend-cuda` refuses and finds what its examples say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(sys.platform != "linux" or torch.version.cuda is not None, reason="needs Linux, torch for CPUs")
def test_examples() -> None:
    words = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "tests.pretend_cuda.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "tests/pretend_cuda/examples.py"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
