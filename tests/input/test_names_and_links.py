"""Names and links cannot be used to read or write files outside the experiment."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evidence import Evidence
from tests.input import captures
from tests.input.strategies import at_most, check_refusal
from tests.page.conftest import TRAIT, write_experiment
from tlcapture.captures.capture import Capture
from tlcapture.commands.project import ProjectOptions, run_project
from tlcapture.commands.prompt_files.outputs import write_capture
from tlcapture.errors import InputError, StorageError, TlcaptureError
from tlcapture.names import Trait, is_safe_name
from tlcapture.page.contents import Contents
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_json
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import write_vector

ODD = Trait.parse(TRAIT)
HOSTILE = [
    "", ".", "..", "../x", "..\\x", "a/b", "a\\b", "/etc", "~", "a\0b", "\0", "-rf", "--help", ".hidden", "x" * 129,
    "x" * 10_000, "a\n", "\x1b[2J", "a b", "a:b", "a*b", "C:", "ａ", "а", "é", "\u2024\u2024", "\u2215x",
    "\uff0e\uff0e", "%2e%2e", "\ud800", "a\u202eb", "\u0661", " 1", "1 ", "a;b", "$(x)", "`x`", "a'b", '"',
]  # fmt: skip
NAMES = st.sampled_from(HOSTILE) | st.text(max_size=6) | st.text("./\\\0-_a", max_size=5)


def paths_of(root: Path, name: str) -> list[Callable[[], Path]]:
    layout = Layout(root, "exp")
    return [
        lambda: Layout(root, name).config,
        lambda: layout.residual("odd", name),
        lambda: layout.internals("odd", name, 0),
        lambda: layout.attention("odd", name),
        lambda: layout.projection(ODD, "residual", "odd", name),
        lambda: layout.vectors(Trait.parse(f"{name}/a")),
        lambda: layout.steering(Trait.parse(f"a/{name}")),
    ]


def paths_of_set(root: Path, name: str) -> list[Callable[[], Path]]:
    layout = Layout(root, "exp")
    return [
        lambda: layout.residual(name, "1"),
        lambda: layout.unfinished(name, "1"),
        lambda: layout.internals(name, "1", 0),
        lambda: layout.logit_lens(name, "1"),
        lambda: layout.projection(ODD, "residual", name, "1"),
        lambda: Datasets(root).prompt_set_file(name),
    ]


def test_a_name_is_one_file_below_its_folder_or_refused(tmp_path: Path, evidence: Evidence) -> None:
    counts: Counter[str] = Counter()

    def path_or_none(make: Callable[[], Path]) -> Path | None:
        try:
            path = make()
        except InputError as error:
            refusal = str(error)
            assert len(refusal.splitlines()) == 1
            refusal.encode()
            return None
        assert Path(os.path.normpath(path)) == path
        assert path.is_relative_to(tmp_path / "experiments") or path.is_relative_to(Path.cwd())
        assert path.name.encode().isascii()
        return path

    @settings(max_examples=at_most(300), deadline=None, database=None)
    @given(NAMES)
    def attempt(name: str) -> None:
        stripped = name.strip()  # a trait is read from a list with spaces after its commas
        for make in paths_of(tmp_path, name):
            assert path_or_none(make) is None or is_safe_name(stripped)
        for make in paths_of_set(tmp_path, name):
            path = path_or_none(make)
            assert path is None or all(map(is_safe_name, name.split("/")))
        counts["refused" if not is_safe_name(name) else "taken as they are"] += 1

    attempt()
    for kind, count in counts.items():
        evidence.tried("names of experiments, sets, prompts, traits", kind, count)


SECRET = "the secret outside"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """An experiment outside the root, with a secret in its files of every format."""
    folder = tmp_path / "outside"
    write_experiment(folder)
    for path in folder.rglob("*.json"):
        text = path.read_text().replace("<b>bold</b>", SECRET).replace('"tiny"', f'"{SECRET}"')
        path.write_text(text)
    return folder / "experiments" / "exp"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_experiment(tmp_path / "root")


LINKS = [
    "config.json",
    "inference",
    "inference/raw",
    "inference/raw/residual",
    "inference/raw/residual/odd",
    "inference/raw/residual/odd/1.pt",
    "inference/style",
    f"inference/{TRAIT}",
    f"inference/{TRAIT}/residual_stream",
    f"inference/{TRAIT}/residual_stream/odd",
    f"inference/{TRAIT}/residual_stream/odd/1.json",
    "analysis",
    "analysis/per_token/odd",
    "analysis/per_token/odd/1_attention.json",
    "analysis/per_token/odd/1_logit_lens.json",
    "extraction",
    "extraction/style",
    f"extraction/{TRAIT}/vectors",
    f"extraction/{TRAIT}/vectors/metadata.json",
    f"extraction/{TRAIT}/vectors/probe_layer1.pt",
    "extraction/extraction_evaluation.json",
    "steering",
    f"steering/{TRAIT}/results.json",
]


def link_out(root: Path, outside: Path, where: str, *, relative: bool = False) -> Path:
    """Replace a part of the experiment by a link to the same part of the experiment outside."""
    own, target = root / "experiments" / "exp" / where, outside / where
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        target.write_text("{}") if target.suffix else target.mkdir()
    if own.exists():
        own.rename(root / "moved")
    own.parent.mkdir(parents=True, exist_ok=True)
    own.symlink_to(os.path.relpath(target, own.parent) if relative else target)
    return own


def everything(contents: Contents) -> str:
    """Everything that the page can show of the experiment, and all error messages."""
    where = {"experiment": "exp", "prompt_set": "odd", "prompt_id": "1"}
    of_trait = {"category": "style", "name": "odd"}
    asked: list[Callable[[], object]] = [
        contents.experiments,
        lambda: contents.prompt_set("exp", "odd"),
        lambda: contents.prompt(**where),
        lambda: contents.layers(**where, **of_trait, component="residual"),
        lambda: contents.lens(**where),
        lambda: contents.lens_token(**where, token="1"),
        lambda: contents.attention(**where),
        lambda: contents.attention_token(**where, token="1"),
        lambda: contents.average("exp", "odd", **of_trait, component="residual"),
        lambda: contents.vectors("exp", **of_trait),
    ]
    shown = []
    for ask in asked:
        try:
            shown.append(json.dumps(ask()))
        except TlcaptureError as error:
            shown.append(str(error))
    return "\n".join(shown)


def test_the_secret_is_visible_if_it_is_read(outside: Path) -> None:
    assert everything(Contents(outside.parents[1])).count(SECRET) > 5


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("where", LINKS)
def test_the_page_does_not_follow_links_that_lead_out(
    root: Path, outside: Path, evidence: Evidence, where: str, relative: bool
) -> None:
    link = link_out(root, outside, where, relative=relative)
    shown = everything(Contents(root))
    assert SECRET not in shown
    if where not in ("config.json", f"extraction/{TRAIT}/vectors/probe_layer1.pt", "inference/raw/residual/odd/1.pt"):
        assert f"{link.relative_to(root)}: a link that leads out of the experiment" in shown
    evidence.tried("links out of an experiment", "read by the page")


def test_no_file_is_written_through_a_link_that_leads_out(root: Path, outside: Path, evidence: Evidence) -> None:
    torch.save(captures.content(), root / "one.pt")
    capture = Capture.open(root / "one.pt")
    layout = Layout(root, "exp")
    writes: dict[str, Callable[[], object]] = {
        "inference/raw/residual/odd": lambda: write_capture(layout, capture),
        "inference/raw/internals/odd": lambda: write_json(layout.internals("odd", "1", 0), {}),
        "analysis/per_token/odd": lambda: write_json(layout.attention("odd", "1"), {}),
        f"extraction/{TRAIT}/vectors": lambda: write_vector(
            VectorFiles(layout, ODD), "residual", "probe", 1, torch.ones(8)
        ),
        "extraction/extraction_evaluation.json": lambda: write_json(layout.evaluation, {}),
        "config.json": lambda: write_json(layout.config, {}),
        f"steering/{TRAIT}/results.json": lambda: write_json(layout.steering(ODD), {}),
    }
    for where, write in writes.items():
        link = link_out(root, outside, where)
        before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
        with pytest.raises(StorageError, match="a link that leads out") as caught:
            write()
        check_refusal(caught.value, link)
        assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before
        link.unlink()
        (root / "moved").rename(link) if (root / "moved").exists() else None
        evidence.tried("links out of an experiment", "written to")


def test_projections_are_not_written_through_a_link(root: Path, outside: Path, evidence: Evidence) -> None:
    layout = Layout(root, "exp")
    torch.save(captures.content(), layout.residual("odd", "1"))
    write_vector(VectorFiles(layout, ODD), "residual", "probe", 1, torch.ones(8))
    layout.evaluation.unlink()
    VectorFiles(layout, ODD).metadata_file("residual").unlink()
    for path in (layout.residual("odd", "2"), layout.residual("odd", "3")):
        path.unlink()
    assert not run_project(layout, ["odd"], ProjectOptions()).failures
    link = link_out(root, outside, f"inference/{TRAIT}/residual_stream/odd")
    before = (outside / f"inference/{TRAIT}/residual_stream/odd/1.json").read_bytes()
    (failure,) = run_project(layout, ["odd"], ProjectOptions()).failures
    check_refusal(failure, link)
    assert (outside / f"inference/{TRAIT}/residual_stream/odd/1.json").read_bytes() == before
    evidence.tried("links out of an experiment", "written to")


def test_links_within_and_above_the_experiment_are_followed(root: Path, tmp_path: Path, evidence: Evidence) -> None:
    """The root, `experiments/` and an experiment can be links, for example to scratch disks."""
    plain = everything(Contents(root))
    folder = root / "experiments" / "exp"
    (folder / "analysis").rename(folder / "elsewhere")
    (folder / "analysis").symlink_to("elsewhere")
    assert everything(Contents(root)) == plain
    for level in (folder, root / "experiments", root):
        target = tmp_path / f"disk-{level.name}"
        level.rename(target)
        level.symlink_to(target)
        assert everything(Contents(root)) == plain
        evidence.tried("links within and above an experiment", "followed")


def test_a_link_to_itself_and_a_dangling_link_do_not_hang(root: Path, evidence: Evidence) -> None:
    folder = root / "experiments" / "exp"
    (folder / "analysis").rename(root / "moved")
    (folder / "analysis").symlink_to("analysis")
    assert everything(Contents(root))
    (folder / "analysis").unlink()
    (folder / "analysis").symlink_to(folder / "nowhere")
    assert everything(Contents(root))
    evidence.tried("links out of an experiment", "to themselves or nothing", 2)
