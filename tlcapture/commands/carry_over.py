"""`tlcapture evaluate --examples`: whether vectors carry over to another dataset of the same trait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tlcapture.commands.evaluating.entries import add_entry, entries_put_in
from tlcapture.errors import InputError, VectorError
from tlcapture.extraction.baselines import bag_of_words
from tlcapture.extraction.cross_validation import null_aurocs, relabelled
from tlcapture.extraction.evaluation import auroc, effect_size_interval, hedges_g
from tlcapture.extraction.examples import Examples, content, examples_in, read_examples
from tlcapture.extraction.prepared_examples import prepare_examples
from tlcapture.extraction.readout import read_out
from tlcapture.models.loading import Model
from tlcapture.names import Trait
from tlcapture.runs.display import Display
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.model_worker import ModelWorker
from tlcapture.runs.report import RunReport
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.rounding import rounded_or_none
from tlcapture.traits.projections.projection import check_fits
from tlcapture.traits.selection import select
from tlcapture.traits.statistics.critical_values import critical_value
from tlcapture.traits.vector_files import IMPORTED, VectorFiles, check_available, traits_with_vectors
from tlcapture.traits.vectors import TraitVector, read_vector

LABELLINGS = 1000


@dataclass(frozen=True)
class CarryOverOptions:
    """Which vectors to score on which examples; without `methods` and `layers` the selected vector of each component.

    `folder` holds examples of one trait, or a folder {category}/{trait} for each.
    """

    folder: Path
    traits: tuple[Trait, ...] = ()
    methods: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    components: tuple[str, ...] = ("residual",)
    batch_size: int | None = None
    examples_as: str = "auto"

    @property
    def name(self) -> str:
        """The name of the dataset, which is the name of its folder."""
        return self.folder.resolve().name


@dataclass(frozen=True)
class CarryOverTask:
    """A trait, and the examples of another dataset of it."""

    trait: Trait
    examples: Examples

    def __str__(self) -> str:
        return str(self.trait)


def run_carry_over(
    layout: Layout,
    options: CarryOverOptions,
    load: ModelLoader,
    display: Display = Display(),
    executor: Executor = LocalExecutor(),
) -> RunReport:
    """Score vectors on examples that were used for nothing else, and write `carry_over` in the evaluation file.

    Raises:
        InputError: the folder has no examples of a trait with vectors; nothing was written.
    """
    layout.check_exists()
    tasks = _tasks(layout, options)
    run = Run.begin(layout, display)
    with entries_put_in(run):
        executor.run(Work(partial(ModelWorker, _carry_over, options), load, tasks, lambda task: 1, "trait"), run)
    return run.report


def _tasks(layout: Layout, options: CarryOverOptions) -> list[CarryOverTask]:
    folder, traits = options.folder, traits_with_vectors(layout, options.traits)
    check_available(layout, traits, options.methods, options.layers)
    if not folder.is_dir():
        raise InputError(f"--examples {folder}: expected a folder with positive.jsonl and negative.jsonl")
    read = partial(_read, options.examples_as)
    if any((folder / f"positive.{end}").is_file() for end in ("jsonl", "txt")):
        if len(traits) != 1:
            raise InputError(f"--examples {folder}: it holds examples of one trait: name the trait with --traits")
        return [CarryOverTask(traits[0], read(folder, traits[0]))]
    found = [trait for trait in traits if (folder / trait.category / trait.name).is_dir()]
    missing = [str(trait) for trait in options.traits if trait not in found]
    if missing or not found:
        raise InputError(
            f"--examples {folder}: expected positive.jsonl and negative.jsonl there or in {{category}}/{{trait}}, "
            f"found no folder {', '.join(missing or map(str, traits))}"
        )
    return [CarryOverTask(trait, read(folder / trait.category / trait.name, trait)) for trait in found]


def _read(examples_as: str, folder: Path, trait: Trait) -> Examples:
    examples = examples_in(folder, trait, examples_as=examples_as)
    if _contents(examples, positive=True) == _contents(examples, positive=False):
        raise InputError(f"--examples {folder}: positive and negative examples are the same")
    return examples


def _contents(examples: Examples, *, positive: bool) -> set[tuple[str | None, ...]]:
    """The texts of one side's examples."""
    side = [item.example for item in examples.items if item.positive == positive]
    return {(each.text, each.system_prompt, each.prompt, each.response) for each in side}


def _own_examples(layout: Layout, trait: Trait) -> Examples | None:
    """The examples that a trait's vectors are extracted from; `None` where they are missing."""
    try:
        return read_examples(Datasets(layout.root), trait)
    except InputError:
        return None


def _check_others(options: CarryOverOptions, examples: Examples, own: Examples | None) -> None:
    """Raise `InputError` if a vector was extracted from the examples, which it would separate in any case."""
    if own is None:
        return
    known = {content(item.example) for item in own.items}
    n_own = sum(content(item.example) in known for item in examples.items)
    if n_own:
        raise InputError(
            f"--examples {options.folder}: {n_own} of its {len(examples.items)} examples are the trait's own, "
            "which its vectors separate in any case: expected others (without --examples, 'tlcapture evaluate' "
            "scores vectors on the trait's own held-out examples)"
        )


