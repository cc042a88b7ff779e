"""`tlcapture extract`: trait vectors from a model's activations on contrastive examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tlcapture.captures.provenance import model_record, now, template_record
from tlcapture.errors import InputError, NumericalError, StorageError
from tlcapture.extraction.calibrating import calibrations
from tlcapture.extraction.changed_examples import RECORDED, digest_of
from tlcapture.extraction.examples import AUTO, GUESS, Examples, read_examples
from tlcapture.extraction.kept_activations import KeptActivations, source_digest
from tlcapture.extraction.methods import FITS, Labels, LayerVectors
from tlcapture.extraction.prepared_examples import PreparedExamples, prepare_examples
from tlcapture.extraction.readout import Activations, component_layers, read_out
from tlcapture.generation.typical_norms import TypicalNorms
from tlcapture.models.loading import Model
from tlcapture.names import Trait
from tlcapture.prompts.tokenization import bos_policy
from tlcapture.runs.display import Display
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.model_worker import ModelWorker
from tlcapture.runs.report import RunReport
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.config import read_config, update_config
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import as_ranges
from tlcapture.traits.calibration import CALIBRATION, HELD_OUT, merged_calibrations
from tlcapture.traits.mean_activations import write_means
from tlcapture.traits.vector_files import METHODS, VectorFiles
from tlcapture.traits.vectors import write_vector
from tlcapture.views.hooks import COMPONENT_HOOKS, COMPONENTS


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract; empty `traits` and `layers` mean all of them.

    `traits=None` means the traits of the root, or of the package if the root has none. With `skip_existing`, a trait
    is left out where all its vectors exist, from the same examples and the model of the same name.
    """

    traits: tuple[Trait, ...] | None = None
    methods: tuple[str, ...] = METHODS
    layers: tuple[int, ...] = ()
    components: tuple[str, ...] = COMPONENTS
    position: str = "auto"
    examples_as: str = AUTO
    batch_size: int | None = None
    seed: int = 0
    skip_existing: bool = False


def run_extract(
    layout: Layout,
    options: ExtractOptions,
    load: ModelLoader,
    display: Display = Display(),
    executor: Executor = LocalExecutor(),
) -> RunReport:
    """Extract the vectors of each trait in `options`.

    Raises:
        InputError: a trait, method or layer is unknown, or an example is wrong; nothing was written.
    """
    datasets = Datasets(layout.root)
    own = datasets.traits(own=True) if options.traits is None else []
    traits = options.traits or own or datasets.traits()
    for method in options.methods:
        if method not in FITS:
            raise InputError(f"no method {method!r}: choose among {', '.join(FITS)}")
    examples = [read_examples(datasets, trait, seed=options.seed, examples_as=options.examples_as) for trait in traits]
    missing = [
        each
        for each in examples
        if not options.skip_existing
        or not all(_has_vectors(layout, each, component, options, load) for component in options.components)
    ]
    if not missing:
        run = Run.begin(layout, display)
        _skip(run, examples)
        return run.report
    for layer in options.layers:
        if not 0 <= layer < load.outline.n_layers:
            raise InputError(f"--layers {layer}: the model has layers 0 to {load.outline.n_layers - 1}")
    executor.known_model(load)  # which may be refused before anything is written
    run = Run.begin(layout, display)
    _skip(run, [each for each in examples if each not in missing])
    if any(each.is_guess for each in missing):
        run.warn(GUESS)
    make, tasks = partial(ModelWorker, _extract_one, options), [ExtractionTask(each) for each in missing]
    executor.run(Work(make, load, tasks, ExtractionTask.size, "example"), run)
    return run.report


