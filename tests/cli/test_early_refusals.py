"""What can be known is checked before torch is imported: experiments, traits, prompt sets, vectors, model folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest

from tests.cli.test_startup import STORED, TOP

HEAVY = ("torch", "transformers", "transformer_lens")
MISSING = "/no/such/model"

CASES = {
    "capture: no such root": ("capture --experiment new --prompt hi --root no/such", "'no/such' does not exist"),
    "extract: no such root": ("extract --experiment new --root no/such", "'no/such' does not exist"),
    "view: no such root": ("view --experiment exp --export x.html --root no/such", "'no/such' does not exist"),
    "view: nothing to export": (
        "view --experiment empty --export x.html",
        "'empty' has no captures to show: make some",
    ),
    "view: nothing to draw": ("view --experiment empty --png pictures", "'empty' has no captures to show: make some"),
    "project: no experiment": ("project --experiment none --all-prompt-sets", "no experiment 'none'"),
    "project: no such set": ("project --experiment exp --prompt-set none", "no captures of prompt set 'none'"),
    "project: no such trait": ("project --experiment exp --all-prompt-sets --traits a/b", "'a/b'"),
    "project: no such vectors": (
        "project --experiment exp --all-prompt-sets --vector-experiment none",
        "no experiment 'none': expected the folder ",
    ),
    "dynamics: no experiment": ("project --experiment none --all-prompt-sets --dynamics-only", "no experiment 'none'"),
    "extract: no such trait": ("extract --experiment new --traits a/b", "no examples for trait 'a/b'"),
    "extract: no model": (f"extract --experiment new --model {MISSING}", "no such folder"),
    "evaluate: no experiment": ("evaluate --experiment none", "no experiment 'none'"),
    "evaluate: no such trait": ("evaluate --experiment exp --traits a/b", "'a/b'"),
    "evaluate: no model": (f"evaluate --experiment exp --model {MISSING} --allow-model-change", "no such folder"),
    "against steering: no experiment": ("evaluate --experiment none --against-steering", "no experiment 'none'"),
    "steer: no experiment": ("steer --experiment none", "no experiment 'none'"),
    "steer: no such trait": ("steer --experiment exp --traits a/b", "'a/b'"),
    "steer: no model": (f"steer --experiment exp --model {MISSING} --allow-model-change", "no such folder"),
    "capture: no such set": ("capture --experiment new --prompt-set none", "no prompt set 'none'"),
    "capture: the path of a set": (
        "capture --prompt-set datasets/inference/dynamic.json",
        "in the package: did you mean 'dynamic'? existing sets: ",
    ),
    "capture: the path of an experiment": (
        "capture --experiment experiments/exp --prompt-set short",
        "starting with '.' or '-'): did you mean 'exp'?",
    ),
    "capture: no model": (f"capture --experiment new --prompt hi --model {MISSING}", "no such folder"),
    "capture: no such vectors": (
        "capture --experiment new --prompt hi --vector-experiment exq",
        "; existing experiments: empty, exp",
    ),
    "capture: no such vectors to steer with": (
        "capture --experiment new --prompt hi --no-project --steer tone/loud:1@1 --vector-experiment none",
        "no experiment 'none'",
    ),
    "capture: revision without model": (
        "capture --experiment new --prompt hi --revision x",
        "--revision needs --model",
    ),
    "capture: dry run": (f"capture --experiment new --prompt hi --dry-run --model {MISSING}", "no such folder"),
    "view: no experiment": ("view --experiment none", "no experiment 'none'"),
    "view: no such set": ("view --experiment exp --prompt-set none", "no captures of prompt set 'none'"),
    "shell: no experiment": ("shell --experiment none", "no experiment 'none'"),
    "traits list: no experiment": ("traits list --experiment none", "no experiment 'none'"),
    "traits check: no such trait": ("traits check --traits a/b", "no examples for trait 'a/b'"),
    "traits import: no such file": ("traits import no.pt --experiment exp --trait a/b", "no.pt: no such file"),
    "traits import: no model": (
        "traits import experiments/exp/extraction/tone/loud/vectors/metadata.json --experiment exp --trait a/b "
        f"--model {MISSING}",
        "no such folder",
    ),
    "export: no experiment": ("export --experiment none --to out", "no experiment 'none'"),
    "compare: no experiment": ("compare exp/short none/short", "no experiment 'none'"),
    "compare: no such set": ("compare exp/none exp/short", "exp/none: no captures"),
    "doctor: no model": (f"doctor --model {MISSING}", "no such folder"),
    "plan: no model": (
        f"plan --model {MISSING} --prompts 1 --prompt-tokens 1 --new-tokens 1",
        "no such folder",
    ),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str], list[str]]]:
    """Exit status, lines of standard error, and heavy modules imported, by case; all in one process without torch."""
    root = tmp_path_factory.mktemp("root")
    copytree(STORED, root / "experiments" / "exp")
    (root / "experiments" / "empty").mkdir()
    code = f"""
import contextlib, io, json, sys
from tlcapture.cli.main import main
found = {{}}
for case, (words, _) in {CASES!r}.items():
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(words.split())
        except SystemExit as end:
            status = end.code
    found[case] = status, errors.getvalue().splitlines(), [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "TLCAPTURE_ROOT": str(root), "PYTHONPATH": str(TOP)}, cwd=root,
    )  # fmt: skip
    import json

    assert sorted(path.name for path in (Path(root) / "experiments").iterdir()) == ["empty", "exp"]
    assert sorted(path.name for path in Path(root).iterdir()) == ["experiments"]
    return {case: tuple(result) for case, result in json.loads(done.stdout).items()}  # type: ignore[misc]


@pytest.mark.parametrize("case", list(CASES))
def test_a_request_that_cannot_succeed_is_refused_before_torch_is_imported(
    case: str, refusals: dict[str, tuple[int, list[str], list[str]]]
) -> None:
    status, lines, imported = refusals[case]
    assert imported == []
    assert status == 2
    assert CASES[case][1] in lines[-1]
