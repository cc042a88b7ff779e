"""`capture --replay`: several captures in one forward pass, with the files that each would have alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from tests import tiny
from tests.cli.conftest import make_prompt_set
from tlcapture.captures.capture import Capture
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json

Run = Callable[..., Result]
ALL = ("--attention", "--logit-lens", "--layer-internals", "all")
TEXTS = [
    "hello there",
    "what?",
    "<b>tell me & more</b>",
    "a",
    "once upon a time",
    "no",
    "say it again, please",
    "x y z",
]


@pytest.fixture
def folder(data: Path) -> Path:
    make_prompt_set(data, "eight", TEXTS)
    return data / "experiments" / "exp"


def files(folder: Path) -> dict[str, Any]:
    """Add-ons by name."""
    paths = sorted([*folder.rglob("*_attention.json"), *folder.rglob("*_logit_lens.json"), *folder.rglob("*_L*.pt")])
    return {path.name: read_json(path) if path.suffix == ".json" else torch.load(path) for path in paths}


def assert_close(one: Any, other: Any) -> None:
    """The same structure and texts, with numbers that differ by rounding."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        if one and isinstance(one[0], float):
            assert one == pytest.approx(other, rel=2e-3, abs=1e-6)
        elif one and isinstance(one[0], dict) and "prob" in one[0]:  # those of equal probability may change places
            assert [each["prob"] for each in one] == pytest.approx([each["prob"] for each in other], rel=2e-3)
        else:
            for pair in zip(one, other, strict=True):
                assert_close(*pair)
    elif isinstance(one, torch.Tensor):
        bound = 1e-4 if one.dtype == torch.float32 else 2e-3
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-6)
    else:
        assert one == other


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The shapes of the tokens of every forward pass from now on, but for the short ones that check a loaded model."""
    from tlcapture.models.engines.bridge import BridgeModel
    from tlcapture.models.engines.hooked import HookedModel

    shapes: list[list[int]] = []
    for kind in (HookedModel, BridgeModel):
        original = kind.step

        def step(self: Any, tokens: Any, *rest: Any, original: Any = original, **options: Any) -> Any:
            if tokens.shape[1] > 10:
                shapes.append(list(tokens.shape))
            return original(self, tokens, *rest, **options)

        monkeypatch.setattr(kind, "step", step)
    return shapes


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_a_replay_in_batches_writes_what_single_replays_do(
    capture: Run, folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ("--prompt-set", "eight")
    made = capture("--temperature", 0.7, "--engine", engine, "--save-dtype", "float32", prompts=prompts)
    assert made.exit_code == 0, made.output
    shapes = count_steps(monkeypatch)
    replay = ("--replay", "--engine", engine, *ALL)
    alone = capture(*replay, "--batch-size", 1, prompts=prompts)
    assert alone.exit_code == 0, alone.output
    assert len(shapes) == len(TEXTS)
    single = files(folder)
    assert len(single) == len(TEXTS) * (2 + tiny.N_LAYERS)
    for path in folder.rglob("*_attention.json"):
        path.unlink()
    shapes.clear()
    together = capture(*replay, prompts=prompts)
    assert together.exit_code == 0, together.output
    assert len(shapes) == 1  # of eight prompts
    assert shapes[0][0] == len(TEXTS)
    assert_close(files(folder), single)


@pytest.mark.parametrize("words", [("--shard", "1/2"), ("--batch-size", 3), ("--limit", 5)])
def test_a_replay_of_a_part_makes_that_part(capture: Run, folder: Path, words: tuple[Any, ...]) -> None:
    prompts = ("--prompt-set", "eight")
    capture("--temperature", 0, prompts=prompts)
    done = capture("--replay", "--attention", *words, prompts=prompts)
    assert done.exit_code == 0, done.output
    count = {"--shard": 4, "--batch-size": 8, "--limit": 5}[words[0]]
    assert len(list(folder.rglob("*_attention.json"))) == count


def test_prompts_that_lack_different_files_get_only_those(
    capture: Run, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ("--prompt-set", "eight")
    capture("--temperature", 0, *ALL, prompts=prompts)
    before = files(folder)
    layout = Layout(data, "exp")
    missing = [layout.attention("eight", "1"), layout.attention("eight", "2"), layout.internals("eight", "3", 1)]
    missing += [layout.logit_lens("eight", "4"), layout.logit_lens("eight", "1")]
    for path in missing:
        path.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*_*.*") if "runs" not in path.parts}
    shapes = count_steps(monkeypatch)
    done = capture("--skip-existing", "--temperature", 0, *ALL, prompts=prompts)
    assert done.exit_code == 0, done.output
    assert all(path.is_file() for path in missing)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert [shape[0] for shape in shapes] == [len(TEXTS)]  # in the batch of an uninterrupted run; the lens needs none
    assert_close(files(folder), before)
    again = capture("--skip-existing", "--temperature", 0, *ALL, prompts=prompts)
    assert "8 prompts skipped" in again.output


def test_a_replay_that_goes_on_makes_the_bits_of_one_that_was_not_stopped(
    capture: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, replay = ("--prompt-set", "eight"), ("--replay", *ALL, "--batch-size", 3)
    capture(prompts=prompts)
    assert capture(*replay, prompts=prompts).exit_code == 0
    whole = {path: path.read_bytes() for path in folder.rglob("*_*.*") if "runs" not in path.parts}
    for path in [path for number, path in enumerate(sorted(whole)) if number % 3]:
        path.unlink()
    shapes = count_steps(monkeypatch)
    assert capture(*replay, "--skip-existing", prompts=prompts).exit_code == 0
    assert [shape[0] for shape in shapes] == [3, 3, 2]
    assert {path: path.read_bytes() for path in whole} == whole


def test_a_replay_in_another_dtype_is_reported_and_recorded(capture: Run, data: Path) -> None:
    assert capture("--dtype", "bfloat16", "--limit", 1).exit_code == 0
    same = capture("--replay", "--layer-internals", 1, "--dtype", "bfloat16", "--limit", 1)
    assert "rounding" not in same.stderr
    other = capture("--replay", "--layer-internals", 1, "--dtype", "float32", "--limit", 1)
    engine = tiny.ENGINES[0]
    words = f"short: captured on {engine} in bfloat16, read again on {engine} in float32: they differ by rounding"
    assert words in other.stderr
    path = Layout(data, "exp").internals("short", "1", 1)
    assert torch.load(path, weights_only=True)["metadata"]["dtype"] == "float32"


def test_a_capture_of_another_model_fails_alone(capture: Run, folder: Path, data: Path) -> None:
    prompts = ("--prompt-set", "eight")
    capture("--temperature", 0, prompts=prompts)
    path = Layout(data, "exp").residual("eight", "2")
    value = torch.load(path)
    value["metadata"]["model_fingerprint"] = "another"
    torch.save(value, path)
    done = capture("--replay", "--attention", prompts=prompts)
    assert done.exit_code == 1
    assert "eight/2: captured from" in done.output
    assert len(list(folder.rglob("*_attention.json"))) == len(TEXTS) - 1


def test_a_capture_that_became_unreadable_fails_alone(
    capture: Run, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two times that it is opened."""
    from tlcapture.commands.prompt_files import replay

    prompts = ("--prompt-set", "eight")
    capture("--temperature", 0, prompts=prompts)
    path, original = Layout(data, "exp").residual("eight", "2"), replay.generate

    def damage(*words: Any, **options: Any) -> Any:
        path.write_bytes(b"")
        return original(*words, **options)

    monkeypatch.setattr(replay, "generate", damage)
    done = capture("--replay", "--attention", prompts=prompts)
    assert done.exit_code == 1
    assert len(list(folder.rglob("*_attention.json"))) == len(TEXTS) - 1
    assert Capture.open(Layout(data, "exp").residual("eight", "1")).positions.is_all


