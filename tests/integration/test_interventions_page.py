"""The commands and examples of docs/interventions.md run, and the examples print what the page shows."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tlcapture import Capture, Experiment
from tlcapture.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "interventions.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_print_what_the_page_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, smollm2: Any
) -> None:
    monkeypatch.setattr("tlcapture.load_model", lambda name: smollm2)
    namespace: dict[str, Any] = {}
    for code, expected in zip(blocks("python"), blocks("text"), strict=True):
        exec(code, namespace)
        assert capsys.readouterr().out == expected


def test_the_commands_capture_one_prompt_set_steered_ablated_and_unchanged(embedded_root: Path) -> None:
    extracted = embedded_root / "experiments/exp/extraction"
    shutil.copytree(extracted, embedded_root / "experiments/page/extraction")
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        words = [
            word.replace("my_exp", "page") for word in shlex.split(command.replace("--samples 8", "--samples 2"))[1:]
        ]
        exact, limit = ["--save-dtype", "float32"], "1" if "--samples" in words else "2"
        more = {
            "extract": ["--methods", "mean_diff", "--skip-existing"],
            "capture": ["--limit", limit, *([] if "--replay" in words else ["--max-new-tokens", "3", *exact])],
            "project": [],
        }[words[0]]
        run = CliRunner().invoke(main, [*words, "--root", str(embedded_root), *more])
        assert run.exit_code == 0, run.output
    layout = Experiment("page", embedded_root).layout
    sampled, casual, plain, ablated, steered = layout.captured_prompt_sets()
    assert (sampled, casual) == ("baseline", "baseline@casual")
    assert len(layout.captured(casual)) == 2
    assert (plain, ablated) == ("single_trait", "single_trait@ablated") and "@steer-refusal-0.2-L16-" in steered
    for prompt_id in layout.captured(plain):
        found = {name: Capture.open(layout.residual(name, prompt_id)) for name in (plain, ablated, steered)}
        (record,) = found[steered].metadata["interventions"]
        vector = torch.load(layout.folder / "extraction/behavioral/refusal/vectors/mean_diff_layer16.pt")
        unit = torch.nn.functional.normalize(vector, dim=0)
        (norm,) = record["typical_norms"]
        n_prompt = len(found[plain].prompt.tokens)
        difference = found[steered].residual(16)[:n_prompt] - found[plain].residual(16)[:n_prompt]
        assert difference[:-1].abs().max() < 1e-3 * norm
        torch.testing.assert_close(difference[-1], 0.2 * norm * unit, atol=1e-3 * norm, rtol=1e-3)
        along = found[ablated].residual(16) @ unit
        assert along.abs().max() < 1e-4 * norm
    assert layout.attention(ablated, layout.captured(ablated)[0]).is_file()
