"""Help in groups, `tlcapture.toml`, suggestions, completion, and `tlcapture list`."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete, get_completion_class
from click.testing import CliRunner, Result

from tests.cli.test_startup import command_of
from tlcapture.cli.command import GROUPS, Command
from tlcapture.cli.main import COMMANDS, main
from tlcapture.cli.options import completion
from tlcapture.cli.settings_file import parameter_of

Run = Callable[..., Result]
OWN = {"version"}


def commands() -> list[tuple[str, click.Command]]:
    found = [(name, command_of(name)) for name in COMMANDS]
    groups = [(name, each) for name, each in found if isinstance(each, click.Group)]
    return [
        *((name, each) for name, each in found if not isinstance(each, click.Group)),
        *((f"{name} {own}", each) for name, group in groups for own, each in group.commands.items()),
    ]


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda each: each if isinstance(each, str) else "")
def test_the_options_are_in_groups_and_two_examples_follow(name: str, command: click.Command) -> None:
    assert isinstance(command, Command)
    said = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=200).output
    assert "\nExamples:\n" in said
    assert command.examples
    assert all(re.match(rf"tlcapture {name}( |$)", example) for example in command.examples)


def test_each_option_is_in_one_group_and_in_the_file_by_its_name() -> None:
    options = [each for _, command in commands() for each in command.params if isinstance(each, click.Option)]
    grouped = [each for names in GROUPS.values() for each in names]
    assert sorted(grouped) == sorted({str(option.name) for option in options})
    for option in options:
        (name,) = (each for each in option.opts if each.startswith("--"))
        assert parameter_of(name.removeprefix("--")) == option.name


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda each: each if isinstance(each, str) else "")
def test_no_help_shows_how_a_number_is_stored(name: str, command: click.Command) -> None:
    said = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=200).output
    assert "2147483647" not in said
    assert "9223372036854775" not in said
    assert "RANGE" not in said


@pytest.mark.parametrize("name", ["compare", "import", "traits import"])
def test_arguments_are_not_listed_as_options(name: str) -> None:
    said = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=200).output
    assert re.search(r"^Usage: .* [A-Z]+$", said, re.MULTILINE)
    assert not re.search(r"^  [A-Z]+$", said, re.MULTILINE)


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_first_help_shows_how_to_begin(words: list[str]) -> None:
    assert CliRunner().invoke(main, words).output.endswith("  tlcapture view\n  tlcapture capture --help\n")


def test_help_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from tlcapture.cli.command import help_settings

    monkeypatch.setenv("COLUMNS", "150")
    assert help_settings()["max_content_width"] == 150


@pytest.mark.parametrize(("typed", "meant"), [("captur", "capture"), ("projct", "project"), ("lsit", "list")])
def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(typed: str, meant: str) -> None:
    done = CliRunner().invoke(main, [typed])
    assert done.exit_code == 2
    assert f"no such command {typed!r}: did you mean {meant!r}" in done.output


def test_a_mistyped_option_is_answered_with_the_one_that_was_meant() -> None:
    assert "--temperature" in CliRunner().invoke(main, ["capture", "--temprature", "0"]).output


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda each: each if isinstance(each, str) else "")
def test_how_to_have_the_help_ends_the_last_group(name: str, command: click.Command) -> None:
    said = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=200).output
    *_, last = said.split("\nExamples:\n")[0].rstrip().split("\n\n")
    assert last.splitlines()[-1].split() == ["-h,", "--help", "Show", "this", "message", "and", "exit."]
    assert len(last.splitlines()) > 2  # its heading, and other options


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("capture --prompt-set shrot", "short"),
        ("capture --prompt-set shrot@mine", "short"),
        ("project --experiment exp --prompt-set shrot", "short"),
        ("project --experiment expp --prompt-set short", "exp"),
        ("project --experiment exp --prompt-set short@mien", "short@mine"),
        ("view --experiment expp --no-browser", "exp"),
        ("view --experiment exp --prompt-set short@mien --no-browser", "short@mine"),
        ("export --experiment exp --to there --prompt-set shrot", "short"),
        ("list --experiment expp", "exp"),
        ("traits list --experiment expp", "exp"),
        ("traits check --traits tone/lud", "tone/loud"),
        ("extract --experiment exp --traits tone/lud", "tone/loud"),
        ("evaluate --experiment exp --traits tone/lud", "tone/loud"),
        ("steer --experiment exp --traits tone/lud", "tone/loud"),
        ("compare exp/shrot exp/short@mine", "short"),
        ("compare expp exp/short@mine", "exp"),
        ("capture --experiment exp --prompt-set short --variant other --responses-from exp/short@mien", "short@mine"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_one_that_was_meant(
    data: Path, monkeypatch: pytest.MonkeyPatch, line: str, meant: str
) -> None:
    for name in ("short", "short@mine"):
        folder = data / "experiments/exp/inference/raw/residual" / name
        folder.mkdir(parents=True)
        (folder / "1.pt").write_bytes(b"")
    (data / "experiments/exp/extraction/tone/loud/vectors").mkdir(parents=True)
    (data / "experiments/exp/extraction/tone/loud/vectors/probe_layer1.pt").write_bytes(b"")
    done = CliRunner().invoke(main, [*line.split(), "--root", str(data)], catch_exceptions=False)
    assert done.exit_code in (1, 2)
    (said,) = [each for each in done.output.splitlines() if "did you mean" in each]
    assert f": did you mean {meant!r}? " in said


# -- tlcapture.toml -------------------------------------------------------------------------------


def values(root: Path, monkeypatch: pytest.MonkeyPatch, *words: str, command: str = "capture") -> dict[str, Any]:
    """What the options of a command are for a command line."""
    found: dict[str, Any] = {}
    made = command_of(command)
    monkeypatch.setattr(made, "callback", click.pass_context(lambda ctx, **_: found.update(ctx.params)))
    done = CliRunner().invoke(main, [command, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return found


def test_settings_come_from_the_file_and_the_command_line_wins(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "tlcapture.toml").write_text(
        'experiment = "mine"\nseed = 3\nmodel = "m"\n[capture]\nmax-new-tokens = 7\nattention = true\nlayers = [1, 2]\n'
        'layer_internals = [1, "all"]\n[extract]\nseed = 9\n'
    )
    found = values(root, monkeypatch, "--prompt", "x", "--seed", "4")
    assert found["experiment"] == "mine"
    assert (found["seed"], found["max_new_tokens"], found["model"]) == (4, 7, "m")
    assert found["attention"] is True
    assert found["layers"] == (1, 2)
    assert found["layer_internals"] == (1, "all")
    assert values(root, monkeypatch, command="extract")["seed"] == 9
    assert values(root, monkeypatch, command="view")["experiment"] == "mine"


def test_an_option_of_any_command_may_stand_at_the_top_of_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "tlcapture.toml").write_text('port = 8000\nvectors = "a"\njson = true\n[traits.check]\ntraits = "loud"\n')
    assert values(root, monkeypatch, command="view")["port"] == 8000
    compared = values(root, monkeypatch, "a", "b", command="compare")
    assert (compared["vectors_of"], compared["as_json"]) == ("a", True)
    assert "invalid value for '--traits': trait 'loud'" in CliRunner().invoke(main, ["traits", "check"]).output


def test_the_file_may_begin_with_a_byte_order_mark(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "tlcapture.toml").write_text("seed = 3\n", encoding="utf-8-sig")
    assert values(root, monkeypatch, "--prompt", "x")["seed"] == 3


def test_the_file_is_that_of_the_root_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCAPTURE_ROOT", str(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "tlcapture.toml").write_text('experiment = "there"\n')
    assert values(tmp_path, monkeypatch)["experiment"] == "default"
    assert values(tmp_path, monkeypatch, "--root", str(other))["experiment"] == "there"
    assert values(tmp_path, monkeypatch, f"--root={other}")["experiment"] == "there"


def test_the_experiment_is_named_by_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "tlcapture.toml").write_text('experiment = "mine"\n')
    monkeypatch.setenv("TLCAPTURE_EXPERIMENT", "set")
    assert values(root, monkeypatch)["experiment"] == "set"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sede = 1", "'sede' is not an option of any command: did you mean 'seed'?"),
        ("jsno = true", "'jsno' is not an option of any command: did you mean 'json'?"),
        ("[traits.chek]", "[traits.chek] is not the name of a command: did you mean 'check'?"),
        ("[capture.layers]", "[capture.layers] is not the name of a command"),
        ("[captur]", "[captur] is not the name of a command: did you mean 'capture'?"),
        ("[capture]\nposition = 1", "'position' is not an option of 'tlcapture capture'"),
        ("[capture]\nseed = 'x'", "'x' is not a whole number"),
        ("seed =", "tlcapture.toml: cannot be read"),
        ("[capture]\nlayers = ['x']", "'x' is not a list of layer numbers"),
        ('[capture]\nadapter = "a\\u0000b"', "adapter: expected text without NUL"),
        (None, "tlcapture.toml: cannot be read: Too many levels of symbolic links"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(root: Path, content: str | None, said: str) -> None:
    if content is None:
        (root / "tlcapture.toml").symlink_to("tlcapture.toml")
    else:
        (root / "tlcapture.toml").write_text(content)
    done = CliRunner().invoke(main, ["capture", "--prompt", "x"])
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output


# -- completion and list --------------------------------------------------------------------------


def completed(function: Any, typed: str, **params: Any) -> list[str]:
    ctx = click.Context(command_of("capture"))
    ctx.params.update(params)
    return [item.value for item in function(ctx, None, typed)]


def test_the_shell_completes_experiments_prompt_sets_and_traits(data: Path) -> None:
    (data / "experiments" / "first").mkdir(parents=True)
    (data / "experiments" / "second").mkdir()
    assert completed(completion.experiments, "f", root=data) == ["first"]
    assert completed(completion.prompt_sets, "sh", root=data) == ["short"]
    assert completed(completion.prompt_sets, "other,sh", root=data) == ["other,short"]
    assert completed(completion.traits, "tone/", root=data) == ["tone/loud", "tone/warm"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("capture --prompt-set", ["short"]),
        ("capture --vector-experiment", ["exp"]),
        ("capture --responses-from", ["exp"]),
        ("compare", ["exp"]),
        ("compare exp exp --traits", ["tone/loud", "tone/warm"]),
        ("compare exp exp --prompt-set", ["short"]),
        ("export --prompt-set", ["short"]),
        ("list --experiment", ["exp"]),
        ("project --traits", ["tone/loud", "tone/warm"]),
        ("steer --traits", ["tone/loud", "tone/warm"]),
        ("traits check --traits", ["tone/loud", "tone/warm"]),
        ("traits import x.pt --trait", ["tone/loud", "tone/warm"]),
        ("view --prompt-set", ["short"]),
    ],
)
def test_the_shell_completes_each_option_by_what_it_takes(data: Path, line: str, found: list[str]) -> None:
    (data / "experiments" / "exp").mkdir(parents=True)
    shell = ShellComplete(main, {}, "tlcapture", "_TLCAPTURE_COMPLETE")
    begin = found[0][:2]
    assert [each.value for each in shell.get_completions(line.split(), begin)] == found


@pytest.mark.parametrize("shell", ["fish", "zsh"])
def test_shells_complete_the_value_after_an_equals_sign_as_one_word(shell: str) -> None:
    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(main, {}, "tlcapture", "_TLCAPTURE_COMPLETE")
    found = made.get_completions(["capture"], "--save-dtype=float")
    assert {each.value for each in found} == {"--save-dtype=float16", "--save-dtype=float32"}
    assert [each.value for each in made.get_completions(["capture", "--save-dtype"], "b")] == ["bfloat16"]
    assert [each.value for each in made.get_completions(["capture"], "--save-d")] == ["--save-dtype"]


def test_fish_takes_values_with_commas() -> None:
    kind = get_completion_class("fish")
    assert kind is not None
    assert 'string split --max 1 "," $completion' in kind(main, {}, "tlcapture", "_TLCAPTURE_COMPLETE").source()


def test_the_shell_completes_without_a_message_where_something_is_wrong(data: Path) -> None:
    shell = ShellComplete(main, {}, "tlcapture", "_TLCAPTURE_COMPLETE")
    (data / "tlcapture.toml").write_text("sede = 1")
    assert [each.value for each in shell.get_completions(["capture"], "--ad")] == ["--adapter"]
    assert shell.get_completions(["captur"], "--ad") == []
    (data / "experiments" / "exp").mkdir(parents=True)
    assert shell.get_completions(["list", "--root", "s3://", "--experiment"], "") == []  # and not those of this folder
    shutil.rmtree(data / "experiments")
    (data / "experiments").write_text("not a folder")
    assert shell.get_completions(["list", "--experiment"], "") == []
    assert [each.value for each in shell.get_completions(["extract", "--traits"], "tone/l")] == ["tone/loud"]


def test_list_shows_experiments_and_what_one_holds(capture: Run, extract: Run, tlcapture: Run, data: Path) -> None:
    nothing = tlcapture("list")
    assert nothing.exit_code == 0
    assert "no experiments" in nothing.output
    extract()
    capture("--prompt-set", "short", "--capture-attn", prompts=())
    found = tlcapture("list").output
    assert re.search(r"exp +tiny-llama +1 +3 +2", found)
    found = tlcapture("list", "--experiment", "exp").output
    assert re.search(r"short +3 +2", found)
    assert "vectors of 2 traits: tone/loud, tone/warm" in found
    assert "tlcapture view --experiment exp" in found
    runs = data / "experiments" / "exp" / "runs"
    ended = json.loads(next(runs.glob("*-capture-*.json")).read_text())
    assert ended["system"]["process"] == os.getpid()
    killed = {**ended, "status": "running", "system": {**ended["system"], "process": 2**22 + 1}}  # no process has it
    for number, status in enumerate(({**ended, "status": "running"}, killed)):
        (runs / f"30000101T00000{number}Z-capture-1.json").write_text(json.dumps(status))
    statuses = [line.split()[1] for line in tlcapture("list", "--experiment", "exp").output.splitlines() if "T" in line]
    assert statuses[-2:] == ["running", "killed"]
    (runs / "20200101T000000Z-capture-1.json").write_text(json.dumps([1]))
    assert tlcapture("list", "--experiment", "exp").exit_code == 0
    done = tlcapture("list", "--experiment", "nix")
    assert done.exit_code == 2
    assert "existing experiments: exp" in done.output


def test_list_says_that_the_vectors_of_the_package_are_used(tlcapture: Run, root: Path) -> None:
    for name, model in (("ours", "smollm2"), ("other", "models/other")):
        folder = root / "experiments" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"inference_model": model}))
    assert (
        "vectors: none of its own, so those that come with the package"
        in tlcapture("list", "--experiment", "ours").output
    )
    assert "vectors of 0 traits: none" in tlcapture("list", "--experiment", "other").output


def test_the_settings_of_the_page_are_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    example = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert example
    (root / "tlcapture.toml").write_text(example[1])
    found = values(root, monkeypatch, "--prompt", "x")
    assert (found["experiment"], found["max_new_tokens"], found["layers"]) == ("gemma", 200, (8, 12, 16))
