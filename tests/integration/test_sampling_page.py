"""The examples of docs/sampling.md run, and print what the page shows."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers.generation import StopStringCriteria

from tlcapture.cli.main import main
from tlcapture.generation.stop_texts import StopTexts

PAGE = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_first_example_prints_what_the_page_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, smollm2: Any
) -> None:
    monkeypatch.setattr("tlcapture.load_model", lambda name: smollm2)
    exec(blocks("python")[0], {})
    assert capsys.readouterr().out == blocks("text")[0]


def test_the_commands_and_the_second_example_run(
    embedded_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(embedded_root / "experiments/exp/extraction", tmp_path / "experiments/my_exp/extraction")
    monkeypatch.setenv("TLCAPTURE_ROOT", str(tmp_path))
    (words,) = re.findall(r"tlcapture (capture .* --samples) 8", PAGE)
    more = ["2", "--limit", "1", "--max-new-tokens", "4"]
    done = CliRunner().invoke(main, [*words.split(), *more], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert "1, 2 samples" in done.stdout
    exec(blocks("python")[1], {})
    shown = capsys.readouterr().out
    assert shown.startswith("1 2 2\n") and "mean" in shown and "std" in shown


def test_stop_texts_end_where_those_of_hugging_face_end(smollm2: Any) -> None:
    """Its criterion is asked after every token of a text, for texts that begin and end within tokens."""
    tokenizer, generator = smollm2.tokenizer, random.Random(5)
    text = (
        "The lighthouse keeper's log: 12,345 ships \u2014 na\u00efve caf\u00e9s!\n\n<|im_end|>The end of\tit all. " * 2
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = tokenizer("Tell me", add_special_tokens=False)["input_ids"]
    for _ in range(4):  # each takes the criterion a walk through the vocabulary
        start = generator.randrange(len(text) // 2)
        stop = text[start : start + generator.randrange(1, 12)]
        theirs, ours = StopStringCriteria(tokenizer, [stop]), StopTexts(tokenizer, [stop])
        ends = [n for n in range(1, len(ids) + 1) if ours.is_completed(prompt[-1], ids[:n])]
        expected = [n for n in range(1, len(ids) + 1) if theirs(torch.tensor([[*prompt, *ids[:n]]]), None)[0]]
        assert ends[0] == expected[0], stop