def _has_vectors(
    layout: Layout, examples: Examples, component: str, options: ExtractOptions, load: ModelLoader
) -> bool:
    """Whether all vectors of a component exist that would be extracted, from these examples and a model of this name.

    Decided without the model's weights, so only an engine and a dtype that are named count. A file that cannot
    be read counts as missing here: extracting the trait again reports it.
    """
    files = VectorFiles(layout, examples.trait)
    try:
        made = files.metadata(component)
        kept = KeptActivations.read(layout.example_activations(examples.trait, component)) if made else None
    except StorageError:
        return False
    position = _usual_position(examples) if options.position == "auto" else options.position
    if kept is None or kept.position != position:
        return False
    measures = load.outline.measures
    with_attention = measures.n_layers if measures.n_attention_layers is None else measures.n_attention_layers
    count = measures.n_layers if component == "residual" else with_attention
    methods, layers, available = options.methods, options.layers, files.available(component)
    return (
        made.get("extraction_model") == kept.model == load.name
        and all(made.get(name) in (None, value) for name, value in load.named.items())
        and (made.get("examples"), made.get("model_fingerprint")) == (kept.examples, kept.fingerprint)
        and kept.source == source_digest(examples, read_config(layout), kept.position)
        and made.get("split") == examples.split_record(options.seed)
        and made.get("examples_as") == examples.lines_as
        and all({*layers} <= {*available.get(each, ())} & {*made.get("layers", ())} for each in methods)
        and {*methods} <= {*made.get("methods", ())}
        and (bool(layers) or all(len(available[each]) == count for each in methods))
    )


def _usual_position(examples: Examples) -> str:
    """The position that `auto` stands for in most of the examples (see `extraction/readout`)."""
    positions = ["response_mean" if item.example.text is None else "all_mean" for item in examples.items]
    return Counter(positions).most_common(1)[0][0]


def _skip(run: Run, examples: Sequence[Examples]) -> None:
    for each in examples:
        run.line(f"{each.trait}: its vectors exist, from these examples: skipped")
        run.report.n_skipped += len(each.items)


@dataclass(frozen=True)
class ExtractionTask:
    """A trait's examples."""

    examples: Examples

    def __str__(self) -> str:
        return str(self.examples.trait)

    def size(self) -> int:
        """The number of examples, positive and negative ones together."""
        return len(self.examples.items)


def _extract_one(run: Run, model: Model, options: ExtractOptions, task: ExtractionTask) -> None:
    update_config(run.layout, extraction_model=model.name)
    with run.progress(task.size(), str(task), "example") as progress:
        _extract(run, model, options, task.examples, progress.advance)
        run.report.n_prompts += task.size()
        progress.advance(done=f"{task}: {task.size()} examples")


def _extract(
    run: Run, model: Model, options: ExtractOptions, examples: Examples, on_examples: Callable[[int], None]
) -> None:
    layout = run.layout
    layers = _layers(model, options)
    prepared = prepare_examples(layout, model, examples, options.position)
    norms = TypicalNorms()
    activations = read_out(
        model, prepared.readings, tuple(layers), batch_size=options.batch_size, on_examples=on_examples, norms=norms
    )
    labels, train = prepared.labels, ~prepared.held_out
    # All vectors are fitted before any is written, so that a failure leaves earlier vectors unchanged.
    fitted = {
        component: {
            method: _fit(method, values[list(layers[component])][:, train], labels[train], options.seed)
            for method in options.methods
        }
        for component, values in activations.items()
    }
    for component, vectors in fitted.items():
        values, at = activations[component], layers[component]
        kept, trained = kept_activations(layout, model, prepared, values), values[:, train]
        metadata = _metadata(layout, component, model, options, at, prepared)
        if component == "residual":
            metadata["typical_norms"] = list(norms.medians().values())
        metadata[CALIBRATION] = {
            method: calibrations(by_layer, trained[list(at)], labels[train], at) for method, by_layer in vectors.items()
        }
        files = VectorFiles(layout, examples.trait)
        with run_lock(run, f"vectors of {examples.trait}"):
            run.wrote(kept.write(layout.example_activations(examples.trait, component)))
            _write(files, component, vectors, trained.mean(dim=1), metadata, run)


def _layers(model: Model, options: ExtractOptions) -> dict[str, tuple[int, ...]]:
    """The layers at which each component is extracted; components that the model has at none of them are left out."""
    found = {}
    for component in options.components:
        available = component_layers(model, component)
        wanted = options.layers or available
        if layers := tuple(layer for layer in wanted if layer in available):
            found[component] = layers
    if not found:
        raise InputError(f"attn_out: expected a layer with attention, which are {as_ranges(model.attention_layers)}")
    return found


