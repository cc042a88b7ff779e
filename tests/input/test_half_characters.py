"""Tokens that are part of a UTF-8 character: token texts show U+FFFD, ids and whole texts are unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from starlette.testclient import TestClient

from tests import tiny
from tests.cli.conftest import make_prompt_set, make_trait
from tests.evidence import Evidence
from tlcapture import Experiment
from tlcapture.captures.capture import Capture
from tlcapture.page.server import page_app
from tlcapture.prompts.tokenization import decode, token_texts

Run = Callable[..., Result]
TEXTS = {
    "an emoji": "\U0001f600",
    "a family of emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "Chinese": "\u6f22\u5b57",
    "accents": "na\u00efve caf\u00e9",
    "a replacement character": "a \ufffd b",
    "combining marks": "e\u0301\u0323",
}


@pytest.fixture
def captured(tlcapture: Run, root: Path, tiny_folder: Path) -> Path:
    """Every text captured and projected with the tiny model, whose tokens are single bytes."""
    make_prompt_set(root, "odd", list(TEXTS.values()))
    make_trait(root, "tone/loud", "LOUD", "soft")
    model = ("--experiment", "exp", "--model", tiny_folder)
    words = ("--traits", "tone/loud", "--component", "residual", "--methods", "mean_diff", "--layers", "1")
    assert tlcapture("extract", *model, *words).exit_code == 0
    options = ("--attention", "--logit-lens", "--max-new-tokens", "12", "--temperature", "1.5")
    result = tlcapture("capture", *model, "--prompt-set", "odd", *options)
    assert result.exit_code == 0, result.output
    return root / "experiments" / "exp"


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def test_every_file_and_the_page_keep_ids_texts_and_tokens(captured: Path, evidence: Evidence) -> None:
    tokenizer = tiny.tokenizer()
    client = TestClient(page_app(captured.parents[1]), base_url="http://127.0.0.1")
    exp = Experiment("exp", captured.parents[1])
    halves = 0
    for number, (name, text) in enumerate(TEXTS.items(), start=1):
        capture = Capture.open(captured / f"inference/raw/residual/odd/{number}.pt")
        assert text in capture.prompt.text
        assert tokenizer(capture.prompt.text, add_special_tokens=False)["input_ids"] == capture.prompt.token_ids
        assert capture.prompt.tokens == token_texts(tokenizer, capture.prompt.token_ids)
        n_halves = sum(byte > 127 for byte in capture.prompt.text.encode())
        assert capture.prompt.tokens.count("\ufffd") == n_halves >= 2
        assert capture.response.text == decode(tokenizer, capture.response.token_ids)
        halves += "\ufffd" in "".join(capture.response.tokens)

        projection = read(captured / f"inference/tone/loud/residual_stream/odd/{number}.json")
        assert projection["prompt"]["text"] == capture.prompt.text
        assert projection["prompt"]["tokens"] == capture.prompt.tokens
        assert projection["response"]["text"] == capture.response.text
        assert projection["response"]["tokens"] == capture.response.tokens
        for kind in ("attention", "logit_lens"):
            assert read(captured / f"analysis/per_token/odd/{number}_{kind}.json")["tokens"] == capture.tokens
        served = client.get(f"/api/exp/sets/odd/{number}").json()
        assert served["tokens"] == capture.tokens
        assert served["text"] == capture.response.text
        assert exp.captures("odd")[number].token_ids == capture.token_ids
        assert exp.captures("odd")[number].logit_lens().tokens == capture.tokens
        evidence.tried("tokens that are part of a character", name)
    assert halves, "no response was cut within a character: raise --max-new-tokens"


def test_replay_uses_ids_instead_of_token_texts(tlcapture: Run, captured: Path, evidence: Evidence) -> None:
    """Tokenizing texts with U+FFFD again would give other tokens; patterns are computed from the stored ids."""
    files = sorted(captured.glob("analysis/per_token/odd/*_attention.json"))
    before = {path: read(path) for path in files}
    for path in files:
        path.unlink()
    result = tlcapture("capture", "--experiment", "exp", "--prompt-set", "odd", "--attention", "--replay")
    assert result.exit_code == 0, result.output
    for path in files:
        after = read(path)
        assert after["tokens"] == before[path]["tokens"]
        flat, again = (
            [weight for entry in content["attention"] for layer in entry["by_layer"] for row in layer for weight in row]
            for content in (before[path], after)
        )
        assert again == pytest.approx(flat, abs=2e-3)
    evidence.tried("tokens that are part of a character", "replayed", len(files))


def test_ranks_are_computed_from_ids_if_tokens_have_equal_texts(captured: Path, evidence: Evidence) -> None:
    """All bytes beyond ASCII show as U+FFFD: a lookup by text would find the first of them."""
    import torch

    from tlcapture.models.loading import load_model

    model = load_model(str(read(captured / "config.json")["inference_model"]), device="cpu")
    capture = Capture.open(captured / "inference/raw/residual/odd/1.pt")
    logits = model.unembed(capture.residual(capture.n_layers - 1).float()).float()
    lens = read(captured / "analysis/per_token/odd/1_logit_lens.json")
    checked = 0
    for entry in lens["predictions"]:
        index = entry["token_idx"]
        came = capture.token_ids[index + 1]
        row = logits[index]
        if abs(float(torch.sort(row - row[came]).values.abs()[1])) > 1e-2:
            assert entry["by_layer"][-1]["actual_rank"] == pytest.approx(1 + int((row > row[came]).sum()), abs=1)
            checked += 1
    assert checked > 5
    evidence.tried("tokens that are part of a character", "ranked by id", checked)
