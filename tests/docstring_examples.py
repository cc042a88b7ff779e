"""The examples in the docstrings of what people use from Python, and which docstring lacks one."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import tlcapture

# What the names of `tlcapture.__all__` return, with the modules they are in.
RETURNED = {
    "captures.capture": ["Capture"],
    "coloured_tokens": ["ColouredTokens"],
    "explore.figures.attention_heads": ["AttentionHeads"],
    "explore.figures.capture_figures": ["CaptureFigures"],
    "explore.captured_sets": ["AllCaptures", "Captures"],
    "explore.experiment_vectors": ["ExperimentVectors", "TraitVectors"],
    "explore.explorable_capture": ["ExplorableCapture"],
    "explore.live.live_capture": ["LiveCapture"],
    "explore.figures.logit_lens_table": ["LogitLensTable"],
    "explore.figures.offline_figure": ["OfflineFigure"],
    "explore.saved_capture": ["SavedCapture"],
    "explore.figures.set_figures": ["SetFigures"],
    "traits.interventions.requested": ["TraitIntervention"],
    "traits.projections.projection": ["Projection"],
    "traits.projections.token_scores": ["TokenScores"],
}
BASES = {"ExplorableCapture", "LiveCapture", "TraitIntervention"}  # whose members have examples
INTERNAL = {"of"}  # `TokenScores.of`: of a file that was read


def documented() -> Iterator[tuple[str, Any]]:
    """Every public name with what it names: functions and classes, and members that the package defines itself."""
    homes = dict.fromkeys(tlcapture.__all__, tlcapture)
    homes |= {name: importlib.import_module(f"tlcapture.{home}") for home, names in RETURNED.items() for name in names}
    for name, home in homes.items():
        thing = getattr(home, name)
        yield name, thing
        for own, member in vars(thing).items() if inspect.isclass(thing) else ():
            is_member = inspect.isroutine(member) or isinstance(member, property | cached_property | classmethod)
            if is_member and not own.startswith("_") and own not in INTERNAL:
                yield f"{name}.{own}", member


def docstring(thing: Any) -> str:
    """The docstring of a function, a class, or a property."""
    of = getattr(thing, "fget", None) or getattr(thing, "func", None) or getattr(thing, "__func__", None) or thing
    return inspect.cleandoc(of.__doc__ or "")


def examples(text: str) -> list[str]:
    """The indented blocks of a docstring that are code."""
    before_sections = re.split(r"\n(?:Args|Attributes|Returns|Raises):\n", text.replace("\nExample:\n", "\n"))[0]
    return [textwrap.dedent(block) for block in re.findall(r"(?<=\n\n)((?: {4}.*\n?|\n(?= {4}))+)", before_sections)]


def without_example() -> list[str]:
    """The names whose docstring has no example, and that are in none of the class they belong to."""
    things = dict(documented())
    of_classes = {name: "\n".join(examples(docstring(thing))) for name, thing in things.items() if "." not in name}
    return [
        name
        for name, thing in things.items()
        if not examples(docstring(thing))
        and not ("." in name and re.search(rf"\.{name.split('.')[1]}\b", of_classes[name.split(".")[0]]))
        and not (name in BASES or "[" in docstring(thing).split("\n")[0])
    ]
