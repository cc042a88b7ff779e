"""Exporting the page as one HTML file that works without a server, with as much data as fits."""

from __future__ import annotations

import base64
import gzip
import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import lexists
from pathlib import Path
from typing import Any

import orjson

from tlcapture.captures.notes import note_counts
from tlcapture.errors import InputError, StorageError, TlcaptureError, refused_path
from tlcapture.names import Trait
from tlcapture.page.assets import exported_page
from tlcapture.page.captured import is_capture
from tlcapture.page.contents import Contents, address
from tlcapture.page.missing import MissingError, root_option
from tlcapture.page.note_contents import EXPORTED
from tlcapture.page.trait_contents import source_of
from tlcapture.storage.experiments.comparisons import compared, comparisons
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_bytes
from tlcapture.traits.projections.saved import all_saved
from tlcapture.views.hooks import COMPONENTS

DEFAULT_MEBIBYTES = 50
_Resource = tuple[str, dict[str, str]]  # its name, and its parameters


@dataclass
class _Carried:
    """Data of the exported file: packed resources, missing ones by path, and labels of data that did not fit."""

    contents: Contents
    room: int
    elements: list[str] = field(default_factory=list)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)
    on_problem: Callable[[str], object] = lambda problem: None
    on_unread: Callable[[str], object] = lambda unread: None
    left_out: list[str] = field(default_factory=list)

    def add(self, label: str, resources: Sequence[_Resource], *, needed: bool = False) -> None:
        """Add resources, all or none of them. Raises `InputError` if `needed` ones do not fit."""
        made, missing = [], {}
        left = self.room
        for name, parameters in resources:
            path = address(name, parameters)
            try:
                packed = _pack(path, self.read(name, parameters))
            except MissingError as error:
                missing[path] = error.to_json()
                continue
            except (TlcaptureError, OSError) as error:
                missing[path] = {"what": self.contents.problem(error), "command": ""}
                self.on_problem(str(refused_path(error) if isinstance(error, OSError) else error))
                continue
            left -= len(packed)
            if left < 0:
                break
            made.append(packed)
        if left < 0:
            if needed:
                raise InputError(f"{label} alone does not fit: raise --max-size, or name fewer prompt sets")
            self.left_out.append(label)
            return
        self.room = left
        self.elements += made
        self.missing |= missing

    def read(self, name: str, parameters: dict[str, str]) -> Any:
        value = getattr(self.contents, name)(**parameters)
        for key, text in _told(value):
            (self.on_unread if key == "unread" else self.on_problem)(self._with_root(text))
        return value

    def _with_root(self, problem: str) -> str:
        """The page's message on a file below the root, with the root."""
        path = self.contents.root / problem.split(": ")[0]
        root = f"{self.contents.root}/".removeprefix("./")
        return f"{root}{problem}" if ": " in problem and lexists(path) else problem


def _told(value: Any) -> Iterator[tuple[str, str]]:
    """The messages in a resource, at any depth, about files that cannot be read, with the key of each."""
    if isinstance(value, dict):
        for key, of_key in value.items():
            if key == "problem" and isinstance(of_key, str):
                yield key, of_key
            elif key in ("problems", "unread"):
                yield from ((key, each) for each in of_key)
            elif isinstance(of_key, dict):
                yield from _told(of_key)


def export_page(
    root: Path,
    experiment: str,
    prompt_sets: Sequence[str],
    target: Path,
    *,
    mebibytes: float = DEFAULT_MEBIBYTES,
    on_problem: Callable[[str], object] = lambda problem: None,
    on_unread: Callable[[str], object] = lambda unread: None,
) -> list[str]:
    """Write the page with an experiment's data to `target`; returns labels of the data that did not fit.

    Trajectories, vectors and layers are added first, then the logit lens and attention of each prompt, until the
    data reaches `mebibytes`. A file that cannot be read is left out, and `on_problem` is called with the reason;
    `on_unread` where it is a raw file that another tool may have written, whose prompt is listed without its text.

    Raises `InputError` if the overview alone does not fit.
    """
    layout = Layout(root, experiment)
    contents = _Only(root, experiment, tuple(prompt_sets), notes_closed=EXPORTED)
    carried = _Carried(contents, int(mebibytes * 2**20), on_problem=on_problem, on_unread=on_unread)
    prompts = [(name, prompt_id) for name in prompt_sets for prompt_id in contents.names(layout, name)]
    carried.add("the overview", list(_overview(layout, prompt_sets, prompts)), needed=True)
    for label, resources in (*_of_sets(layout, contents), *_of_prompts(layout, contents, prompts)):
        carried.add(label, list(resources))
    write_bytes(target, exported_page(_data(carried, experiment)).encode("utf-8"))
    return carried.left_out


