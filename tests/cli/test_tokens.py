"""`capture --tokens`: those rows of a full capture, in every file, and everything that reads them."""

from __future__ import annotations

import itertools
import shutil
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
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json, write_json
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.projections.token_scores import TokenScores
from tlcapture.views.kept_tokens import KeptTokens

Run = Callable[..., Result]
GREEDY = ("--temperature", 0, "--save-dtype", "float32")
VIEWS = ("--capture-attn", "--layer-internals", "all")
# Eight new tokens and more, so that a response can commit.
LONG = ("--max-new-tokens", 12)
N_NEW = 12
SELECTIONS = ["response", "last", "first:3", "-4:-1"]


def slice_of(selection: str) -> slice:
    """What a selection means, as a slice of the response."""
    known = {"response": slice(None), "last": slice(-1, None), "first:3": slice(3)}
    return known.get(selection) or slice(*(int(each) if each else None for each in selection.split(":")))


def positions_of(selection: str, n_prompt: int) -> list[int]:
    return list(range(n_prompt, n_prompt + N_NEW)[slice_of(selection)])


@pytest.fixture
def folder(data: Path) -> Path:
    return data / "experiments" / "exp"


def tree(folder: Path) -> dict[str, bytes]:
    """The files of an experiment, apart from the records of its runs."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(("runs/", ".locks/"))}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_file_holds_the_rows_of_a_whole_capture_that_were_asked_for(
    extract: Run, capture: Run, folder: Path, raw: Path, analysis: Path, projected: Path, selection: str
) -> None:
    extract()
    capture(*GREEDY, *VIEWS, *LONG)
    names = {
        "raw": raw / "1.pt",
        "internals": folder / "inference/raw/internals/short/1_L1.pt",
        "attention": analysis / "1_attention.json",
        "lens": analysis / "1_logit_lens.json",
        "projection": projected / "1.json",
    }
    before = {name: load(path) for name, path in names.items()}
    done = capture(*GREEDY, *VIEWS, *LONG, "--tokens", selection)
    assert done.exit_code == 0, done.output
    after = {name: load(path) for name, path in names.items()}
    n_prompt = len(before["raw"]["prompt"]["tokens"])
    kept = positions_of(selection, n_prompt)

    assert after["raw"]["metadata"]["positions"] == kept
    for part, rows in (("prompt", []), ("response", [each - n_prompt for each in kept])):
        assert after["raw"][part]["tokens"] == before["raw"][part]["tokens"]
        for layer, by_point in after["raw"][part]["activations"].items():
            assert "attn_out" in by_point
            for point, tensor in by_point.items():
                assert torch.equal(tensor, before["raw"][part]["activations"][layer][point][rows])

    assert after["internals"]["positions"] == after["internals"]["metadata"]["positions"] == kept
    tensors = {name: value for name, value in before["internals"].items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        rows = tensor[:, kept] if name.endswith("pattern") else tensor[kept]
        assert torch.equal(after["internals"][name], rows), name
    assert after["internals"]["tokens"] == before["internals"]["tokens"]

    assert after["attention"]["positions"] == after["lens"]["positions"] == kept
    assert after["attention"]["attention"] == [before["attention"]["attention"][each] for each in kept]
    last = len(before["lens"]["predictions"])
    expected = [before["lens"]["predictions"][each] for each in kept if each < last]
    for one, other in zip(after["lens"]["predictions"], expected, strict=True):
        assert {**one, "by_layer": 0} == {**other, "by_layer": 0}
        for layer, whole in zip(one["by_layer"], other["by_layer"], strict=True):
            # A product of other rows rounds otherwise.
            assert layer["actual_prob"] == pytest.approx(whole["actual_prob"], rel=2e-3)
            probs = [[each["prob"] for each in found["top_k"]] for found in (layer, whole)]
            assert probs[0] == pytest.approx(probs[1], rel=2e-3)

    was, now = before["projection"], after["projection"]
    assert now["metadata"]["positions"] == kept
    assert now["projections"] == {
        "prompt": [], "response": [was["projections"]["response"][each - n_prompt] for each in kept],
    }  # fmt: skip
    assert now["dynamics"] == was["dynamics"]
    assert now["metadata"]["chance"] == was["metadata"]["chance"]


def load(path: Path) -> Any:
    return read_json(path) if path.suffix == ".json" else torch.load(path, weights_only=True)


def test_a_capture_of_some_tokens_says_which_and_is_read_by_both_readers(capture: Run, raw: Path) -> None:
    capture(*GREEDY, *LONG, "--tokens", "2:5")
    saved = Capture.open(raw / "1.pt")
    n_prompt = len(saved.prompt.tokens)
    assert saved.positions.kept == (n_prompt + 2, n_prompt + 3, n_prompt + 4)
    assert saved.residual(1).shape == saved.residual(1, part="response").shape == (3, tiny.D_MODEL)
    assert saved.residual(1, part="prompt").shape == (0, tiny.D_MODEL)
    assert len(saved.tokens) == n_prompt + N_NEW
    copy = raw.parents[3] / "copy.pt"
    torch.save(torch.load(raw / "1.pt", weights_only=True), copy)  # without an index
    again = Capture.open(copy)
    assert again.positions == saved.positions
    assert torch.equal(again.residual(1), saved.residual(1))


@pytest.mark.parametrize("positions", [[3, 2], [1, 1], [-1], [99], [0, 1], [2.0], "all"])
def test_positions_that_do_not_fit_are_refused(capture: Run, raw: Path, positions: Any) -> None:
    capture(*GREEDY, "--tokens", "last")
    value = torch.load(raw / "1.pt", weights_only=True)
    value["metadata"]["positions"] = positions
    torch.save(value, raw / "1.pt")
    with pytest.raises(InputError.__mro__[1], match=r"1\.pt: not a valid raw residual file: ") as error:
        Capture.open(raw / "1.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ("last", "token 8 of 9 was kept"),
        ("first:3", "tokens 3 to 5 of 9 were kept"),
        ("100:", "none of 9 tokens was kept"),
    ],
)
def test_what_was_kept_is_said_in_words(selection: str, said: str) -> None:
    assert KeptTokens.parse(selection).of(n_prompt=3, n_tokens=9).described() == said


def test_files_of_all_tokens_do_not_mention_positions(extract: Run, capture: Run, folder: Path) -> None:
    extract()
    capture(*GREEDY, *VIEWS)
    assert not [name for name, content in tree(folder).items() if b"positions" in content]


@pytest.mark.parametrize(
    "words", ["first", "first:0", "first:-1", "5", "1:2:3", "3:3", "5:2", "-2:-5", ":0", "a:b", "", "prompt"]
)
def test_a_selection_that_says_nothing_is_one_clear_line(capture: Run, folder: Path, words: str) -> None:
    done = capture("--tokens", words)
    assert done.exit_code == 2
    assert "error: invalid value for '--tokens': " in done.output
    assert len([line for line in done.output.splitlines() if "--tokens" in line]) == 1
    assert not folder.exists()


def test_a_response_shorter_than_the_tokens_to_keep_leaves_files_without_rows(
    extract: Run, capture: Run, tlcapture: Run, folder: Path, raw: Path, analysis: Path, projected: Path
) -> None:
    extract()
    done = capture(*GREEDY, *VIEWS, "--tokens", "100:200")
    assert done.exit_code == 0, done.output
    saved = Capture.open(raw / "1.pt")
    assert saved.positions.kept == ()
    assert saved.residual(1).shape == (0, tiny.D_MODEL)
    scores = TokenScores.read(projected / "1.json")
    assert np.isnan(scores.trajectory).all()
    assert len(scores.trajectory) == len(saved.tokens)
    assert read_json(analysis / "1_attention.json")["attention"] == []
    assert read_json(analysis / "1_logit_lens.json")["predictions"] == []
    again = tlcapture("project", "--experiment", "exp", "--prompt-set", "short")
    assert again.exit_code == 0, again.output
    assert set(read_json(projected / "1.json")["dynamics"]["velocity"]) == {None}
    contents = Contents(folder.parents[1])
    assert set(contents.prompt("exp", "short", "1")["projections"][0]["trajectory"]) == {None}
    assert contents.lens("exp", "short", "1")["token_idx"] == []
    explored = Experiment("exp", folder.parents[1])
    assert len(explored.to_pandas("short")) == 0
    assert "tokens" in explored.captures("short")["1"]._repr_html_()


@pytest.mark.parametrize("dynamics_only", [False, True])
def test_projecting_again_gives_null_for_what_needs_a_missing_token_and_says_so_once(
    extract: Run, capture: Run, tlcapture: Run, projected: Path, dynamics_only: bool
) -> None:
    extract()
    capture(*GREEDY, *LONG)
    whole = read_json(projected / "1.json")
    n_prompt = len(whole["prompt"]["tokens"])
    again = ("project", "--experiment", "exp", "--prompt-set", "short", *(["--dynamics-only"] if dynamics_only else []))

    capture(*GREEDY, *LONG, "--tokens", "response")
    done = tlcapture(*again)
    assert done.exit_code == 0, done.output
    assert done.output.count("values that need the others are null") == 1
    found, was = read_json(projected / "1.json"), whole["dynamics"]
    now = found["dynamics"]
    # A commitment is of the response alone; the step into it and the baseline of persistence need the prompt.
    for name in ("commitment_point", "commitment_shift", "commitment_p"):
        assert now[name] == pytest.approx(was[name], rel=1e-4) if was[name] is not None else now[name] is None
    assert now["peak_velocity"] is now["persistence"] is None
    assert now["velocity"][:n_prompt] == [None] * n_prompt
    assert now["velocity"][n_prompt:] == pytest.approx(was["velocity"][n_prompt:], rel=1e-3, abs=1e-4)
    assert now["acceleration"][:n_prompt] == [None] * n_prompt
    assert None not in now["acceleration"][n_prompt:]
    if not dynamics_only:
        chance = found["metadata"]["chance"]
        assert (chance["persist"], chance["rises"], chance["persistence"]) == (None, None, None)
        assert chance["commit"] == whole["metadata"]["chance"]["commit"]
        assert found["metadata"]["means"]["prompt"] is None

    capture(*GREEDY, *LONG, "--tokens", "first:3")
    tlcapture(*again)
    now = read_json(projected / "1.json")["dynamics"]
    assert [now[name] for name in ("commitment_point", "commitment_p", "peak_velocity", "persistence")] == [None] * 4
    known = [index for index, value in enumerate(now["velocity"]) if value is not None]
    assert known == [n_prompt, n_prompt + 1]


def test_the_summary_compares_rises_over_all_tokens(
    extract: Run, capture: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlcapture.commands.projecting.top_traits import summary_of

    monkeypatch.setattr("tlcapture.commands.projecting.top_traits.FEWEST_TO_COMPARE", 3)  # as many as the set has
    extract()
    summaries = []
    for more in ((), ("--tokens", "last")):
        capture(*GREEDY, *LONG, *more)
        summaries.append(summary_of(Layout(data, "exp"), "short"))
    whole, last = summaries
    assert last.findings == whole.findings
    assert [each.trait for each in last.tops] == [each.trait for each in whole.tops]
    assert len(whole.tops) == 3
    for one, other in zip(last.tops, whole.tops, strict=True):
        assert (one.rise, one.calibrated) == pytest.approx((other.rise, other.calibrated), rel=1e-3)
        assert one.chance == pytest.approx(other.chance, rel=1e-3)


def test_skip_existing_captures_again_what_lacks_a_token(capture: Run, raw: Path, analysis: Path) -> None:
    capture(*GREEDY, "--tokens", "last")
    before = {path: path.stat().st_mtime_ns for path in raw.glob("*.pt")}
    capture(*GREEDY, "--tokens", "-1:", "--skip-existing")
    assert {path: path.stat().st_mtime_ns for path in raw.glob("*.pt")} == before
    capture(*GREEDY, "--tokens", "response", "--skip-existing")
    assert len(Capture.open(raw / "1.pt").positions.kept) == 6
    capture(*GREEDY, "--skip-existing", "--attention", "--tokens", "last")
    assert len(read_json(analysis / "1_attention.json")["attention"]) == 1
    assert len(Capture.open(raw / "1.pt").positions.kept) == 6
    capture(*GREEDY, "--skip-existing")
    assert Capture.open(raw / "1.pt").positions.is_all
    done = capture(*GREEDY, "--skip-existing", "--replay", "--attention", "--tokens", "first:2")
    assert done.exit_code == 0, done.output
    assert len(read_json(analysis / "1_attention.json")["attention"]) == 2
    capture("--skip-existing", "--replay", "--attention", "--layer-internals", 1, "--tokens", "last")
    assert len(read_json(analysis / "1_attention.json")["attention"]) == 1
    stamp = (analysis / "1_attention.json").stat().st_mtime_ns
    capture("--skip-existing", "--replay", "--attention", "--layer-internals", 1, "--tokens", "last")
    assert (analysis / "1_attention.json").stat().st_mtime_ns == stamp
    n_tokens = Capture.open(raw / "1.pt").n_tokens
    for more in (("--replay",), ()):  # without a choice, views are of all tokens that were captured
        capture(*GREEDY, "--replay", "--attention", "--tokens", "last")
        capture(*GREEDY, "--skip-existing", "--attention", *more)
        assert len(read_json(analysis / "1_attention.json")["attention"]) == n_tokens


def test_a_replay_holds_the_tokens_of_the_capture_or_those_asked_for(
    capture: Run, folder: Path, raw: Path, analysis: Path
) -> None:
    capture(*GREEDY, "--attention", "--logit-lens", "--layer-internals", 1, "--tokens", "2:5")
    live = {path: load(path) for path in (*analysis.glob("*.json"), *folder.glob("inference/raw/internals/short/*.pt"))}
    done = capture("--replay", "--attention", "--logit-lens", "--layer-internals", 1)
    assert done.exit_code == 0, done.output
    n_prompt = len(Capture.open(raw / "1.pt").prompt.tokens)
    for path, value in live.items():
        found = load(path)
        assert found["positions"] == value["positions"]
        if path.suffix == ".pt":
            for name, tensor in found.items():
                if isinstance(tensor, torch.Tensor):
                    torch.testing.assert_close(tensor, value[name], rtol=1e-3, atol=1e-4)
    attention = read_json(analysis / "1_attention.json")
    assert [each["token_idx"] for each in attention["attention"]] == [n_prompt + each for each in (2, 3, 4)]
    capture("--replay", "--attention", "--tokens", "last")
    assert [each["token_idx"] for each in read_json(analysis / "1_attention.json")["attention"]] == [n_prompt + 5]
    refused = capture("--replay", "--logit-lens", "--tokens", "last")
    assert refused.exit_code == 1
    assert f"only tokens {n_prompt + 2} to {n_prompt + 4} of {n_prompt + 6} were kept" in refused.output


def test_projections_only_keep_those_tokens_and_are_not_made_again(
    extract: Run, capture: Run, raw: Path, projected: Path
) -> None:
    extract()
    done = capture(*GREEDY, "--projections-only", "--tokens", "first:2")
    assert done.exit_code == 0, done.output
    assert not list(raw.glob("*.pt"))
    content = ProjectionFile.read(projected / "1.json")
    assert len(content.scores) == 2
    stamp = (projected / "1.json").stat().st_mtime_ns
    capture(*GREEDY, "--projections-only", "--tokens", ":1", "--skip-existing")
    assert (projected / "1.json").stat().st_mtime_ns == stamp
    capture(*GREEDY, "--projections-only", "--skip-existing")
    assert ProjectionFile.read(projected / "1.json").positions.is_all


def test_exploration_shows_what_was_kept(extract: Run, capture: Run, data: Path, tiny_folder: Path) -> None:
    extract()
    capture(*GREEDY, *LONG, "--attention", "--logit-lens")
    whole = Experiment("exp", data).captures("short")["1"]
    frame = Experiment("exp", data).to_pandas("short")
    trajectory = whole.project("tone/loud").trajectory
    kept = [len(whole.prompt.tokens) + each for each in (2, 3, 4)]

    capture(*GREEDY, *LONG, "--attention", "--logit-lens", "--tokens", "2:5")
    experiment = Experiment("exp", data)
    part = experiment.captures("short")["1"]
    found = part.project("tone/loud")
    assert torch.isnan(found.trajectory).nonzero().flatten().tolist() == [
        each for each in range(len(whole.tokens)) if each not in kept
    ]
    torch.testing.assert_close(found.trajectory[kept], trajectory[kept])
    assert "unknown whether it persists" in repr(found)
    assert "not kept" in found._repr_html_()
    for each in (experiment.to_pandas("short"), part.to_pandas("tone/loud")):
        one = each[(each.prompt_id == "1") & (each.trait == "tone/loud")]
        assert one.token_idx.tolist() == kept
        was = frame[(frame.prompt_id == "1") & (frame.trait == "tone/loud") & frame.token_idx.isin(kept)]
        np.testing.assert_allclose(one.score, was.score, rtol=1e-4)
    assert f"tokens {kept[0]} to {kept[-1]} of {len(whole.tokens)} were kept" in part._repr_html_()
    heads, table = part.attention(1), part.logit_lens()
    assert (list(heads.positions), list(table.after)) == (kept, kept)
    np.testing.assert_allclose(heads.patterns[:, kept], whole.attention(1).patterns[:, kept], rtol=1e-3)
    assert f"{len(part.tokens) - 3} tokens were not kept" in heads._repr_html_()
    assert printable_tokens(part, kept) in table._repr_html_()
    for name in ("1_attention.json", "1_logit_lens.json"):
        (data / "experiments/exp/analysis/per_token/short" / name).unlink()
    computed = Experiment("exp", data).captures("short")["1"]
    np.testing.assert_allclose(computed.attention(1).patterns, heads.patterns, rtol=1e-3)
    assert list(computed.logit_lens().after) == kept
    np.testing.assert_allclose(computed.logit_lens().actual_prob, table.actual_prob, rtol=1e-3)
    assert computed.cache["resid_post", 1].shape == (3, tiny.D_MODEL)
    plot = part.plot
    for figure in (plot.trajectory("tone/loud"), plot.layers("tone/loud"), plot.logit_lens(), plot.attention(1, 0)):
        assert figure.to_json()


def printable_tokens(part: Any, kept: list[int]) -> str:
    return f"tokens {kept[0]} to {kept[-1]} of {len(part.tokens)}"


def test_the_page_shows_gaps_and_says_what_was_kept(extract: Run, capture: Run, data: Path, tmp_path: Path) -> None:
    from tlcapture.commands.plots import projection_picture
    from tlcapture.page.export import export_page

    extract()
    capture(*GREEDY, *LONG, "--attention", "--logit-lens", "--tokens", "2:5")
    contents, where = Contents(data), ("exp", "short", "1")
    prompt = contents.prompt(*where)
    assert prompt["problems"] == []
    n_prompt, n_tokens = prompt["n_prompt_tokens"], len(prompt["tokens"])
    kept = [n_prompt + each for each in (2, 3, 4)]
    for projection in prompt["projections"]:
        known = [index for index, score in enumerate(projection["trajectory"]) if score is not None]
        assert known == kept
        assert projection["kept"] == f"tokens {kept[0]} to {kept[-1]} of {n_tokens} were kept"
        assert projection["dynamics"]["peak_velocity"] is not None
    layers = contents.layers(*where, "tone", "loud", "residual")
    assert [any(token) for token in layers["scores"]] == [index in kept for index in range(n_tokens)]
    assert layers["layers"] == list(range(tiny.N_LAYERS))
    assert contents.lens(*where)["token_idx"] == contents.attention(*where)["positions"] == kept
    assert contents.attention_token(*where, str(kept[0]))["context_size"] == kept[0] + 1
    with pytest.raises(InputError, match="captured with --tokens"):
        contents.attention_token(*where, "0")
    average = contents.average("exp", "short", "tone", "loud", "residual")
    assert average["position"] == [2, 3, 4]
    assert average["n"] == [3, 3, 3]
    problems: list[str] = []
    export_page(data, "exp", ["short"], tmp_path / "page.html", on_problem=problems.append)
    assert problems == []
    path = data / "experiments/exp/inference/tone/loud/residual_stream/short/1.json"
    assert projection_picture(TokenScores.read(path)).startswith(b"\x89PNG")


def test_a_projection_file_whose_rows_are_not_those_of_its_positions_is_refused(
    extract: Run, capture: Run, projected: Path
) -> None:
    extract()
    capture(*GREEDY, "--tokens", "first:2")
    content = read_json(projected / "1.json")
    content["metadata"]["positions"] = content["metadata"]["positions"][:1]
    write_json(projected / "1.json", content)
    with pytest.raises(InputError.__mro__[1], match="the numbers of projections and tokens differ: 2 for 1 tokens"):
        ProjectionFile.read(projected / "1.json")


def test_live_captures_keep_those_tokens(tiny_folder: Path) -> None:
    from tlcapture.models.loading import load_model

    model = load_model(str(tiny_folder))
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "save_dtype": "float32"}
    (whole,) = capture_live(model, "hello", **options)
    (part,) = capture_live(model, "hello", **options, tokens="-2:")
    n_tokens = len(whole.tokens)
    assert part.positions.kept == (n_tokens - 2, n_tokens - 1)
    assert torch.equal(part.residual(1), whole.residual(1)[-2:])
    assert list(part.logit_lens().after) == [n_tokens - 2]
    np.testing.assert_allclose(part.attention(0).patterns[:, -2:], whole.attention(0).patterns[:, -2:], rtol=1e-5)
    with pytest.raises(InputError, match="does not name tokens"):
        next(capture_live(model, "hello", tokens="middle"))


@pytest.mark.parametrize("selection", ["response", "last", "4:100"])
def test_the_predicted_size_is_what_is_written(
    extract: Run, capture: Run, folder: Path, raw: Path, selection: str
) -> None:
    extract()
    words = (*GREEDY, "--max-new-tokens", 60, *VIEWS, "--tokens", selection)
    estimated = capture(*words, "--dry-run", "--json")
    assert estimated.exit_code == 0, estimated.output
    import json

    estimate = json.loads(estimated.stdout)["estimate"]["kinds"]
    capture(*words)
    written = {
        "raw residual": list(raw.glob("*.pt")),
        "layer internals": list(folder.glob("inference/raw/internals/short/*.pt")),
        "attention": list(folder.glob("analysis/per_token/short/*_attention.json")),
        "projection": [*folder.glob("inference/tone/*/*_stream/short/*.json")],
    }
    for kind, paths in written.items():
        size = sum(path.stat().st_size for path in paths)
        assert estimate[kind]["files"] == len(paths)
        assert 0.7 < estimate[kind]["bytes"] / size < 1.6, kind


def test_a_plan_predicts_fewer_bytes_for_fewer_tokens(tlcapture: Run, tiny_folder: Path) -> None:
    import json

    def planned(*words: str) -> dict[str, Any]:
        common = (
            "plan",
            "--model",
            str(tiny_folder),
            "--prompts",
            "10",
            "--prompt-tokens",
            "40",
            "--new-tokens",
            "200",
        )
        done = tlcapture(*common, "--views", "residual,attention,logit_lens", *words, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["views"]

    whole, last = planned(), planned("--tokens", "last")
    ten, twenty = planned("--tokens", "first:10"), planned("--tokens", "first:20")
    points = 2 * tiny.N_LAYERS + 1
    grown = twenty["raw residual"]["bytes_per_prompt"] - ten["raw residual"]["bytes_per_prompt"]
    assert grown == 10 * (points * tiny.D_MODEL * 2 + 5)
    assert last["logit lens"]["bytes_per_prompt"] < 0.01 * whole["logit lens"]["bytes_per_prompt"]
    assert last["attention"]["bytes_per_prompt"] < 0.03 * whole["attention"]["bytes_per_prompt"]


@pytest.mark.parametrize("tokens", ["first:2", "100:"])
def test_spans_beyond_the_tokens_are_refused_whatever_was_kept(
    extract: Run, capture: Run, projected: Path, tokens: str
) -> None:
    extract()
    capture("--tokens", tokens)
    content = read_json(projected / "1.json")
    content["spans"][-1]["stop"] = 10_000
    write_json(projected / "1.json", content)
    with pytest.raises(StorageError, match="spans: one ends at token 10000 of"):
        ProjectionFile.read(projected / "1.json")


@pytest.mark.parametrize("selection", ["first:3", "response"])
@pytest.mark.filterwarnings("ignore:.*by default")
def test_spans_of_some_tokens_are_those_of_all_and_means_are_null_once_tokens_are_missing(
    extract: Run, capture: Run, tlcapture: Run, data: Path, folder: Path, projected: Path, selection: str
) -> None:
    extract()
    capture(*GREEDY, *LONG)
    whole, frame = read_json(projected / "1.json"), Experiment("exp", data).to_pandas("short", traits="tone/loud")
    for only in ((), ("--projections-only",)):
        shutil.rmtree(folder / "inference/raw")
        assert capture(*GREEDY, *LONG, *only, "--tokens", selection).exit_code == 0
        part = read_json(projected / "1.json")
        assert (part["spans"], part["dynamics"]["by_span"]) == (whole["spans"], whole["dynamics"]["by_span"])
        assert "wrote 0 files" in capture(*GREEDY, *LONG, *only, "--tokens", selection, "--skip-existing").output
        if not only:
            rows = Experiment("exp", data).to_pandas("short", traits="tone/loud")
            keys = ["prompt_id", "token_idx"]
            both = rows.merge(frame, on=keys, suffixes=("", "_of_all"))
            assert len(both) == len(rows) == 3 * len(part["metadata"]["positions"])
            for column in ("token", "part", "span", "role"):
                assert both[column].tolist() == both[f"{column}_of_all"].tolist()
            assert tlcapture("project", "--experiment", "exp", "--prompt-set", "short").exit_code == 0
            again = read_json(projected / "1.json")["dynamics"]["by_span"]
            is_whole = [each["kind"] == "answer" and selection == "response" for each in again]
            assert [each["mean"] is not None for each in again] == is_whole
            assert [each["peak_velocity"] for each in again] == [None] * len(again)


def test_any_number_of_tokens_may_be_asked_for() -> None:
    for text in ("first:" + "9" * 30, ":" + "9" * 30, "-" + "9" * 30 + ":"):
        assert KeptTokens.parse(text).of(2, 9).response == tuple(range(7))


def test_a_slice_is_refused_exactly_if_it_is_empty_for_every_response() -> None:
    for start, stop in itertools.product((None, *range(-3, 4)), repeat=2):
        text = f"{'' if start is None else start}:{'' if stop is None else stop}"
        if any(range(n_tokens)[start:stop] for n_tokens in range(12)):
            assert KeptTokens.parse(text).of(2, 9).response == tuple(range(7)[start:stop])
        else:
            with pytest.raises(InputError, match="keeps no token of any response"):
                KeptTokens.parse(text)
