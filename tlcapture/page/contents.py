"""The page's content, read from the files of the experiments on request. Importing this module loads no torch.

Every public method of `Contents` is a resource of the page. `RESOURCES` has their paths, for the server and for
exported pages.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcapture.comparison.comparison_files import ComparisonFile
from tlcapture.comparison.outdated import is_outdated
from tlcapture.errors import InputError, StorageError, TlcaptureError
from tlcapture.names import Trait, base_set, split_name
from tlcapture.page import missing, readable
from tlcapture.page.average import average_trajectory
from tlcapture.page.captured import captured_tokens
from tlcapture.page.long_reading import SHORT_REQUESTS, comparisons_read
from tlcapture.page.note_contents import NoteContents
from tlcapture.page.overview import overview_of
from tlcapture.page.projections import projection_of
from tlcapture.page.prompt_list import folders_listed, listed_prompts
from tlcapture.page.trait_contents import cross_traits_of, vectors_of
from tlcapture.page.view_contents import head_content
from tlcapture.prompts.prompt_sets import Prompt, read_prompt_file
from tlcapture.runs.recorded_runs import capture_at_work
from tlcapture.storage.experiments.comparisons import comparison_file, comparisons
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout, existing_experiments
from tlcapture.storage.files import FileState
from tlcapture.storage.folders import state_of
from tlcapture.storage.remote.roots import shown
from tlcapture.traits.interventions.records import described
from tlcapture.traits.missing_vectors import PACKAGED
from tlcapture.traits.projections.saved import all_saved, saved_projection
from tlcapture.traits.vector_sources.packaged import vectors_layout
from tlcapture.traits.verdicts import Doubts
from tlcapture.views.hooks import check_component
from tlcapture.views.json_files import head_of
from tlcapture.views.kept_tokens import spread_rows

RESOURCES = {
    "root_folder": "root",
    "experiments": "experiments",
    "prompt_set": "{experiment}/sets/{prompt_set}",
    "overview": "{experiment}/overviews/{prompt_set}/{component}",
    "prompt": "{experiment}/sets/{prompt_set}/{prompt_id}",
    "samples": "{experiment}/sets/{prompt_set}/{prompt_id}/samples/{category}/{name}/{component}",
    "layers": "{experiment}/sets/{prompt_set}/{prompt_id}/layers/{category}/{name}/{component}",
    "lens": "{experiment}/sets/{prompt_set}/{prompt_id}/lens",
    "lens_token": "{experiment}/sets/{prompt_set}/{prompt_id}/lens/{token}",
    "attention": "{experiment}/sets/{prompt_set}/{prompt_id}/attention",
    "attention_token": "{experiment}/sets/{prompt_set}/{prompt_id}/attention/{token}",
    "attention_heads": "{experiment}/sets/{prompt_set}/{prompt_id}/heads",
    "attention_matrix": "{experiment}/sets/{prompt_set}/{prompt_id}/matrix/{layer}/{head}",
    "contributions": "{experiment}/sets/{prompt_set}/{prompt_id}/contributions",
    "internals": "{experiment}/sets/{prompt_set}/{prompt_id}/internals",
    "internals_layer": "{experiment}/sets/{prompt_set}/{prompt_id}/internals/{layer}",
    "internals_token": "{experiment}/sets/{prompt_set}/{prompt_id}/internals/{layer}/{token}",
    "notes": "{experiment}/sets/{prompt_set}/{prompt_id}/notes",
    "at_work": "{experiment}/running/{prompt_set}",
    "average": "{experiment}/averages/{prompt_set}/{category}/{name}/{component}",
    "vectors": "{experiment}/vectors/{category}/{name}",
    "cross_traits": "{experiment}/cross_traits/{source}",
    "comparisons": "{experiment}/compared",
    "uncompared": "{experiment}/uncompared/{prompt_set}",
    "compared_set": "{experiment}/compared/{other}/{prompt_set}",
    "comparison": "{experiment}/compared/{other}/{prompt_set}/{prompt_id}",
}
# Characters of a set's name, and those that stand for them in addresses; no name has these.
_IN_ADDRESS, _FROM_ADDRESS = str.maketrans("/@", "~!"), str.maketrans("~!", "/@")


def address(resource: str, parameters: Mapping[str, str]) -> str:
    """The path of a resource; a prompt set in a subfolder is one part of it, and so is a variant."""
    return RESOURCES[resource].format(
        **{key: text.translate(_IN_ADDRESS) if key == "prompt_set" else text for key, text in parameters.items()}
    )


def from_address(parameters: Mapping[str, str]) -> dict[str, str]:
    """The parameters of a resource from the parts of its path."""
    return {key: text.translate(_FROM_ADDRESS) if key == "prompt_set" else text for key, text in parameters.items()}


@dataclass(frozen=True)
class Contents(NoteContents):
    """The experiments of a root, as JSON values.

    Methods raise `TlcaptureError`, and `MissingError` for data that a command can create.
    """

    def root_folder(self) -> dict[str, str]:
        """The root, and what the page's commands need to find it from the current folder."""
        return {"folder": shown(self.root), "option": missing.root_option(self.root)}

    def experiments(self) -> list[dict[str, Any]]:
        """All experiments with their captured prompt sets and traits; the `problem` of one that cannot be listed."""
        found: list[dict[str, Any]] = []
        for name in existing_experiments(self.root):
            listed: dict[str, Any] = {"name": name, "prompt_sets": [], "traits": []}
            try:
                layout = self._layout(name)
                traits = sorted({str(trait) for trait in layout.traits()} | _projected_traits(layout))
                listed |= {"prompt_sets": layout.prompt_sets(), "traits": traits}
            except InputError:
                continue
            except (StorageError, OSError) as error:
                listed["problem"] = self.problem(error)
            found.append(listed)
        return found

    def prompt_set(self, experiment: str, prompt_set: str) -> dict[str, Any]:
        """The captures of a set, and whether each has attention and logit lens.

        The sample of a prompt names the `prompt`, and its number, `sample`.
        """
        layout = self._layout(experiment)
        folders = tuple(layout.projection_folders(prompt_set))
        state = state_of(folders_listed(layout, prompt_set, folders))
        listed = _listed if state is not None else _listed.__wrapped__
        return listed(layout, prompt_set, folders, _file_of_set(self.root, prompt_set), state)

    def at_work(self, experiment: str, prompt_set: str) -> dict[str, Any]:
        """The unfinished capture of a set, running or stopped: `run`, null if there is none.

        `command` continues a stopped one.
        """
        layout = self._layout(experiment)
        run = capture_at_work(layout, prompt_set)
        if run is None or (not run.is_running and len(layout.prompt_ids(prompt_set)) >= run.n_planned):
            return {"run": None}
        option = "" if " --skip-existing" in run.command_line else " --skip-existing"
        counts = {"done": run.n_done, "planned": run.n_planned, "failed": run.n_failed}
        return {"run": {"is_running": run.is_running, **counts, "command": run.command_line + option}}

    def overview(self, experiment: str, prompt_set: str, component: str) -> dict[str, Any]:
        """What stands out in each prompt of a set; without projections, the answers."""
        layout, captures = self._layout(experiment), self.prompt_set(experiment, prompt_set)["prompts"]
        found = overview_of(layout, prompt_set, check_component(component), captures)
        absent = {} if found["traits"] else {"missing": missing.projections(layout, prompt_set).to_json()}
        named = {name: [self.problem(StorageError(each)) for each in found[name]] for name in ("problems", "unread")}
        return {**found, **absent, **named}

    def prompt(self, experiment: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """A prompt's tokens, and its trajectory and dynamics for every trait that it is projected onto."""
        layout = self._layout(experiment)
        found: dict[str, Any] = {"tokens": None, "n_prompt_tokens": 0, "projections": [], "problems": []}
        doubts = Doubts(self.root)
        try:
            saved = all_saved(layout, prompt_set, prompt_id)
        except TlcaptureError as error:  # of a shard
            saved, found["problems"] = [], [self.problem(error)]
        for each in saved:
            try:
                content = each.read()
                projection = projection_of(each, content, doubts)
            except TlcaptureError as error:
                found["problems"].append(self.problem(error))
                continue
            if found["tokens"] is None:
                n_prompt = len(content.prompt.tokens)
                found |= {"tokens": content.tokens, "n_prompt_tokens": n_prompt, "text": content.response.text}
                found["interventions"] = [described(each.model_dump()) for each in content.metadata.interventions]
                found["spans"] = [span.to_json() for span in content.spans]
                found["prompt_text"] = content.prompt.text
            if content.tokens != found["tokens"]:
                found["problems"].append(
                    f"{each.path.relative_to(self.root)}: its tokens differ from those of the other projections"
                )
                continue
            found["projections"].append(projection)
            found["n_layers"], found["layers"] = content.n_layers, content.layers
        if found["tokens"] is None:
            found |= self._tokens_of_capture(layout, prompt_set, prompt_id)
        if found["tokens"] is not None:
            texts = found.get("prompt_text", ""), found.get("text", "")
            found["joined"] = readable.joined_parts(found["tokens"], found["n_prompt_tokens"], *texts)
        if not found["projections"]:
            found["missing"] = missing.projections(layout, prompt_set).to_json()
        return found

    def tokens(self, experiment: str, prompt_set: str, prompt_id: str) -> Sequence[str]:
        """The tokens of a capture; empty if no file can be read."""
        return self.prompt(experiment, prompt_set, prompt_id)["tokens"] or []

    def layers(
        self, experiment: str, prompt_set: str, prompt_id: str, category: str, name: str, component: str
    ) -> dict[str, Any]:
        """The projection onto one trait's vector: `scores[token][layer][point]`, null at what was not kept.

        `layers` are the kept layers, if the file holds only some tokens.
        """
        layout, trait = self._layout(experiment), Trait.parse(f"{category}/{name}")
        saved = saved_projection(layout, trait, check_component(component), prompt_set, prompt_id)
        if saved is None:
            raise missing.projections(layout, prompt_set)
        content = saved.read()
        found, held = {"sublayers": content.sublayers(component), "scores": content.scores}, content.positions
        if held.is_all:
            return found
        scores = spread_rows(content.scores, held, [None] * content.n_layers)
        return {**found, "scores": scores, "layers": content.layers}

    def average(self, experiment: str, prompt_set: str, category: str, name: str, component: str) -> dict[str, Any]:
        """Mean and standard deviation of a prompt set's trajectories, aligned at the first response token."""
        layout = self._layout(experiment)
        found, _ = self._average(layout, prompt_set, self.names(layout, prompt_set), f"{category}/{name}", component)
        return found

    def samples(
        self, experiment: str, prompt_set: str, prompt_id: str, category: str, name: str, component: str
    ) -> dict[str, Any]:
        """Mean and standard deviation of the trajectories of a prompt's samples, and of their means over responses."""
        layout = self._layout(experiment)
        names = self.samples_of(layout, prompt_set).get(prompt_id, [])
        found, responses = self._average(layout, prompt_set, names, f"{category}/{name}", component)
        means = [float(np.nanmean(each)) for each in responses if np.isfinite(each).any()]
        return {
            **found,
            "response_mean": float(np.mean(means)) if means else None,
            "response_sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        }

    def names(self, layout: Layout, prompt_set: str) -> Sequence[str]:
        """The names of a set's captures, and of what was only projected."""
        return layout.prompt_ids(prompt_set)

    def samples_of(self, layout: Layout, prompt_set: str) -> Mapping[str, Sequence[str]]:
        """The names of the samples of each prompt of a set that has some; lists the set again where it has changed."""
        state = state_of(folders_listed(layout, prompt_set, layout.projection_folders(prompt_set)))
        return (_samples if state is not None else _samples.__wrapped__)(layout, prompt_set, state)

    def _average(
        self, layout: Layout, prompt_set: str, names: Sequence[str], trait: str, component: str
    ) -> tuple[dict[str, Any], list[NDArray[np.float64]]]:
        """Mean and deviation of the trajectories of captures, and the trajectories of their responses."""
        trajectories, scales, problems = [], [], []
        for each in names:
            SHORT_REQUESTS.give_way()
            try:
                saved = saved_projection(layout, Trait.parse(trait), check_component(component), prompt_set, each)
                content = None if saved is None else saved.read()
            except StorageError as error:
                problems.append(self.problem(error))
                continue
            if content is not None:
                prompt, response = map(np.array, content.trajectory)
                trajectories.append((prompt, response))
                scales.append(content.calibration)
        if not trajectories:
            raise missing.projections(layout, prompt_set)
        # Captures that are projected onto different vectors have no scale in common.
        scale = scales[0] if all(each == scales[0] for each in scales) else None
        calibration = None if scale is None else asdict(scale)
        found = {**average_trajectory(trajectories), "calibration": calibration, "problems": problems}
        return found, [response for _, response in trajectories]

    def vectors(self, experiment: str, category: str, name: str) -> dict[str, Any]:
        """A trait's vectors with the selected one, their evaluation and steering results."""
        return vectors_of(self._layout(experiment), Trait.parse(f"{category}/{name}"), self.problem)

    def cross_traits(self, experiment: str, source: str) -> dict[str, Any]:
        """The AUROC of each trait's vector on each trait's examples; `source` is that of `vectors`."""
        layout = self._layout(experiment)
        return cross_traits_of(layout if source == experiment else vectors_layout(self.root, PACKAGED))

    def uncompared(self, experiment: str, prompt_set: str) -> dict[str, str]:
        """The page's message on a set that was not compared: `what` is missing, and the command that compares it."""
        return missing.comparison(self._layout(experiment), prompt_set).to_json()

    def comparisons(self, experiment: str) -> list[dict[str, Any]]:
        """The comparisons that the experiment's prompt sets have."""
        layout = self._layout(experiment)
        return [{"other": other, "prompt_set": prompt_set} for other, prompt_set in comparisons(layout)]

    def compared_set(self, experiment: str, other: str, prompt_set: str) -> dict[str, Any]:
        """The summary of the comparisons of a set, and the names of the compared prompts and samples."""
        layout = self._layout(experiment)
        read = comparisons_read(layout, other, prompt_set)
        found = read.summary
        problems = [self.problem(StorageError(each)) for each in found.problems]
        if found.left_out is not None and read.b is not None:
            again = missing.outdated(layout, prompt_set, read.b, found.left_out)
            if not found.n_files:
                raise again
            problems.append(str(again))
        if not found.n_files:
            raise missing.comparison(layout, prompt_set)
        doubts = Doubts(self.root).lines(found.vectors)
        return {**found.to_json(), "problems": problems, "ids": [*found.names, *found.outdated], "doubts": doubts}

    def comparison(self, experiment: str, other: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """The comparison of one prompt."""
        layout = self._layout(experiment)
        path = comparison_file(layout, other, prompt_set, prompt_id)
        if not path.is_file():
            raise missing.comparison(layout, prompt_set)
        found = ComparisonFile.read(path)
        if is_outdated(layout, prompt_set, path, found):
            raise missing.outdated(layout, prompt_set, found.b, "a capture of this prompt was made again since")
        return found.model_dump(exclude_unset=True)

    def _tokens_of_capture(self, layout: Layout, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """The tokens of a capture that is not projected, from the capture itself or else from its add-ons."""
        path = layout.residual(prompt_set, prompt_id)
        try:
            if path.is_file():
                return captured_tokens(path)
        except TlcaptureError as error:
            unread = {"unread": [self.problem(error)]}
        else:
            unread = {}
        for path_of in (layout.attention, layout.logit_lens):
            path = layout.saved(path_of(prompt_set, prompt_id))
            if path.is_file():
                return {**head_content(head_of(path)), **unread}
        return unread


_SetFile = tuple[Path, str, FileState]  # its path, the name of the set, and its state


@lru_cache(maxsize=4)
def _listed(
    layout: Layout, prompt_set: str, folders: Sequence[tuple[Trait, str]], file: _SetFile | None, _state: Hashable
) -> dict[str, Any]:
    """The answer of `Contents.prompt_set`, which an open page asks for every few seconds."""
    ids = layout.prompt_ids(prompt_set)
    if not ids:
        raise missing.captures(layout, prompt_set)
    prompts = listed_prompts(layout, prompt_set, ids, {} if file is None else _prompts_in(file), folders)
    return {"name": prompt_set, "prompts": prompts, "traits": sorted({str(trait) for trait, _ in folders})}


@lru_cache(maxsize=4)
def _samples(layout: Layout, prompt_set: str, _state: Hashable) -> Mapping[str, Sequence[str]]:
    """The answer of `Contents.samples_of`, which each request for samples needs."""
    found: dict[str, list[str]] = {}
    for name in layout.prompt_ids(prompt_set):
        prompt_id, sample = split_name(name)
        if sample is not None:
            found.setdefault(prompt_id, []).append(name)
    return found


def _file_of_set(root: Path, prompt_set: str) -> _SetFile | None:
    """The file of a prompt set; `None` if it is missing."""
    name = base_set(prompt_set)
    with suppress(TlcaptureError, OSError):
        path = Datasets(root).prompt_set_file(name)
        return path, name, FileState.of(path.stat())
    return None


@lru_cache(maxsize=4)
def _prompts_in(file: _SetFile) -> dict[str, Prompt]:
    """The prompts of a prompt set file by file name; empty if it is invalid."""
    path, name, _ = file
    try:
        return {str(prompt.id): prompt for prompt in read_prompt_file(path, name).prompts}
    except TlcaptureError:
        return {}


def _projected_traits(layout: Layout) -> set[str]:
    """The traits that any capture is projected onto."""
    return {str(trait) for trait, _ in layout.projection_folders()}