def _overview(layout: Layout, prompt_sets: Sequence[str], prompts: Sequence[tuple[str, str]]) -> Iterator[_Resource]:
    """The resources that the page cannot do without."""
    experiment = layout.experiment
    yield from (("experiments", {}), ("root_folder", {}))
    for kind in ("prompt_set", "uncompared"):
        yield from ((kind, {"experiment": experiment, "prompt_set": name}) for name in prompt_sets)
    yield from (("prompt", _of(experiment, *prompt)) for prompt in prompts)
    noted = {name: note_counts(layout, name) for name in prompt_sets}
    yield from (("notes", _of(experiment, *prompt)) for prompt in prompts if prompt[1] in noted[prompt[0]])


def _of_sets(layout: Layout, contents: _Only) -> Iterator[tuple[str, Iterable[_Resource]]]:
    """Labels and resources of prompt sets and traits."""
    of_experiment, prompt_sets = {"experiment": layout.experiment}, contents.prompt_sets
    for name in prompt_sets:
        for component in COMPONENTS:
            of_set = {**of_experiment, "prompt_set": name, "component": component}
            yield f"what stands out in {name}", [("overview", of_set)]
    projected = {name: layout.projection_folders(name) for name in prompt_sets}
    traits = sorted({*layout.traits(), *(trait for pairs in projected.values() for trait, _ in pairs)})
    for trait in traits:
        yield f"vectors of {trait}", [("vectors", {**of_experiment, **_named(trait)})]
    for source in sorted({source_of(layout, trait).experiment for trait in traits}):
        yield (
            f"which traits the vectors of {source} tell apart",
            [("cross_traits", {**of_experiment, "source": source})],
        )
    for name, pairs in projected.items():
        for trait, component in pairs:
            of_trait = {**of_experiment, "prompt_set": name, **_named(trait), "component": component}
            yield f"mean of {name} on {trait}", [("average", of_trait)]
    for name, pairs in projected.items():
        for prompt_id in contents.samples_of(layout, name):
            where = _of(layout.experiment, name, prompt_id)
            samples = [("samples", {**where, **_named(trait), "component": component}) for trait, component in pairs]
            yield f"samples of {name}/{prompt_id}", samples


def _of_prompts(
    layout: Layout, contents: _Only, prompts: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, Iterable[_Resource]]]:
    """Labels and resources of single prompts, the largest last."""
    named = {"/".join(prompt): _of(layout.experiment, *prompt) for prompt in prompts}
    for prompt, (name, of_prompt) in zip(prompts, named.items(), strict=True):
        yield f"layers of {name}", _layers(layout, *prompt)
        yield f"what the layers of {name} add", _contributions(contents, of_prompt)
    yield "the list of comparisons", [("comparisons", {"experiment": layout.experiment})]
    for other, prompt_set in comparisons(layout):
        if prompt_set in contents.prompt_sets:
            yield f"{prompt_set} compared with {other}", _compared(layout, other, prompt_set)
    for kind, heading in (("lens", "logit lens"), ("attention", "attention")):
        for name, of_prompt in named.items():
            yield f"{heading} of {name}", _tokens(contents, kind, of_prompt)
    for name, of_prompt in named.items():
        yield f"internals of {name}", _internals(contents, of_prompt)


