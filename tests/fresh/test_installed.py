"""The installed package in an environment of its own, with the embedded model; `make test-fresh` runs this.

It imports nothing else of `tests`, since that folder lies next to the source of `tlcapture`, which is not what is
tested. Its oracles are Hugging Face's forward pass, and the definition of a projection in numpy.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import subprocess
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tlcapture
from tlcapture.models.checkpoints.embedded import embedded_folder

TRAIT = "tone/loud"
PROMPTS = ["How do tides work?", "Tell me a short joke about the sea, please."]
HAS_HOOKED = int(version("transformer_lens").split(".")[0]) < 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a prompt set, and with the contrastive examples of a trait."""
    root = tmp_path_factory.mktemp("root")
    prompts = [{"id": str(number), "text": text} for number, text in enumerate(PROMPTS, start=1)]
    inference = root / "datasets" / "inference"
    inference.mkdir(parents=True)
    (inference / "two.json").write_text(json.dumps({"name": "two", "prompts": prompts}))
    trait = root / "datasets" / "traits" / TRAIT
    trait.mkdir(parents=True)
    for side, words in {"positive": "STOP! LISTEN TO ME", "negative": "please do sit down"}.items():
        lines = [{"pair": str(n), "prompt": f"Speech {n}?", "response": f"{words}, {n} times."} for n in range(10)]
        (trait / f"{side}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def tlcapture_command(root: Path, *words: str) -> str:
    program = Path(sysconfig.get_path("scripts")) / "tlcapture"
    command = [program, words[0], "--experiment", "exp", "--root", root, *words[1:]]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def printed(root: Path) -> str:
    """What a capture with every add-on printed."""
    return tlcapture_command(
        root, "capture", "--prompt-set", "two", "--layer-internals", "all", "--capture-attn", "--temperature", "0",
        "--max-new-tokens", "8", "--save-dtype", "float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded_folder(), attn_implementation="eager").eval()


def test_the_package_is_the_installed_one() -> None:
    assert Path(sysconfig.get_path("purelib")) in Path(tlcapture.__file__).parents


def test_the_console_says_once_which_engine_runs_and_why_it_is_the_bridge(printed: str) -> None:
    (line,) = [line for line in printed.splitlines() if " on engine " in line]
    if HAS_HOOKED:
        assert "on engine hooked" in line
    else:
        assert "on engine bridge" in line
        assert 'pip install "transformer_lens<4"' in line


@pytest.mark.parametrize("prompt_id", ["1", "2"])
def test_a_capture_with_all_add_ons_equals_hugging_face(
    root: Path, printed: str, hugging_face: Any, prompt_id: str
) -> None:
    folder = root / "experiments" / "exp"
    raw = torch.load(folder / f"inference/raw/residual/two/{prompt_id}.pt", weights_only=True)
    per_token = folder / "analysis" / "per_token" / "two"
    n_prompt = len(raw["prompt"]["token_ids"])
    ids = torch.tensor([raw["prompt"]["token_ids"] + raw["response"]["token_ids"]])
    with torch.no_grad():
        written = hugging_face.generate(ids[:, :n_prompt], max_new_tokens=8, do_sample=False)
        theirs = hugging_face(ids, output_hidden_states=True, output_attentions=True)
    assert written.tolist() == ids.tolist()

    patterns = json.loads((per_token / f"{prompt_id}_attention.json").read_text())["attention"]
    lens = json.loads((per_token / f"{prompt_id}_logit_lens.json").read_text())["predictions"]
    n_layers = hugging_face.config.num_hidden_layers
    for layer in range(n_layers):
        parts = [raw[part]["activations"][layer] for part in ("prompt", "response")]
        residual_in, after_attn, attn_out = (
            torch.cat([part[point] for part in parts]) for point in ("residual_in", "after_attn", "attn_out")
        )
        assert_equal(residual_in, theirs.hidden_states[layer][0])
        assert_equal(after_attn, theirs.hidden_states[layer][0] + attn_out)
        internals = torch.load(folder / f"inference/raw/internals/two/{prompt_id}_L{layer}.pt", weights_only=True)
        assert_equal(internals[f"blocks.{layer}.hook_resid_pre"].squeeze(0), theirs.hidden_states[layer][0])
    for token, row in enumerate(patterns):
        expected = torch.stack([pattern[0, :, token, : token + 1] for pattern in theirs.attentions])
        torch.testing.assert_close(torch.tensor(row["by_layer"]), expected, rtol=1e-3, atol=1e-4)
    probabilities = theirs.logits[0].softmax(dim=-1)
    for prediction in lens:
        last, token = prediction["by_layer"][n_layers - 1], prediction["token_idx"]
        found = [each["prob"] for each in last["top_k"]]
        expected = probabilities[token].topk(len(found)).values
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-2, atol=1e-4)
        actual = float(probabilities[token, ids[0, token + 1]])
        assert last["actual_prob"] == pytest.approx(actual, rel=1e-2, abs=1e-4)


def test_vectors_are_extracted_and_captures_projected_and_exported(root: Path, printed: str, tmp_path: Path) -> None:
    tlcapture_command(root, "extract", "--traits", TRAIT, "--methods", "mean_diff", "--component", "residual")
    tlcapture_command(root, "project", "--prompt-set", "two", "--layer", "16")
    folder = root / "experiments" / "exp"
    vector = torch.load(folder / f"extraction/{TRAIT}/vectors/mean_diff_layer16.pt", weights_only=True).double().numpy()
    raw = torch.load(folder / "inference/raw/residual/two/1.pt", weights_only=True)
    saved = json.loads((folder / f"inference/{TRAIT}/residual_stream/two/1.json").read_text())
    for part in ("prompt", "response"):
        residual = raw[part]["activations"][16]["residual_out"].double().numpy()
        expected = residual @ vector / np.linalg.norm(vector)
        found = [token[16][2] for token in saved["projections"][part]]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    page = tmp_path / "page.html"
    tlcapture_command(root, "view", "--export", str(page))
    exported = re.findall(
        r'<script type="text/plain" id="data:exp/sets/two/1">([^<]*)<', page.read_text(encoding="utf-8")
    )
    tokens = json.loads(gzip.decompress(base64.b64decode(exported[0])))["tokens"]
    assert PROMPTS[0] in "".join(tokens)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
