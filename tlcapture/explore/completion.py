"""What IPython completes within the arguments of captures: traits and residual points.

    cap.project("beh<Tab>          # behavioral/refusal
    cap.residual(12, "aft<Tab>     # after_attn

`%load_ext tlcapture` switches it on. Sets, ids and traits in brackets, and names after a dot, are completed without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from tlcapture.explore.captured_sets import Captures
from tlcapture.explore.experiment import Experiment
from tlcapture.explore.explorable_capture import ExplorableCapture
from tlcapture.explore.roots import default_root
from tlcapture.storage.layout import Layout
from tlcapture.traits.packaged_vectors import packaged_layout, takes_packaged
from tlcapture.views.hooks import POINTS

_METHODS = {
    "traits": "project projected coloured by_span to_pandas trajectory layers Steer Ablate Cap",
    "points": "residual",
}
_OPEN = re.compile(r"([A-Za-z_]\w*)(?:\.plot)?(?:\.(\w+))?\((?:[^()]*,)?\s*[\"']([\w/]*)$")


def completions(line: str, names: Mapping[str, Any]) -> list[str]:
    """The traits or points that complete a line of code up to the cursor; `names` are those of the session.

        completions('cap.project("beh', {"cap": cap})  # ['behavioral/refusal']

    None where the line does not end within such an argument, or where what it is called on has no vectors.
    """
    found = _OPEN.search(line)
    if found is None:
        return []
    owner, method, begun = names.get(found[1]), found[2] or found[1], found[3]
    kind = next((kind for kind, methods in _METHODS.items() if method in methods.split()), None)
    known: Iterable[str] = ()
    if kind == "points" and isinstance(owner, ExplorableCapture):
        known = [*POINTS, "attn_out"]
    elif kind == "traits":
        with suppress(Exception):  # a completion never fails
            known = _traits(owner)
    return [each for each in known if each.startswith(begun)]


def _traits(owner: Any) -> list[str]:
    """The traits of the experiment that an object is of, or of the package where that has none for its model."""
    model = None
    if isinstance(owner, Experiment):
        layout, model = owner.layout, owner.config.inference_model
    elif isinstance(owner, Captures):
        layout, model = owner._experiment.layout, owner._experiment.config.inference_model
    elif isinstance(owner, ExplorableCapture):
        own, model = owner._vectors(), owner._captured.metadata.get("inference_model")
        layout = Layout(default_root(), "none") if own is None else own
    else:
        layout = packaged_layout()
    return list(map(str, (packaged_layout() if takes_packaged(layout, model) else layout).traits()))


def complete_in(shell: Any) -> None:
    """Let an IPython shell complete such arguments, too."""

    def matcher(text: str) -> list[str]:
        return completions(shell.Completer.text_until_cursor, shell.user_ns)

    matchers: list[Callable[[str], list[str]]] = shell.Completer.custom_matchers
    if not any(getattr(each, "__qualname__", "") == matcher.__qualname__ for each in matchers):
        matchers.append(matcher)
