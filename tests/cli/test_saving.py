"""Captures that were made in Python and saved: the files that the command line writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import tlcapture as package
from tlcapture import Experiment, load_model
from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError
from tlcapture.page.contents import Contents
from tlcapture.prompts.prompt_sets import read_prompt_file
from tlcapture.storage.files import read_json

Run = Callable[..., Result]
ADD_ONS = ("--attention", "--logit-lens", "--layer-internals", "1")
TIMES = ("capture_date", "projection_date", "inference_experiment", "experiment", "timestamp")


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    return load_model(str(tiny_folder))


@pytest.fixture
def both(capture: Run, extract: Run, data: Path, model: Any) -> Path:
    """The set `short` captured into `exp` by the command line, and into `py` from Python; both have the vectors."""
    assert extract().exit_code == 0
    shutil.copytree(data / "experiments" / "exp", data / "experiments" / "py")
    assert capture(*ADD_ONS).exit_code == 0
    prompts = read_prompt_file(data / "datasets" / "inference" / "short.json")
    options: dict[str, Any] = {"attention": True, "logit_lens": True, "internals": [1], "max_new_tokens": 6}
    for cap in package.capture(model, prompts, **options):
        saved = cap.save("py")
        assert (saved.prompt_set, saved.prompt_id, saved.tokens) == ("short", cap.prompt_id, cap.tokens)
    return data / "experiments"


def files_in(folder: Path) -> dict[str, Path]:
    kept = ("inference", "analysis")
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] in kept
    }


def without_times(value: Any) -> Any:
    """A value without dates and the name of the experiment."""
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


def test_the_files_are_those_of_the_command_line(both: Path) -> None:
    ours, theirs = (files_in(both / name) for name in ("py", "exp"))
    assert list(ours) == list(theirs)
    assert len(ours) == 3 * (1 + 2 + 1 + 2)  # raw, attention and lens, internals of a layer, two traits
    for name, path in theirs.items():
        if path.suffix == ".pt":
            values = [torch.load(each, weights_only=True) for each in (ours[name], path)]
        else:
            values = [read_json(each) for each in (ours[name], path)]
        assert equal(*map(without_times, values)), name


def test_the_page_shows_what_was_saved(both: Path) -> None:
    contents = Contents(both.parent)
    for what in ("prompt", "lens", "attention"):
        ours, theirs = (getattr(contents, what)(name, "short", "1") for name in ("py", "exp"))
        assert without_times(ours) == without_times(theirs)
    assert contents.prompt("py", "short", "1")["projections"]


def test_texts_become_the_next_prompts_of_adhoc_and_keep_their_ids(data: Path, model: Any, capture: Run) -> None:
    assert capture(prompts=("--prompt", "one")).exit_code == 0
    saved = [cap.save(Experiment("exp", data)) for cap in package.capture(model, ["two", "one"], max_new_tokens=2)]
    assert sorted((each.prompt_id, each.metadata["prompt_text"]) for each in saved) == [("1", "one"), ("2", "two")]
    again = next(package.capture(model, "two", max_new_tokens=3)).save("exp")
    assert again.prompt_id == "2"
    assert len(again.response.tokens) <= 3
    assert [each.prompt_id for each in Experiment("exp", data).captures["adhoc"].values()] == ["1", "2"]


def test_an_experiment_is_made_and_records_its_model(root: Path, model: Any, tiny_folder: Path) -> None:
    cap = next(package.capture(model, "hello", max_new_tokens=2))
    cap.save(root / "experiments" / "new")
    assert Experiment("new", root).config.inference_model == str(tiny_folder)
    assert not list((root / "experiments" / "new").rglob("*.unfinished"))


def test_another_model_is_refused_unless_that_is_allowed(capture: Run, model: Any, data: Path) -> None:
    capture()
    config = data / "experiments" / "exp" / "config.json"
    config.write_text(json.dumps({"inference_model": "another"}))
    cap = next(package.capture(model, "hello", max_new_tokens=2))
    with pytest.raises(InputError, match="uses inference_model 'another'"):
        cap.save("exp")
    assert not (data / "experiments/exp/inference/raw/residual/adhoc").exists()
    cap.save("exp", allow_model_change=True)


@pytest.mark.parametrize(
    ("target", "expected"),
    [(3, "expected an Experiment, its name or its folder, got int"), ("a/b", "not the folder of an experiment"),
     ("no name", "experiment 'no name' is not a safe file name")],
)  # fmt: skip
def test_what_is_not_an_experiment_is_refused(target: Any, expected: str, root: Path, model: Any) -> None:
    with pytest.raises(InputError, match=expected):
        next(package.capture(model, "hello", max_new_tokens=1)).save(target)


def test_a_path_gets_the_raw_residual_alone(tmp_path: Path, model: Any) -> None:
    cap = next(package.capture(model, "hello", max_new_tokens=2))
    cap.save(tmp_path / "one.pt")
    assert Capture.open(tmp_path / "one.pt").token_ids == cap.token_ids


def test_add_ons_are_those_that_were_captured(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = next(package.capture(model, "hello", max_new_tokens=3, temperature=0))
    full = next(package.capture(model, "hello", max_new_tokens=3, temperature=0, internals="all"))
    assert plain.more is None
    expected, lens = [plain.attention(layer).patterns for layer in range(3)], plain.logit_lens()
    computed = [plain.internals(layer) for layer in range(3)]
    monkeypatch.setattr(
        "tlcapture.explore.applied_interventions.AppliedInterventions.forced",
        lambda *args: pytest.fail("computed again"),
    )
    for layer in range(3):
        torch.testing.assert_close(
            torch.tensor(full.attention(layer).patterns), torch.tensor(expected[layer]), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(dict(full.internals(layer)), dict(computed[layer]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        *(torch.tensor(each.top_probs) for each in (full.logit_lens(), lens)), rtol=2e-3, atol=1e-4
    )
    with pytest.raises(InputError, match="internals 'some': expected layers, or 'all'"):
        next(package.capture(model, "hello", internals="some"))


def test_a_model_says_what_it_is(model: Any, tiny_folder: Path) -> None:
    expected = f"<model {str(tiny_folder)!r} on engine {model.engine}, {model.device}, float32: 3 layers, d_model 32>"
    assert repr(model) == expected
