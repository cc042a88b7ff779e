"""What the page shows, read from the experiments' own files when it is asked for. Loads no torch.

Every method is a resource of the page, and `RESOURCES` says under which path; the server and the
export both go by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tlcapture.errors import InputError, StorageError, TlcaptureError
from tlcapture.layout import Datasets, Layout
from tlcapture.names import Trait
from tlcapture.prompts import read_prompt_set
from tlcapture.report import missing
from tlcapture.report.average import average_trajectory
from tlcapture.report.entries import TokenEntries
from tlcapture.storage import read_json
from tlcapture.traits.projection_files import trajectory_of_file
from tlcapture.traits.selection import Selection, ranked, select
from tlcapture.traits.vector_files import COMPONENTS, VectorFiles

RESOURCES = {
    "experiments": "experiments",
    "prompt_set": "{experiment}/sets/{prompt_set}",
    "prompt": "{experiment}/sets/{prompt_set}/{prompt_id}",
    "layers": "{experiment}/sets/{prompt_set}/{prompt_id}/layers/{category}/{name}/{component}",
    "lens": "{experiment}/sets/{prompt_set}/{prompt_id}/lens",
    "lens_token": "{experiment}/sets/{prompt_set}/{prompt_id}/lens/{token}",
    "attention": "{experiment}/sets/{prompt_set}/{prompt_id}/attention",
    "attention_token": "{experiment}/sets/{prompt_set}/{prompt_id}/attention/{token}",
    "average": "{experiment}/averages/{prompt_set}/{category}/{name}/{component}",
    "vectors": "{experiment}/vectors/{category}/{name}",
}
_TEXT_AT_THE_START = re.compile(rb'\{\s*"prompt"\s*:\s*\{\s*"text"\s*:\s*("(?:[^"\\]|\\.)*")')
_HEAD = 2**16


@dataclass(frozen=True)
class Contents:
    """The experiments of a root. Methods raise `TlcaptureError`; `MissingError` where a command would help."""

    root: Path

    def experiments(self) -> list[dict[str, Any]]:
        """All experiments, their captured prompt sets and their traits."""
        found = []
        for folder in sorted((self.root / "experiments").glob("*")):
            try:
                layout = self._layout(folder.name)
            except InputError:
                continue
            prompt_sets = layout.prompt_sets()
            traits = sorted({str(trait) for trait in layout.traits()} | set(_projected(layout, "*")))
            found.append({"name": folder.name, "prompt_sets": prompt_sets, "traits": traits})
        return found

    def prompt_set(self, experiment: str, prompt_set: str) -> dict[str, Any]:
        """The prompts captured of a set, and what there is of each."""
        layout = self._layout(experiment)
        ids = layout.prompt_ids(prompt_set)
        if not ids:
            raise missing.captures(layout, prompt_set)
        worded = self._wordings(prompt_set)
        prompts = [
            {
                "id": prompt_id,
                "text": _wording(layout, prompt_set, prompt_id, worded.get(prompt_id)),
                "attention": layout.attention(prompt_set, prompt_id).is_file(),
                "logit_lens": layout.logit_lens(prompt_set, prompt_id).is_file(),
            }
            for prompt_id in ids
        ]
        return {"name": prompt_set, "prompts": prompts, "traits": _projected(layout, prompt_set)}

    def prompt(self, experiment: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """A prompt's tokens, and its trajectory and dynamics on every trait it is projected onto."""
        layout = self._layout(experiment)
        found: dict[str, Any] = {"tokens": None, "n_prompt_tokens": 0, "projections": [], "problems": []}
        for path in layout.all_projections(prompt_set, prompt_id):
            try:
                content = read_json(path)
                projection = _projection(layout, path, content)
                tokens, n_prompt = _tokens(content)
            except (TlcaptureError, KeyError, TypeError) as error:
                found["problems"].append(f"{path.relative_to(self.root)}: {error}")
                continue
            if found["tokens"] is None:
                found |= {"tokens": tokens, "n_prompt_tokens": n_prompt, "text": content["response"].get("text", "")}
            if tokens != found["tokens"]:
                found["problems"].append(f"{path.relative_to(self.root)}: it is of other tokens than its neighbours")
                continue
            found["projections"].append(projection)
            by_layer = content["projections"]["prompt"][0]
            found["n_layers"] = len(by_layer)
            found["layers"] = [layer for layer, scores in enumerate(by_layer) if scores is not None]
        if found["tokens"] is None:
            found |= self._tokens_of_add_ons(layout, prompt_set, prompt_id)
        if not found["projections"]:
            found["missing"] = _as_json(missing.projections(layout, prompt_set))
        return found

    def layers(
        self, experiment: str, prompt_set: str, prompt_id: str, category: str, name: str, component: str
    ) -> dict[str, Any]:
        """The projection onto one trait's vector at every layer and residual point: `scores[token][layer][point]`,
        null at layers that the capture did not keep."""
        layout, trait = self._layout(experiment), Trait.parse(f"{category}/{name}")
        path = layout.projection(trait, _component(component), prompt_set, prompt_id)
        if not path.is_file():
            raise missing.projections(layout, prompt_set)
        content = read_json(path)
        try:
            parts = content["projections"]
            return {"sublayers": content["metadata"]["sublayers"], "scores": [*parts["prompt"], *parts["response"]]}
        except (KeyError, TypeError) as error:
            raise StorageError(f"{path}: no projection file: {type(error).__name__}: {error}") from None

    def lens(self, experiment: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """Of every token and layer: the likeliest next token, and rank and probability of the one that came."""
        entries = self._entries(experiment, prompt_set, prompt_id, "logit-lens")
        found: dict[str, Any] = {name: [] for name in ("token_idx", "actual", "top", "prob", "rank", "actual_prob")}
        for entry in entries:
            layers = entry["by_layer"]
            found["token_idx"].append(entry["token_idx"])
            found["actual"].append(entry["actual_next_token"])
            found["top"].append([layer["top_k"][0]["token"] for layer in layers])
            found["prob"].append([layer["top_k"][0]["prob"] for layer in layers])
            found["rank"].append([layer["actual_rank"] for layer in layers])
            found["actual_prob"].append([layer["actual_prob"] for layer in layers])
        return {**_head(entries), "top_k": entries.rest.get("top_k"), **found}

    def lens_token(self, experiment: str, prompt_set: str, prompt_id: str, token: str) -> dict[str, Any]:
        """All predictions of one token."""
        return self._entries(experiment, prompt_set, prompt_id, "logit-lens")[_index(token)]

    def attention(self, experiment: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """What a prompt's attention file holds besides the patterns."""
        entries = self._entries(experiment, prompt_set, prompt_id, "attention")
        return {**_head(entries), "n_heads": entries.rest.get("n_heads")}

    def attention_token(self, experiment: str, prompt_set: str, prompt_id: str, token: str) -> dict[str, Any]:
        """What one token attends to: `by_layer[layer][head][key]`."""
        return self._entries(experiment, prompt_set, prompt_id, "attention")[_index(token)]

    def tokens_of(self, kind: str, experiment: str, prompt_set: str, prompt_id: str) -> list[int]:
        """The tokens of which there is `attention` or a logit `lens`."""
        named = "attention" if kind == "attention" else "logit-lens"
        return self._entries(experiment, prompt_set, prompt_id, named).token_indices

    def average(self, experiment: str, prompt_set: str, category: str, name: str, component: str) -> dict[str, Any]:
        """The mean trajectory of a prompt set on a trait and its spread, responses beginning together."""
        layout, trait = self._layout(experiment), Trait.parse(f"{category}/{name}")
        lines, problems = [], []
        for prompt_id in layout.prompt_ids(prompt_set):
            path = layout.projection(trait, _component(component), prompt_set, prompt_id)
            if path.is_file():
                try:
                    lines.append(trajectory_of_file(read_json(path)))
                except StorageError as error:
                    problems.append(f"{path.relative_to(self.root)}: {error}")
        if not lines:
            raise missing.projections(layout, prompt_set)
        return {**average_trajectory(lines), "problems": problems}

    def vectors(self, experiment: str, category: str, name: str) -> dict[str, Any]:
        """A trait's vectors: where there are any, their evaluation, their steering, and which is chosen and why."""
        layout, trait = self._layout(experiment), Trait.parse(f"{category}/{name}")
        files = VectorFiles(layout, trait)
        components = {component: _component_vectors(files, component) for component in COMPONENTS}
        components = {component: found for component, found in components.items() if found}
        if not components:
            command = f"tlcapture extract --experiment {experiment} --traits {trait}"
            raise missing.MissingError(f"no vectors of {trait}", command)
        return {
            "trait": str(trait),
            "components": components,
            "evaluation": _evaluation(layout, trait),
            "steering": _steering(layout, trait),
        }

    def _layout(self, experiment: str) -> Layout:
        layout = Layout(self.root, experiment)
        if not layout.folder.is_dir():
            raise InputError(f"no experiment {experiment!r} in {self.root / 'experiments'}")
        return layout

    def _entries(self, experiment: str, prompt_set: str, prompt_id: str, kind: str) -> TokenEntries:
        layout = self._layout(experiment)
        path_of = layout.attention if kind == "attention" else layout.logit_lens
        path = path_of(prompt_set, prompt_id)
        if not path.is_file():
            raise missing.add_on(layout, prompt_set, kind)
        return TokenEntries(path)

    def _tokens_of_add_ons(self, layout: Layout, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        for path in (layout.attention(prompt_set, prompt_id), layout.logit_lens(prompt_set, prompt_id)):
            if path.is_file():
                return _head(TokenEntries(path))
        return {}

    def _wordings(self, prompt_set: str) -> dict[str, str]:
        """The prompts as the prompt set has them today; none where there is no such file."""
        try:
            return {prompt.id: prompt.text for prompt in read_prompt_set(Datasets(self.root), prompt_set).prompts}
        except TlcaptureError:
            return {}


def _as_json(error: missing.MissingError) -> dict[str, str]:
    return {"what": error.what, "command": error.command}


def _component(component: str) -> str:
    if component not in COMPONENTS:
        raise InputError(f"no component {component!r}: choose one of {', '.join(COMPONENTS)}")
    return component


def _index(token: str) -> int:
    if not token.isdecimal():
        raise InputError(f"token {token!r}: expected a number")
    return int(token)


def _projected(layout: Layout, prompt_set: str) -> list[str]:
    """Traits onto which anything of a prompt set is projected."""
    folders = layout.projection_folders(prompt_set)
    return sorted({str(trait) for trait, _ in folders})


def _wording(layout: Layout, prompt_set: str, prompt_id: str, worded: str | None) -> str:
    """What to call a prompt: as its prompt set words it, if the capture holds that; else as it was run."""
    for path in layout.all_projections(prompt_set, prompt_id):
        with path.open("rb") as file:
            match = _TEXT_AT_THE_START.match(file.read(_HEAD))
        try:
            run = str(orjson.loads(match[1])) if match else ""
        except orjson.JSONDecodeError:
            run = ""
        if run:
            return worded if worded and worded.strip() in run else run
    return worded or ""


def _projection(layout: Layout, path: Path, content: Any) -> dict[str, Any]:
    trait, component = layout.of_projection(path)
    prompt, response = trajectory_of_file(content)
    metadata = content["metadata"]
    return {
        "trait": str(trait),
        "component": component,
        "trajectory": [*prompt, *response],
        "dynamics": content["dynamics"],
        "vector": metadata["vector_source"],
        "model": metadata.get("inference_model"),
        "warnings": metadata.get("warnings", []),
    }


def _tokens(content: Any) -> tuple[list[str], int]:
    prompt, response = content["prompt"]["tokens"], content["response"]["tokens"]
    scores = content["projections"]
    if len(prompt) != len(scores["prompt"]) or len(response) != len(scores["response"]):
        raise StorageError("it has not as many projections as tokens")
    return [*prompt, *response], len(prompt)


def _head(entries: TokenEntries) -> dict[str, Any]:
    rest = entries.rest
    return {name: rest.get(name) for name in ("tokens", "n_prompt_tokens", "n_layers")}


def _component_vectors(files: VectorFiles, component: str) -> dict[str, Any] | None:
    available = files.available(component)
    if not available:
        return None
    metadata = files.metadata(component)
    n_layers = int(metadata.get("num_layers") or 1 + max(map(max, available.values())))
    found: dict[str, Any] = {"available": available, "n_layers": n_layers, "metadata": metadata}
    try:
        chosen = select(files, component, n_layers)
        rivals = [each for each in ranked(files, component, available) if each.layer != chosen.layer]
        found |= {"selected": _selection(chosen), "runner_up": _selection(rivals[0]) if rivals else None}
    except TlcaptureError as error:
        found |= {"selected": None, "problem": str(error)}
    return found


def _selection(selection: Selection) -> dict[str, Any]:
    names = ("layer", "method", "selected_by", "score", "warning")
    return {name: getattr(selection, name) for name in names}


def _evaluation(layout: Layout, trait: Trait) -> dict[str, Any]:
    if not layout.evaluation.is_file():
        return {"missing": _as_json(missing.evaluation(layout))}
    content = read_json(layout.evaluation)
    try:
        rows = [row for row in content["all_results"] if row["trait"] == str(trait)]
        needed = ("method", "layer", "val_effect_size", "val_auroc")
        rows = [row for row in rows if all(isinstance(row.get(name), str | int | float) for name in needed)]
    except (KeyError, TypeError, AttributeError) as error:
        return {"problem": f"{layout.evaluation}: no evaluation: {type(error).__name__}: {error}"}
    return {"rows": rows} if rows else {"missing": _as_json(missing.evaluation(layout))}


def _steering(layout: Layout, trait: Trait) -> dict[str, Any]:
    path = layout.steering(trait)
    if not path.is_file():
        return {"missing": _as_json(missing.steering(layout, trait))}
    content = read_json(path)
    try:
        runs = [
            {
                "layer": run["config"]["layers"][0],
                "method": run["config"]["methods"][0],
                "component": run["config"].get("component", "residual"),
                "coefficient": run["config"]["coefficients"][0],
                "trait_mean": run["result"]["trait_mean"],
                "coherence_mean": run["result"]["coherence_mean"],
            }
            for run in content["runs"]
            if len(run["config"]["layers"]) == 1
        ]
        baseline: Mapping[str, Any] = content["baseline"]
        return {"baseline": {key: baseline[key] for key in ("trait_mean", "coherence_mean")}, "runs": runs}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        return {"problem": f"{path}: no steering results: {type(error).__name__}: {error}"}
