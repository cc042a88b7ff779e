"""What README and the pages of docs/ show: every command has such options, examples run, links lead somewhere.

The pages say what the embedded model does; here their examples run with a tiny model of three layers.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from docs.generated_pages import api_page, commands_page, every_command, fields_page
from docs.module_index import modules, with_index
from docs.run_examples import PAGES as WITH_OUTPUTS
from docs.run_examples import examples, shown_now
from docs.run_notebooks import code_cells, executed
from tests.cli.conftest import make_trait
from tests.cli.test_conversations import with_template
from tests.conftest import quick_evaluations, unrendered_figures
from tlcapture.cli.command import Command
from tlcapture.cli.main import main
from tlcapture.version import __version__

TOP = Path(__file__).parents[1]
DOCS = TOP / "docs"
PAGES = [TOP / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "generated" not in path.parts)]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
# Layers of the embedded model, and layers of the tiny one in their place.
LAYERS = {
    "layers 12": "layers 1", "layers=12": "layers=1", "@12": "@1", "residual(12)": "residual(1)",
    "layer=[8, 12, 16, 20]": "layer=[0, 1]", "layer=[12, 20]": "layer=[1, 2]", "residual(20)": "residual(2)",
    "residual(5)": "residual(1)", '"resid_post", 5': '"resid_post", 1', "residual(16,": "residual(1,",
    "tensors[12]": "tensors[1]", "layer=20": "layer=2", "blocks.12.": "blocks.1.",
}  # fmt: skip
VECTORS = ["extract --experiment mine --traits style/formality --methods mean_diff --component residual"]
# The pages whose examples run, and what has to be there before: commands.
RUN: dict[str, list[str]] = {
    "docs/tutorial.md": [],
    "docs/coming-from.md": [],
    "docs/how-to/own-model.md": [],
    "docs/how-to/own-trait.md": [],
    "docs/how-to/one-answer.md": [
        "extract --experiment story --traits temporal/past_focus --methods mean_diff --component residual",
        "evaluate --experiment story --traits temporal/past_focus --component residual",
    ],
    "docs/how-to/studies.md": [],
    "docs/how-to/thinking-models.md": [],
    "docs/how-to/steering.md": VECTORS,
    "README.md": [],
}


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every `tlcapture` command of a page, indented or in a block of a shell."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    indented = re.findall(r"(?:^    .*\n)+", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    for line in "\n".join([*blocks, *indented]).replace("\\\n", " ").splitlines():
        found = re.match(r"\s*(?:\$ |git log -1 \| )?tlcapture (.*?)(?: &)?$", line)
        if found:
            yield shlex.split(found[1], comments=True)


def parsed(words: list[str], command: click.Command = main, name: str = "tlcapture") -> None:
    """Check that a command exists, and has the options that are given."""
    context = click.Context(command, info_name=name)
    if isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, words)
        assert found is not None
        parsed(rest, found, str(name))
    else:
        command.make_parser(context).parse_args(list(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_every_command_of_a_page_has_the_options_it_shows(page: Path) -> None:
    for words in commands_of(page.read_text(encoding="utf-8")):
        parsed(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    assert not [target for target in targets if target and not (page.parent / target).exists()]


def test_readme_is_short() -> None:
    assert len((TOP / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    names = {path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES[1:]} - {"index"}
    names |= {f"generated/{path.stem}" for path in NOTEBOOKS}
    assert not [name for name in sorted(names) if f"\n{name}\n" not in index]


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, as a reader has it, where the model is tiny."""
    from tlcapture.models.loading import load_model

    for name in ("style/formality", "behavioral/refusal", "temporal/past_focus"):
        make_trait(tmp_path, name, "LOUD", "soft")
    completions = [{"question": f"why {n}?", "positive": "LOUD", "negative": "soft"} for n in range(2)]
    (tmp_path / "datasets/traits/style/formality/steering.json").write_text(json.dumps({"questions": completions}))
    make_trait(tmp_path, "mood/grumpy", "bah today", "oh indeed")
    make_trait(tmp_path / "more", "mood/grumpy", "bah again", "oh fine")
    (tmp_path / "more/datasets/traits/mood").rename(tmp_path / "more/mood")
    (tmp_path / "datasets/traits/mood/grumpy/steering.json").write_text(json.dumps(completions))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(tiny_folder)
    (tmp_path / "tlcapture.toml").write_text(f'model = "{tiny_folder}"\ndevice = "cpu"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TLCAPTURE_ROOT", raising=False)
    names = {"smollm2": tiny_folder}
    monkeypatch.setattr("tlcapture.load_model", lambda name: load_model(str(names.get(name, name)), device="cpu"))
    with quick_evaluations(), unrendered_figures():
        yield tmp_path


def run(words: list[str]) -> None:
    if words[0] == "shell" or (words[0] == "view" and not {"--export", "--png"} & set(words)):
        return  # they go on until they are stopped
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    # Ten examples of two words each fail the check of examples, as they should.
    assert done.exit_code == (1 if words[:2] == ["traits", "check"] else 0), done.output


@pytest.mark.filterwarnings("ignore:.*by default", "ignore:.*untrained", "ignore:.*no better")
@pytest.mark.parametrize("page", RUN)
def test_the_examples_of_a_page_run_in_order(page: str, place: Path, tiny_folder: Path) -> None:
    if page == "docs/how-to/thinking-models.md":
        (place / "tlcapture.toml").write_text(f'model = "{with_template("qwen3", place / "qwen3", tiny_folder)}"\n')
    for command in RUN[page]:
        run(command.split())
    text = (TOP / page).read_text(encoding="utf-8")
    for old, new in LAYERS.items():
        text = text.replace(old, new)
    names: dict[str, Any] = {}
    if page == "README.md":
        for words in commands_of(text.split("## What it does")[0]):
            run(words)
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(block, names)
        else:
            for words in commands_of(f"```bash\n{block}```"):
                run(words)


def test_the_comparison_with_transformer_lens_prints_what_the_page_shows(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (DOCS / "coming-from.md").read_text(encoding="utf-8")
    ((code, shown),) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    for old, new in LAYERS.items():
        code = code.replace(old, new)
    exec(code, {})
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_stores(path: Path, smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcapture.load_model", lambda name: smollm2)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell, outputs in zip(code_cells(notebook), executed(notebook), strict=True):
        stored = cell["outputs"]
        assert [output.get("text") for output in outputs] == [output.get("text") for output in stored], cell["source"]
        assert [sorted(output.get("data", {})) for output in outputs] == [sorted(o.get("data", {})) for o in stored]


PRINTED = """loading smollm2 ...
prompt  trait   rise
     1  a/b   +2.5 sd
next: tlcapture view
Tides are the rise and the fall of seas. They are many.
wrote 11 files (6.5 MiB) in experiments/default, in 8.5 s
"""


def test_a_page_shows_the_lines_that_are_printed_now_and_leaves_out_the_same_ones() -> None:
    shown = """prompt  trait   rise
     1  a/b   +2.4 sd
...
Tides are the rise and the fall of water. ...
wrote 11 files (6.5 MiB) in experiments/default, in 3.1 s
"""
    now = shown.replace("+2.4", "+2.5").replace("of water. ...", "of seas. ...")
    assert shown_now(shown, PRINTED) == now  # times differ from run to run, and stay
    assert shown_now(now, PRINTED) == now
    with pytest.raises(SystemExit, match="nothing like 'warning: none' is printed any more"):
        shown_now("warning: none\n", PRINTED)


@pytest.mark.parametrize("page", WITH_OUTPUTS)
def test_outputs_of_a_page_follow_an_example(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert sum(shown is not None for _, _, shown in examples(text)) == text.count("```text")


# -- examples in the help -------------------------------------------------------------------------

EXAMPLES_OF = [
    "doctor", "plan", "traits check", "extract", "capture", "project", "steer", "evaluate", "compare", "traits list",
    "view", "list", "export", "import", "traits import", "shell",
]  # fmt: skip
OF_HELP = {"8,12,16": "0,1,2", "12,16": "1,2", "@16": "@1", "--layer 12": "--layer 1"}


@pytest.mark.filterwarnings("ignore:.*by default", "ignore:.*untrained", "ignore:.*no better")
def test_the_examples_in_the_help_run_in_order(place: Path) -> None:
    from tests.cli.conftest import make_prompt_set

    make_prompt_set(place, "single_trait", ["hi", "why?"])
    for unused in ("mood", "temporal"):
        shutil.rmtree(place / "datasets" / "traits" / unused)
    found = {name.removeprefix("tlcapture "): each for name, each in every_command() if isinstance(each, Command)}
    assert sorted(found) == sorted(EXAMPLES_OF)
    for name in EXAMPLES_OF:
        for example in found[name].examples:
            for old, new in OF_HELP.items():
                example = example.replace(old, new)
            run(shlex.split(example)[1:])


# -- what is generated ----------------------------------------------------------------------------


def test_the_reference_of_commands_has_every_option_of_every_command() -> None:
    text = commands_page()
    for name, command in every_command():
        section = re.split(r"^## ", text.split(f"\n## {name}\n")[1], flags=re.MULTILINE)[0]
        context = click.Context(command, info_name=name)
        options = [] if isinstance(command, click.Group) else command.get_params(context)
        shown = [option for option in options if option.get_help_record(context) is not None]
        missing = {option.opts[0] for option in shown if f"`{option.opts[0]}" not in section}
        assert missing <= {"--help", *(option.opts[0] for option in shown if isinstance(option, click.Argument))}, name


def test_the_python_reference_has_every_public_name() -> None:
    import tlcapture

    assert re.findall(r"^## (\w+)$", api_page(), re.MULTILINE) == tlcapture.__all__


def test_the_fields_of_files_are_those_of_the_models() -> None:
    from tlcapture.captures.format import CaptureMetadata

    section = fields_page().split("**CaptureMetadata**")[1].split("\n\n**")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(CaptureMetadata.model_fields)
    assert "ForwardRef" not in fields_page()
    assert "| `n_layers` | `int` | ≥ 1, ≤ 10000, required |" in section


def test_the_map_names_every_package_and_only_modules_that_exist() -> None:
    page, package = (TOP / "CONTRIBUTING.md").read_text(), TOP / "tlcapture"
    named = {*re.findall(r"`((?:[a-z_]+/)+[a-z_]+)`", page)}
    packages = {path.parent.name for path in package.rglob("*/__init__.py")}
    shown = {*re.findall(r"^ {6,8}([a-z_]+)/ ", page, re.MULTILINE)}
    modules = {str(path.relative_to(package).with_suffix("")) for path in package.rglob("*.py")}
    assert shown == packages
    assert {name for name in named if name not in modules} == set()


def test_the_map_lists_every_module_with_its_docstring() -> None:
    page = (TOP / "CONTRIBUTING.md").read_text()
    assert page == with_index(page), "run 'make module-index'"
    assert [name for _, name, summary in modules() if not summary] == []


def test_the_version_is_that_of_the_changelog_and_of_the_citation() -> None:
    assert re.search(r"^## (\S+)", (TOP / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__
    assert f"\nversion: {__version__}\n" in (TOP / "CITATION.cff").read_text()
