"""`capture --projections-only`: the projections of an ordinary capture, and no raw activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.cli.conftest import make_prompt_set
from tlcapture.captures.capture import Capture
from tlcapture.explore.experiment import Experiment
from tlcapture.page.contents import Contents
from tlcapture.storage.files import read_json

Run = Callable[..., Result]
ONLY = ("--projections-only", "--temperature", 0)


@pytest.fixture
def inference(data: Path) -> Path:
    return data / "experiments" / "exp" / "inference"


def projections(inference: Path) -> dict[str, Any]:
    """What the projection files hold, but for dates and what only files without a raw capture hold."""
    found = {}
    for path in sorted(inference.glob("*/*/*_stream/short/*.json")):
        content = read_json(path)
        content["metadata"].pop("projection_date")
        content["metadata"].pop("capture", None)
        found[str(path.relative_to(inference))] = content
    return found


def modified(inference: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in inference.rglob("*.json")}


def test_projections_are_those_of_an_ordinary_capture_and_nothing_raw_is_kept(
    capture: Run, extract: Run, inference: Path, analysis: Path, raw: Path
) -> None:
    extract()
    capture("--temperature", 0, "--attention", "--logit-lens", "--capture-attn")
    expected, add_ons = projections(inference), {path.name: path.read_bytes() for path in analysis.glob("*")}
    metadata = dict(Capture.open(raw / "1.pt").metadata)
    for path in [*inference.rglob("*.*"), *analysis.glob("*")]:
        path.unlink()
    done = capture(*ONLY, "--attention", "--logit-lens", "--capture-attn")
    assert done.exit_code == 0, done.output
    assert len(expected) == 12  # 3 prompts, 2 traits, 2 components
    assert projections(inference) == expected
    assert {path.name: path.read_bytes() for path in analysis.glob("*")} == add_ons
    assert list(inference.rglob("*.pt")) == []
    said = read_json(inference / "tone/loud/residual_stream/short/1.json")["metadata"]["capture"]
    assert said.keys() == metadata.keys()
    assert all(said[key] == metadata[key] for key in said if key != "capture_date")


def test_skip_existing_makes_exactly_what_is_missing(capture: Run, extract: Run, inference: Path, data: Path) -> None:
    extract()
    capture(*ONLY)
    expected, before = projections(inference), modified(inference)
    done = capture(*ONLY, "--skip-existing")
    assert "3 prompts skipped: nothing was missing" in done.output
    assert modified(inference) == before
    (inference / "tone/loud/residual_stream/short/2.json").unlink()
    done = capture(*ONLY, "--skip-existing")
    assert "2 prompts skipped" in done.output
    assert projections(inference) == expected
    changed = [path.stem for path, when in modified(inference).items() if before.get(path) != when]
    assert changed == ["2", "2"]


@pytest.mark.parametrize("change", ["wording", "mark", "vector", "mixture", "lens", "attn"])
def test_skip_existing_recaptures_a_prompt_that_differs_from_the_request(
    capture: Run, extract: Run, inference: Path, data: Path, change: str
) -> None:
    extract()
    capture(*ONLY)
    file, more = inference / "tone/warm/residual_stream/short/2.json", []
    if change == "wording":
        make_prompt_set(data, "short", ["hello there", "another?", "<b>tell me & more</b>"])
    elif change == "mark":
        (inference / "raw/residual/short/.2.unfinished").touch()
    elif change == "vector":
        content = read_json(file)
        content["metadata"]["vector_source"]["method"] = "gradient"
        file.write_text(json.dumps(content))
    elif change == "mixture":
        content = read_json(file)
        content["response"]["tokens"][0] = "x"
        file.write_text(json.dumps(content))
    elif change == "lens":
        more = ["--logit-lens"]
    else:
        more = ["--capture-attn"]
    before = modified(inference)
    done = capture(*ONLY, "--skip-existing", *more)
    assert done.exit_code == 0, done.output
    changed = {path.stem for path, when in modified(inference).items() if before.get(path) != when}
    assert changed == ({"1", "2", "3"} if more else {"2"})
    assert "3 prompts skipped" in capture(*ONLY, "--skip-existing", *more).output


def test_files_derived_from_other_tokens_are_removed(capture: Run, extract: Run, analysis: Path) -> None:
    extract()
    capture(*ONLY, "--attention")
    capture(*ONLY)
    assert len(list(analysis.glob("*"))) == 3  # of the same tokens
    capture(*ONLY, "--max-new-tokens", 3)
    assert list(analysis.glob("*")) == []


def test_next_to_a_raw_capture_projections_are_made_from_it_or_not_at_all(
    capture: Run, extract: Run, inference: Path, raw: Path
) -> None:
    extract()
    capture("--temperature", 0, "--no-project")
    before = {path: path.read_bytes() for path in raw.glob("*.pt")}
    done = capture(*ONLY)
    assert done.exit_code == 1
    assert "would leave projections of one run next to the raw capture of another" in done.output
    assert projections(inference) == {}
    done = capture(*ONLY, "--skip-existing")
    assert done.exit_code == 0, done.output
    made = projections(inference)
    assert len(made) == 6
    assert {path: path.read_bytes() for path in raw.glob("*.pt")} == before
    capture("--temperature", 0)
    assert projections(inference) == made


def test_an_ordinary_capture_replaces_projections_without_one(
    capture: Run, extract: Run, inference: Path, raw: Path
) -> None:
    extract()
    capture(*ONLY)
    expected = projections(inference)
    assert capture("--temperature", 0, "--skip-existing").exit_code == 0
    assert len(list(raw.glob("*.pt"))) == 3
    assert projections(inference) == expected
    assert "capture" not in read_json(inference / "tone/loud/residual_stream/short/1.json")["metadata"]


def test_prompts_with_projections_alone_are_shown_like_others(
    capture: Run, extract: Run, data: Path, tlcapture: Run
) -> None:
    extract()
    assert "short: the trait that rose most" in capture(*ONLY).output
    exp = Experiment("exp", data)
    assert set(exp.to_pandas("short", layers="all").prompt_id) == {"1", "2", "3"}
    with pytest.raises(KeyError, match="only projections of this prompt were kept"):
        exp.captures("short")[1]
    contents = Contents(data)
    assert contents.experiments()[0]["prompt_sets"] == ["short"]
    assert [prompt["id"] for prompt in contents.prompt_set("exp", "short")["prompts"]] == ["1", "2", "3"]
    assert contents.prompt("exp", "short", "2")["n_layers"] == 3
    assert contents.average("exp", "short", "tone", "loud", "residual")["n_captures"] == 3
    done = tlcapture("view", "--experiment", "exp", "--png", data / "pictures", "--export", data / "page.html")
    assert done.exit_code == 0, done.output
    assert len(list((data / "pictures").rglob("*.png"))) == 6
    done = tlcapture("project", "--experiment", "exp", "--prompt-set", "short")
    assert done.exit_code == 2
    assert "has projections but no captures (--projections-only)" in done.output
    done = tlcapture("project", "--experiment", "exp", "--all-prompt-sets", "--dynamics-only")
    assert done.exit_code == 0, done.output


def test_it_can_be_combined_with_layers_points_and_shards(capture: Run, extract: Run, inference: Path) -> None:
    extract()
    words = (*ONLY, "--layers", "1,2", "--points", "residual_out", "--layer", 1, "--shard", "1/2")
    assert capture(*words).exit_code == 0
    made = projections(inference)
    assert {Path(name).stem for name in made} == {"1", "3"}
    assert {tuple(content["metadata"]["layers"]) for content in made.values()} == {(1, 2)}
    assert "2 prompts skipped" in capture(*words, "--skip-existing").output
    # All layers are more than what is there.
    assert "skipped" not in capture(*ONLY, "--layer", 1, "--shard", "1/2", "--skip-existing").output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--no-project",), "--projections-only keeps only projections: leave out --replay and --no-project"),
        (("--replay",), "--projections-only keeps only projections: leave out --replay and --no-project"),
        (("--layer-internals", 1), "--projections-only keeps no raw activations: leave out --layer-internals"),
    ],
)
def test_options_that_contradict_it_are_an_error(
    capture: Run, extract: Run, words: tuple[object, ...], said: str
) -> None:
    extract()
    done = capture(*ONLY, *words)
    assert done.exit_code == 2
    assert said in done.output


def test_without_vectors_it_is_an_error_before_anything_runs(capture: Run, extract: Run, data: Path) -> None:
    done = capture(*ONLY)
    assert done.exit_code == 2
    assert "--projections-only: experiment 'exp' has no trait vectors: run 'tlcapture extract" in done.output
    extract()
    done = capture(*ONLY, "--layers", "0", "--layer", 1)
    assert done.exit_code == 2
    assert "no trait has a vector that fits, so nothing would be kept" in done.output
