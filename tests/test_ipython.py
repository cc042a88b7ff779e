"""IPython on a tiny model: the magic, objects of the Python API, and the shell in a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import tlcapture
from tests.cli.conftest import make_prompt_set, make_trait
from tlcapture import Ablate, Cap, Experiment, Steer
from tlcapture.captures.capture import Capture
from tlcapture.cli.main import main
from tlcapture.errors import InputError, StorageError
from tlcapture.explore.doubts import _told
from tlcapture.explore.live.live_capture import LiveCapture
from tlcapture.models.lazy_model import LazyModel
from tlcapture.models.loading import Model

TOP = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*by default")
TRAITS = ["behavioral/refusal", "style/formality"]
Run = Callable[[str], Any]


@contextmanager
def new_session(folder: Path, monkeypatch: pytest.MonkeyPatch, root: Path, model: Any) -> Iterator[Any]:
    """An IPython session in an empty folder, with a model that stands for every name of one."""
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("TLCAPTURE_ROOT", str(root))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tlcapture.models.loading.load_model", lambda name, **options: model)
    config = Config()
    config.HistoryManager.enabled = False
    InteractiveShell.clear_instance()
    session = InteractiveShell.instance(config=config, user_module=types.ModuleType("session"))
    yield session
    session.restore_sys_module_state()
    InteractiveShell.clear_instance()


def run_in(session: Any, cell: str) -> Any:
    """Run a cell that must succeed; returns the value of its last expression."""
    result = session.run_cell(cell, silent=False)
    result.raise_error()
    return result.result


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """An experiment with vectors of two traits and two captures."""
    root = tmp_path_factory.mktemp("root")
    for trait, positive, negative in zip(TRAITS, ("never", "indeed"), ("sure", "yeah"), strict=True):
        make_trait(root, trait, positive, negative)
    make_prompt_set(root, "single_trait", ["Name a colour.", "How do tides work?"])
    common = ["--experiment", "exp", "--root", str(root), "--model", str(tiny_folder)]
    for words in (
        ["extract", *common, "--methods", "mean_diff"],
        ["capture", *common, "--prompt-set", "single_trait", "--max-new-tokens", "8",
         "--save-dtype", "float32", "--capture-attn", "--attention", "--logit-lens"],
    ):  # fmt: skip
        result = CliRunner().invoke(main, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return root


@pytest.fixture(scope="module")
def model(tiny_root: Path) -> Model:
    return Experiment("exp", tiny_root).model


@pytest.fixture
def exp(tiny_root: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    found = Experiment("exp", tiny_root)
    monkeypatch.setitem(found.__dict__, "model", model)  # loaded once for all tests
    return found


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_root: Path, model: Model) -> Iterator[Any]:
    with new_session(tmp_path, monkeypatch, tiny_root, model) as session:
        yield session


@pytest.fixture
def run(shell: Any) -> Run:
    return lambda cell: run_in(shell, cell)


@pytest.fixture
def live(exp: Experiment, model: Model) -> LiveCapture:
    (cap,) = tlcapture.capture(model, "Name a colour.", max_new_tokens=4, temperature=0, vectors=exp)
    return cap


def test_the_magic_captures_as_the_library_does(run: Run, shell: Any, model: Model) -> None:
    run("%load_ext tlcapture")
    run('%capture_prompt -n 5 --temperature 0 "Name a colour."')
    cap = shell.user_ns["cap"]
    (same,) = tlcapture.capture(model, "Name a colour.", max_new_tokens=5, temperature=0)
    assert cap.response.token_ids == same.response.token_ids
    run('%capture_prompt -n 5 --seed 3 --temperature 2.5 "Name a colour."')
    other = shell.user_ns["cap"]
    assert (other.metadata["seed"], other.metadata["temperature"]) == (3, 2.5)


def test_the_magic_takes_sampling_and_interventions_as_the_library_does(
    run: Run, shell: Any, exp: Experiment, model: Model
) -> None:
    shell.user_ns["exp"] = exp
    run("%load_ext tlcapture")
    rules = "--top-p 0.8 --top-k 40 --min-p 0.02 --repetition-penalty 1.2 --stop ' the' --samples 2 --seed 3"
    changes = "--ablate behavioral/refusal@1:prompt --steer style/formality:+0.3@2 --cap behavioral/refusal:5@all"
    run(f'%capture_prompt -n 5 --temperature 1.5 {rules} {changes} "Name a colour."')
    expected = tlcapture.capture(
        model,
        "Name a colour.",
        max_new_tokens=5,
        temperature=1.5,
        top_p=0.8,
        top_k=40,
        min_p=0.02,
        repetition_penalty=1.2,
        stop=[" the"],
        samples=2,
        seed=3,
        vectors=exp,
        interventions=[
            Ablate("behavioral/refusal", 1, where="prompt"),
            Steer("style/formality", 0.3, 2),
            Cap("behavioral/refusal", 5, "all"),
        ],
    )
    caps = shell.user_ns["caps"]
    for cap, same in zip(caps, expected, strict=True):
        assert cap.token_ids == same.token_ids
        assert torch.equal(cap.residual(2), same.residual(2))
        kept = {"sampling", "sample", "interventions", "temperature"}
        assert {key: cap.metadata[key] for key in kept} == {key: same.metadata[key] for key in kept}
    assert shell.user_ns["cap"] is caps[0] and len(caps) == 2


def test_the_magic_uses_the_model_and_vectors_of_the_session(
    run: Run, shell: Any, exp: Experiment, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    loads: list[str] = []
    shell.user_ns["exp"] = exp
    shell.user_ns["model"] = LazyModel(lambda: loads.append("once") or model, "tiny")
    run("%load_ext tlcapture")
    run("model, model.n_layers")
    run('%capture_prompt -t behavioral/refusal -n 2 "hi"')
    assert loads == ["once"]
    assert "behavioral/refusal" in capsys.readouterr().out  # the caption of the colours
    assert shell.user_ns["cap"].project("style/formality").vector.experiment == "exp"


@pytest.mark.parametrize(
    ("line", "expected_error"),
    [
        ("%capture_prompt --vector-experiment nix hi", "no experiment 'nix'"),
        ("%capture_prompt --vector-experiment exp -t a/b hi", "available traits: behavioral/refusal"),
        ("%capture_prompt", "no prompt"),
        ("%capture_prompt what's this", "put the prompt in double quotes"),
        ("%capture_prompt -n few hi", "invalid int value: 'few'"),
        ("%capture_prompt -n -1 hi", "expected a number of at least 0"),
        ("%capture_prompt --nix hi", "unrecognized arguments"),
        ("%capture_prompt --temperature nan hi", "temperature nan"),
        ("%capture_prompt -n 100000 hi", "does not fit"),
        ("%capture_prompt -t behavioral/nix hi", "available traits: behavioral/refusal, style/formality"),
        ("%capture_prompt -t nix hi", "not of the form category/name"),
        ("%capture_prompt --steer behavioral/refusal@2 hi", "is not TRAIT:COEFFICIENT@LAYERS"),
        ("%capture_prompt --ablate behavioral/nix@2 hi", "behavioral/nix"),
        ("%capture_prompt --samples 0 hi", "samples 0"),
        ("%capture_prompt --top-p 2 hi", "top_p 2"),
        ("%capture_prompt --sampling best hi", "invalid choice: 'best'"),
        ("%capture_prompt --template-arg thinking hi", "is not KEY=VALUE"),
        ("%capture_prompt --thinking on hi", "no switch"),
        ("model = 3\n%capture_prompt hi", "the variable 'model' is a int"),
        ("del exp\n%capture_prompt -t a/b hi", "no vectors: set exp"),
        ("%%capture_prompt two texts\nhere", "takes the prompt from the cell"),
    ],
)
def test_a_usage_error_is_one_line_without_traceback(
    shell: Any, exp: Experiment, capsys: pytest.CaptureFixture[str], line: str, expected_error: str
) -> None:
    shell.user_ns["exp"] = exp
    shell.run_cell("%load_ext tlcapture")
    result = shell.run_cell(line)
    assert type(result.error_in_exec).__name__ == "UsageError"
    printed = capsys.readouterr()
    assert expected_error in printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err
    assert (printed.out + printed.err).strip().count("\n") == 0
    assert "cap" not in shell.user_ns


def test_an_error_shows_the_lines_of_the_cell_and_none_of_the_package(
    shell: Any, exp: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.user_ns["exp"] = exp
    shell.run_cell("def look(layer):\n    return exp.captures['single_trait'][1].residual(layer)")
    shell.run_cell("look(0).shape\nlook(99)")
    printed = re.sub(r"\x1b\[[0-9;]*m", "", "".join(capsys.readouterr()))
    assert "look(99)" in printed and "return exp.captures['single_trait'][1].residual(layer)" in printed
    assert "InputError: " in printed and "layers 0 to 2" in printed
    package = Path(tlcapture.__file__).parent
    assert f"{package.parent.name}/{package.name}/" not in printed and "raise " not in printed
    assert printed.strip().splitlines()[0].startswith("Cell In[")


def test_each_cause_of_doubt_is_told_once(exp: Experiment) -> None:
    cap = exp.captures["single_trait"][1]
    _told.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            cap.projected(*TRAITS)
            cap.project(TRAITS[0])
        cap.plot.trajectory(TRAITS[1])
    (told,) = [str(each.message) for each in caught]
    assert told.startswith(f"{TRAITS[0]}, {TRAITS[1]}: layer 1 by default")
    assert caught[0].filename == __file__


def test_a_live_capture_is_a_capture_and_projects_like_a_saved_one(exp: Experiment, model: Model) -> None:
    saved = exp.captures["single_trait"]["1"]
    text = saved.metadata["prompt_text"]
    prompt = tlcapture.Prompt(id="1", text=text)
    (cap,) = tlcapture.capture(
        model, tlcapture.PromptSet(name="single_trait", prompts=[prompt]), max_new_tokens=8, save_dtype="float32"
    )
    assert isinstance(cap, Capture)
    assert cap.token_ids == saved.token_ids  # the same seed and sampling
    with pytest.raises(InputError, match="pass vector_experiment='NAME'"):
        cap.project(TRAITS[0])
    (cap,) = tlcapture.capture(model, [prompt], max_new_tokens=1, vectors=exp)
    n_prompt = len(cap.prompt.tokens)
    theirs = saved.project(TRAITS[0]).trajectory[:n_prompt]
    assert torch.allclose(cap.project(TRAITS[0]).trajectory[:n_prompt], theirs, rtol=1e-2, atol=0.5)


def test_attention_and_logit_lens_files_hold_what_the_model_computes(
    exp: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    cap, again = exp.captures["single_trait"]["2"], exp.captures["single_trait"]["2"]
    monkeypatch.setattr(again, "_current", lambda path: None)
    heads, computed = cap.attention(1), again.attention(1)
    assert (heads.source, computed.source) == ("2_attention.json", "a forward pass")
    assert np.allclose(heads.patterns, computed.patterns, atol=1e-3)
    assert heads.patterns.sum(axis=-1) == pytest.approx(np.ones(heads.patterns.shape[:2]), abs=2e-3)
    lens, other = cap.logit_lens(), again.logit_lens()
    assert (lens.source, other.source) == ("2_logit_lens.json", "its residuals")
    assert np.allclose(lens.top_probs, other.top_probs, atol=1e-3)
    assert (lens.actual_rank == other.actual_rank).mean() > 0.98
    assert lens.top_tokens[2][5][0] == other.top_tokens[2][5][0]
    with torch.no_grad():
        probs = exp.model.tl(torch.tensor([cap.token_ids]))[0].softmax(dim=-1)
    assert lens.top_probs[-1, :, 0] == pytest.approx(probs[:-1].max(dim=-1).values.numpy(), abs=1e-3)


def test_a_file_of_another_run_is_not_used(exp: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cap = exp.captures["single_trait"]["2"]
    other = tmp_path / "1_attention.json"
    shutil.copy(exp.layout.attention("single_trait", "1"), other)
    monkeypatch.setattr(cap, "_current", lambda path: other)
    assert cap.attention(0).source == "a forward pass"
    broken = tmp_path / "broken.json"
    head = {"tokens": cap.tokens, "n_prompt_tokens": 1, "n_layers": cap.n_layers, "n_heads": 4}
    broken.write_text(json.dumps({**head, "attention": []}))
    monkeypatch.setattr(cap, "_current", lambda path: broken)
    with pytest.raises(StorageError, match=r"broken.json: it does not have one entry per token"):
        cap.attention(1)


def test_another_model_is_refused_for_attention_and_logit_lens(
    exp: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = exp.captures["single_trait"]["1"]
    monkeypatch.setattr(cap, "_current", lambda path: None)
    monkeypatch.setattr(exp.model, "fingerprint", "another")
    with pytest.raises(InputError, match="was captured from"):
        cap.attention(0)
    with pytest.raises(InputError, match="was captured from"):
        cap.logit_lens()


def test_the_error_for_a_missing_layer_head_or_trait_lists_the_existing_ones(
    exp: Experiment, live: LiveCapture
) -> None:
    for cap in (exp.captures["single_trait"]["1"], live):
        with pytest.raises(InputError, match="no layer 3: the model has layers 0 to 2"):
            cap.plot.attention(3, 0)
        with pytest.raises(InputError, match="layer '1' is not a number: the model has layers 0 to 2"):
            cap.internals("1")
        with pytest.raises(InputError, match="no head 4: layer 2 has heads 0 to 3"):
            cap.plot.attention(2, 4)
        with pytest.raises(InputError, match=r"no vectors for trait 'a/b'.*available traits: behavioral/refusal"):
            cap.plot.trajectory("a/b")
        with pytest.raises(InputError, match="no point 'nix'"):
            cap.plot.layers(TRAITS[0], "nix")
        with pytest.raises(InputError, match="no experiment 'nix'"):
            cap.project(TRAITS[0], vector_experiment="nix")
        with pytest.raises(InputError, match="no component 'mlp'"):
            cap.to_pandas(component="mlp")
    with pytest.raises(KeyError, match="prompt sets with captures: single_trait"):
        exp.captures["nix"]


def test_frames_of_a_capture_and_of_its_files_agree(exp: Experiment) -> None:
    cap = exp.captures["single_trait"]["1"]
    ours = cap.to_pandas(layers="all")
    files = exp.to_pandas("single_trait", layers="all")
    files = files[files.prompt_id == "1"].reset_index(drop=True)
    keys = ["prompt_id", "token_idx", "token", "part", "trait", "layer"]
    assert ours[keys].equals(files[keys])
    assert ours.score.to_numpy() == pytest.approx(files.score.to_numpy(), rel=1e-4, abs=1e-3)
    # Independently: the dot product of a residual with the unit vector.
    vector = cap.project(TRAITS[0]).vector.vector
    expected = cap.residual(1)[7] @ vector / vector.norm()
    row = ours[(ours.trait == TRAITS[0]) & (ours.layer == 1) & (ours.token_idx == 7)]
    assert row.score.item() == pytest.approx(float(expected), rel=1e-4)


def test_every_public_object_has_a_one_line_repr_and_html(exp: Experiment, live: LiveCapture) -> None:
    saved = exp.captures["single_trait"]["1"]
    for shown in (
        exp, exp.captures, exp.captures["single_trait"], saved, live, saved.prompt, saved.project(TRAITS[0]),
        saved.coloured(), saved.coloured(TRAITS[0]), saved.attention(2), saved.logit_lens(),
    ):  # fmt: skip
        assert "\n" not in repr(shown) or shown is saved.prompt
        assert "tensor([" not in shown._repr_html_()
        assert len(repr(shown)) < 3000
        assert shown._repr_html_().count("<") > 2
    assert "SavedCapture(single_trait/1" in repr(saved)
    assert "LiveCapture(adhoc/1" in repr(live)
    assert "3 layers" in repr(saved.prompt.residual)
    assert "behavioral/refusal" in repr(saved.project(TRAITS[0]))
    assert "3 layers" in saved._repr_html_()
    assert {"residual", "tokens", "plot", "project"} <= set(dir(saved))


def test_the_shell_in_a_terminal(tiny_root: Path, tmp_path: Path) -> None:
    """A real terminal session: banner, variables, one-line errors, and torch is not imported before it is needed."""
    pexpect = pytest.importorskip("pexpect")
    words = ["-m", "tlcapture", "shell", "--experiment", "exp", "--root", str(tiny_root)]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "COLUMNS"},  # the terminal's own width counts
        "IPYTHONDIR": str(tmp_path),
        "IPY_TEST_SIMPLE_PROMPT": "1",
        "TERM": "dumb",
        "PYTHONPATH": str(TOP),
    }
    session = pexpect.spawn(
        sys.executable, words, env=environment, encoding="utf-8", timeout=60, dimensions=(50, 250), echo=False
    )
    prompt = r"In \[\d+\]: $"

    def answer(line: str) -> str:
        session.sendline(line)
        session.expect(prompt)
        return str(session.before)

    session.expect(prompt)
    banner = session.before
    assert "Three things to try" in banner
    tries = [line.strip() for line in banner.splitlines() if line.startswith("    ")]
    assert len(tries) == 3
    assert "single_trait: 2" in answer("captures")
    assert "loaded on first use" in answer("model")
    assert "Experiment('exp'" in answer("exp")
    answer("%load_ext tlcapture")
    error = answer("%capture_prompt")
    assert "UsageError: no prompt" in error
    assert answer("import sys; 'torch' in sys.modules").count("False") == 1
    refused = answer("exp.to_pandas('nix')")
    assert "InputError: experiment 'exp' has no captures of prompt set 'nix'" in refused
    assert "Traceback" not in error + refused
    assert "behavioral/refusal" in answer(tries[2])
    session.sendline("exit")
    session.expect(pexpect.EOF)
    session.close()
    assert session.exitstatus == 0


def test_without_ipython_the_shell_names_the_package_to_install(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "IPython" else found(name, *rest)
    )
    result = CliRunner().invoke(main, ["shell", "--experiment", "exp", "--root", str(tiny_root)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "run 'pip install ipython'" in result.stderr
    assert CliRunner().invoke(main, ["shell", "--experiment", "nix", "--root", str(tiny_root)]).exit_code == 2


def test_project_plots_its_projections(tiny_root: Path, tmp_path: Path) -> None:
    import matplotlib.image

    words = ["project", "--experiment", "exp", "--root", tiny_root, "--prompt-set", "single_trait"]
    words += ["--traits", "style/formality", "--plot", tmp_path / "pictures"]
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    pictures = sorted((tmp_path / "pictures").rglob("*.png"))
    assert [path.stem for path in pictures] == [f"exp_style_formality_single_trait_{number}" for number in (1, 2)]
    assert len(np.unique(matplotlib.image.imread(pictures[0]))) > 50
    assert "2 pictures in" in result.stdout
