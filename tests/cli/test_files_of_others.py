"""Prompt sets and projection files as others write them: ids of any type, titles, lists, folders, missing labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from tests.page.conftest import TRAIT, projection, scores, write, write_experiment
from tests.page.test_export import carried, manifest
from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError, StorageError
from tlcapture.explore.experiment import Experiment
from tlcapture.names import Trait
from tlcapture.page.contents import Contents
from tlcapture.page.server import page_app
from tlcapture.prompts.prompt_sets import read_prompt_file, read_prompt_set
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.projections.token_scores import TokenScores

Run = Callable[..., Result]
ADD_ONS = ("--attention", "--logit-lens", "--layer-internals", 1)


def make_set(data: Path, name: str, content: Any) -> None:
    path = data / "datasets" / "inference" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def ids_in_files(folder: Path) -> dict[str, set[Any]]:
    """Every id that the files of an experiment record, by folder."""
    found: dict[str, set[Any]] = {}
    for path in folder.rglob("*"):
        place = path.relative_to(folder).parts
        if path.suffix == ".json" and place[0] in ("inference", "analysis"):
            content = json.loads(path.read_text())
            metadata = content.get("metadata", content)
            records = [metadata, metadata["capture"]] if "capture" in metadata else [metadata]
        elif path.suffix == ".pt" and place[:2] == ("inference", "raw"):
            records = [torch.load(path, weights_only=True)["metadata"]]
        else:
            continue
        found.setdefault("/".join(place[:3]), set()).update(record["prompt_id"] for record in records)
    return found


@pytest.mark.parametrize("words", [ADD_ONS, ("--attention", "--projections-only")], ids=["raw", "projections only"])
def test_an_id_has_in_every_file_the_type_of_its_prompt_set(
    capture: Run, extract: Run, data: Path, words: tuple[object, ...]
) -> None:
    make_set(data, "short", [{"id": 1, "text": "hi"}, {"id": "2", "text": "ho"}, {"id": "x", "prompt": "hey"}])
    assert extract("--component", "residual").exit_code == 0
    assert capture(*words).exit_code == 0
    found = ids_in_files(data / "experiments" / "exp")
    assert len(found) == (5 if words == ADD_ONS else 3)
    assert all(ids == {1, "2", "x"} for ids in found.values()), found
    assert "3 prompts skipped" in capture(*words, "--skip-existing").output
    exp = Experiment("exp", data)
    assert set(exp.to_pandas("short").prompt_id) == {1, "2", "x"}
    assert [each["id"] for each in Contents(data).prompt_set("exp", "short")["prompts"]] == [1, "2", "x"]
    if words == ADD_ONS:
        assert [cap.prompt_id for cap in exp.captures("short").values()] == [1, "2", "x"]
        assert exp.captures("short")[1].prompt_id == exp.captures("short")["1"].prompt_id == 1
        assert capture("--replay", "--attention").exit_code == 0
        assert ids_in_files(data / "experiments" / "exp") == found


def test_a_number_as_id_samples_what_its_digits_sample(capture: Run, data: Path, raw: Path) -> None:
    responses = []
    for number in (1, "1"):
        make_set(data, "short", [{"id": number, "text": "hi"}])
        assert capture("--temperature", 2).exit_code == 0
        responses.append(Capture.open(raw / "1.pt").token_ids)
    assert responses[0] == responses[1]


def test_a_further_key_that_nearly_has_a_meaning_is_said_once(capture: Run, data: Path, raw: Path) -> None:
    prompts = [{"id": n, "text": "hi", "sytem_prompt": "Be brief.", "source": "a book", "tags": []} for n in (1, 2)]
    prompts[1]["system"] = "Be brief."
    content = {"prompts": prompts, "System-Prompt": "x", "licence": "CC0", "version": 2}
    (data / "datasets" / "inference" / "odd.json").write_text(json.dumps(content))
    result = capture("--prompt-set", "odd", "--no-project", prompts=())
    assert result.exit_code == 0
    said = [line for line in result.stderr.splitlines() if "without a meaning" in line]
    assert [line.split(": ", 1)[1] for line in said] == [
        "odd: 'System-Prompt' is kept as a key without a meaning here: is it 'system_prompt'?",
        "odd: 'sytem_prompt' is kept as a key without a meaning here: is it 'system_prompt'?",
        "odd: 'system' is kept as a key without a meaning here: is it 'system_prompt'?",
    ]
    metadata = torch.load(raw.parent / "odd" / "1.pt", weights_only=True)["metadata"]
    assert metadata["prompt_fields"]["sytem_prompt"] == "Be brief."


def test_a_prompt_set_in_another_form_is_told_from_a_missing_one(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "inference"
    folder.mkdir(parents=True)
    (folder / "mine.jsonl").write_text('{"id": 1, "text": "a"}\n')
    (folder / "lines.json").write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    for name in ("mine", "mine.jsonl"):
        with pytest.raises(InputError, match=r"no prompt set 'mine.*mine\.jsonl is not one: a prompt set is a "):
            read_prompt_set(Datasets(tmp_path), name)
    with pytest.raises(InputError, match=r"line 2, column 1: not valid JSON: .*: JSON lines\? Put them into one list"):
        read_prompt_set(Datasets(tmp_path), "lines")


def test_null_is_as_good_as_no_key(tmp_path: Path) -> None:
    """As tables write what they lack."""
    nulls = {"text": None, "prompt": None, "messages": None, "note": None, "system_prompt": None, "topic": None}
    messages = [{"role": "user", "content": "hey"}]
    prompts = [
        {**nulls, "id": 1, "text": "hi"},
        {**nulls, "id": 2, "prompt": "ho"},
        {**nulls, "id": 3, "messages": messages},
    ]
    content = {"name": None, "title": None, "description": None, "system_prompt": None, "prompts": prompts}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    found = read_prompt_file(path)
    assert (found.name, found.title, found.description, found.system_prompt) == ("mine", "mine", "", None)
    assert [prompt.text for prompt in found.prompts] == ["hi", "ho", "hey"]
    assert [prompt.fields for prompt in found.prompts] == [{"topic": None}] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["hi", "ho"], 'prompts[0]: expected {"id", "text"} or {"id", "messages"}, found \'hi\''),
        ([{"id": 1, "text": "hi"}, None], 'prompts[1]: expected {"id", "text"} or {"id", "messages"}, found null'),
        ({"1": "hi"}, 'expected a list of prompts, or {"prompts": [...]}'),
        ("hi", 'expected a list of prompts, or {"prompts": [...]}'),
        ({"prompts": {"1": "hi"}}, "prompts: expected a list, found an object"),
    ],
)
def test_another_shape_is_refused_with_the_one_expected(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_prompt_file(path)
    assert str(caught.value).removesuffix(" (and 1 more)") == f"{path}: {message}"


def test_further_keys_of_a_prompt_are_in_all_metadata(capture: Run, extract: Run, data: Path, raw: Path) -> None:
    fields = {"topic": "sea", "labels": [1, None, {"a": 0.5}]}
    prompts = [{"id": 1, "text": "hi", **fields}, {"id": 2, "text": "ho"}]
    make_set(data, "short", {"name": "A title", "prompts": prompts})
    assert capture("--layer-internals", 0).exit_code == 0
    opened = Capture.open(raw / "1.pt").metadata
    internals = torch.load(raw.parents[1] / "internals/short/1_L0.pt", weights_only=True)["metadata"]
    assert opened["prompt_fields"] == internals["prompt_fields"] == fields
    assert opened["prompt_set"] == "short"
    assert "prompt_fields" not in Capture.open(raw / "2.pt").metadata
    assert extract("--component", "residual").exit_code == 0
    make_set(data, "other", {"name": "other", "prompts": prompts})
    assert capture("--projections-only", prompts=("--prompt-set", "other")).exit_code == 0
    path = data / "experiments/exp/inference/tone/loud/residual_stream/other/1.json"
    assert json.loads(path.read_text())["metadata"]["capture"]["prompt_fields"] == fields


@pytest.fixture
def nested(tlcapture: Run, capture: Run, extract: Run, data: Path) -> Path:
    """Sets `general`, `general/mine`, `general-mine` and `residual_stream/x`, captured and projected."""
    for name in NESTED:
        make_set(data, name, {"name": f"Title of {name}", "prompts": [{"id": 1, "text": name}]})
    assert extract("--component", "residual").exit_code == 0
    done = capture("--attention", prompts=("--prompt-set", ",".join(NESTED)))
    assert done.exit_code == 0, done.output
    return data


NESTED = ["general", "general-mine", "general/mine", "residual_stream/x"]


def test_a_set_in_a_subfolder_is_captured_into_folders_of_its_path(nested: Path, tlcapture: Run, capture: Run) -> None:
    folder = nested / "experiments" / "exp"
    for name in NESTED:
        assert Capture.open(folder / f"inference/raw/residual/{name}/1.pt").metadata["prompt_text"] == name
        assert (folder / f"analysis/per_token/{name}/1_attention.json").is_file()
        scores_file = folder / f"inference/tone/loud/residual_stream/{name}/1.json"
        assert json.loads(scores_file.read_text())["metadata"]["prompt_set"] == name
        assert TokenScores.read(scores_file).prompt_set == name
    layout = Layout(nested, "exp")
    assert layout.prompt_sets() == layout.captured_prompt_sets() == NESTED
    assert {str(trait) for trait, _ in layout.projection_folders()} == {"tone/loud", "tone/warm"}
    assert len({layout.lock(f"captures-of-{name}") for name in NESTED}) == len(NESTED)
    again = capture("--attention", "--skip-existing", prompts=("--prompt-set", ",".join(NESTED)))
    assert "4 prompts skipped" in again.output
    exp = Experiment("exp", nested)
    assert list(exp.captures) == NESTED
    assert exp.captures["general/mine"][1].metadata["prompt_set"] == "general/mine"
    assert set(exp.to_pandas("general/mine").prompt_id) == {1}
    done = tlcapture("project", "--experiment", "exp", "--all-prompt-sets", "--layer", 0)
    assert "wrote 8 files" in done.output
    assert "wrote 8 files" in tlcapture("project", "--experiment", "exp", "--all-prompt-sets", "--dynamics-only").output


def test_a_set_in_a_subfolder_is_on_the_page(nested: Path, tlcapture: Run) -> None:
    from starlette.testclient import TestClient

    target = nested / "page.html"
    done = tlcapture("view", "--experiment", "exp", "--export", target)
    assert done.exit_code == 0, done.output
    found = carried(target.read_text())
    with TestClient(page_app(nested), base_url="http://localhost") as client:
        assert client.get("/api/experiments").json()[0]["prompt_sets"] == NESTED
        for path in ("exp/sets/general~mine", "exp/sets/general~mine/1", "exp/sets/general~mine/1/attention/0",
                     "exp/averages/general~mine/tone/loud/residual"):  # fmt: skip
            assert found[path] == client.get(f"/api/{path}").json()
        assert client.get("/api/exp/sets/..~..~x").status_code == 404
        assert client.get("/api/exp/sets/~etc").status_code == 404
    done = tlcapture("view", "--experiment", "exp", "--prompt-set", "general/mine", "--png", nested / "pictures")
    assert done.exit_code == 0, done.output
    drawn = {path.relative_to(nested / "pictures").as_posix() for path in (nested / "pictures").rglob("*.png")}
    assert drawn == {
        f"tone/{name}/residual_stream/general/mine/exp_tone_{name}_general_mine_1.png" for name in ("loud", "warm")
    }


def test_of_all_sets_a_bad_one_is_named_and_the_others_run(
    capture: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcapture.storage.experiments.datasets.shipped_datasets", lambda: data / "nothing")
    make_set(data, "sub/deep/mine", [{"id": 1, "text": "hi"}])
    make_set(data, "sub/bad", {"prompts": []})
    make_set(data, "my notes", [{"id": 1, "text": "hi"}])
    (data / "datasets/inference/broken.json").write_text("{")
    dry = capture("--dry-run", prompts=("--all-prompt-sets",)).output
    result = capture(prompts=("--all-prompt-sets",))
    assert result.exit_code == 1
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed")]
    assert [line.split(": ")[1] for line in failed] == ["broken", "my notes", "sub/bad"]
    assert all(f"would {line}".replace("failed", "fail", 1) in dry for line in failed)
    assert Layout(data, "exp").captured_prompt_sets() == ["other", "short", "sub/deep/mine"]
    refused = capture(prompts=("--prompt-set", "short,sub/bad"))
    assert refused.exit_code == 2


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/", "a/../../b"])
def test_a_set_outside_the_folder_is_refused(capture: Run, tlcapture: Run, data: Path, name: str) -> None:
    (data / "x.json").write_text(json.dumps([{"id": 1, "text": "hi"}]))
    for result in (
        capture(prompts=("--prompt-set", name)),
        tlcapture("view", "--experiment", "exp", "--prompt-set", name),
    ):
        assert result.exit_code == 2
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")


# -- projections ----------------------------------------------------------------------------------


def without(content: Any, *keys: str) -> Any:
    """A copy without keys, at any depth."""
    if isinstance(content, dict):
        return {key: without(value, *keys) for key, value in content.items() if key not in keys}
    return [without(each, *keys) for each in content] if isinstance(content, list) else content


LABELS = (
    "text", "n_tokens", "sublayers", "trait", "method", "component", "selected_by", "score", "model", "experiment",
    "prompt_set", "inference_model", "inference_experiment", "projection_date",
)  # fmt: skip


def slim(content: Any, place: str) -> Any:
    """Only layers 0 and 2, with the list of them in the metadata or beside it; the vector is of layer 2."""
    kept = {name: [[row[0], row[2]] for row in part] for name, part in content["projections"].items()}
    metadata = {**content["metadata"], "vector_source": {"layer": 2}}
    made = {**content, "projections": kept, "metadata": metadata}
    (metadata if place == "metadata" else made)["layers"] = [0, 2]
    return made


def in_order(layers: list[Any], place: str = "top") -> dict[str, Any]:
    """Only the given layers, in this order, with the list of them; the vector is of layer 2."""
    content = projection(1)
    content["projections"] = {
        part: [[token[int(layer)] for layer in layers] for token in rows]
        for part, rows in content["projections"].items()
    }
    (content if place == "top" else content["metadata"])["layers"] = layers
    content["metadata"]["vector_source"]["layer"] = 2
    return content


@pytest.mark.parametrize("place", ["top", "metadata"])
@pytest.mark.parametrize("layers", [[0, 2], [2, 0], [2, 1, 0], [1, 2, 0], [2]])
def test_a_slim_file_has_its_layers_in_any_order(layers: list[int], place: str, tmp_path: Path) -> None:
    found = ProjectionFile.parse(in_order(layers, place), tmp_path / "1.json")
    assert found.layers == sorted(layers)
    whole = [*found.trajectory[0], *found.trajectory[1]]
    assert whole == [token[2][-1] for token in scores(1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ["0", "2"]}, "layers: expected different numbers of layers"),
        ({"layers": [0.0, 2.0]}, "layers: expected different numbers of layers"),
        ({"layers": [2, 2]}, "layers: expected different numbers of layers"),
        ({"layers": [-1, 2]}, "layers: expected different numbers of layers"),
        ({"layers": [0, 1, 2, 3]}, "2 scores per token for 4 layers in the list layers"),
    ],
)
def test_a_list_of_layers_that_does_not_say_which_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=message):
        ProjectionFile.parse({**in_order([0, 2]), **change}, tmp_path / "1.json")


def test_scores_in_another_order_of_points_are_not_taken_for_the_trajectory(tmp_path: Path) -> None:
    content = projection(1)
    content["metadata"]["sublayers"].reverse()
    with pytest.raises(StorageError, match="sublayers end with residual_in, expected residual_out or attn_out"):
        ProjectionFile.parse(content, tmp_path / "1.json")


FORMS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "without labels": (lambda content: without(content, *LABELS), 1),
    "with a number as id": (lambda content: {**content, "metadata": {**content["metadata"], "prompt_id": 1}}, 1),
    "without an id": (lambda content: without(content, "prompt_id", "prompt_set"), 1),
    "slim, layers in metadata": (lambda content: slim(content, "metadata"), 2),
    "slim, layers beside it": (lambda content: slim(content, "top"), 2),
    "slim, without labels": (lambda content: without(slim(content, "top"), *LABELS), 2),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_projection_without_labels_is_read(tlcapture: Run, root: Path, form: str) -> None:
    write_experiment(root)
    make, layer = FORMS[form]
    layout = Layout(root, "exp")
    for number in ("2", "3"):
        layout.residual("odd", number).unlink()
    layout.projection(Trait.parse(TRAIT), "residual", "odd", "2").unlink()
    path = layout.projection(Trait.parse(TRAIT), "residual", "odd", "1")
    given = make(projection(1))
    write(path, given)
    trajectory = [row[layer][2] for row in scores(1)]  # written by hand: residual_out at the vector's layer
    done = tlcapture("project", "--experiment", "exp", "--prompt-set", "odd", "--dynamics-only")
    assert done.exit_code == 0, done.output
    content = read_json(path)
    expected = {**given, "metadata": {**given["metadata"], "definitions": 2}}
    assert without(content, "dynamics") == without(expected, "dynamics")
    assert content["dynamics"]["velocity"] == [b - a for a, b in pairwise(trajectory)]
    (shown,) = Contents(root).prompt("exp", "odd", "1")["projections"]
    assert shown["trajectory"] == trajectory
    layers = Contents(root).layers("exp", "odd", "1", *TRAIT.split("/"), "residual")
    assert layers["sublayers"] == ["residual_in", "after_attn", "residual_out"]
    assert layers["scores"][1][layer] == scores(1)[1][layer]
    read = TokenScores.read(path)
    assert (read.prompt_set, str(read.prompt_id), read.trait, read.component) == ("odd", "1", TRAIT, "residual")
    assert read.trajectory.tolist() == trajectory
    viewed = tlcapture("view", "--experiment", "exp", "--export", root / "page.html", "--png", root / "pictures")
    assert viewed.exit_code == 0, viewed.output
    assert carried((root / "page.html").read_text())["exp/sets/odd/1"]["projections"][0]["trajectory"] == trajectory  # type: ignore[index]


@pytest.mark.parametrize("lacking", ["tokens", "projections", "vector_source", "layer"])
def test_a_projection_without_a_number_is_refused(tlcapture: Run, root: Path, lacking: str) -> None:
    write_experiment(root)
    path = Layout(root, "exp").projection(Trait.parse(TRAIT), "residual", "odd", "1")
    write(path, without(projection(1), lacking))
    done = tlcapture("project", "--experiment", "exp", "--prompt-set", "odd", "--dynamics-only")
    assert done.exit_code == 1
    (line,) = (line for line in done.stderr.splitlines() if str(path) in line)
    assert lacking in line


BAD = {
    "inference/style/odd/residual_stream/odd/1.json": "exp/sets/odd/2",
    "analysis/per_token/odd/1_attention.json": "exp/sets/odd/1/lens",
    "analysis/per_token/odd/1_logit_lens.json": "exp/sets/odd/1/attention",
    "extraction/extraction_evaluation.json": "exp/sets/odd/1",
    "extraction/style/odd/vectors/metadata.json": "exp/sets/odd/1",
}


# Two kinds of content for each file, all five in turn.
CONTENTS = cycle(["", "{", '{"a": 1}', "[1, 2]", "\x00\x01"])


@pytest.mark.parametrize(("bad", "content"), [(bad, next(CONTENTS)) for bad in BAD for _ in range(2)])
def test_a_bad_file_is_named_and_the_rest_is_exported(tlcapture: Run, root: Path, bad: str, content: str) -> None:
    write_experiment(root)
    target = root / "page.html"
    assert tlcapture("view", "--experiment", "exp", "--export", target).exit_code == 0
    whole = set(carried(target.read_text()))
    path = root / "experiments/exp" / bad
    path.write_text(content)
    done = tlcapture("view", "--experiment", "exp", "--export", target)
    assert "Traceback" not in done.output
    found = carried(target.read_text())
    assert BAD[bad] in found
    assert len(whole - set(found)) < len(whole) / 2
    if "extraction" not in bad:  # those are shown as problems of the vectors, or as vectors of unknown origin
        assert done.exit_code == 1
        assert [line for line in done.stderr.splitlines() if line.startswith(f"failed: {path}: ")]
        kinds = {"1_attention.json": "attention", "1_logit_lens.json": "lens"}
        if path.name in kinds:
            missing = manifest(target.read_text())["missing"][f"exp/sets/odd/1/{kinds[path.name]}"]  # type: ignore[index]
            assert path.name in missing["what"]


def test_pictures_are_drawn_of_all_files_but_a_bad_one(tlcapture: Run, root: Path) -> None:
    write_experiment(root)
    path = root / "experiments/exp/inference/style/odd/residual_stream/odd/1.json"
    path.write_text("{")
    done = tlcapture("view", "--experiment", "exp", "--png", root / "pictures")
    assert done.exit_code == 1
    assert str(path) in done.stderr
    assert [each.name for each in (root / "pictures").rglob("*.png")] == ["exp_style_odd_odd_2.png"]
