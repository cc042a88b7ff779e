"""Parsing options loads no torch, and the scripts are the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from shutil import copytree

import click
import pytest

from tests.cli.conftest import make_trait

TOP = Path(__file__).parents[2]
HEAVY = ("torch", "transformer_lens", "transformers", "numpy", "pydantic", "rich")
STORED = TOP / "tests" / "stored" / "hooked-3.9.0"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True)
    return done.stdout.strip()


HELP = [
    "--help", "capture --help", "evaluate -h", "traits list -h", "traits import -h", "traits check -h", "project -h",
    "extract -h", "shell -h", "doctor -h", "plan -h", "--version",
]  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom tlcapture.cli.main import main\n"
        f"for words in {HELP!r}:\n"
        "    try:\n        main(words.split())\n    except SystemExit as end:\n        assert end.code == 0\n"
        f"    print('loaded by', words, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    loaded = [line for line in python(code).splitlines() if line.startswith("loaded by")]
    assert loaded == [f"loaded by {words} []" for words in HELP]


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = f"print([name for name in {HEAVY!r} if name in sys.modules])"
    assert python(f"import sys, tlcapture; dir(tlcapture); {loaded}") == "[]"
    assert python("import sys; from tlcapture import Experiment; print('torch' in sys.modules)") == "False"


def test_listing_vectors_loads_no_torch(tmp_path: Path) -> None:
    copytree(STORED, tmp_path / "experiments" / "exp")
    code = (
        "import sys\nfrom tlcapture.cli.main import main\n"
        f"try:\n    main(['traits', 'list', '--experiment', 'exp', '--root', {str(tmp_path)!r}])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print('torch' in sys.modules)"
    )
    lines = python(code).splitlines()
    assert lines[0].startswith("trait ")
    assert lines[-1] == "False"


def test_checking_examples_loads_no_torch(tmp_path: Path) -> None:
    make_trait(tmp_path, "tone/loud", "loud", "soft")
    make_trait(tmp_path, "tone/warm", "warm", "cold")
    code = (
        "import sys\nfrom tlcapture.cli.main import main\n"
        f"try:\n    main(['traits', 'check', '--traits', 'tone/loud,tone/warm', '--root', {str(tmp_path)!r}])\n"
        "except SystemExit as end:\n    assert end.code == 1  # words tell the sides apart\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    lines = python(code).splitlines()
    assert lines[0].startswith("trait ")
    assert lines[-1] == "[]"


def test_public_names_exist_and_others_do_not() -> None:
    import tlcapture

    assert all(getattr(tlcapture, name) for name in tlcapture.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nix'"):
        tlcapture.nix  # noqa: B018


def command_of(name: str) -> click.Command:
    from tlcapture.cli.main import main

    command = main.get_command(click.Context(main), name)
    assert command is not None
    return command


def test_every_command_is_listed_and_defined_in_the_module_of_its_name() -> None:
    from tlcapture.cli.main import COMMANDS, main

    modules = {path.stem for path in (TOP / "tlcapture" / "cli").glob("*.py")}
    values = {name: getattr(import_module(f"tlcapture.cli.{name}"), name, None) for name in modules}
    found = {value.name for value in values.values() if isinstance(value, click.Command)}
    assert found - {"main"} == set(COMMANDS) == set(main.list_commands(click.Context(main)))
    assert all(command_of(name).name == name for name in COMMANDS)
    assert max(map(len, COMMANDS.values())) <= 66  # they fit on one line of an 80-column terminal


def run_script(name: str, *words: str, cwd: Path = TOP) -> subprocess.CompletedProcess[str]:
    width = {name: value for name, value in os.environ.items() if name == "COLUMNS"}
    return subprocess.run(
        [sys.executable, TOP / "scripts" / name, *words], cwd=cwd, capture_output=True, text=True,
        env={**width, "PYTHONPATH": str(TOP), "PATH": ""},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "command"),
    [("capture_raw_activations.py", "capture"), ("project_raw_activations_onto_traits.py", "project")],
)
def test_scripts_offer_exactly_the_options_of_their_command(script: str, command: str) -> None:
    done = run_script(script, "--help")
    found = command_of(command)
    assert {p.opts[-1] for p in found.params} <= set(done.stdout.replace(",", " ").replace("/", " ").split())
    context = click.Context(found, info_name=f"tlcapture {command}", **found.context_settings)
    assert done.stdout == found.get_help(context) + "\n"


def test_scripts_take_the_table_of_their_command_and_say_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "tlcapture.toml").write_text('[project]\nlayer = "x"\n')
    done = run_script("project_raw_activations_onto_traits.py", "--all-prompt-sets", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: invalid value for '--layer': 'x' is neither a layer number nor 'auto'\n"


OPTIONS = {
    "capture": "experiment prompt-set prompt all-prompt-sets attention logit-lens layer-internals capture-attn "
    "no-project replay layer method max-new-tokens temperature skip-existing model engine device dtype save-dtype "
    "batch-size seed limit vector-experiment root allow-model-change layers points projections-only shard dry-run "
    "overwrite sampling",
    "project": "experiment prompt-set all-prompt-sets traits layer method component dynamics-only skip-existing "
    "vector-experiment root shard",
    "extract": "experiment traits methods layers component model engine device dtype batch-size seed root",
    "plan": "model prompts prompt-tokens new-tokens views traits layers points save-dtype batch-size workers gpu "
    "efficiency tokens-per-second measure budget json",
}


@pytest.mark.parametrize("command", list(OPTIONS))
def test_commands_have_every_documented_option(command: str) -> None:

    offered = {option for parameter in command_of(command).params for option in parameter.opts}
    assert {f"--{name}" for name in OPTIONS[command].split()} <= offered


def test_defaults_of_capture_are_those_in_the_documentation() -> None:
    params = {p.name: p for p in command_of("capture").params}
    layer = params["layer"]
    assert isinstance(layer, click.Option)
    assert (layer.help or "").endswith("[default: auto, or 16 where nothing was evaluated]")
    defaults = {name: p.default for name, p in params.items()}
    longest = params["max_new_tokens"]
    assert isinstance(longest, click.Option)
    assert "[default: 50, or 1024 where the chat template makes models think]" in (longest.help or "")
    assert defaults["temperature"] == 0.7
    assert (defaults["seed"], defaults["batch_size"], defaults["save_dtype"]) == (0, "auto", "auto")


def test_setup_cfg_lists_every_package() -> None:
    import configparser

    config = configparser.ConfigParser()
    config.read(TOP / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(TOP).parts) for path in (TOP / "tlcapture").rglob("__init__.py")}
    assert listed == found | {"tlcapture.datasets"}
