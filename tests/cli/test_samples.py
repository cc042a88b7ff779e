"""`capture --samples N`: files of each sample, what is missing, replay, projections, frames and the summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from tests.cli.conftest import make_prompt_set
from tlcapture import Experiment
from tlcapture.captures.capture import Capture
from tlcapture.commands.projecting import top_traits
from tlcapture.commands.projecting.top_traits import summary_of
from tlcapture.page.contents import Contents
from tlcapture.page.export import export_page
from tlcapture.storage.experiments.layout import Layout

Run = Callable[..., Result]
HOT = ("--temperature", "1.5")


def names(folder: Path, pattern: str = "*.pt") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def ids_of(path: Path) -> list[int]:
    return Capture.open(path).response.token_ids


def test_each_sample_has_files_of_its_own_and_the_first_draws_what_one_response_would(
    capture: Run, data: Path, raw: Path, analysis: Path
) -> None:
    path = data / "datasets/inference/short.json"
    content = json.loads(path.read_text())
    content["prompts"][0]["id"] = 7
    path.write_text(json.dumps(content))
    assert capture(*HOT).exit_code == 0
    alone = {name: ids_of(raw / f"{name}.pt") for name in ("7", "2", "3")}
    done = capture(*HOT, "--samples", 2, "--attention", "--logit-lens", "--layer-internals", 1, "--limit", 2)
    assert done.exit_code == 0, done.stderr
    assert names(raw) == ["2.pt", "2.s1.pt", "2.s2.pt", "3.pt", "7.pt", "7.s1.pt", "7.s2.pt"]
    assert {name: ids_of(raw / f"{name}.s1.pt") for name in ("7", "2")} == {name: alone[name] for name in ("7", "2")}
    assert ids_of(raw / "7.s2.pt") != alone["7"]
    metadata = Capture.open(raw / "7.s2.pt").metadata
    assert (metadata["prompt_id"], metadata["sample"]) == (7, 2)
    assert "sample" not in Capture.open(raw / "7.pt").metadata
    for kind in ("attention", "logit_lens"):
        found = json.loads((analysis / f"7.s2_{kind}.json").read_text())
        assert (found["prompt_id"], found["sample"]) == (7, 2)
        assert found["tokens"] == Capture.open(raw / "7.s2.pt").tokens
    internals = torch.load(raw.parents[1] / "internals/short/7.s2_L1.pt", weights_only=True)
    assert internals["metadata"]["sample"] == 2
    assert internals["token_ids"] == Capture.open(raw / "7.s2.pt").token_ids


def test_only_the_samples_that_are_missing_are_made_with_the_bits_of_one_run(
    capture: Run, raw: Path, tmp_path: Path
) -> None:
    few = ("--batch-size", 6, *HOT)
    capture(*few, "--samples", 4)
    whole = {path.name: torch.load(path, weights_only=True) for path in raw.glob("*.pt")}
    for name in ("1.s3.pt", "3.s1.pt"):
        (raw / name).unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in raw.glob("*.pt")}
    again = capture(*few, "--samples", 4, "--skip-existing")
    assert again.exit_code == 0, again.stderr
    for path in raw.glob("*.pt"):
        assert path.name not in kept or path.stat().st_mtime_ns == kept[path.name]
    for name in ("1.s3.pt", "3.s1.pt"):
        found, expected = torch.load(raw / name, weights_only=True), whole[name]
        for part in ("prompt", "response"):
            for layer, by_point in expected[part]["activations"].items():
                assert all(torch.equal(found[part]["activations"][layer][at], value) for at, value in by_point.items())
    more = capture(*few, "--samples", 5, "--skip-existing")
    assert more.exit_code == 0 and len(names(raw)) == 15


def test_a_replay_takes_all_samples_that_are_saved(capture: Run, raw: Path, analysis: Path) -> None:
    capture(*HOT, "--samples", 2, "--top-k", 9)
    before = {name: (raw / name).read_bytes() for name in names(raw)}
    done = capture("--replay", "--attention")
    assert done.exit_code == 0, done.stderr
    assert names(analysis, "*_attention.json") == [
        f"{n}.s{sample}_attention.json" for n in (1, 2, 3) for sample in (1, 2)
    ]
    assert {name: (raw / name).read_bytes() for name in names(raw)} == before
    assert Capture.open(raw / "1.s2.pt").metadata["sampling"]["top_k"] == 9
    one = capture("--replay", "--logit-lens", "--samples", 1)
    assert one.exit_code == 0 and names(analysis, "*_lens.json") == [f"{n}.s1_logit_lens.json" for n in (1, 2, 3)]
    more = capture("--replay", "--logit-lens", "--samples", 3)
    command = "tlcapture capture --experiment exp --prompt-set short --samples 3 --skip-existing"
    assert more.exit_code == 1 and f"3 of 9 are missing: run '{command}' first" in more.stderr


def test_a_dry_run_counts_the_files_of_all_samples(capture: Run, raw: Path) -> None:
    done = capture("--samples", 3, "--dry-run", "--json")
    assert json.loads(done.stdout)["estimate"]["kinds"]["raw residual"]["files"] == 9
    assert "9 responses to capture" in capture("--samples", 3, "--dry-run").stdout
    assert not raw.exists()
    capture("--samples", 2)
    again = json.loads(capture("--samples", 3, "--dry-run", "--json").stdout)["estimate"]
    assert sorted(Path(each).name for each in again["replaces"]) == names(raw)


def test_a_capture_of_another_prompt_is_never_replaced_by_a_sample(capture: Run, data: Path, raw: Path) -> None:
    make_prompt_set(data, "short", ["hello"])
    path = data / "datasets/inference/short.json"
    path.write_text(json.dumps([{"id": "a.s1", "text": "first"}]))
    capture()
    before = (raw / "a.s1.pt").read_bytes()
    path.write_text(json.dumps([{"id": "a", "text": "second"}]))
    done = capture("--samples", 1)
    assert done.exit_code == 1
    assert "a.s1.pt: the capture of another prompt, a.s1: rename one of the prompts" in done.stderr
    assert (raw / "a.s1.pt").read_bytes() == before
    path.write_text(json.dumps([{"id": "a", "text": "second"}, {"id": "a.s1", "text": "first"}]))
    both = capture("--samples", 2)
    assert both.exit_code in (1, 2) and "prompt a.s1 has the name of sample 1 of prompt a" in both.stderr


def test_given_prompts_keep_their_ids_with_samples(capture: Run, data: Path) -> None:
    folder = data / "experiments/exp/inference/raw/residual/adhoc"
    for text in ("one", "two", "one"):
        done = capture("--samples", 2, "--overwrite", prompts=("--prompt", text))
        assert done.exit_code == 0, done.stderr
    assert names(folder) == ["1.s1.pt", "1.s2.pt", "2.s1.pt", "2.s2.pt"]


@pytest.fixture
def sampled(capture: Run, extract: Run, data: Path) -> Path:
    """Three prompts with three samples each, projected onto two traits; returns the experiment's folder."""
    assert extract().exit_code == 0
    done = capture(*HOT, "--samples", 3, "--max-new-tokens", 9)
    assert done.exit_code == 0, done.stderr
    return data / "experiments" / "exp"


