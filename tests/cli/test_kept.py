"""`capture --layers --points`: a part of a full capture, bit for bit, and everything that reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from tests import tiny
from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError, StorageError
from tlcapture.explore.experiment import Experiment
from tlcapture.explore.live.live_capture import capture as capture_live
from tlcapture.page.contents import Contents
from tlcapture.storage.files import read_json
from tlcapture.traits.projections.token_scores import TokenScores

Run = Callable[..., Result]
GREEDY = ("--temperature", 0, "--save-dtype", "float32")
LAYER_1 = ("--layer", 1)  # of the vectors


def files(raw: Path) -> dict[str, Any]:
    return {path.stem: torch.load(path, weights_only=True) for path in sorted(raw.glob("*.pt"))}


@pytest.mark.parametrize(
    ("layers", "points"),
    [("0,2", "residual_out"), ("1,2", "residual_in,residual_out"), ("1", "after_attn"), ("all", "residual_in")],
)
def test_a_subset_equals_that_part_of_a_full_capture(capture: Run, raw: Path, layers: str, points: str) -> None:
    capture(*GREEDY, "--capture-attn")
    whole = files(raw)
    done = capture(*GREEDY, "--capture-attn", "--layers", layers, "--points", points)
    assert done.exit_code == 0, done.output
    kept = range(tiny.N_LAYERS) if layers == "all" else [int(layer) for layer in layers.split(",")]
    for number, value in files(raw).items():
        assert value["metadata"]["layers"] == list(kept)
        assert value["metadata"]["points"] == points.split(",")
        assert value["metadata"]["n_layers"] == tiny.N_LAYERS
        assert set(value["metadata"]["hooks"]) == {*points.split(","), "attn_out"}
        for part in ("prompt", "response"):
            assert value[part]["tokens"] == whole[number][part]["tokens"]
            activations = value[part]["activations"]
            assert list(activations) == list(kept)
            for layer, by_point in activations.items():
                assert set(by_point) == {*points.split(","), "attn_out"}
                for point, tensor in by_point.items():
                    assert torch.equal(tensor, whole[number][part]["activations"][layer][point])


def test_a_file_holds_each_kept_activation_once(capture: Run, raw: Path) -> None:
    capture(*GREEDY, "--layers", "1,2", "--points", "residual_in,residual_out")
    value = torch.load(raw / "1.pt", weights_only=True)
    activations = value["prompt"]["activations"]
    assert activations[2]["residual_in"].data_ptr() == activations[1]["residual_out"].data_ptr()
    storages = {
        tensor.untyped_storage().data_ptr() for by_point in activations.values() for tensor in by_point.values()
    }
    assert len(storages) == 1
    n_tokens = len(value["prompt"]["tokens"])
    assert activations[1]["residual_in"].untyped_storage().nbytes() == 3 * n_tokens * tiny.D_MODEL * 4


def test_only_what_is_kept_is_captured(capture: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tlcapture.generation.recording.recorder import Recorder

    asked: list[list[str]] = []
    recorder = Recorder.__init__

    def noting(self: Any, names: Any, *rest: Any) -> None:
        asked.append(list(names))
        recorder(self, names, *rest)

    monkeypatch.setattr(Recorder, "__init__", noting)
    capture("--layers", "1", "--points", "residual_out")
    assert {name for names in asked for name in names} == {"blocks.1.hook_resid_post"}


def test_reading_activations_that_were_not_kept_names_those_that_were(capture: Run, raw: Path) -> None:
    capture("--layers", "0,2", "--points", "residual_out", "--capture-attn")
    saved = Capture.open(raw / "1.pt")
    assert (saved.n_layers, saved.d_model) == (tiny.N_LAYERS, tiny.D_MODEL)
    assert saved.residual(2).shape == saved.residual(0, "attn_out").shape == (len(saved.tokens), tiny.D_MODEL)
    assert "the capture has residual_out of layers 0, 2" in saved._repr_html_()
    with pytest.raises(InputError, match="layer 1 was not kept: the capture has residual_out of layers 0, 2"):
        saved.residual(1)
    with pytest.raises(InputError, match="after_attn was not kept"):
        saved.residual(0, "after_attn", "prompt")
    with pytest.raises(InputError, match="layer 1 was not kept"):
        saved.residual(1, "attn_out")


def test_a_file_without_layers_in_its_metadata_holds_all_layers(capture: Run, raw: Path) -> None:
    capture(*GREEDY)
    expected = Capture.open(raw / "1.pt").residual(1, "residual_out")
    value = torch.load(raw / "1.pt", weights_only=True)
    del value["metadata"]["layers"], value["metadata"]["points"]
    torch.save(value, raw / "1.pt")
    saved = Capture.open(raw / "1.pt")
    assert saved.kept.is_all
    assert torch.equal(saved.residual(2, "residual_in"), expected)
    assert "3 prompts skipped" in capture(*GREEDY, "--skip-existing").output


def test_a_live_capture_keeps_the_layers_and_points_asked_for(capture: Run, raw: Path) -> None:
    capture(*GREEDY)
    (live,) = capture_live(
        tiny.model("llama"), ["hello there"], layers=[1], points=["residual_out"], temperature=0, max_new_tokens=6,
        save_dtype="float32",
    )  # fmt: skip
    # Not bit for bit: a batch of one prompt adds in another order.
    assert torch.allclose(live.residual(1), Capture.open(raw / "1.pt").residual(1), atol=1e-3)
    with pytest.raises(InputError, match="layer 0 was not kept"):
        live.residual(0)


def test_a_file_that_lacks_a_layer_is_not_a_capture(capture: Run, raw: Path) -> None:
    capture()
    value = torch.load(raw / "1.pt", weights_only=True)
    for part in ("prompt", "response"):
        del value[part]["activations"][1]
    torch.save(value, raw / "1.pt")
    with pytest.raises(StorageError, match=r"1\.pt: .* has 2 layers of width 32, but metadata states 3 of width 32"):
        Capture.open(raw / "1.pt")


def test_projections_of_a_subset_equal_those_of_a_full_capture_and_are_null_elsewhere(
    capture: Run, extract: Run, projected: Path
) -> None:
    extract()
    capture(*GREEDY, *LAYER_1)
    whole = read_json(projected / "1.json")
    done = capture(*GREEDY, *LAYER_1, "--layers", "1,2", "--points", "after_attn,residual_out")
    assert done.exit_code == 0, done.output
    subset = read_json(projected / "1.json")
    assert subset["metadata"]["layers"] == [1, 2]
    assert subset["metadata"]["sublayers"] == ["after_attn", "residual_out"]
    assert subset["dynamics"] == whole["dynamics"]
    for part in ("prompt", "response"):
        for ours, theirs in zip(subset["projections"][part], whole["projections"][part], strict=True):
            assert ours[0] is None
            assert ours[1:] == [layer[1:] for layer in theirs[1:]]


def test_a_vector_whose_layer_or_point_was_not_kept_is_an_error_for_its_trait(
    capture: Run, extract: Run, projected: Path, tlcapture: Run
) -> None:
    extract()
    done = capture("--layers", "0,2", *LAYER_1)
    assert done.exit_code == 1
    message = "tone/loud: the probe vector of tone/loud is of layer 1, but the capture has only layers 0, 2"
    assert message in done.output
    assert not projected.exists()
    assert "next: tlcapture view" in done.stdout  # extracting again would not help
    assert "but the capture has only layer 0" in capture("--layers", "0", *LAYER_1).output
    done = capture("--points", "residual_in", *LAYER_1)
    assert done.exit_code == 1
    assert "projects residual_out, but only residual_in was kept" in done.output
    done = tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--layer", 1)
    assert done.exit_code == 1
    assert "projects residual_out, but only residual_in was kept" in done.output


def test_everything_that_shows_projections_shows_the_kept_layers(
    capture: Run, extract: Run, data: Path, projected: Path, tlcapture: Run
) -> None:
    extract()
    capture(*GREEDY, "--limit", 1, "--layers", "1,2", "--points", "residual_out", *LAYER_1)
    line = TokenScores.read(projected / "1.json")
    assert list(line.layers) == [1, 2]
    assert np.isnan(line.by_layer()[:, 0]).all()
    with pytest.raises(InputError, match="no layer 0: the projection has layers 1, 2"):
        line.at(0)
    exp = Experiment("exp", data)
    assert set(exp.to_pandas("short", layers="all").layer) == {1, 2}
    cap = exp.captures("short")[1]
    again = cap.to_pandas("tone/loud", layers="all", layer=1)
    written = exp.to_pandas("short", "tone/loud", layers="all")
    assert np.allclose(again.score, written[written.prompt_id == "1"].score, rtol=1e-4)
    heat = cap.plot.layers("tone/loud", layer=1).data[0].z
    assert np.isnan(heat[0].astype(float)).all()
    assert np.isfinite(heat[1:, 1:].astype(float)).all()
    contents = Contents(data)
    assert contents.prompt("exp", "short", "1")["layers"] == [1, 2]
    page = contents.layers("exp", "short", "1", "tone", "loud", "residual")
    assert [token[0] for token in page["scores"]] == [None] * len(cap.tokens)
    done = tlcapture("view", "--experiment", "exp", "--png", data / "pictures", "--export", data / "page.html")
    assert done.exit_code == 0, done.output
    assert len(list((data / "pictures").rglob("*.png"))) == 2


def test_the_cache_of_a_subset_has_its_activations_and_names_missing_ones(capture: Run, data: Path, raw: Path) -> None:
    capture("--layers", "0", "--points", "residual_out,residual_in")
    cap = Experiment("exp", data).captures("short")[1]
    assert set(cap.cache) == {"blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"}
    assert torch.equal(cap.cache["resid_post", 0], Capture.open(raw / "1.pt").residual(0).float())
    with pytest.raises(
        KeyError, match=r"blocks\.2\.hook_resid_post: the capture has residual_in, residual_out of layer 0"
    ):
        cap.cache["resid_post", 2]


def test_a_live_logit_lens_works_with_a_subset_and_a_replayed_one_does_not(
    capture: Run, raw: Path, analysis: Path, data: Path
) -> None:
    capture(*GREEDY, "--logit-lens", "--attention")
    whole = {path.name: path.read_bytes() for path in analysis.glob("*")}
    for path in analysis.glob("*"):
        path.unlink()
    assert capture(*GREEDY, "--logit-lens", "--attention", "--layers", 1).exit_code == 0
    assert {path.name: path.read_bytes() for path in analysis.glob("*")} == whole
    done = capture("--replay", "--logit-lens")
    assert done.exit_code == 1
    assert (
        "the logit lens needs residual_out of every layer, but the capture has residual_in, after_attn" in done.output
    )
    assert capture("--replay", "--attention").exit_code == 0
    (analysis / "1_logit_lens.json").unlink()
    with pytest.raises(InputError, match="layer 0 was not kept"):
        Experiment("exp", data).captures("short")[1].logit_lens()


def test_skip_existing_recaptures_prompts_with_too_few_layers_and_keeps_the_others(
    capture: Run, raw: Path, analysis: Path
) -> None:
    capture(*GREEDY, "--layers", "1,2")
    before = {path: path.stat().st_mtime_ns for path in raw.glob("*.pt")}
    done = capture(*GREEDY, "--skip-existing", "--layers", 2, "--points", "residual_out")
    assert "3 prompts skipped: nothing was missing" in done.output
    assert {path: path.stat().st_mtime_ns for path in raw.glob("*.pt")} == before
    assert capture(*GREEDY, "--skip-existing", "--layers", "0,1").exit_code == 0
    assert {tuple(value["metadata"]["layers"]) for value in files(raw).values()} == {(0, 1)}
    # The logit lens needs all layers: the prompts are captured again.
    assert capture(*GREEDY, "--skip-existing", "--layers", 1, "--logit-lens").exit_code == 0
    assert len(list(analysis.glob("*_logit_lens.json"))) == 3


def test_wrong_layers_and_points_are_refused(capture: Run, raw: Path) -> None:
    done = capture("--layers", "1,7")
    assert done.exit_code == 2
    assert "--layers 7: the model has layers 0 to 2" in done.output
    done = capture("--points", "middle")
    assert done.exit_code == 2
    assert "'middle' is not a list of residual points: residual_in, after_attn, residual_out" in done.output
    assert "leave it out to use --layers and --points" in capture("--replay", "--layers", 1).output
    assert not raw.exists()
