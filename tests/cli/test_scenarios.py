"""Lines of .txt examples as texts that are read, or as scenarios that the model completes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.cli.conftest import Run
from tlcapture.extraction.examples import read_examples
from tlcapture.names import Trait
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.vector_files import VectorFiles

LOUD = Trait("tone", "loud")
SIDES = {
    side: [f"{word} {number} and" for number in range(8)] for side, word in (("positive", "UP"), ("negative", "low"))
}
HALVES = (slice(0, 8), slice(8, 16))
GUESS = "lines of .txt examples are read as bare texts, which is a guess: if the model is to complete them, pass"


@pytest.fixture
def lines(data: Path) -> Path:
    """The examples of `tone/loud` and `tone/warm` as plain lines."""
    for trait in ("loud", "warm"):
        folder = data / "datasets" / "traits" / "tone" / trait
        for side, texts in SIDES.items():
            (folder / f"{side}.jsonl").unlink()
            (folder / f"{side}.txt").write_text("".join(f"{text}\n" for text in texts))
    return data


def found(root: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """The mean difference at layer 1 and the metadata."""
    files = VectorFiles(Layout(root, "exp"), LOUD)
    return torch.load(files.file("residual", "mean_diff", 1), weights_only=True), files.metadata("residual")


def mean_difference(root: Path, *, completed: bool) -> torch.Tensor:
    """The difference of the two sides' means over the training examples, from Hugging Face alone."""
    held_out = [item.held_out for item in read_examples(Datasets(root), LOUD).items]
    means = [mean_state(text, completed=completed) for texts in SIDES.values() for text in texts]
    fitted = [[mean for mean, held in zip(means[part], held_out[part], strict=True) if not held] for part in HALVES]
    return torch.stack(fitted[0]).mean(dim=0) - torch.stack(fitted[1]).mean(dim=0)


@torch.no_grad()
def mean_state(text: str, *, completed: bool) -> torch.Tensor:
    """The mean state after layer 1 over a text, or over the model's greedy completion of it."""
    model, tokenizer = tiny.hf_model("llama"), tiny.tokenizer()
    ids, start = [0, *tokenizer(text)["input_ids"]], 1
    if completed:
        ids = [0, 2, *tokenizer(f"user\n{text}")["input_ids"], 3, *tokenizer("\n")["input_ids"]]  # the tiny template
        ids += [2, *tokenizer("assistant\n")["input_ids"]]
        start = len(ids)
        new = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=[1, 3])
        response = new[0, start:].tolist()
        ids += response[:-1] if response[-1] in (1, 3) else response
    return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0][start:].mean(dim=0)


def test_without_the_option_lines_are_read_as_texts_and_this_is_said_once(
    extract: Run, lines: Path, root: Path
) -> None:
    result = extract("--methods", "mean_diff")
    assert result.exit_code == 0, result.output
    assert result.stderr.count(GUESS) == 1
    _, metadata = found(root)
    assert (metadata["position"], metadata["examples_as"]) == ("all_mean", "texts")
    said = extract("--methods", "mean_diff", "--examples-as", "texts")
    assert GUESS not in said.stderr


@pytest.mark.parametrize("examples_as", ["texts", "scenarios"])
def test_the_vector_is_that_of_hugging_faces_states_of_the_lines_or_of_what_the_model_adds(
    extract: Run, tlcapture: Run, lines: Path, root: Path, examples_as: str
) -> None:
    result = extract("--methods", "mean_diff", "--examples-as", examples_as)
    assert result.exit_code == 0, result.output
    assert GUESS not in result.stderr
    vector, metadata = found(root)
    assert metadata["examples_as"] == examples_as
    assert metadata["position"] == {"texts": "all_mean", "scenarios": "response_mean"}[examples_as]
    assert torch.allclose(vector, mean_difference(root, completed=examples_as == "scenarios"), atol=1e-3)
    evaluated = tlcapture("evaluate", "--experiment", "exp", "--methods", "mean_diff")
    assert evaluated.exit_code == 0, evaluated.output
    assert GUESS not in evaluated.stderr


def test_evaluating_imported_vectors_and_checking_take_the_option_too(
    tlcapture: Run, lines: Path, tiny_folder: Path
) -> None:
    file = Path(__file__).parents[1] / "other_tools" / "repeng.gguf"
    words = ("--experiment", "exp", "--trait", "tone/loud", "--model", tiny_folder)
    assert tlcapture("traits", "import", file, *words).exit_code == 0
    evaluate = ("evaluate", "--experiment", "exp")
    assert tlcapture(*evaluate).stderr.count(GUESS) == 1
    assert GUESS not in tlcapture(*evaluate, "--examples-as", "scenarios").stderr
    check = ("traits", "check", "--traits", "tone/loud,tone/warm")
    assert tlcapture(*check).stderr.count(GUESS) == 1
    scenarios = tlcapture(*check, "--examples-as", "scenarios")
    assert GUESS not in scenarios.stderr
    assert "tone/loud: by prompt: AUROC 1.00, expected 0.35 to 0.65" in scenarios.output
