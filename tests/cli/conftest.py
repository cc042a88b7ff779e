"""A small root with prompt sets and two traits, and fixtures that run commands in it on a tiny model."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import Result

from tests import tiny
from tests.conftest import quick_evaluations, unrendered_figures
from tlcapture.traits.evaluation_files import EvaluationRow

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


def make_data(root: Path) -> Path:
    """Prompt sets `short` (3 prompts) and `other` (1), traits `tone/loud` and `tone/warm`."""
    make_prompt_set(root, "short", ["hello there", "what?", "<b>tell me & more</b>"])
    make_prompt_set(root, "other", ["once"])
    make_trait(root, "tone/loud", "LOUD", "soft")
    make_trait(root, "tone/warm", "warm", "cold")
    return root


@pytest.fixture(scope="package", autouse=True)
def _quick_evaluations() -> Iterator[None]:
    with quick_evaluations(), unrendered_figures(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlcapture.commands.plots.evaluation_heatmaps", heatmaps_in_words)
        yield


def heatmaps_in_words(trait: str, rows: Sequence[EvaluationRow]) -> bytes:
    """What the heat maps of an evaluation would show."""
    return f"{trait}: {sorted(row.key for row in rows)}".encode()


@pytest.fixture
def data(root: Path) -> Path:
    """A root with the prompt sets and traits of `make_data`."""
    return make_data(root)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, tuple[str, ...], Run], Result]:
    """What a command makes of a root without the experiment: run the first time, and copied from then on.

    With other words, other examples or another prompt set it is run again.
    """
    made: dict[tuple[object, ...], tuple[Path, Result]] = {}

    def run_or_copy(experiment: Path, words: tuple[str, ...], run: Run) -> Result:
        data = experiment.parents[1] / "datasets"
        key = (words, *((path.relative_to(data), path.read_bytes()) for path in sorted(data.rglob("*.json*"))))
        if key not in made:
            result = run(*words)
            if result.exit_code:
                return result
            copy = tmp_path_factory.mktemp("once") / "exp"
            made[key] = (Path(shutil.copytree(experiment, copy)), result)
            return result
        folder, result = made[key]
        shutil.copytree(folder, experiment)
        return result

    return run_or_copy


@pytest.fixture(scope="session")
def tuned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the tiny Llama, all changed a little, as a finetune changes them."""
    model = copy.deepcopy(tiny.hf_model("llama"))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    folder = tmp_path_factory.mktemp("models") / "tuned-llama"
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def capture(tlcapture: Run, data: Path, tiny_folder: Path) -> Run:
    """`tlcapture capture` of the set `short` with the tiny model, 6 new tokens."""

    def run(*words: object, prompts: tuple[object, ...] = ("--prompt-set", "short")) -> Result:
        common = ("--experiment", "exp", "--model", tiny_folder, "--max-new-tokens", "6")
        return tlcapture("capture", *common, *prompts, *words)

    return run


@pytest.fixture
def extract(tlcapture: Run, data: Path, tiny_folder: Path, once: Callable[..., Result]) -> Run:
    """`tlcapture extract` of the root's two traits with the tiny model."""

    def run(*words: object, experiment: str = "exp") -> Result:
        common = ("--experiment", experiment, "--model", tiny_folder, "--traits", "tone/loud,tone/warm")
        command = ("extract", *map(str, common), *map(str, words))
        folder = data / "experiments" / experiment
        return tlcapture(*command) if folder.exists() else once(folder, command, tlcapture)

    return run


@pytest.fixture
def evaluated(data: Path, tlcapture: Run, extract: Run, once: Callable[..., Result]) -> Result:
    """`tlcapture evaluate` of vectors of the residual stream of the root's two traits."""

    def run(*words: str) -> Result:
        assert extract("--component", "residual").exit_code == 0
        return tlcapture(*words)

    result = once(data / "experiments" / "exp", ("evaluate", "--experiment", "exp", "--component", "residual"), run)
    assert result.exit_code == 0, result.output
    return result


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