@dataclass(frozen=True)
class _Only(Contents):
    """The contents of one experiment, restricted to some of its prompt sets."""

    experiment: str
    prompt_sets: tuple[str, ...]
    _samples: dict[str, Mapping[str, Sequence[str]]] = field(default_factory=dict, compare=False)
    _names: dict[str, Sequence[str]] = field(default_factory=dict, compare=False)

    def names(self, layout: Layout, prompt_set: str) -> Sequence[str]:
        if prompt_set not in self._names:
            self._names[prompt_set] = super().names(layout, prompt_set)
        return self._names[prompt_set]

    def samples_of(self, layout: Layout, prompt_set: str) -> Mapping[str, Sequence[str]]:
        if prompt_set not in self._samples:
            self._samples[prompt_set] = super().samples_of(layout, prompt_set)
        return self._samples[prompt_set]

    def experiments(self) -> list[dict[str, Any]]:
        found = [each for each in super().experiments() if each["name"] == self.experiment]
        return [{**each, "prompt_sets": list(self.prompt_sets)} for each in found]


def _of(experiment: str, prompt_set: str, prompt_id: str) -> dict[str, str]:
    return {"experiment": experiment, "prompt_set": prompt_set, "prompt_id": prompt_id}


def _named(trait: Trait) -> dict[str, str]:
    return {"category": trait.category, "name": trait.name}


def _layers(layout: Layout, prompt_set: str, prompt_id: str) -> Iterator[_Resource]:
    try:
        saved = all_saved(layout, prompt_set, prompt_id)
    except StorageError:  # of a shard, which the overview names
        saved = []
    for each in saved:
        where = _of(layout.experiment, prompt_set, prompt_id)
        yield "layers", {**where, **_named(each.trait), "component": each.component}


def _compared(layout: Layout, other: str, prompt_set: str) -> Iterator[_Resource]:
    where = {"experiment": layout.experiment, "other": other, "prompt_set": prompt_set}
    yield "compared_set", where
    for prompt_id in compared(layout, other, prompt_set):
        yield "comparison", {**where, "prompt_id": prompt_id}


def _tokens(contents: Contents, kind: str, where: dict[str, str]) -> Iterator[_Resource]:
    """The resources of a prompt's attention or logit lens: the overview and one per token."""
    yield kind, where
    if kind == "attention":
        yield "attention_heads", where
    try:
        tokens = contents.tokens_of(kind, **where)
    except (TlcaptureError, OSError):
        tokens = [0]  # requested, so that the page can show what is missing
    for token in tokens:
        yield f"{kind}_token", {**where, "token": str(token)}


def _contributions(contents: Contents, where: dict[str, str]) -> Iterator[_Resource]:
    """The layers' contributions in a prompt; empty for a raw file that is not a capture, as its prompt reports."""
    try:
        contents.contributions(**where)
    except StorageError:
        layout = Layout(contents.root, where["experiment"])
        if not is_capture(layout.residual(where["prompt_set"], where["prompt_id"])):
            return
    except MissingError:
        pass
    yield "contributions", where


def _internals(contents: Contents, where: dict[str, str]) -> Iterator[_Resource]:
    """The resources of a prompt's internals: the stored layers, each of them, and one per layer and token."""
    yield "internals", where
    try:
        for layer in contents.internals(**where)["layers"]:
            at = {**where, "layer": str(layer)}
            yield "internals_layer", at
            for token in contents.internals_layer(**at)["tokens"]:
                yield "internals_token", {**at, "token": str(token)}
    except (TlcaptureError, OSError):
        return  # the page says what is missing


def _pack(path: str, value: Any) -> str:
    try:
        data = orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise StorageError(f"{path}: a file has content that cannot be shown: {error}") from None
    packed = base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")
    return f'<script type="text/plain" id="data:{html.escape(path)}">{packed}</script>'


def _data(carried: _Carried, experiment: str) -> str:
    listed = carried.left_out
    shown = "; ".join(listed[:12]) + (f"; and {len(listed) - 12} more" if len(listed) > 12 else "")
    manifest = {
        "missing": carried.missing,
        "command": f"tlcapture view --experiment {experiment}{root_option(carried.contents.root)}",
        "note": f"Omitted, because this file would be too large: {shown}." if listed else "",
    }
    head = base64.b64encode(orjson.dumps(manifest)).decode("ascii")
    return "\n".join([f'<script type="text/plain" id="exported">{head}</script>', *carried.elements])
