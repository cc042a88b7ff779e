"""`tlcapture extract`: contrastive examples through the model, into trait vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tlcapture import __version__
from tlcapture.config import read_config, record
from tlcapture.errors import InputError, NumericalError, TlcaptureError
from tlcapture.extraction.examples import Examples, read_examples
from tlcapture.extraction.methods import FITS
from tlcapture.extraction.readout import HOOKS, Activations, Reading, read_out, tokenize_example
from tlcapture.layout import Datasets, Layout
from tlcapture.models import Model
from tlcapture.names import Trait
from tlcapture.runs.report import Reporter, RunReport
from tlcapture.runs.vectors import now
from tlcapture.traits.vectors import COMPONENTS, METHODS, VectorFolder


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract; empty `traits` and `layers` mean all there are."""

    traits: tuple[Trait, ...] = ()
    methods: tuple[str, ...] = METHODS
    layers: tuple[int, ...] = ()
    components: tuple[str, ...] = COMPONENTS
    batch_size: int | None = None
    seed: int = 0


def run_extract(
    layout: Layout, options: ExtractOptions, load: Callable[[], Model], reporter: Reporter = Reporter()
) -> RunReport:
    """Extract vectors of every trait asked for.

    Raises:
        InputError: a trait, method or layer is unknown, or an example is wrong; nothing was written.
    """
    datasets = Datasets(layout.root)
    traits = options.traits or tuple(datasets.traits())
    for method in options.methods:
        if method not in FITS:
            raise InputError(f"no method {method!r}: choose among {', '.join(FITS)}")
    examples = [read_examples(datasets, trait, seed=options.seed) for trait in traits]
    model = load()
    layers = options.layers or tuple(range(model.n_layers))
    for layer in layers:
        if not 0 <= layer < model.n_layers:
            raise InputError(f"--layers {layer}: the model has layers 0 to {model.n_layers - 1}")
    record(layout, extraction_model=model.name)
    report = RunReport(layout.folder)
    total = sum(len(each.items) for each in examples)
    with reporter.progress(total, "examples", "example") as progress:
        for each in examples:
            try:
                _extract(layout, each, model, options, layers, report, progress.advance)
            except TlcaptureError as error:
                report.failed(str(each.trait), error)
                continue
            report.n_prompts += len(each.items)
            progress.advance(done=f"{each.trait}: {len(each.items)} examples")
    return report


def _extract(
    layout: Layout,
    examples: Examples,
    model: Model,
    options: ExtractOptions,
    layers: Sequence[int],
    report: RunReport,
    on_examples: Callable[[int], None],
) -> None:
    config = read_config(layout)
    readings = [
        tokenize_example(
            model.tokenizer, item.example, chat_template=config.use_chat_template, system_prompt=config.system_prompt
        )
        for item in examples.items
    ]
    batch_size = options.batch_size or 16
    activations = read_out(model, readings, options.components, batch_size=batch_size, on_examples=on_examples)
    labels = torch.tensor([item.positive for item in examples.items])
    train = torch.tensor([not item.held_out for item in examples.items])
    folder = VectorFolder(layout, examples.trait)
    for component, values in activations.items():
        metadata = _metadata(layout, component, model, options, readings, examples)
        if not _are_of_one_kind(folder.metadata(component), metadata):
            folder.clear(component)
        selected: Activations = values[list(layers)][:, train]
        for method in options.methods:
            vectors = FITS[method](selected, labels[train], seed=options.seed)
            if not vectors.isfinite().all() or not vectors.any(dim=-1).all():
                raise NumericalError(f"{method} on {component} gave a vector that is zero or holds NaN or inf")
            for layer, vector in zip(layers, vectors, strict=True):
                folder.write(component, method, layer, vector)
                report.wrote(folder.file(component, method, layer).stat().st_size)
        available = folder.available(component)
        layers_there = sorted({layer for there in available.values() for layer in there})
        folder.write_metadata(component, {**metadata, "methods": list(available), "layers": layers_there})


def _are_of_one_kind(before: dict[str, Any], now_made: dict[str, Any]) -> bool:
    """Whether vectors of an earlier extraction may stand under the same metadata as those made now."""
    keys = ("model_fingerprint", "hook", "position", "dtype", "engine", "split")
    return all(before.get(key) == now_made[key] for key in keys)


def _metadata(
    layout: Layout,
    component: str,
    model: Model,
    options: ExtractOptions,
    readings: Sequence[Reading],
    examples: Examples,
) -> dict[str, Any]:
    positions = Counter(reading.position for reading in readings)
    return {
        "extraction_model": model.name,
        "extraction_experiment": layout.experiment,
        "trait": str(examples.trait),
        "component": component,
        "methods": list(options.methods),
        "layers": list(options.layers),
        "num_layers": model.n_layers,
        "hidden_dim": model.d_model,
        "timestamp": now(),
        "hook": HOOKS[component].replace("layer", "L"),
        "position": positions.most_common(1)[0][0],
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_processing": "none",
        "model_fingerprint": model.fingerprint,
        "engine": model.engine,
        "split": examples.split_record(options.seed),
        "tlcapture_version": __version__,
    }
