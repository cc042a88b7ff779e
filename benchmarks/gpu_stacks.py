"""Where the threads of a command are, from the stacks that py-spy saw many times a second."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

RATE = 50  # a second
_IMPORT = "_find_and_load ("
_OURS = "tlcapture/"
_EVERYWHERE = ("tlcapture/cli/", "tlcapture/__main__")  # around all that a command does


def py_spy() -> str | None:
    """The program, which `pip install --target` puts beside the packages."""
    beside = [str(Path(folder) / "bin") for folder in sys.path]
    return shutil.which("py-spy", path=os.pathsep.join([*beside, os.environ.get("PATH", "")]))


def recording(program: str, into: Path) -> list[str]:
    """What is written before a command so that stacks of its threads, waiting ones too, are saved."""
    return [program, "record", "--rate", str(RATE), "--threads", "--idle", "--format", "raw", "-o", str(into), "--"]


def seconds_of(stacks: Path, least: float = 0.03, most: int = 25) -> dict[str, dict[str, float]]:
    """Seconds of each kind of thread, and within each function of the package that it called.

    Threads are of one kind if their names differ by a number; their seconds are added up. Kinds and functions with less
    than the share `least` are left out, as are all functions beyond the `most` slowest; `import` is all imports. A
    function's seconds hold those of what it calls.
    """
    within: dict[str, Counter[str]] = defaultdict(Counter)
    for line in stacks.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        name = re.sub(r"thread \(\w+\)(: )?|[-_]?\d+", "", thread) or "unnamed"
        ours = {re.sub(r":\d+\)$", "", frame) for frame in frames if _counts(frame)}
        imports = {"import"} if any(frame.startswith(_IMPORT) for frame in frames) else set()
        within[name].update(dict.fromkeys({"", *ours, *imports}, int(count)))
    found = {}
    longest = max(counts[""] for counts in within.values())
    for name, counts in within.items():
        if counts[""] < least * longest:
            continue
        dear = [(key, n) for key, n in counts.most_common(most) if n >= least * counts[""]]
        found[name] = {key.replace(" (" + _OURS, " ("): n / RATE for key, n in dear}
    return dict(sorted(found.items(), key=lambda item: -item[1][""]))


def _counts(frame: str) -> bool:
    return _OURS in frame and not any(part in frame for part in _EVERYWHERE)