def test_python_has_samples_by_name_in_frames_and_together(sampled: Path, data: Path) -> None:
    exp = Experiment("exp", data)
    captures = exp.captures["short"]
    assert list(captures.keys()) == [f"{n}.s{sample}" for n in (1, 2, 3) for sample in (1, 2, 3)]
    assert (captures["2.s3"].prompt_id, captures["2.s3"].sample) == ("2", 3)
    assert [each.sample for each in captures.samples(2)] == [1, 2, 3]
    frame = exp.to_pandas("short", "tone/loud")
    assert set(zip(frame["prompt_id"], frame["sample"], strict=True)) == {
        (n, sample) for n in "123" for sample in (1, 2, 3)
    }
    own = frame[(frame["prompt_id"] == "2") & (frame["sample"] == 3)]["score"].to_numpy()
    assert np.allclose(own, captures["2.s3"].project("tone/loud").trajectory, atol=2e-2)


def projections(folder: Path, prompt: int, trait: str = "tone/loud") -> list[dict[str, Any]]:
    files = folder / "inference" / trait / "residual_stream/short"
    return [json.loads((files / f"{prompt}.s{sample}.json").read_text()) for sample in (1, 2, 3)]


def rise_of(content: dict[str, Any]) -> float:
    layer = content["metadata"]["vector_source"]["layer"]
    prompt, response = ([token[layer][-1] for token in content["projections"][part]] for part in ("prompt", "response"))
    return mean(response) - mean(prompt[1:])


