"""`tlcapture evaluate`, `steer` and `traits` on a tiny model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests import tiny
from tests.cli.conftest import heatmaps_in_words, make_trait
from tlcapture.errors import NumericalError
from tlcapture.names import Trait
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json
from tlcapture.traits.evaluation_files import EvaluationRow
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import read_vector, write_vector

Run = Callable[..., Result]
QUESTIONS = [
    {"id": str(n), "question": f"how about {n}?", "positive": f"LOUD {n}", "negative": f"soft {n}"} for n in range(4)
]


@pytest.fixture
def vectors(extract: Run, data: Path) -> Path:
    """An experiment with vectors of `tone/loud` and `tone/warm`, both with steering questions."""
    assert extract("--component", "residual").exit_code == 0
    return with_questions(data)


def with_questions(data: Path) -> Path:
    for name in ("loud", "warm"):
        path = data / "datasets" / "traits" / "tone" / name / "steering.json"
        path.write_text(json.dumps({"questions": QUESTIONS}))
    return data / "experiments" / "exp"


def test_evaluate_writes_rows_best_vectors_and_pictures(tlcapture: Run, data: Path, evaluated: Result) -> None:
    result, vectors = evaluated, data / "experiments" / "exp"
    value = read_json(vectors / "extraction" / "extraction_evaluation.json")
    assert len(value["all_results"]) == 2 * 3 * 3
    row = value["all_results"][0]
    assert {"trait", "method", "layer", "component", "val_accuracy", "val_auroc", "val_effect_size"} <= set(row)
    assert set(row["cosine_to_traits"]) == {"tone/warm"}
    assert set(row["cosine_to_methods"]) == {"probe", "mean_diff"} - {row["method"]} | ({"gradient"} - {row["method"]})
    assert set(value["best_vectors"]) == {"tone/loud", "tone/warm"}
    best = value["best_vectors"]["tone/loud"]
    own = [each for each in value["all_results"] if each["trait"] == "tone/loud"]
    assert best["cv_effect_size"] == max(each["cv_effect_size"] for each in own)
    assert 0 <= best["nested_auroc"] <= 1
    assert 0 < best["p"] <= 1
    assert set(best["baselines"]) == {"layer 0", "bag of words", "characters", "tokens", "characters a word"}
    assert sum(best["chosen_layers"].values()) == 5
    assert best["verdict"] in result.output
    assert {name: set(row) for name, row in value["cross_trait"].items()} == {
        "tone/loud": {"tone/loud", "tone/warm"},
        "tone/warm": {"tone/loud", "tone/warm"},
    }
    farthest = value["cross_trait_chance"]
    assert 0 < farthest <= 0.5
    assert f"vectors lie within {0.5 - farthest:.2f} to {0.5 + farthest:.2f} in 95 %" in result.output
    for trait in ("tone/loud", "tone/warm"):
        rows = [EvaluationRow(**each) for each in value["all_results"] if each["trait"] == trait]
        assert (vectors / "extraction" / trait / "evaluation.png").read_bytes() == heatmaps_in_words(trait, rows)
    assert "loading" in result.output  # for the reference of ordinary prompts alone
    few = ("--methods", "probe", "--layers", "0")
    again = tlcapture("evaluate", "--experiment", "exp", "--component", "residual", *few)
    assert again.exit_code == 0, again.output
    assert "loading" not in again.output  # activations are those that extract kept
    # The choice is among all that have scores, whichever are scored again.
    assert read_json(vectors / "extraction" / "extraction_evaluation.json") == value


def test_activations_are_read_again_where_they_were_not_kept(tlcapture: Run, data: Path, evaluated: Result) -> None:
    words, vectors = ("evaluate", "--experiment", "exp", "--component", "residual"), data / "experiments" / "exp"
    path = vectors / "extraction" / "extraction_evaluation.json"
    with_kept = read_json(path)
    for kept in (vectors / "extraction").glob("*/*/activations/*.pt"):
        kept.unlink()
    path.unlink()
    again = tlcapture(*words)
    assert again.exit_code == 0, again.output
    assert "loading" in again.output
    assert read_json(path) == with_kept


def test_evaluating_some_vectors_keeps_the_rows_of_other_vectors(tlcapture: Run, vectors: Path) -> None:
    tlcapture("evaluate", "--experiment", "exp", "--traits", "tone/warm", "--component", "residual")
    words = ("--traits", "tone/loud", "--methods", "probe", "--layers", "0,2", "--component", "residual")
    assert tlcapture("evaluate", "--experiment", "exp", *words).exit_code == 0
    rows = read_json(vectors / "extraction" / "extraction_evaluation.json")["all_results"]
    assert [(r["method"], r["layer"]) for r in rows if r["trait"] == "tone/loud"] == [("probe", 0), ("probe", 2)]
    assert sum(row["trait"] == "tone/warm" for row in rows) == 9


def test_evaluating_one_trait_changes_nothing_of_another(tlcapture: Run, vectors: Path) -> None:
    path, words = vectors / "extraction" / "extraction_evaluation.json", ("evaluate", "--experiment", "exp")
    assert tlcapture(*words, "--traits", "tone/warm", "--component", "residual").exit_code == 0
    before = read_json(path)["best_vectors"]["tone/warm"]
    assert len(before["gain_interval"]) == 2
    assert tlcapture(*words, "--traits", "tone/loud", "--component", "residual").exit_code == 0
    assert read_json(path)["best_vectors"]["tone/warm"] == before


def test_changed_examples_are_not_evaluated(tlcapture: Run, vectors: Path, data: Path) -> None:
    file = data / "datasets" / "traits" / "tone" / "loud" / "positive.jsonl"
    file.write_text(file.read_text().replace("LOUD", "NOISY"))
    result = tlcapture("evaluate", "--experiment", "exp", "--component", "residual")
    assert result.exit_code == 1
    assert "failed: tone/loud: examples or model have changed since the vectors were extracted" in result.stderr


def test_steer_writes_results_and_skips_existing_runs(tlcapture: Run, vectors: Path) -> None:
    words = ("steer", "--experiment", "exp", "--traits", "tone/loud", "--layers", "0,2", "--coefficients", "0.1,0.5")
    result = tlcapture(*words, "--methods", "mean_diff")
    assert result.exit_code == 0, result.output
    path = vectors / "steering" / "tone" / "loud" / "results.json"
    value = read_json(path)
    assert set(value["baseline"]) == {"trait_mean", "coherence_mean"}
    configs = [run["config"] for run in value["runs"]]
    assert [(c["layers"], c["coefficients"]) for c in configs] == [([n], [x]) for n in (0, 2) for x in (0.1, 0.5)]
    assert all(c["methods"] == ["mean_diff"] and c["component"] == "residual" for c in configs)
    scores = {"trait_mean", "coherence_mean", "gain", "standard_error", "n"}
    assert all(set(run["result"]) - {"null", "null_covariance"} == scores for run in value["runs"])
    base = value["baseline"]["trait_mean"]
    assert all(run["result"]["gain"] == pytest.approx(run["result"]["trait_mean"] - base) for run in value["runs"])
    ranked = sorted(value["runs"], key=lambda r: (r["result"]["coherence_mean"] >= 70, r["result"]["gain"]))
    assert ["null" in run["result"] for run in ranked] == [False, True, True, True]
    assert all(len(run["result"]["null"]) == 20 for run in ranked[1:])
    for found, layer in zip(value["monitoring"], (0, 2), strict=True):
        assert (found["layer"], found["method"], found["n"]) == (layer, "mean_diff", 12)
        assert found["coefficients"] == [0, 0.1, 0.5]
        assert len(found["null"]) == 99
        assert f"{found['rank_correlation']:+.2f}" in result.output
    assert "what chance reaches at the best of 4 cells, by random vectors at 3 of them" in result.output
    assert "no coherent run does not beat" not in result.output
    assert (path.parent / "steering.png").read_bytes().startswith(b"\x89PNG")
    again = tlcapture(*words, "--methods", "mean_diff")
    assert "wrote 1 file" in again.output  # the picture
    more = tlcapture("steer", "--experiment", "exp", "--traits", "tone/loud", "--layers", 1, "--search")
    assert more.exit_code == 0
    assert len(read_json(path)["runs"]) > 4


def test_runs_are_kept_where_what_follows_them_fails(
    tlcapture: Run, vectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: object) -> None:
        raise NumericalError("out of luck")

    words = ("steer", "--experiment", "exp", "--traits", "tone/loud", "--layers", 1, "--coefficients", "0.1,0.2")
    with monkeypatch.context() as patch:
        patch.setattr("tlcapture.commands.steer._Trials.add_nulls", fails)
        failed = tlcapture(*words)
    assert (failed.exit_code, "failed: tone/loud: out of luck" in failed.stderr) == (1, True)
    kept = read_json(vectors / "steering" / "tone" / "loud" / "results.json")["runs"]
    assert [run["config"]["coefficients"] for run in kept] == [[0.1], [0.2]]
    assert tlcapture(*words).exit_code == 0
    completed = read_json(vectors / "steering" / "tone" / "loud" / "results.json")["runs"]
    assert [run["responses"] for run in completed] == [run["responses"] for run in kept]


def test_a_vector_whose_file_was_replaced_is_steered_with_again(tlcapture: Run, vectors: Path, data: Path) -> None:
    words = ("steer", "--experiment", "exp", "--traits", "tone/loud", "--layers", 1, "--coefficients", "0.4")
    files = VectorFiles(Layout(data, "exp"), Trait("tone", "loud"))
    path, found = vectors / "steering" / "tone" / "loud" / "results.json", []
    for _ in range(2):  # the metadata, and with it the time of the extraction, stays
        assert tlcapture(*words, "--methods", "mean_diff").exit_code == 0
        (run,) = read_json(path)["runs"]
        digest = hashlib.blake2b(files.file("residual", "mean_diff", 1).read_bytes(), digest_size=8).hexdigest()
        assert run["vector_digest"] == digest
        found.append(run["result"]["gain"])
        write_vector(files, "residual", "mean_diff", 1, -read_vector(files, "residual", "mean_diff", 1).vector)
    assert found[0] != found[1]


def test_random_vectors_have_the_covariance_of_the_reference_also_in_place_of_earlier_ones(
    tlcapture: Run, data: Path, evaluated: Result
) -> None:
    path = with_questions(data) / "steering" / "tone" / "loud" / "results.json"
    words = ("steer", "--experiment", "exp", "--traits", "tone/loud", "--methods", "mean_diff", "--layers", "1")
    assert tlcapture(*words, "--coefficients", "0.1").exit_code == 0
    (made,) = read_json(path)["runs"]
    assert made["result"]["null_covariance"] == "reference"
    (monitored,) = read_json(path)["monitoring"]
    assert monitored["null_covariance"] == "reference"
    earlier = json.loads(path.read_text())
    earlier["runs"][0]["result"] |= {"null": [0.0] * 20, "null_covariance": "isotropic"}
    earlier["monitoring"][0] |= {"null": [0.0] * 99, "p": 1.0}
    del earlier["monitoring"][0]["null_covariance"]  # as earlier versions wrote it
    path.write_text(json.dumps(earlier))
    assert tlcapture(*words, "--coefficients", "0.1").exit_code == 0
    assert (read_json(path)["runs"], read_json(path)["monitoring"]) == ([made], [monitored])


def test_random_vectors_are_added_to_earlier_results_and_runs_of_other_questions_are_made_again(
    tlcapture: Run, vectors: Path, data: Path
) -> None:
    words = (*STEER, "--methods", "probe")
    assert tlcapture(*words).exit_code == 0
    path = vectors / "steering" / "tone" / "loud" / "results.json"
    made = read_json(path)
    earlier = json.loads(json.dumps(made))
    for name in ("gain", "standard_error", "null"):
        earlier["runs"][0]["result"].pop(name)
    del earlier["runs"][0]["config"]["component"], earlier["metadata"]["questions"]
    for name in ("component", "vector_digest"):
        del earlier["monitoring"][0][name]
    earlier["runs"][0]["responses"][0] = "as it was"
    path.write_text(json.dumps(earlier))
    assert tlcapture(*words).exit_code == 0
    again = read_json(path)
    assert [run["responses"][0] for run in again["runs"]] == ["as it was"]  # not repeated
    assert again["runs"][0]["result"]["null"] == made["runs"][0]["result"]["null"]
    assert len(again["monitoring"]) == 1
    steering_file(data, {"questions": [{**each, "positive": "quite another"} for each in QUESTIONS]})
    assert tlcapture(*words).exit_code == 0
    other = read_json(path)
    assert other["runs"][0]["responses"] == made["runs"][0]["responses"]
    assert other["runs"][0]["result"]["trait_mean"] != made["runs"][0]["result"]["trait_mean"]


@pytest.fixture
def judge_server() -> Iterator[tuple[str, list[str], list[str]]]:
    """A local judge: its address, the requests it received, and its answers."""
    asked: list[str] = []
    answers = ["72"]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][0]["content"])
            content = {"choices": [{"message": {"content": answers[0]}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, answers
    server.shutdown()
    server.server_close()


def test_a_judge_replaces_the_likelihoods_of_the_trait_mean(
    tlcapture: Run, vectors: Path, judge_server: tuple[str, list[str], list[str]]
) -> None:
    url, asked, answers = judge_server
    words = ("steer", "--experiment", "exp", "--traits", "tone/loud", "--layers", 1, "--coefficients", "0.1")
    assert tlcapture(*words).exit_code == 0
    assert not asked
    definition = vectors.parents[1] / "datasets" / "traits" / "tone" / "loud" / "definition.md"
    definition.write_text("Shouting.", encoding="utf-8-sig")
    assert tlcapture(*words, "--judge", url).exit_code == 0
    assert any("Shouting." in text for text in asked) and not any("ufeff" in ascii(text) for text in asked)
    value = read_json(vectors / "steering" / "tone" / "loud" / "results.json")
    assert value["metadata"]["scored_by"] == f"judge {url}"
    assert [run["result"]["trait_mean"] for run in value["runs"]] == [72.0]  # not mixed with likelihoods
    assert any("how about 2?" in text for text in asked)
    answers[0] = "very much"
    result = tlcapture(*words, "--judge", url, "--coefficients", "0.2")
    assert result.exit_code == 1
    assert "expected a number from 0 to 100, got 'very much'" in result.stderr
    assert tlcapture(*words, "--judge", "ftp://x").exit_code == 2


EVAL_PROMPT = 'Score {answer} as a reply to {question}, as in {"score": 1}, from 0 to 100, or say REFUSAL.'
STEER = ("steer", "--experiment", "exp", "--traits", "tone/loud", "--layers", 1, "--coefficients", "0.1")


def steering_file(data: Path, content: object) -> None:
    (data / "datasets" / "traits" / "tone" / "loud" / "steering.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "content",
    [
        {"questions": ["why {answer}?", "what?"], "eval_prompt": EVAL_PROMPT},
        {"instruction": [{"pos": "a"}], "questions": ["why {answer}?", "what?"], "eval_prompt": EVAL_PROMPT},
        ["why {answer}?", "what?"],
        [{"question": "why {answer}?"}, {"id": "b", "question": "what?", "positive": "x", "negative": "y"}],
    ],
)  # fmt: skip
def test_plain_questions_are_scored_by_a_judge_that_is_asked_their_eval_prompt(
    tlcapture: Run, vectors: Path, data: Path, judge_server: tuple[str, list[str], list[str]], content: Any
) -> None:
    url, asked, _ = judge_server
    steering_file(data, content)
    result = tlcapture(*STEER, "--judge", url)
    assert result.exit_code == 0, result.output
    value = read_json(vectors / "steering" / "tone" / "loud" / "results.json")
    (run,) = value["runs"]
    assert (run["result"]["trait_mean"], run["result"]["n"]) == (72.0, 2)
    assert run["result"]["coherence_mean"] > 0
    assert len(asked) == 2 + 2 + 20 * 2  # the baseline, the run, and random vectors in place of its vector
    steered = asked[2:4]
    assert run["result"]["null"] == [0.0] * 20
    for text, question, response in zip(steered, ["why {answer}?", "what?"], run["responses"], strict=True):
        if isinstance(content, dict):
            # The oracle: a plain replacement of the placeholders, the question's own braces being text.
            before, after = EVAL_PROMPT.split("{answer}")
            assert text == before + response + after.replace("{question}", question)
        else:
            assert f"Question: {question}" in text
            assert f"Response: {response}" in text


def test_a_refusal_is_no_score_and_another_eval_prompt_is_another_scorer(
    tlcapture: Run, vectors: Path, data: Path, judge_server: tuple[str, list[str], list[str]]
) -> None:
    url, _, answers = judge_server
    path = vectors / "steering" / "tone" / "loud" / "results.json"
    steering_file(data, {"questions": ["why?"], "eval_prompt": EVAL_PROMPT})
    answers[0] = "REFUSAL"
    result = tlcapture(*STEER, "--judge", url)
    assert result.exit_code == 1
    assert "it answered REFUSAL to every response" in result.stderr
    answers[0] = "40"
    assert tlcapture(*STEER, "--judge", url).exit_code == 0
    first = read_json(path)["metadata"]["scored_by"]
    steering_file(data, {"questions": ["why?"], "eval_prompt": EVAL_PROMPT + " Be strict."})
    answers[0] = "20"
    assert tlcapture(*STEER, "--judge", url).exit_code == 0
    value = read_json(path)
    assert first.startswith(f"judge {url}, eval_prompt ")
    assert value["metadata"]["scored_by"] != first
    assert [run["result"]["trait_mean"] for run in value["runs"]] == [20.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (["why?", "what?"], "2 of 2 steering questions of tone/loud have no completions: likelihood scores need"),
        (
            {"questions": ["why?", {"question": "a?", "positive": "x", "negative": "y"}], "eval_prompt": "{answer}"},
            "1 of 2 steering questions of tone/loud have no completions",
        ),
        ({"questions": ["why?"], "eval_prompt": "Score it."}, "steering.json: eval_prompt: expected {answer} in it"),
        ([{"question": "a?", "positive": "x"}], 'expected both "positive" and "negative", or neither'),
        (
            {"questions": ["why?"], "eval_promt": "{answer}"},
            "unknown key 'eval_promt': expected questions, eval_prompt",
        ),
        ([], "steering.json: questions"),
        ([""], "steering.json: questions[0]"),
        ([3], "steering.json: questions[0]"),
    ],
)
def test_questions_that_cannot_be_scored_are_refused_before_the_model_is_loaded(
    tlcapture: Run, vectors: Path, data: Path, content: Any, said: str
) -> None:
    steering_file(data, content)
    result = tlcapture(*STEER)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "loading" not in result.stdout


def test_a_comparison_with_steering_needs_both_measures(tlcapture: Run, vectors: Path) -> None:
    result = tlcapture("evaluate", "--experiment", "exp", "--against-steering")
    assert "has effect sizes and steering results" in result.stderr


def test_selection_and_comparison_use_both_measures(tlcapture: Run, data: Path, evaluated: Result) -> None:
    vectors = with_questions(data)
    listed = tlcapture("traits", "list", "--experiment", "exp")
    assert listed.exit_code == 0
    assert listed.output.count("effect_size") == 2
    origin = listed.output.splitlines()[-2]
    made = f"on {tiny.ENGINES[0]} in float32, blocks.{{L}}.hook_resid_post, response_mean"
    assert origin.startswith("all: ") and made in origin
    assert "chat template, 1 BOS" in origin
    best = read_json(data / "experiments/exp/extraction/extraction_evaluation.json")["best_vectors"]
    for trait, row in best.items():  # what evaluate said of each is said again
        (line,) = [line for line in listed.output.splitlines() if line.endswith(f": {row['verdict']}")]
        assert trait in line
    words = ("--methods", "mean_diff", "--coefficients", "0.01")
    assert tlcapture("steer", "--experiment", "exp", *words).exit_code == 0
    # No gain of 0.01 typical norms beats those of random vectors.
    assert tlcapture("traits", "list", "--experiment", "exp").output.count("effect_size") == 2
    for path in (vectors / "steering").glob("*/*/results.json"):
        value = json.loads(path.read_text())
        for run in value["runs"]:
            run["result"].pop("null", None)
        path.write_text(json.dumps(value))
    listed = tlcapture("traits", "list", "--experiment", "exp").output
    assert [line.split()[3] for line in listed.splitlines()[1:3]] == ["steering"] * 2
    assert "tone/loud, tone/warm: its steering gain was not compared with random vectors" in listed
    compared = tlcapture("evaluate", "--experiment", "exp", "--against-steering")
    assert compared.exit_code == 0
    lines = [line.split() for line in compared.output.splitlines()]
    assert ["tone/loud", "3", "3", "-", "-"] in lines
    assert ["pooled", "6", "6", "-", "-"] in lines
    assert "a correlation needs vectors at 8 layers that were evaluated and steered" in compared.output


def test_traits_check_reports_problems_of_examples(tlcapture: Run, data: Path) -> None:
    folder = data / "datasets" / "traits" / "tone" / "leaky"
    folder.mkdir()
    for side, topic, tail in (("positive", "cats", " and on" * 9), ("negative", "stocks", "")):
        rows = [{"pair": str(n), "prompt": f"about {topic} {n}", "response": f"reply{tail}"} for n in range(20)]
        rows[1] = rows[0]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = tlcapture("traits", "check", "--traits", "tone/leaky")
    assert result.exit_code == 1
    assert "tone/leaky: 2 examples occur twice" in result.output
    for cue in ("characters", "words", "tokens"):
        assert (
            f"tone/leaky: {cue}: AUROC 1.00, more in 1.00 of the pairs, expected 0.35 to 0.65 (by chance 0.32 to 0.68)"
            in result.output
        )
    assert "tone/leaky: by prompt: AUROC 1.00, expected 0.35 to 0.65" in result.output


def test_traits_check_passes_on_the_shipped_examples_and_prints_its_bounds(tlcapture: Run) -> None:
    result = tlcapture("traits", "check")
    assert result.exit_code == 0, result.output
    rows = [line.split()[:3] for line in result.output.splitlines()[1:11]]
    assert [row[1:] for row in rows] == [["64", "0"]] * 10
    assert [row[0] for row in rows] == [str(trait) for trait in Datasets(Path()).traits()]
    assert "*" not in result.output
    assert "Bounds: 0.35 to 0.65 for lengths" in result.output
    assert "0.25 to 0.75 for the words of other traits" in result.output
    assert "95 % of the time by chance: " in result.output


def test_an_unreadable_trait_does_not_keep_another_from_being_checked(tlcapture: Run, data: Path) -> None:
    (data / "datasets" / "traits" / "tone" / "loud" / "positive.jsonl").write_text("{")
    result = tlcapture("traits", "check", "--traits", "tone/warm")
    assert "\ntone/warm     10 " in result.stdout
    assert "not compared with tone/loud: " in result.stderr
    assert tlcapture("traits", "check").exit_code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "--experiment", "exp"), "has no trait vectors"),
        (("steer", "--experiment", "exp"), "has no trait vectors"),
        (("steer", "--experiment", "exp", "--coefficients", "0"), "not a list of numbers other than zero"),
        (("traits", "list", "--experiment", "exp"), "has no trait vectors"),
        (("traits", "check", "--traits", "x/y"), "no examples for trait 'x/y'"),
        (("evaluate", "--experiment", "exp", "--traits", "x/y"), "no vectors for trait 'x/y'"),
        (("evaluate", "--experiment", "nix"), "no experiment 'nix': expected the folder"),
        (("steer", "--experiment", "nix"), "existing experiments: exp"),
        (("traits", "list", "--experiment", "nix"), "existing experiments: exp"),
    ],
)
def test_wrong_usage_is_refused_with_a_reason(tlcapture: Run, data: Path, words: tuple[str, ...], message: str) -> None:
    (data / "experiments" / "exp").mkdir(parents=True)
    result = tlcapture(*words)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"questions": []}',
        '{"questions": [{"id": "1"}]}',
        '["how?", "why?", "how?"]',
        '[{"question": "how?", "positive": "so", "negative": "so"}]',
    ],
)
def test_damaged_steering_questions_are_reported_with_their_file(
    tlcapture: Run, vectors: Path, data: Path, content: str
) -> None:
    (data / "datasets" / "traits" / "tone" / "loud" / "steering.json").write_text(content)
    result = tlcapture("steer", "--experiment", "exp", "--traits", "tone/loud")
    assert result.exit_code == 2
    assert "steering.json" in result.stderr


def test_a_trait_without_questions_is_told_what_they_look_like(tlcapture: Run, evaluated: Result, data: Path) -> None:
    path = data / "datasets/traits/tone/loud/steering.json"
    path.unlink(missing_ok=True)
    refused = tlcapture(*STEER)
    assert refused.exit_code == 2
    line = refused.stderr.splitlines()[-1]
    assert line.startswith(f"error: {path}: no such file: expected questions")
    path.write_text(line.split("such as ")[1])
    assert tlcapture(*STEER).exit_code == 0


def test_evaluating_some_vectors_again_leaves_the_score_of_the_choice_among_all(
    tlcapture: Run, data: Path, evaluated: Result
) -> None:
    path = data / "experiments" / "exp" / "extraction" / "extraction_evaluation.json"
    before = read_json(path)
    words = ("evaluate", "--experiment", "exp", "--component", "residual", "--traits", "tone/loud")
    assert tlcapture(*words, "--methods", "probe", "--layers", "1").exit_code == 0
    assert read_json(path)["best_vectors"] == before["best_vectors"]


def test_an_evaluation_leaves_out_rows_of_vectors_that_were_removed(
    tlcapture: Run, data: Path, evaluated: Result
) -> None:
    vectors = data / "experiments" / "exp" / "extraction"
    best = read_json(vectors / "extraction_evaluation.json")["best_vectors"]["tone/loud"]
    (vectors / "tone" / "loud" / "vectors" / f"{best['method']}_layer{best['layer']}.pt").unlink()
    assert tlcapture("evaluate", "--experiment", "exp", "--component", "residual").exit_code == 0
    value, gone = read_json(vectors / "extraction_evaluation.json"), (best["method"], best["layer"])
    assert gone not in [(row["method"], row["layer"]) for row in value["all_results"] if row["trait"] == "tone/loud"]
    now = value["best_vectors"]["tone/loud"]
    assert (now["method"], now["layer"]) != gone
    assert f"{best['method']} {best['layer']}" not in now["chosen_layers"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods", "prob"], "--methods prob: no trait has such vectors: did you mean 'probe'? methods: probe, "),
        (["--layers", "77"], "--layers 77: there are vectors of layers 0 to 2"),
    ],
)
def test_vectors_that_no_trait_has_are_not_evaluated(
    tlcapture: Run, data: Path, evaluated: Result, words: list[str], says: str
) -> None:
    path = data / "experiments" / "exp" / "extraction" / "extraction_evaluation.json"
    before = path.read_bytes()
    for command in (["evaluate"], ["evaluate", "--examples", str(data / "datasets" / "traits")], ["steer"]):
        result = tlcapture(*command, "--experiment", "exp", *words)
        assert (result.exit_code, path.read_bytes()) == (2, before)
        assert result.stderr.startswith(f"error: {says}")


def test_traits_without_an_evaluated_vector_are_named_below_the_table(tlcapture: Run, data: Path, extract: Run) -> None:
    assert extract("--component", "residual").exit_code == 0
    make_trait(data, "tone/new", "old", "new")
    assert extract("--component", "residual", "--traits", "tone/new").exit_code == 0
    result = tlcapture("evaluate", "--experiment", "exp", "--component", "residual", "--traits", "tone/loud,tone/warm")
    assert result.exit_code == 0, result.output
    assert "3 tone/warm" in result.stdout
    assert "without an evaluated vector: 2 tone/new" in result.stdout
