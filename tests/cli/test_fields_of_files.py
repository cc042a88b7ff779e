"""docs/formats.md names every field of every file that a run with everything writes."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open

from docs.generated_pages import fields_page
from tests.cli.test_conversations import with_template
from tlcapture import Experiment
from tlcapture.cli.main import main

PAGE = Path("docs/formats.md").read_text(encoding="utf-8") + fields_page()
CODE = [*re.findall(r"`([^`\n]+)`", PAGE), *re.findall(r"^    .*$", PAGE, re.MULTILINE)]
NAMED = {word for code in CODE for word in re.findall(r"\w+", code)}
# Fields whose content has names of layers, traits, options and so on as its keys, and how many levels of them.
KEYED = {
    "activations": 1, "arguments": 1, "baselines": 1, "best_vectors": 1, "calibration": 2, "chosen_layers": 1,
    "cosine_to_methods": 1, "cosine_to_traits": 1, "cross_trait": 2, "folders": 1, "held_out_calibration": 2,
    "hooks": 1, "planned": 1, "template_args": 1, "traits": 1, "versions": 1, "written": 1,
}  # fmt: skip
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
    {"role": "user", "content": "and?"},
]


def keys(value: Any, at: str = "", levels: int = 0) -> Iterator[tuple[str, str]]:
    """Every key that names a field, with where it is."""
    if isinstance(value, dict):
        is_calibration = "negative_mean" in value  # of a projection's own vector
        for key, inner in value.items():
            if levels <= 0 or is_calibration:
                yield str(key), at
            below = levels - 1 if levels > 0 else KEYED.get(str(key), 0)
            yield from keys(inner, f"{at}.{key}", below)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from keys(inner, at, levels)


def contents(path: Path) -> Iterator[Any]:
    """All that a file holds which has keys: JSON, what torch saved, indices, heads, records and names of tensors."""
    if path.suffix == ".json":
        yield json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".pt":
        yield torch.load(path, weights_only=True)
        with zipfile.ZipFile(path) as archive:
            yield from (json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json"))
    elif path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            head = json.loads(file.metadata()["content"])
            names = list(file.keys())
            yield {**file.metadata(), "content": head}
            yield dict.fromkeys(re.sub(r"\d+$", "L", name) for name in names)
            if "records" in names:
                records = bytes(file.get_tensor("records"))
                for each in head["prompts"]:
                    record = json.loads(records[slice(*each["record"])])
                    yield {"shared": record["shared"]}
                    yield from record["traits"].values()


def is_named(key: str) -> bool:
    return key in NAMED or key in CODE or ".hook_" in key  # TransformerLens's own names


@pytest.fixture
def experiment(data: Path, tiny_folder: Path, evaluated: Result) -> Path:
    """An experiment with views in both forms, samples of a conversation, interventions, thinking and a comparison."""
    model = with_template("qwen3", data / "qwen3", tiny_folder)
    questions = [{"question": f"why {n}?", "positive": "LOUD", "negative": "soft"} for n in range(2)]
    (data / "datasets/traits/tone/loud/steering.json").write_text(json.dumps(questions))
    talks = {"name": "talks", "prompts": [{"id": 1, "note": "n", "messages": TALK}]}
    (data / "datasets/inference/talks.json").write_text(json.dumps(talks))
    new = ("--max-new-tokens", 6, "--no-check", "--model", model, "--allow-model-change")
    sampled = ("--top-p", 0.9, "--top-k", 40, "--min-p", 0.01, "--repetition-penalty", 1.1, "--stop", "zzz")
    pushed = ("--steer", "tone/loud:0.2@1:thinking", "--ablate", "tone/warm@1", "--cap", "tone/loud:1@2")
    parts = ("--attention", "--attention-layers", 1, "--logit-lens", "--lens-layers", 1, "--tokens", "response")
    short = ("--prompt-set", "short", "--limit", 1)
    run("steer", "--traits", "tone/loud", "--layers", 1, "--methods", "mean_diff", "--coefficients", "0.2,0.4")
    whole = ("--layer-internals", "all", "--capture-attn", "--samples", 2)
    run("capture", "--prompt-set", "talks", *whole, *sampled, *new)
    run("capture", *short, "--attention", "--logit-lens", "--format", "compact", *new)
    run("capture", *short, *pushed, *parts, "--variant", "pushed", *new)
    run("capture", "--responses-from", "exp/short", "--variant", "again", *new[2:])
    run("capture", "--prompt-set", "other", "--projections-only", *new)
    run("project", "--prompt-set", "short@again", "--centered", "--format", "json")
    run("compare", "exp/short", "exp/short@pushed")
    Experiment("exp", data).captures["short"][1].add_note("here", 1, 3)
    return data / "experiments" / "exp"


def run(command: str, *words: object) -> Result:
    named = () if command == "compare" else ("--experiment", "exp")
    done = CliRunner().invoke(main, [str(word) for word in (command, *named, *words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.filterwarnings("ignore:.*by default", "ignore:.*no better")
def test_the_page_names_every_field_of_every_file(experiment: Path) -> None:
    files = [path for path in experiment.rglob("*") if path.is_file() and ".locks" not in path.parts]
    unnamed = {
        (key, f"{re.sub(r'[0-9]+', 'N', str(path.relative_to(experiment)))}: {at}")
        for path in files
        for content in contents(path)
        for key, at in keys(content)
        if not is_named(key)
    }
    assert not unnamed
    kinds = {path.suffix for path in files}
    assert kinds == {".json", ".pt", ".safetensors", ".png"}
    found = {key for path in files for content in contents(path) for key, _ in keys(content)}
    assert {"interventions", "thinking", "sample", "dropped", "tokens_from", "centered", "rank_correlation"} <= found