def test_the_summary_has_a_row_for_each_prompt_with_mean_and_spread(
    sampled: Path, data: Path, tlcapture: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rises are standardised over the prompts, each of which has the mean of its samples."""
    monkeypatch.setattr(top_traits, "FEWEST_TO_COMPARE", 3)
    tops = summary_of(Layout(data, "exp"), "short").tops
    assert [top.prompt_id for top in tops] == ["1", "2", "3"]
    for number, top in enumerate(tops, start=1):
        by_prompt = [[rise_of(each) for each in projections(sampled, n, top.trait)] for n in (1, 2, 3)]
        means = np.array([mean(each) for each in by_prompt])
        own = (means[number - 1] - means.mean()) / means.std()
        assert top.samples is not None and top.samples.n == 3
        assert top.rise == pytest.approx(own, rel=1e-3)
        assert top.samples.rise == pytest.approx(stdev(by_prompt[number - 1]) / means.std(), rel=1e-3)
    shown = tlcapture("project", "--experiment", "exp", "--prompt-set", "short").stdout
    assert "1, 3 samples" in shown and "+-: the standard deviation over the samples of a prompt" in shown


def test_the_page_has_the_samples_of_a_prompt_with_their_mean_and_spread(
    sampled: Path, data: Path, tmp_path: Path
) -> None:
    contents = Contents(data)
    listed = contents.prompt_set("exp", "short")["prompts"]
    assert [(each["id"], each["prompt"], each["sample"]) for each in listed[:4]] == [
        ("1.s1", "1", 1), ("1.s2", "1", 2), ("1.s3", "1", 3), ("2.s1", "2", 1)
    ]  # fmt: skip
    assert listed[4]["text"] == "what?"
    found = contents.samples("exp", "short", "2", "tone", "loud", "residual")
    files = projections(sampled, 2)
    layer = files[0]["metadata"]["vector_source"]["layer"]
    third = [each["projections"]["response"][2][layer][-1] for each in files]
    assert found["mean"][found["position"].index(2)] == pytest.approx(mean(third))
    assert found["sd"][found["position"].index(2)] == pytest.approx(stdev(third))
    responses = [mean(token[layer][-1] for token in each["projections"]["response"]) for each in files]
    assert (found["response_mean"], found["response_sd"]) == (
        pytest.approx(mean(responses)), pytest.approx(stdev(responses))
    )  # fmt: skip
    page = tmp_path / "page.html"
    assert export_page(data, "exp", ["short"], page) == []
    assert 'id="data:exp/sets/short/2/samples/tone/loud/residual"' in page.read_text()


def test_projections_of_samples_are_kept_without_raw_files_too(capture: Run, extract: Run, data: Path) -> None:
    extract()
    words = (*HOT, "--samples", 2, "--projections-only")
    assert capture(*words).exit_code == 0
    files = sorted(data.glob("experiments/exp/inference/tone/loud/residual_stream/short/*.json"))
    assert [path.name for path in files] == [f"{n}.s{sample}.json" for n in (1, 2, 3) for sample in (1, 2)]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = capture(*words, "--skip-existing")
    assert again.exit_code == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in files} == before
    files[3].unlink()
    capture(*words, "--skip-existing")
    assert files[3].exists() and files[0].stat().st_mtime_ns == before[files[0]]
    only = json.loads(files[3].read_text())["metadata"]
    assert (only["prompt_id"], only["sample"], only["capture"]["sample"]) == ("2", 2, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--samples", 0), "invalid value for '--samples': 0 is not from 1 to 100000"),
        (("--top-p", 1.5), "invalid value for '--top-p': 1.5 is not from 0 to 1"),
        (("--top-p", "nan"), "top_p nan: expected a number from 0 to 1"),
        (("--top-k", "many"), "invalid value for '--top-k': 'many' is not a whole number"),
        (("--min-p", -1), "invalid value for '--min-p'"),
        (("--repetition-penalty", 0), "invalid value for '--repetition-penalty'"),
        (("--repetition-penalty", "inf"), "repetition_penalty inf: expected a number above 0"),
        (("--stop", ""), "stop '': expected a text that is not empty"),
    ],
)
def test_invalid_values_are_one_clear_line(words: tuple[object, ...], message: str, capture: Run, raw: Path) -> None:
    done = capture(*words)
    assert done.exit_code in (1, 2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not raw.exists()