def test_options_that_a_replay_does_not_read_are_reported(capture: Run) -> None:
    assert capture().exit_code == 0
    done = capture("--replay", "--attention", "--thinking", "on", "--top-p", "0.5")
    assert done.exit_code == 0, done.output
    assert "--replay reads stored tokens: --max-new-tokens, --top-p, --thinking have no effect" in done.stderr
    assert "no effect" not in capture().stderr


def test_prompts_without_a_capture_are_one_failure_which_names_the_command(
    capture: Run, tlcapture: Run, folder: Path
) -> None:
    prompts = ("--prompt-set", "eight")
    capture("--limit", 3, prompts=prompts)
    replay = ("--replay", "--attention")
    done = capture(*replay, "--limit", 7, prompts=prompts)
    assert done.exit_code == 1 and len(files(folder)) == 3
    (failure,) = [line for line in done.stderr.splitlines() if line.startswith("failed")]
    assert "eight: --replay needs saved captures, and 4 of 7 are missing: run 'tlcapture capture " in failure
    assert "would fail: eight: --replay needs" in capture(*replay, "--dry-run", prompts=prompts).stdout
    command = shlex.split(failure.partition("'")[2].partition("'")[0])
    assert tlcapture(*command[1:], "--max-new-tokens", 6).exit_code == 0
    assert capture(*replay, "--limit", 7, prompts=prompts).exit_code == 0
    of_variant = capture(*replay, "--variant", "v", prompts=prompts)
    assert "8 of 8 are missing: capture them first, as the others of the variant" in of_variant.stderr
