"""Which prompts of a set may have files made from a capture, and where projections lie, from lists of folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tlcapture.errors import StorageError
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout, derived_files
from tlcapture.storage.experiments.prompts_with_files import PromptsWithFiles
from tlcapture.traits.projections.saved import ListedProjections, projections_of_prompt

LOUD, WARM = Trait("tone", "loud"), Trait("tone", "warm")
PLACES: dict[str, Callable[[Layout], Path]] = {
    "attention": lambda layout: layout.attention("a/s", "7.s1"),
    "compact attention": lambda layout: layout.forms(layout.attention("a/s", "7.s1"))[1],
    "lens": lambda layout: layout.logit_lens("a/s", "7.s1"),
    "compact lens": lambda layout: layout.forms(layout.logit_lens("a/s", "7.s1"))[1],
    "internals": lambda layout: layout.internals("a/s", "7.s1", 12),
    "projection": lambda layout: layout.projection(LOUD, "residual", "a/s", "7.s1"),
    "projection of attention": lambda layout: layout.projection(LOUD, "attn_out", "a/s", "7.s1"),
    "shard": lambda layout: layout.shards("attn_out", "a/s") / "7.s1.safetensors",
    "comparison": lambda layout: layout.folder / "analysis" / "compare" / "other" / "a/s" / "7.s1.json",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_prompt_with_any_file_made_from_its_capture_is_known(tmp_path: Path, place: str) -> None:
    layout = Layout(tmp_path, "exp")
    path = PLACES[place](layout)
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert derived_files(Layout(tmp_path, "exp"), "a/s", "7.s1") == [path]
    before = PromptsWithFiles(layout, "a/s")
    assert before.may_have_any("7.s1")
    assert not before.may_have_any("7")
    assert not PromptsWithFiles(layout, "a").may_have_any("7.s1")


def test_any_prompt_may_be_in_a_shard_of_several(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    assert not PromptsWithFiles(layout, "s").may_have_any(7)
    merged = layout.shards("residual", "s") / "+"
    merged.mkdir(parents=True)
    (merged / "1.safetensors").touch()
    assert PromptsWithFiles(layout, "s").may_have_any(7)


def test_projections_of_listed_folders_are_those_of_each_prompt(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    for trait, component, name in ((WARM, "residual", "1"), (LOUD, "residual", "1"), (LOUD, "attn_out", "2")):
        path = layout.projection(trait, component, "s", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    for component in ("residual", "attn_out"):
        listed = ListedProjections(layout, "s", component)
        for name in ("1", "2", "3"):
            assert listed.of(name) == projections_of_prompt(layout, "s", name, component)
    assert [each.trait for each in ListedProjections(layout, "s", "residual").of("1")] == [LOUD, WARM]


def test_a_listed_projection_behind_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    path = layout.projection(LOUD, "residual", "s", "1")
    path.parent.mkdir(parents=True)
    (tmp_path / "outside.json").write_text("{}")
    path.symlink_to(tmp_path / "outside.json")
    with pytest.raises(StorageError, match="leads out"):
        ListedProjections(layout, "s", "residual").of("1")
