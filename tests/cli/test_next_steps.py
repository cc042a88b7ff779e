"""Every command ends with the command to run next, where there is one, and it runs as printed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tlcapture.errors import StorageError
from tlcapture.storage.files import read_json
from tlcapture.traits.projections.token_scores import TokenScores, dynamics_command

Run = Callable[..., Result]


def _next(result: Result) -> list[str]:
    """The words of the command that an output ends with."""
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    program, *words = shlex.split(last.removeprefix("next: "))
    assert (last[:6], program) == ("next: ", "tlcapture")
    return words


def test_from_the_first_capture_to_projections(tlcapture: Run, capture: Run, tiny_folder: Path, data: Path) -> None:
    """Each next command is run, up to the one that serves a page."""
    first = capture("--max-new-tokens", 2)
    assert first.stdout.count("exp: no trait vectors to project onto: those that come with the package are of") == 1
    words = _next(first)
    assert words == ["extract", "--experiment", "exp"]
    words = _next(tlcapture(*words, "--methods", "mean_diff", "--traits", "tone/loud"))
    assert words == ["evaluate", "--experiment", "exp"]
    words = _next(tlcapture(*words))
    assert words == ["project", "--experiment", "exp", "--all-prompt-sets"]
    assert _next(tlcapture("traits", "list", "--experiment", "exp")) == words
    words = _next(tlcapture(*words))
    assert words == ["view", "--experiment", "exp"]
    assert _next(tlcapture("list", "--experiment", "exp")) == words
    assert _next(capture("--max-new-tokens", 2)) == words
    assert _next(tlcapture("export", "--experiment", "exp", "--to", data / "out")) == [
        "import", str(data / "out"), "--experiment", "copy",
    ]  # fmt: skip
    assert _next(tlcapture("import", data / "out", "--experiment", "copy")) == ["view", "--experiment", "copy"]


def test_the_root_is_named_where_it_is_not_the_default(
    tlcapture: Run, capture: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unasked = capture("--max-new-tokens", 1, "--no-project")
    assert unasked.exit_code == 0 and "no trait vectors" not in unasked.stdout
    monkeypatch.delenv("TLCAPTURE_ROOT")
    assert _next(tlcapture("list", "--root", data)) == ["list", "--experiment", "exp", "--root", str(data)]
    monkeypatch.chdir(data)
    assert _next(tlcapture("list")) == ["list", "--experiment", "exp"]
    assert _next(tlcapture("list", "--root", data)) == ["list", "--experiment", "exp"]


def test_a_dry_run_points_to_the_run(capture: Run) -> None:
    assert capture("--dry-run").stdout.endswith("next: the same without --dry-run\n")


def test_a_failed_command_has_no_next_step(tlcapture: Run) -> None:
    result = tlcapture("project", "--experiment", "nix", "--all-prompt-sets")
    assert result.exit_code == 2
    assert "next:" not in result.output


def test_a_quiet_command_and_json_keep_it_from_standard_output(capture: Run) -> None:
    assert "next:" not in capture("--max-new-tokens", 1, "-q").output
    assert "next:" not in capture("--max-new-tokens", 1, "--json").stdout


def test_commands_in_messages_name_the_root_too(
    tlcapture: Run, extract: Run, data: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract("--layers", "1", "--methods", "mean_diff")
    monkeypatch.delenv("TLCAPTURE_ROOT")
    where = ("--experiment", "exp", "--root", data)
    done = tlcapture("capture", *where, "--model", tiny_folder, "--prompt-set", "short", "--max-new-tokens", 2)
    assert f"'tlcapture evaluate --experiment exp --root {data}' would choose one" in done.stderr
    assert f"'tlcapture steer --experiment exp --root {data}' first" in (
        tlcapture("evaluate", *where, "--against-steering").stderr
    )
    assert _next(tlcapture("export", *where, "--to", data / "out"))[-2:] == ["--root", str(data)]
    path = data / "experiments/exp/inference/tone/loud/residual_stream/short/1.json"
    assert dynamics_command(path) == (
        f"tlcapture project --experiment exp --root {data} --prompt-set short --dynamics-only"
    )
    value = read_json(path)
    path.write_text(json.dumps({key: each for key, each in value.items() if key != "dynamics"}))
    with pytest.raises(StorageError, match=f"it lacks dynamics: run '{dynamics_command(path)}'"):
        TokenScores.read(path)
    assert tlcapture(*shlex.split(dynamics_command(path))[1:]).exit_code == 0
    assert TokenScores.read(path).trait == "tone/loud"
