"""The pages of the site that are made from the code: commands, the Python API, fields of files, and the notebooks.

python -m docs.generated_pages FOLDER
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import BaseModel, RootModel
from pydantic_core import PydanticUndefined

import tlcapture
from tlcapture.cli.command import Command, grouped_options
from tlcapture.cli.main import main

TOP = Path(__file__).parents[1]
NOTEBOOKS = TOP / "docs" / "notebooks"
# Pages that lie outside docs/, and their names on the site.
OUTSIDE = {
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/RESULTS.md": "results",
    "benchmarks/GPU.md": "results-gpu",
}
# The kinds of files whose content the code checks with a model, in the order of the page.
FILES = {
    "Prompt set": "tlcapture.prompts.prompt_sets:PromptSet",
    "Experiment: `config.json`": "tlcapture.storage.experiments.config:ExperimentConfig",
    "Raw capture: `inference/raw/residual/{set}/{id}.pt`": "tlcapture.captures.format:CaptureContent",
    "Index of a raw capture: `tlcapture.json` in its archive": "tlcapture.captures.index:CaptureIndex",
    "Projection: `inference/{category}/{trait}/residual_stream/{set}/{id}.json`": (
        "tlcapture.traits.projections.files:ProjectionFile"
    ),
    "Attention: `analysis/per_token/{set}/{id}_attention.json`, without `attention`": (
        "tlcapture.views.json_files:AttentionHead"
    ),
    "Attention: an entry of `attention`": "tlcapture.views.json_files:AttentionEntry",
    "Logit lens: `analysis/per_token/{set}/{id}_logit_lens.json`, without `predictions`": (
        "tlcapture.views.json_files:LensHead"
    ),
    "Logit lens: an entry of `predictions`": "tlcapture.views.json_files:LensEntry",
    "Vectors: `extraction/{category}/{trait}/vectors/metadata.json`": "tlcapture.traits.vector_files:VectorMetadata",
    "Evaluation: `extraction/extraction_evaluation.json`": "tlcapture.traits.evaluation_files:Evaluation",
    "Steering results": "tlcapture.traits.steering_files:SteeringResults",
    "Comparison: `analysis/compare/{other}/{set}/{id}.json`": "tlcapture.comparison.comparison_files:ComparisonFile",
    "Note: `notes/{set}/{name}_{id}.json`": "tlcapture.captures.notes:Note",
    "Export: `tlcapture-export.json`": "tlcapture.exchange.manifest:Manifest",
}


def write_generated(folder: Path) -> None:
    """Write every generated page into a folder; files that would not change are left alone."""
    pages = {"commands.md": commands_page(), "api.md": api_page(), "fields.md": fields_page()}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        pages[f"{path.stem}.md"] = notebook_page(path, folder)
    for outside, name in OUTSIDE.items():
        pages[f"{name}.md"] = outside_page(TOP / outside)
    folder.mkdir(exist_ok=True)
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# -- commands -------------------------------------------------------------------------------------


def every_command(group: click.Group = main, name: str = "tlcapture") -> Iterator[tuple[str, click.Command]]:
    """All commands with their full names; those of a group after the group itself."""
    context = click.Context(group, info_name=name)
    for each in group.list_commands(context):
        command = group.get_command(context, each)
        assert command is not None
        yield f"{name} {each}", command
        if isinstance(command, click.Group):
            yield from every_command(command, f"{name} {each}")


def commands_page() -> str:
    """Every command with its options, in the groups of its help."""
    lines = ["# Commands", "", "Made from the commands themselves; `tlcapture COMMAND --help` prints the same.", ""]
    for name, command in every_command():
        lines += [f"## {name}", "", inspect.cleandoc(command.help or ""), ""]
        if isinstance(command, click.Group):
            continue
        context = click.Context(command, info_name=name)
        lines += ["```text", " ".join([name, *command.collect_usage_pieces(context)]), "```", ""]
        for title, rows in grouped_options(command, context).items():
            lines += [f"**{title}**", "", "| option | meaning |", "| --- | --- |"]
            lines += [f"| `{_cell(option)}` | {_cell(_plain(text))} |" for option, text in rows]
            lines.append("")
        if isinstance(command, Command) and command.examples:
            lines += ["```bash", *command.examples, "```", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A text in Markdown: what could be markup stands as it is, except code in backticks."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>\[\]{}$~])", r"\\\1", part) for part in parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# -- Python ---------------------------------------------------------------------------------------


def api_page() -> str:
    """The names of `tlcapture.__all__` from their docstrings."""
    lines = [
        "# Python reference",
        "",
        "Made from the docstrings of `tlcapture.__all__`. [python.md](../python.md) has the same API by subject,",
        "with the objects that these names return.",
        "",
    ]
    for name in tlcapture.__all__:
        thing = getattr(tlcapture, name)
        kind = "autoclass" if inspect.isclass(thing) else "autofunction"
        lines += [f"## {name}", "", "```{eval-rst}", f".. {kind}:: tlcapture.{name}"]
        if inspect.isclass(thing):
            lines += ["   :members:", "   :exclude-members: model_config"]
        lines += ["```", ""]
    return "\n".join(lines)


# -- fields of files ------------------------------------------------------------------------------


def fields_page() -> str:
    """A table of fields for each kind of file, from the models that check files when they are read."""
    lines: list[str] = []
    done: set[type] = set()
    for title, home in FILES.items():
        module, name = home.split(":")
        lines += [f"### {title}", ""]
        for model in _with_parts(getattr(importlib.import_module(module), name)):
            if model not in done:
                done.add(model)
                lines += _table(model)
    return "\n".join(lines)


def _with_parts(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model, and the models that its fields refer to."""
    found: dict[type[BaseModel], None] = {}
    todo = [model]
    while todo:
        each = todo.pop(0)
        if each not in found:
            found[each] = None
            todo += [part for kind in _types(each).values() for part in _models_in(kind)]
    return iter(found)


