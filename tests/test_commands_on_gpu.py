"""Commands on a GPU write the files that they write on a CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests import tiny
from tests.cli.conftest import make_prompt_set, make_trait
from tests.conftest import quick_evaluations, unrendered_figures
from tlcapture.cli.main import main

pytestmark = pytest.mark.skipif(tiny.DEVICE == "cpu", reason="compares a GPU with the CPU")

TRAITS = [f"tone/{word}" for word in ("loud", "warm", "dry", "keen", "calm", "bold", "kind", "glad", "wry", "grave")]
TEXTS = ["hello there", "what?", "<b>tell me & more</b>", "a", "once upon a time"]
DEVICES = ("cpu", "cuda")
QUESTIONS = {"questions": [{"question": "how are you?", "positive": "LOUD", "negative": "soft"}]}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A root for each device with prompts, examples of ten traits, and the same vectors of them."""
    folder = tmp_path_factory.mktemp("commands")
    made = {device: folder / device for device in DEVICES}
    tiny.hf_model("llama").save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    make_prompt_set(made["cpu"], "five", TEXTS)
    for trait in TRAITS:
        make_trait(made["cpu"], trait, trait[-4:].upper(), "soft")
        (made["cpu"] / "datasets" / "traits" / trait / "steering.json").write_text(json.dumps(QUESTIONS))
    with quick_evaluations(), unrendered_figures():
        run(made["cpu"], "extract", *on("cpu", folder), "--traits", ",".join(TRAITS), "--component", "residual")
        shutil.copytree(made["cpu"], made["cuda"])
        yield made


def on(device: str, folder: Path) -> tuple[object, ...]:
    """The options that let a command run the model in a folder on a device."""
    return ("--model", folder / "model", "--device", device)


def run(root: Path, name: str, *words: object) -> None:
    """Run a command in this process."""
    options = {"TLCAPTURE_EXPERIMENT": "exp", "TLCAPTURE_ROOT": str(root)}
    result = CliRunner(env=options).invoke(main, [name, *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def on_both(roots: dict[str, Path], name: str, *words: object) -> None:
    """Run a command on each device."""
    for device, root in roots.items():
        run(root, name, *on(device, root.parent), *words)


def compare(roots: dict[str, Path], pattern: str) -> int:
    """Assert that the roots hold the same files, up to rounding; returns the number of those of a pattern."""
    one, other = (root / "experiments" / "exp" for root in roots.values())
    found = files(one, pattern)
    assert files(other, pattern) == found
    for path in found:
        assert_close(content(one / path), content(other / path), str(path))
    return len(found)


def files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that hold what was computed."""
    return sorted(path.relative_to(folder) for path in folder.rglob(pattern) if is_compared(path))


def is_compared(path: Path) -> bool:
    """Whether a file holds what was computed."""
    is_of_run = path.name == "config.json" or {"runs", ".locks"} & set(path.parts) or path.name.startswith(".")
    return path.suffix in (".json", ".pt", ".safetensors") and not is_of_run


def content(path: Path) -> Any:
    """What a file holds."""
    if path.suffix == ".pt":
        return torch.load(path)
    return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_bytes())


def assert_close(one: Any, other: Any, where: str) -> None:
    """The same structure and texts, and numbers that differ by rounding."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in (each for each in one if not str(each).endswith(("_date", "_digest", "timestamp"))):
            assert_close(one[key], other[key], f"{where}: {key}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.device == other.device, where
        tolerance = 1e-4 if one.dtype == torch.float32 else 0.02
        largest = float(one.double().abs().nan_to_num().max()) if one.numel() else 0.0
        options = {"rtol": tolerance, "atol": tolerance * largest, "equal_nan": True}
        assert torch.allclose(one.double(), other.double(), **options), where
    elif isinstance(one, list) and one and isinstance(one[0], float | int):
        assert np.allclose(one, other, rtol=2e-3, atol=2e-4), where
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_close(*pair, f"{where}[{number}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-4), where
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def captured(roots: dict[str, Path]) -> dict[str, Path]:
    """The roots, with a capture of all views of sampled responses, projected onto ten traits."""
    views = ("--attention", "--logit-lens", "--layer-internals", 1, "--capture-attn", "--save-dtype", "float32")
    how = ("--prompt-set", "five", "--temperature", 0.7, "--max-new-tokens", 12, "--layer", 1)
    on_both(roots, "capture", *how, *views)
    return roots


def test_a_capture_with_all_views(captured: dict[str, Path]) -> None:
    assert compare(captured, "*.pt") > 10
    assert compare(captured, "*.json") > 60


def test_steered_captures(captured: dict[str, Path]) -> None:
    how = ("--prompt-set", "five", "--temperature", 0.7, "--max-new-tokens", 12, "--layer", 1, "--variant", "loud")
    acts = ("--steer", "tone/loud:0.5@1", "--ablate", "tone/warm@2:response", "--cap", "tone/dry:0@0")
    on_both(captured, "capture", *how, *acts, "--samples", 3, "--attention", "--save-dtype", "float32")
    assert compare(captured, "five@loud/*.json") > 60


def test_a_replay(captured: dict[str, Path]) -> None:
    on_both(captured, "capture", "--prompt-set", "five", "--replay", "--layer-internals", "all")
    assert compare(captured, "*_L2.pt") == len(TEXTS)


def test_a_projection_of_saved_captures(captured: dict[str, Path]) -> None:
    for root in captured.values():
        run(root, "project", "--prompt-set", "five", "--layer", 2, "--method", "probe")
    assert compare(captured, "*.json") > 60


def test_a_comparison_of_two_captures(captured: dict[str, Path]) -> None:
    read = ("--prompt-set", "five", "--responses-from", "exp", "--variant", "read", "--save-dtype", "float32")
    on_both(captured, "capture", *read, "--layer", 1, "--steer", "tone/loud:0.3@1")
    for device, root in captured.items():
        run(root, "compare", "exp/five", "exp/five@read", "--device", device)
    assert compare(captured, "analysis/compare/**/*.json")


def test_extraction_evaluation_and_steering(roots: dict[str, Path], tmp_path: Path) -> None:
    two = ("--traits", "tone/loud,tone/warm", "--component", "residual")
    own = {device: tmp_path / device for device in DEVICES}
    for part in ("cpu/datasets", "cuda/datasets", "model"):
        shutil.copytree(roots["cpu"].parent / part, tmp_path / part)
    on_both(own, "extract", *two)
    assert compare(own, "*.pt")
    on_both(own, "evaluate", *two)
    on_both(own, "steer", "--traits", "tone/loud", "--layers", "1", "--coefficients=-0.5,0.5")
    assert compare(own, "*.json")
