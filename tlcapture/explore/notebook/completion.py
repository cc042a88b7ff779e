"""IPython completion for experiments and captures, where IPython's own does not evaluate the objects.

    exp.captures["single<Tab>      # single_trait; exp.captures["single_trait"]["<Tab> has the ids
    exp.vectors["beh<Tab>          # behavioral/refusal
    cap.project("beh<Tab>          # behavioral/refusal
    cap.residual(12, "aft<Tab>     # after_attn

`%load_ext tlcapture` switches it on.
"""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher
from IPython.core.interactiveshell import InteractiveShell

from tlcapture.explore.captured_sets import AllCaptures, Captures
from tlcapture.explore.experiment import Experiment
from tlcapture.explore.experiment_vectors import ExperimentVectors
from tlcapture.explore.explorable_capture import ExplorableCapture
from tlcapture.traits.vector_sources.packaged import packaged_layout, takes_packaged
from tlcapture.views.hooks import POINTS

_OF_TRAITS = {"project", "projected", "coloured", "by_span", "to_pandas", "trajectory", "layers"}
_MADE_OF_TRAITS = {"Steer", "Ablate", "Cap"}
_OWNER = r"([A-Za-z_]\w*)((?:\.(?:captures|vectors|at)|\[[^\[\]]*\]|\([^()]*\))*)"
_IN_BRACKETS = re.compile(_OWNER + r"\[[\"']([^\"'\[\]]*)$")
_IN_CALL = re.compile(_OWNER + r"(?:\.plot)?(?:\.(\w+))?\((?:[^()]*,)?\s*[\"']([\w/]*)$")
_OURS = (Experiment, AllCaptures, Captures, ExperimentVectors, ExplorableCapture)


def completions(line: str, names: Mapping[str, Any]) -> list[str]:
    """The sets, ids, traits or points that complete a line of code up to the cursor; empty elsewhere.

        completions('cap.project("beh', {"cap": cap})  # ['behavioral/refusal']

    Args:
        names: the variables of the session.
    """
    known: Iterable[str] = ()
    with suppress(Exception):  # a completion never fails
        if found := _IN_BRACKETS.search(line):
            known = _resolved(found[1], found[2], names)._ipython_key_completions_()
        elif found := _IN_CALL.search(line):
            known = _arguments(found, names)
    return [each for each in known if found and each.startswith(found[found.re.groups])]


def _arguments(found: re.Match[str], names: Mapping[str, Any]) -> Iterable[str]:
    if found[1] in _MADE_OF_TRAITS:
        return _traits(None)
    owner = _resolved(found[1], found[2], names)
    if found[3] == "residual" and isinstance(owner, ExplorableCapture):
        return [*POINTS, "attn_out"]
    return _traits(owner) if found[3] in _OF_TRAITS and owner is not None else ()


def _resolved(name: str, steps: str, names: Mapping[str, Any]) -> Any:
    """The object that a name with its attributes, keys and arguments stands for; `None` if it is not of ours."""
    value: Any = names.get(name)
    for step in re.findall(r"\.\w+|\[[^\]]*\]|\([^)]*\)", steps):
        if not isinstance(value, _OURS) and not isinstance(getattr(value, "__self__", None), Captures):
            return None  # nothing else is called
        if step.startswith("."):
            value = getattr(value, step[1:])
        else:
            key = literal_eval(step[1:-1])
            value = value[key] if step.startswith("[") else value(key)
    return value if isinstance(value, _OURS) else None


def _traits(owner: Any) -> list[str]:
    """The traits of the experiment that an object belongs to; if it has none, those of the package for its model."""
    layout, model = packaged_layout(), None
    if isinstance(owner, Experiment):
        layout, model = owner.layout, owner.config.inference_model
    elif isinstance(owner, Captures):
        layout, model = owner._experiment.layout, owner._experiment.config.inference_model
    elif isinstance(owner, ExplorableCapture):
        own, model = owner._vectors(), owner._captured.metadata.get("inference_model")
        layout = layout if own is None else own
    return list(map(str, (packaged_layout() if takes_packaged(layout, model) else layout).traits()))


def complete_in(shell: InteractiveShell) -> None:
    """Let an IPython shell complete these names, and offer nothing else in their place."""

    @context_matcher(identifier="tlcapture")
    def matcher(context: CompletionContext) -> SimpleMatcherResult:
        found = completions(context.text_until_cursor, shell.user_ns)
        return {"completions": [SimpleCompletion(each) for each in found], "suppress": bool(found)}

    known = shell.Completer.custom_matchers
    others = [each for each in known if getattr(each, "matcher_identifier", None) != "tlcapture"]
    shell.Completer.custom_matchers = [*others, matcher]
