"""The same experiment as JSON and in the compact form: what page, frames, comparisons and exports show is the same."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import Result

from tlcapture.errors import TlcaptureError
from tlcapture.exchange.exported import ChosenActivations, read_exported
from tlcapture.explore.experiment import Experiment
from tlcapture.page.contents import RESOURCES, Contents
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json
from tlcapture.traits.projections.saved import all_saved

Run = Callable[..., Result]
SETS = ("short", "other", "short@calm")
TRAITS = ("tone/loud", "tone/warm")
VIEWS = ("--attention", "--logit-lens")
GREEDY = ("--temperature", 0)
HALF = {"rtol": 1e-3, "atol": 6e-8}  # of weights in 16 bits
# What is of weights, of the run itself, or of no file that has two forms.
WEIGHTS = {"attention_token", "attention_heads", "attention_matrix"}
LEFT_OUT = {"at_work", "notes"}


def make(form: str, capture: Run, tlcapture: Run, data: Path) -> None:
    """An experiment with samples, a variant, all views, projected again and compared, and views made by `--replay`."""
    for folder in ("inference", "analysis", ".locks", "runs"):
        shutil.rmtree(data / "experiments" / "exp" / folder, ignore_errors=True)
    of_form = ("--format", form)
    project = ("project", "--experiment", "exp", "--prompt-set")
    replay = (*VIEWS, "--replay", "--prompt-set", "short@calm", "--attention-layers", "0,2", "--lens-top", 3)
    for done in (
        capture(*GREEDY, *VIEWS, "--capture-attn", "--layer-internals", 1, *of_form),
        capture("--samples", 2, "--temperature", 1, *of_form, prompts=("--prompt-set", "other")),
        capture(*GREEDY, "--steer", "tone/loud:+2@1", "--variant", "calm", *of_form),
        tlcapture("capture", "--experiment", "exp", *replay, *of_form),
        tlcapture(*project, "short", "--dynamics-only"),
        tlcapture(*project, "other", "--traits", "tone/warm", "--layer", 2, *of_form),
        tlcapture("compare", "exp/short", "exp/short@calm"),
    ):
        assert done.exit_code == 0, done.output
    files = [path for path in (data / "experiments/exp").rglob("*.safetensors") if "extraction" not in path.parts]
    assert bool(files) == (form == "compact")
    assert bool(list((data / "experiments/exp/inference").rglob("*_stream/**/*.json"))) == (form == "json")


def resources(data: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Every resource of the page with every choice of its parameters."""
    contents, layout = Contents(data), Layout(data, "exp")
    choices: dict[str, Any] = {
        "experiment": lambda _: ["exp"],
        "source": lambda _: ["exp"],
        "other": lambda _: [each["other"] for each in contents.comparisons("exp")],
        "prompt_set": lambda _: SETS,
        "prompt_id": lambda so_far: layout.prompt_ids(so_far["prompt_set"]),
        "category": lambda _: ["tone"],
        "name": lambda _: ["loud", "warm"],
        "component": lambda _: ["residual", "attn_out"],
        "layer": lambda _: ["0", "1", "2"],
        "head": lambda _: ["0", "mean"],
        "token": lambda _: ["1", "5"],
    }

    def chosen(names: list[str], so_far: dict[str, str]) -> Iterator[dict[str, str]]:
        if not names:
            yield so_far
        for each in choices[names[0]](so_far) if names else ():
            yield from chosen(names[1:], {**so_far, names[0]: str(each)})

    for resource, path in RESOURCES.items():
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        for parameters in chosen(names, {}):
            if resource not in LEFT_OUT:
                yield resource, parameters


def shown(data: Path) -> dict[str, Any]:
    """What the page shows, by resource and parameters; of what is missing, that it is."""
    found: dict[str, Any] = {}
    for resource, parameters in resources(data):
        try:
            value = getattr(Contents(data), resource)(**parameters)
        except TlcaptureError as error:
            value = str(error).replace(".safetensors", ".json")
        if resource == "attention_matrix" and not isinstance(value, str):
            value["weights"] = np.frombuffer(base64.b64decode(value["weights"]), np.float16).astype(float).tolist()
        if resource == "comparison" and not isinstance(value, str):
            value = undated(value)
        found[f"{resource} {' '.join(parameters.values())}"] = value
    return found


def undated(comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison without its date."""
    dated = {"comparison_date"}
    return {**comparison, "metadata": {k: v for k, v in comparison["metadata"].items() if k not in dated}}


def frames(data: Path) -> dict[str, Any]:
    """Every table of the experiment in Python."""
    experiment, found = Experiment("exp", data), dict[str, Any]()
    for prompt_set in SETS:
        captures = experiment.captures[prompt_set]
        found[f"{prompt_set} rises"] = captures.rises()
        for traits in (None, *TRAITS):
            found[f"{prompt_set} of {traits}"] = captures.to_pandas(traits)
        found[f"{prompt_set} at all layers"] = captures.to_pandas(layers="all")
    for by in ("trait", "layer"):
        found[f"compared by {by}"] = experiment.compare("exp/short@calm", "short", by=by)
    return found


def exported(data: Path) -> list[Any]:
    """What an export has of every capture, without dates."""
    layout, found = Layout(data, "exp"), []
    for prompt_set in SETS:
        for name in layout.prompt_ids(prompt_set):
            each = read_exported(layout, prompt_set, name, ChosenActivations())
            for projection in each.record["projections"]:
                for date in ("projection_date", "capture"):
                    projection["content"]["metadata"].pop(date, None)
            found.append((prompt_set, name, each.record["projections"], each.columns))
    return found


def assert_close(one: Any, other: Any, where: str) -> None:
    """The same, but for the rounding of weights to 16 bits."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close(one[key], other[key], f"{where} {key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for first, second in zip(one, other, strict=True):
            assert_close(first, second, where)
    elif isinstance(one, float):
        np.testing.assert_allclose(one, other, **HALF, err_msg=where)
    else:
        assert one == other, where


def test_everything_shows_the_same_of_both_forms(extract: Run, capture: Run, tlcapture: Run, data: Path) -> None:
    extract()
    seen = {}
    for form in ("json", "compact"):
        make(form, capture, tlcapture, data)
        comparison = sorted((data / "experiments/exp/analysis/compare").rglob("*.json"))
        layout = Layout(data, "exp")
        assert all(all_saved(layout, name, each) for name in SETS for each in layout.prompt_ids(name))
        seen[form] = shown(data), frames(data), exported(data), [undated(read_json(path)) for path in comparison]
    (page, tables, rows, compared), (page2, tables2, rows2, compared2) = seen.values()
    assert page.keys() == page2.keys()
    assert {name.split()[0] for name in page} == RESOURCES.keys() - LEFT_OUT
    n_weights = 0
    for name, value in page.items():
        if name.split()[0] in WEIGHTS:
            assert_close(value, page2[name], name)
            n_weights += not isinstance(value, str)
        else:
            assert value == page2[name], name
    assert n_weights > 40
    assert tables.keys() == tables2.keys()
    for name, table in tables.items():
        assert len(table), name
        assert table.equals(tables2[name]), name
    assert rows == rows2
    assert len(compared) == len(compared2) == 3
    assert compared == compared2