def _carry_over(run: Run, model: Model, options: CarryOverOptions, task: CarryOverTask) -> None:
    with run.progress(1, str(task.trait), "trait") as progress:
        rows = [row for component in options.components for row in _rows(run.layout, model, options, task, component)]
        if not rows:
            raise VectorError("no such vectors, so that nothing was scored")
        add_entry(run, {"trait": str(task.trait), "carry_over": {options.name: rows}})
        progress.advance(1, done=f"{task.trait}: scored on {options.name}")


def _rows(
    layout: Layout, model: Model, options: CarryOverOptions, task: CarryOverTask, component: str
) -> list[dict[str, Any]]:
    files = VectorFiles(layout, task.trait)
    vectors = list(_vectors(files, model, options, component))
    if not vectors:
        return []
    own = _own_examples(layout, task.trait)
    if any(vector.method != IMPORTED for vector in vectors):
        _check_others(options, task.examples, own)
    at_prompt = files.metadata(component).get("position") == "last_prompt_token"
    prepared = prepare_examples(layout, model, task.examples, "last_prompt_token" if at_prompt else "auto")
    read = read_out(model, prepared.readings, [component], batch_size=options.batch_size)[component]
    words = _words_auroc(own, prepared.texts, prepared.labels)
    rows = []
    for vector in vectors:
        row = _row(task.examples, prepared.digest, files, vector, _scores(read, vector))
        layer0 = None
        if 0 in files.available(component).get(vector.method, ()):
            first = read_vector(files, component, vector.method, 0)
            layer0 = rounded_or_none(auroc(_scores(read, first), prepared.labels))
        rows.append({**row, "layer0_auroc": layer0, "bag_of_words_auroc": words})
    return rows


def _scores(read: torch.Tensor, vector: TraitVector) -> torch.Tensor:
    return read[vector.layer] @ torch.nn.functional.normalize(vector.vector, dim=0)


def _words_auroc(own: Examples | None, texts: Sequence[str], labels: torch.Tensor) -> float | None:
    """The AUROC of words, learned from the trait's own examples; `None` without texts of both sides among them."""
    known = [item for item in own.items if item.example.text or item.example.response] if own is not None else []
    if len({item.positive for item in known}) < 2:
        return None
    all_texts = [item.example.text or item.example.response or "" for item in known] + list(texts)
    all_labels = torch.cat([torch.tensor([item.positive for item in known]), labels])
    is_new = torch.arange(len(all_texts)) >= len(known)
    return rounded_or_none(auroc(bag_of_words(all_texts, all_labels, is_new[None])[is_new], labels))


def _vectors(files: VectorFiles, model: Model, options: CarryOverOptions, component: str) -> Sequence[TraitVector]:
    available = files.available(component)
    if not available:
        return []
    if options.methods or options.layers:
        wanted = [
            (method, layer)
            for method in options.methods or available
            for layer in available.get(method, ())
            if not options.layers or layer in options.layers
        ]
    else:
        chosen = select(files, component, model.n_layers)
        wanted = [(chosen.method, chosen.layer)]
    vectors = [read_vector(files, component, method, layer) for method, layer in wanted]
    for vector in vectors:
        check_fits(vector, model.n_layers, model.d_model)
        if vector.metadata.get("model_fingerprint") not in (None, model.fingerprint):
            raise VectorError(
                f"the {vector.method} vector at layer {vector.layer} comes from another model: extract it again"
            )
    return vectors


def _row(
    examples: Examples, digest: str, files: VectorFiles, vector: TraitVector, scores: torch.Tensor
) -> dict[str, Any]:
    """The measures of one vector; its null are labels shuffled within pairs, or over unpaired examples."""
    labels = torch.tensor([item.positive for item in examples.items])
    drawn = relabelled(labels, examples.groups, LABELLINGS)
    null = null_aurocs(scores[None], labels, drawn)[:, 0]
    found = auroc(scores, labels)
    sides = examples.sides(range(len(examples.items)))
    positive, negative = scores[sides.positive], scores[sides.negative]
    interval = effect_size_interval(positive[None], negative[None], paired=sides.are_pairs)[0]
    return {
        "method": vector.method,
        "layer": vector.layer,
        "component": vector.component,
        "auroc": rounded_or_none(found),
        "effect_size": rounded_or_none(hedges_g(positive, negative)),
        "effect_size_interval": [rounded_or_none(bound) for bound in interval],
        "null_auroc_p95": rounded_or_none(critical_value(null)),
        "p": rounded_or_none((1 + (null >= found).sum()) / (1 + LABELLINGS)),
        "n_positive": int(labels.sum()),
        "n_negative": int((~labels).sum()),
        "examples": digest,
        "vector_digest": files.digest(vector.component, vector.method, vector.layer),
    }