def _types(model: type[BaseModel]) -> dict[str, Any]:
    """The types of a model's fields, with names of types that are defined after it."""
    hints = typing.get_type_hints(model)
    return {name: hints[name] for name in model.model_fields}


def _models_in(kind: Any) -> list[type[BaseModel]]:
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        return [kind]
    return [model for part in typing.get_args(kind) for model in _models_in(part)]


def _table(model: type[BaseModel]) -> list[str]:
    summary = (inspect.getdoc(model) or "").split("\n\n")[0]
    lines = [f"**{model.__name__}**: {_plain(summary)}", "", "| field | type | |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        notes = [bound for limit in field.metadata if (bound := _bound(limit))]
        if field.is_required():
            notes.append("required")
        elif field.default not in (None, "", (), PydanticUndefined):
            notes.append(f"default `{field.default}`")
        kind = "the whole file" if issubclass(model, RootModel) else f"`{field.alias or name}`"
        lines.append(f"| {kind} | `{_cell(type_name(_types(model)[name]))}` | {', '.join(notes)} |")
    return [*lines, ""]


def _bound(limit: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "at least", "max_length": "at most"}
    for name, sign in signs.items():
        if (value := getattr(limit, name, None)) is not None:
            return f"{sign} {value}" + (" items" if "length" in name else "")
    return ""


def type_name(kind: Any) -> str:
    """A type as one reads it: `list[int]`, `str or null`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return type_name(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(type_name, parts)))
    if origin is typing.Literal:
        return " or ".join(map(repr, parts))
    if origin is not None:
        return f"{getattr(origin, '__name__', origin)}[{', '.join(map(type_name, parts))}]"
    return {type(None): "null", Ellipsis: "...", Any: "any"}.get(kind) or str(getattr(kind, "__name__", kind))


# -- pages outside docs/ --------------------------------------------------------------------------


def outside_page(path: Path) -> str:
    """A page that lies outside docs/, with links that lead to pages of the site or are code."""

    def link(found: re.Match[str]) -> str:
        text, target = found[1], (path.parent / found[2]).resolve()
        name = target.relative_to(TOP).as_posix() if target.is_relative_to(TOP) else found[2]
        if name in OUTSIDE:
            return f"[{text}]({OUTSIDE[name]}.md)"
        inside = name.startswith("docs/") and target.suffix == ".md"
        return f"[{text}](../{name.removeprefix('docs/')}{found[3] or ''})" if inside else f"`{name}`"

    return re.sub(r"\[([^\]]*)\]\(((?!https?:)[^)#]+)(#[^)]*)?\)", link, path.read_text(encoding="utf-8"))


def on_site(source: str, depth: int) -> str:
    """The text of a page of docs/ with links to pages outside that lead to their copies on the site."""
    for path, name in OUTSIDE.items():
        source = source.replace(f"]({'../' * (depth + 1)}{path}", f"]({'../' * depth}generated/{name}.md")
    return source


# -- notebooks ------------------------------------------------------------------------------------


def notebook_page(path: Path, folder: Path) -> str:
    """A notebook with its stored outputs as a page; its pictures are written into the folder."""
    lines: list[str] = []
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for index, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for number, output in enumerate(cell["outputs"]):
            lines += [*_shown(output, folder, f"{path.stem}-{index}-{number}.png"), ""]
    return "\n".join(lines)


def _shown(output: Mapping[str, Any], folder: Path, picture: str) -> list[str]:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        folder.mkdir(exist_ok=True)
        (folder / picture).write_bytes(base64.b64decode("".join(data["image/png"])))
        return [f"![what the cell shows]({picture})"]
    return ["```text", "".join(data["text/plain"]).rstrip("\n"), "```"]


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def _main(folder: Path) -> None:
    """Write the generated pages into FOLDER."""
    write_generated(folder)


if __name__ == "__main__":
    _main()
