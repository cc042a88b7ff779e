"""A small root with prompt sets and two traits, and fixtures that run commands in it on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]


def make_trait(root: Path, name: str, positive: str, negative: str) -> None:
    """Write ten pairs of contrastive examples, whose responses hold a word of their side."""
    folder = root / "datasets" / "traits" / name
    folder.mkdir(parents=True)
    for side, word in (("positive", positive), ("negative", negative)):
        rows = [{"pair": str(n), "prompt": f"say {n}", "response": f"{word} {n} {word}"} for n in range(10)]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_prompt_set(root: Path, name: str, texts: list[str]) -> None:
    """Write a prompt set with ids 1, 2, ..."""
    folder = root / "datasets" / "inference"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [{"id": str(n), "text": text} for n, text in enumerate(texts, start=1)]
    (folder / f"{name}.json").write_text(json.dumps({"name": name, "prompts": prompts}))


@pytest.fixture
def data(root: Path) -> Path:
    """Prompt sets `short` (3 prompts) and `other` (1), traits `tone/loud` and `tone/warm`."""
    make_prompt_set(root, "short", ["hello there", "what?", "<b>tell me & more</b>"])
    make_prompt_set(root, "other", ["once"])
    make_trait(root, "tone/loud", "LOUD", "soft")
    make_trait(root, "tone/warm", "warm", "cold")
    return root


@pytest.fixture
def capture(tlcapture: Run, data: Path, tiny_folder: Path) -> Run:
    """`tlcapture capture` of the set `short` with the tiny model, 6 new tokens."""

    def run(*words: object, prompts: tuple[object, ...] = ("--prompt-set", "short")) -> Result:
        common = ("--experiment", "exp", "--model", tiny_folder, "--max-new-tokens", "6")
        return tlcapture("capture", *common, *prompts, *words)

    return run


@pytest.fixture
def extract(tlcapture: Run, data: Path, tiny_folder: Path) -> Run:
    """`tlcapture extract` of the root's two traits with the tiny model."""

    def run(*words: object, experiment: str = "exp") -> Result:
        common = ("--experiment", experiment, "--model", tiny_folder, "--traits", "tone/loud,tone/warm")
        return tlcapture("extract", *common, *words)

    return run


@pytest.fixture
def raw(data: Path) -> Path:
    """The folder of raw residuals of the set `short`."""
    return data / "experiments" / "exp" / "inference" / "raw" / "residual" / "short"


@pytest.fixture
def analysis(data: Path) -> Path:
    """The folder of add-ons of the set `short`."""
    return data / "experiments" / "exp" / "analysis" / "per_token" / "short"


@pytest.fixture
def projected(data: Path) -> Path:
    """The folder of projections of the set `short` onto `tone/loud`."""
    return data / "experiments" / "exp" / "inference" / "tone" / "loud" / "residual_stream" / "short"
