"""`tlcapture evaluate --examples`: vectors on another dataset of their trait."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from tests import tiny
from tests.cli.conftest import make_trait
from tlcapture.storage.files import read_json

Run = Callable[..., Result]


@pytest.fixture
def elsewhere(extract: Run, data: Path) -> Path:
    """A folder with another dataset of `tone/loud`, and an experiment with vectors of both traits."""
    assert extract("--component", "residual").exit_code == 0
    return make_elsewhere(data)


def with_other_prompts(data: Path) -> Path:
    """A folder with the responses of `tone/loud` to other prompts."""
    folder = data / "reworded"
    folder.mkdir()
    for side in ("positive", "negative"):
        text = (data / "datasets" / "traits" / "tone" / "loud" / f"{side}.jsonl").read_text()
        (folder / f"{side}.jsonl").write_text(text.replace("say ", "tell "))
    return folder


def make_elsewhere(data: Path) -> Path:
    make_trait(data / "other", "tone/loud", "NOISE", "hush")
    return data / "other" / "datasets" / "traits"


def stored(data: Path) -> dict[str, dict[str, list[dict[str, object]]]]:
    content = read_json(data / "experiments" / "exp" / "extraction" / "extraction_evaluation.json")
    found: dict[str, dict[str, list[dict[str, object]]]] = content["carry_over"]
    return found


def test_the_selected_vector_is_scored_on_folders_of_traits(tlcapture: Run, data: Path, evaluated: Result) -> None:
    """Whether it steers is the next question."""
    elsewhere, question = make_elsewhere(data), {"question": "how?", "positive": "so", "negative": "no"}
    (data / "datasets" / "traits" / "tone" / "loud" / "steering.json").write_text(json.dumps([question]))
    result = tlcapture("evaluate", "--experiment", "exp", "--examples", elsewhere)
    assert result.exit_code == 0, result.output
    assert set(stored(data)) == {"traits"}
    ((trait, (row,)),) = stored(data)["traits"].items()
    assert trait == "tone/loud"
    best = read_json(data / "experiments" / "exp" / "extraction" / "extraction_evaluation.json")["best_vectors"][trait]
    assert (row["method"], row["layer"]) == (best["method"], best["layer"])
    assert f"{row['auroc']:.3f}" in result.output
    after = f"--experiment exp --traits {trait} --methods {row['method']} --layers {row['layer']}"
    assert result.stdout.splitlines()[-1] == f"next: tlcapture steer {after}"
    assert tlcapture("evaluate", "--experiment", "exp", "--component", "residual").exit_code == 0
    assert stored(data)["traits"] == {trait: [row]}  # evaluating again keeps it


def test_scores_are_those_of_the_activations_that_hugging_face_gives(
    tlcapture: Run, data: Path, elsewhere: Path
) -> None:
    import torch

    words = ("--methods", "mean_diff", "--layers", "1", "--component", "residual")
    folder = elsewhere / "tone" / "loud"
    result = tlcapture("evaluate", "--experiment", "exp", "--traits", "tone/loud", "--examples", folder, *words)
    assert result.exit_code == 0, result.output
    (row,) = stored(data)["loud"]["tone/loud"]
    path = data / "experiments" / "exp" / "extraction" / "tone" / "loud" / "vectors" / "mean_diff_layer1.pt"
    vector = torch.load(path)
    tokenizer, scores = tiny.tokenizer(), {}
    for side in ("positive", "negative"):
        scores[side] = []
        for line in (folder / f"{side}.jsonl").read_text().splitlines():
            example = json.loads(line)
            chat = [{"role": "user", "content": example["prompt"]}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [*prompt, *tokenizer(example["response"], add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                hidden = tiny.hf_model("llama")(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
            scores[side].append(float(hidden[len(prompt) :].mean(dim=0) @ vector / vector.norm()))
    positive, negative = np.array(scores["positive"]), np.array(scores["negative"])
    wins = (positive[:, None] > negative).mean()
    pooled = np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2)
    g = (1 - 3 / (4 * 18 - 1)) * (positive.mean() - negative.mean()) / pooled
    assert row["auroc"] == pytest.approx(wins, abs=0.005)
    assert row["effect_size"] == pytest.approx(g, rel=1e-3)
    low, high = row["effect_size_interval"]  # type: ignore[misc]
    assert low < g < high
    # All 1,024 ways to exchange labels within ten pairs are the exact null.
    flips = [np.array([n >> k & 1 for k in range(10)], dtype=bool) for n in range(1024)]
    null = []
    for flip in flips:
        a, b = np.where(flip, negative, positive), np.where(flip, positive, negative)
        null.append((a[:, None] > b).mean())
    assert row["p"] == pytest.approx(np.mean(np.array(null) >= wins - 1e-9), abs=0.04)
    assert row["null_auroc_p95"] == pytest.approx(np.quantile(null, 0.95), abs=0.05)


@pytest.mark.parametrize(
    ("folder", "words", "said"),
    [
        ("nowhere", (), "expected a folder with positive.jsonl and negative.jsonl"),
        ("tone/loud", (), "it holds examples of one trait: name the trait with --traits"),
        ("", ("--traits", "tone/warm"), "found no folder tone/warm"),
        ("tone", (), "found no folder tone/loud, tone/warm"),
    ],
)
def test_a_folder_without_such_examples_is_refused(
    tlcapture: Run, elsewhere: Path, folder: str, words: tuple[str, ...], said: str
) -> None:
    result = tlcapture("evaluate", "--experiment", "exp", "--examples", elsewhere / folder, *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_examples_whose_sides_are_the_same_are_refused(tlcapture: Run, data: Path, elsewhere: Path) -> None:
    folder = elsewhere / "tone" / "loud"
    rows = (folder / "negative.jsonl").read_text().splitlines()
    (folder / "positive.jsonl").write_text("\n".join(reversed(rows)))
    result = tlcapture("evaluate", "--experiment", "exp", "--examples", elsewhere)
    assert result.exit_code == 2
    assert f"{folder}: positive and negative examples are the same" in result.stderr


def test_sides_that_do_not_vary_have_no_effect_size(tlcapture: Run, data: Path, elsewhere: Path) -> None:
    folder = elsewhere / "tone" / "loud"
    for side, word in (("positive", "NOISE"), ("negative", "hush")):
        rows = [{"pair": str(n), "prompt": "say it", "response": word} for n in range(6)]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--methods", "probe", "--layers", "1", "--component", "residual")
    result = tlcapture("evaluate", "--experiment", "exp", "--examples", elsewhere, *words)
    assert result.exit_code == 0, result.output
    (row,) = stored(data)["traits"]["tone/loud"]
    assert (row["effect_size"], row["effect_size_interval"]) == (None, [None, None])
    assert row["auroc"] in (0.0, 1.0)
    assert "- to -" not in result.output


def test_scores_stand_beside_those_of_layer_0_and_of_the_words_of_the_own_examples(
    tlcapture: Run, data: Path, elsewhere: Path
) -> None:
    words = ("--methods", "mean_diff", "--layers", "0,1", "--component", "residual")
    for folder in (elsewhere / "tone" / "loud", with_other_prompts(data)):
        result = tlcapture("evaluate", "--experiment", "exp", "--traits", "tone/loud", "--examples", folder, *words)
        assert result.exit_code == 0, result.output
        first, second = stored(data)[folder.name]["tone/loud"]
        assert first["layer0_auroc"] == second["layer0_auroc"] == first["auroc"]
    assert second["bag_of_words_auroc"] == 1.0  # on the very responses that the words were learned from


def test_the_examples_that_the_vectors_were_extracted_from_are_refused(
    tlcapture: Run, data: Path, elsewhere: Path
) -> None:
    own, folder = data / "datasets" / "traits" / "tone" / "loud", elsewhere / "tone" / "loud"
    with (folder / "positive.jsonl").open("a") as file:
        file.write((own / "positive.jsonl").read_text().splitlines()[3].replace('"3"', '"30"') + "\n")
    for given, said in ((own, "20 of its 20"), (folder, "1 of its 21")):
        result = tlcapture("evaluate", "--experiment", "exp", "--traits", "tone/loud", "--examples", given)
        assert result.exit_code == 1
        assert f"{said} examples are the trait's own, which its vectors separate" in " ".join(result.output.split())
    assert not (data / "experiments" / "exp" / "extraction" / "extraction_evaluation.json").exists()


def test_without_texts_among_the_own_examples_the_score_of_words_is_unknown(
    tlcapture: Run, data: Path, elsewhere: Path
) -> None:
    own = data / "datasets" / "traits" / "tone" / "loud"
    for side in ("positive", "negative"):
        (own / f"{side}.jsonl").write_text("".join(f'{{"prompt": "{side} {n}"}}\n' for n in range(6)))
    result = tlcapture("evaluate", "--experiment", "exp", "--traits", "tone/loud", "--examples", elsewhere)
    assert result.exit_code == 0, result.output
    assert stored(data)["traits"]["tone/loud"][0]["bag_of_words_auroc"] is None


def test_a_vector_is_said_to_be_reversed_on_a_dataset_with_its_sides_exchanged(
    tlcapture: Run, data: Path, elsewhere: Path
) -> None:
    own, swapped = with_other_prompts(data), data / "swapped"
    swapped.mkdir()
    for side, other in (("positive", "negative"), ("negative", "positive")):
        (swapped / f"{side}.jsonl").write_bytes((own / f"{other}.jsonl").read_bytes())
    words = ("--traits", "tone/loud", "--methods", "probe", "--layers", "1", "--component", "residual")
    said = {}
    for folder in (own, swapped):
        result = tlcapture("evaluate", "--experiment", "exp", *words, "--examples", folder)
        assert result.exit_code == 0, result.output
        said[folder.name] = "tone/loud: probe 1 is reversed there" in result.output
    (straight,), (turned,) = (stored(data)[name]["tone/loud"] for name in ("reworded", "swapped"))
    assert turned["auroc"] == pytest.approx(1 - float(str(straight["auroc"])))
    assert said == {"reworded": False, "swapped": True}
