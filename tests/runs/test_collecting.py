"""Files that workers send back are stored where a local run stores them, without stale derived files next to them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.input import captures
from tlcapture.captures.capture import Capture
from tlcapture.errors import StorageError
from tlcapture.names import Trait
from tlcapture.runs.received_files import store_outputs
from tlcapture.runs.report import Done
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.layout import Layout

RAW = "experiments/exp/inference/raw/residual/odd/1.pt"


def packed(**changes: Any) -> bytes:
    value = captures.content()
    value["metadata"] |= {"model_fingerprint": "f", "engine": "hooked", "dtype": "float32", **changes}
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_returned_capture_is_stored_and_files_derived_from_another_are_removed(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    done = store_outputs(layout, {RAW: packed()}, Done(n_prompts=1))
    assert [(written.path, done.n_prompts) for written in done.written] == [(tmp_path / RAW, 1)]
    assert Capture.open(tmp_path / RAW).prompt_id == "1"
    assert read_config(layout).inference_model == captures.content()["metadata"]["inference_model"]
    lens = layout.logit_lens("odd", "1")
    lens.parent.mkdir(parents=True)
    lens.write_text("{}")
    store_outputs(layout, {RAW: packed()}, Done())
    assert lens.is_file()  # the same tokens from the same model
    store_outputs(layout, {RAW: packed(model_fingerprint="another")}, Done())
    assert not lens.exists()
    assert not layout.unfinished("odd", "1").exists()


def test_a_returned_capture_of_a_set_in_a_subfolder_replaces_what_was_derived_from_another(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    name = RAW.replace("odd", "general/mine")
    lens = layout.logit_lens("general/mine", "1")
    lens.parent.mkdir(parents=True)
    lens.write_text("{}")
    done = store_outputs(layout, {name: packed(prompt_set="general/mine", prompt_id=1)}, Done())
    assert [written.path for written in done.written] == [tmp_path / name]
    assert Capture.open(tmp_path / name).prompt_id == 1
    assert not lens.exists()
    assert not layout.unfinished("general/mine", "1").exists()


def test_an_invalid_capture_replaces_nothing(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    store_outputs(layout, {RAW: packed()}, Done())
    before = (tmp_path / RAW).read_bytes()
    with pytest.raises(StorageError):
        store_outputs(layout, {RAW: before[:500]}, Done())
    assert (tmp_path / RAW).read_bytes() == before
    assert layout.unfinished("odd", "1").exists()  # so that the next run captures the prompt again
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_overwrite_a_file_that_cannot_be_read_is_kept_and_named(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    path = tmp_path / RAW
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    done = store_outputs(layout, {RAW: packed()}, Done(), overwrite=False)
    assert [failed.what for failed in done.failures] == [RAW]
    assert not done.written
    assert path.read_text() == "mine"
    path.unlink()
    lens = layout.logit_lens("odd", "1")
    lens.parent.mkdir(parents=True)
    lens.write_text("mine")
    assert store_outputs(layout, {RAW: packed()}, Done(), overwrite=False).failures
    assert (lens.read_text(), path.exists()) == ("mine", False)


def test_returned_projections_in_the_compact_form_join_those_that_are_there(tmp_path: Path) -> None:
    """A worker does not see what the experiment holds: other traits stay, and what replaces a JSON file removes it."""
    from tests.input.test_safetensors_files import shard_file
    from tlcapture.storage.compact.shard_writing import merge_shards
    from tlcapture.traits.projections.saved import all_saved

    here, there = Layout(tmp_path / "here", "exp"), Layout(tmp_path / "there", "exp")
    for layout, trait in ((here, "tone/warm"), (there, "tone/loud")):
        shard_file(layout.shards("residual", "odd") / "1.safetensors", trait)
    merge_shards(here.shards("residual", "odd"))
    old = here.projection(Trait.parse("tone/loud"), "residual", "odd", "1")
    old.parent.mkdir(parents=True)
    old.write_text('{"projections": {}}')
    attention = here.attention("odd", "1")
    attention.parent.mkdir(parents=True)
    attention.write_text("{}")
    name = "experiments/exp/analysis/projections/residual_stream/odd/1.safetensors"
    sent = {
        name: (there.root / name).read_bytes(),
        "experiments/exp/analysis/per_token/odd/1_attention.safetensors": b"",
    }
    store_outputs(here, sent, Done())
    assert [str(each.trait) for each in all_saved(here, "odd", "1")] == ["tone/loud", "tone/warm"]
    assert [each.content()["projections"]["prompt"][0][0] for each in all_saved(here, "odd", "1")] == [[1.0, 2.0]] * 2
    assert not old.exists()
    assert not attention.exists()
