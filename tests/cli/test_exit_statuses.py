"""What fails is named, and the exit status is 1, whether it is alone or among others; wrong usage has 2."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tests import tiny
from tests.cli.conftest import make_data, make_trait
from tests.faults.test_single_prompts import TEMPLATE
from tlcapture.cli.main import main

LONG = "x" * 400
TEXTS = {"refused": "a secret", "long": LONG, "nan": "Zebra"}
REASONS = {
    "refused": "the model's chat template refuses the prompt (no secrets)",
    "long": "context",
    "nan": "NaN or inf",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding of the letter Z is NaN, and a chat template that refuses secrets."""
    folder = tmp_path_factory.mktemp("models") / "odd"
    tokenizer, weights = tiny.tokenizer(chat_template=TEMPLATE), copy.deepcopy(tiny.hf_model("llama"))
    with torch.no_grad():
        weights.model.embed_tokens.weight[tokenizer("Z", add_special_tokens=False)["input_ids"]] = torch.nan
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Path]:
    """A root with an experiment of two captures, one of them damaged, and of traits that cannot be worked on."""
    root = make_data(tmp_path_factory.mktemp("root"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLCAPTURE_ROOT", str(root))
        for name, text in TEXTS.items():
            make_trait(root, f"bad/{name}", text, "soft")
        for trait, question in (("tone/loud", "how?"), *((f"bad/{name}", text) for name, text in TEXTS.items())):
            asked = [{"question": question, "positive": "LOUD", "negative": "soft"}]
            (root / "datasets" / "traits" / trait / "steering.json").write_text(json.dumps(asked))
        words = ("--experiment", "exp", "--model", model, "--no-check")
        for command in (
            ("capture", *words, "--prompt-set", "short", "--max-new-tokens", 3, "--limit", 2),
            ("capture", *words, "--prompt-set", "other", "--max-new-tokens", 3),
            ("extract", *words, "--traits", "tone/loud", "--methods", "mean_diff", "--component", "residual"),
        ):
            done = run(*command)
            assert done.exit_code == 0, done.output
        vectors = root / "experiments" / "exp" / "extraction"
        for name in TEXTS:
            folder = vectors / "bad" / name
            shutil.copytree(vectors / "tone" / "loud", folder)
            metadata = folder / "vectors" / "metadata.json"
            metadata.write_text(metadata.read_text().replace("tone/loud", f"bad/{name}"))
        for damaged in ("short/2", "other/1"):
            (root / "experiments" / "exp" / "inference" / "raw" / "residual" / f"{damaged}.pt").write_bytes(b"damaged")
        yield root


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


EXISTING = ("--experiment", "exp", "--no-check")
CASES = {
    **{
        f"capture: {what}, {how}": ("capture", what, text, how)
        for what, text in TEXTS.items()
        for how in ("alone", "among others")
    },
    **{f"extract: {what}": ("extract", what, "--traits", f"bad/{what}") for what in TEXTS},
    **{f"steer: {what}": ("steer", what, "--traits", f"bad/{what}", "--layers", 1) for what in TEXTS},
    "evaluate: refused": ("evaluate", "refused", "--traits", "bad/refused"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_model_cannot_take_fails_by_name_with_status_1(case: str, made: Path, model: Path) -> None:
    command, what, *words = CASES[case]
    if command == "capture":
        text, how = map(str, words)
        given = ["--prompt", text, *(["--prompt", "fine"] if how == "among others" else [])]
        where = ("--experiment", f"{what}-{how[0]}", "--model", model, "--no-check")
        done = run("capture", *where, *given, "--max-new-tokens", 3)
        name = "adhoc/1"
    else:
        done, name = run(command, *EXISTING, *words), f"bad/{what}"
    assert done.exit_code == 1
    (failure,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert failure.startswith(f"failed: {name}: ") and REASONS[str(what)] in failure
    assert what != "refused" or failure.endswith('or "use_chat_template": false in config.json')  # no option of extract
    assert what != "nan" or failure.endswith(f"run 'tlcapture doctor --model {model}'")


@pytest.mark.parametrize(("prompt_set", "name"), [("other", "other/1"), ("short", "short/2")])
@pytest.mark.parametrize("command", [("project",), ("capture", "--replay", "--attention")])
def test_a_damaged_capture_fails_by_name_with_status_1(
    command: tuple[str, ...], prompt_set: str, name: str, made: Path
) -> None:
    words = ("--no-check", "--limit", 2) if command[0] == "capture" else ()
    done = run(*command, "--experiment", "exp", "--prompt-set", prompt_set, *words)
    assert done.exit_code == 1, done.output
    (failure,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert failure.startswith(f"failed: {name}: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--template-arg", "depth=1"), "--template-arg depth: the model's chat template reads no value of this name"),
        (("--thinking", "on"), "--thinking: the model's chat template has no switch for thinking"),
        (("--system-prompt", "\udcff"), "--system-prompt is not valid Unicode"),
    ],
)
def test_what_no_prompt_can_be_run_with_is_wrong_usage(
    words: tuple[str, ...], said: str, made: Path, model: Path
) -> None:
    done = run("capture", "--experiment", "wrong", "--model", model, "--no-check", "--prompt-set", "short", *words)
    assert (done.exit_code, "wrote" in done.output) == (2, False)
    assert said in done.stderr.splitlines()[-1]
    assert not (made / "experiments" / "wrong").exists()


LAYERS = {
    "--layers": ("capture",),
    "--attention-layers": ("capture", "--attention"),
    "--lens-layers": ("capture", "--logit-lens"),
    "--layer-internals": ("capture",),
    "--layer": ("capture",),
    "--layers ": ("extract", "--traits", "tone/loud"),
}


@pytest.mark.parametrize("option", LAYERS)
def test_a_layer_that_the_model_lacks_is_refused_before_its_weights_are_loaded(
    option: str, made: Path, model: Path
) -> None:
    command, *words = LAYERS[option]
    given = ("--prompt", "hi") if command == "capture" else ()
    done = run(command, "--experiment", "new", "--model", model, *given, *words, option.strip(), 7)
    assert done.exit_code == 2
    assert done.output.splitlines() == [f"error: {option.strip()} 7: the model has layers 0 to 2"]


def test_other_commands_know_the_layers_of_their_vectors(made: Path) -> None:
    for command in (
        ("evaluate", "--layers"),
        ("steer", "--layers"),
        ("project", "--prompt-set", "short", "--layer"),
        ("capture", "--prompt-set", "short", "--layer"),
    ):
        done = run(*command, 7, "--experiment", "exp")
        assert (done.exit_code, "loading" in done.output) == (2, False)
        assert f"{command[-1]} 7: there are vectors of layers 0 to 2" in done.output
