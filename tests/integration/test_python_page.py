"""docs/python.md lists the public API completely, and its examples run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import tlcapture
from tlcapture import Capture, Experiment
from tlcapture.captures.capture import CapturedPart
from tlcapture.coloured_tokens import ColouredTokens
from tlcapture.explore.captured_sets import AllCaptures, Captures
from tlcapture.explore.figures.attention_heads import AttentionHeads
from tlcapture.explore.figures.capture_figures import CaptureFigures
from tlcapture.explore.figures.logit_lens_table import LogitLensTable
from tlcapture.explore.figures.offline_figure import OfflineFigure
from tlcapture.explore.live.live_capture import LiveCapture
from tlcapture.explore.projection_frames import COLUMNS
from tlcapture.explore.saved_capture import SavedCapture
from tlcapture.traits.projections.projection import Projection
from tlcapture.traits.projections.token_scores import TokenScores
from tlcapture.traits.selection import Selection
from tlcapture.traits.statistics.dynamics import Dynamics
from tlcapture.traits.vectors import TraitVector

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
CLASSES = (
    Experiment, AllCaptures, Captures, Capture, CapturedPart, SavedCapture, LiveCapture, Projection, Dynamics,
    TraitVector, Selection, TokenScores, AttentionHeads, LogitLensTable, ColouredTokens, CaptureFigures,
    OfflineFigure, tlcapture.PromptSet, tlcapture.TlcaptureError,
)  # fmt: skip
# Classes whose sections refer to those of other classes.
INHERITED = {"LiveCapture": (Capture, SavedCapture)}


def listed(name: str) -> set[str]:
    """Members in the first column of the tables below a class's heading."""
    section = re.search(rf"^##+ `{name}`\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert section, f"docs/python.md has no section on {name}"
    cells = [row.split(" | ")[0] for row in section[1].splitlines() if row.startswith("| `")]
    return {found for cell in cells for found in re.findall(r"`(\w+)(?:\(.*?\))?`", cell)}


def members(kind: type) -> set[str]:
    own = [each for each in kind.mro() if each.__module__.startswith("tlcapture")]
    found = {name for each in own for name in vars(each) if not name.startswith("_")} - {"model_config"}
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return {name for name in found | fields if not name.startswith("_")}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_public_member_is_listed(kind: type) -> None:
    inherited = {name for each in INHERITED.get(kind.__name__, ()) for name in listed(each.__name__)}
    assert members(kind) <= listed(kind.__name__) | inherited


@pytest.mark.parametrize("kind", [*CLASSES], ids=lambda kind: kind.__name__)
def test_every_listed_member_exists(kind: type) -> None:
    attributes = {"prompt_set"} if kind is Captures else set()  # set by __init__
    assert listed(kind.__name__) <= members(kind) | attributes


def test_every_listed_member_of_a_model_exists(smollm2: Any) -> None:
    assert not [name for name in listed("Model") if not hasattr(smollm2, name)]


@pytest.mark.parametrize("name", tlcapture.__all__)
def test_every_public_name_has_a_section(name: str) -> None:
    assert re.search(rf"^##+ .*`{name}`", PAGE, re.MULTILINE)


def test_the_columns_of_data_frames_are_listed() -> None:
    section = PAGE.split("### Data frames\n")[1].split("\n#")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(COLUMNS)


def test_every_link_leads_to_a_section() -> None:
    headings = re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors


@pytest.mark.filterwarnings("ignore:.*by default")
def test_the_examples_run_in_order(embedded_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCAPTURE_ROOT", str(embedded_root))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, namespace)
    assert Path("trajectory.html").stat().st_size > 10_000