def kept_activations(
    layout: Layout, model: Model, prepared: PreparedExamples, activations: Activations
) -> KeptActivations:
    """The activations of a trait's examples, with the data that tells later whether the examples have changed."""
    return KeptActivations(
        activations,
        prepared.texts,
        [reading.stop - reading.start for reading in prepared.readings],
        prepared.digest,
        source_digest(prepared.examples, read_config(layout), prepared.position),
        model.name,
        model.fingerprint,
        prepared.position,
    )


def _fit(method: str, activations: Activations, labels: Labels, seed: int) -> LayerVectors:
    vectors = FITS[method](activations, labels, seed=seed)
    if not vectors.isfinite().all() or not vectors.any(dim=-1).all():
        raise NumericalError(
            f"{method} gave a vector that is zero or contains NaN or inf: are both sides of the examples equal at "
            "--position?"
        )
    return vectors


def _write(
    folder: VectorFiles,
    component: str,
    vectors: dict[str, LayerVectors],
    means: LayerVectors,
    metadata: dict[str, Any],
    run: Run,
) -> None:
    """Write vectors, the training examples' mean activations, and last their metadata, which says that all is there.

    Vectors that the earlier metadata lists are kept if they were extracted in the same way, and removed otherwise;
    vectors that it does not list belong to another tool and are kept.
    """
    before, made_at = folder.metadata(component), metadata["layers"]
    methods, layers = list(before.get("methods", ())), list(before.get("layers", ()))
    removed: list[Path] = []
    if _are_of_one_kind(before, metadata):
        both = {*methods, *metadata["methods"]}
        metadata["layers"] = sorted({*layers, *metadata["layers"]})
        metadata["methods"] = [*(m for m in METHODS if m in both), *sorted(both - {*METHODS})]
        for name in (CALIBRATION, HELD_OUT):
            if merged := merged_calibrations(before.get(name), metadata.get(name)):
                metadata[name] = merged
    else:
        # Before any is written: if the run is killed, vectors are of unknown origin rather than of a wrong one.
        removed = folder.remove_all(component, methods, layers)
    for method, by_layer in vectors.items():
        for layer, vector in zip(made_at, by_layer, strict=True):
            run.wrote(write_vector(folder, component, method, layer, vector))
    run.wrote(write_means(folder, component, means))
    folder.write_metadata(component, metadata)
    run.removed(removed)


def _are_of_one_kind(before: dict[str, Any], now_made: dict[str, Any]) -> bool:
    """Whether the metadata of an earlier extraction also describes the vectors extracted now."""
    keys = ("model_fingerprint", "hook", "position", "dtype", "engine", "split", "examples")
    return all(before.get(key) == now_made[key] for key in keys)


def _metadata(
    layout: Layout,
    component: str,
    model: Model,
    options: ExtractOptions,
    layers: Sequence[int],
    prepared: PreparedExamples,
) -> dict[str, Any]:
    return {
        "extraction_model": model.name,
        "extraction_experiment": layout.experiment,
        "trait": str(prepared.examples.trait),
        "component": component,
        "methods": list(options.methods),
        "layers": list(layers),
        "num_layers": model.n_layers,
        "hidden_dim": model.d_model,
        "timestamp": now(),
        "hook": COMPONENT_HOOKS[component],
        "position": prepared.position,
        **model_record(model),
        "chat_template": prepared.typical.chat_template,
        **template_record(prepared.typical.merged, prepared.typical.dropped),
        "bos": bos_policy(model.tokenizer, prepared.typical.token_ids, chat_template=prepared.typical.chat_template),
        "split": prepared.examples.split_record(options.seed),
        "examples": prepared.digest,
        RECORDED: digest_of(prepared.examples),
        **({} if prepared.examples.lines_as is None else {"examples_as": prepared.examples.lines_as}),
    }
