"""Whether the reference that comes with the package could be stored in fewer bits: how many of the chance levels that
the summary of a captured prompt set shows would change.

    python benchmarks/reference_bits.py --experiment demo --prompt-set single_trait

Values are rounded to a grid for each layer and dimension, around the mean over the prompts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from tlcapture import Experiment
from tlcapture.captures.capture import Capture
from tlcapture.traits.choice import VectorChoice, choose_vectors
from tlcapture.traits.projections.projection import project
from tlcapture.traits.statistics.chance import RandomDirections
from tlcapture.traits.statistics.critical_values import LEVEL
from tlcapture.traits.statistics.reference import Means, Reference, read_reference
from tlcapture.traits.vector_sources.packaged import packaged_layout

BITS = (12, 10, 8, 6)
_Shown = dict[str, list[str]]


@click.command()
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("."))
@click.option("--experiment", default="demo", show_default=True)
@click.option("--prompt-set", default="single_trait", show_default=True)
def main(root: Path, experiment: str, prompt_set: str) -> None:
    """Print, for each number of bits, how many chance levels differ from those in 16 bits."""
    whole = read_reference(packaged_layout(), "residual")
    assert whole is not None
    captures = [each.capture for each in Experiment(experiment, root).captures[prompt_set]]
    known = shown_with(whole, captures)
    for bits in BITS:
        found = shown_with(in_bits(whole, bits), captures)
        size = whole.response_means.numel() * 2 * bits / 8 / 2**20
        differ = {name: sum(a != b for a, b in zip(known[name], found[name], strict=True)) for name in known}
        said = ", ".join(f"{number} of {len(known[name])} {name}" for name, number in differ.items())
        click.echo(f"{bits} bits, {size:.1f} MiB: {said} differ")


def in_bits(reference: Reference, bits: int) -> Reference:
    """A reference whose means were stored in fewer bits."""
    means = (_rounded(each, bits) for each in (reference.prompt_means, reference.response_means))
    return replace(reference, **dict(zip(("prompt_means", "response_means"), means, strict=True)))


def _rounded(values: Means, bits: int) -> Means:
    centre = values.float().mean(dim=1, keepdim=True)
    step = ((values - centre).abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-7)
    return centre + torch.round((values - centre) / step) * step


def shown_with(reference: Reference, captures: list[Capture]) -> _Shown:
    """The chance levels as they are shown, over the set and over the reference prompts."""
    levels = []
    for capture in captures:
        chosen = choose_vectors(packaged_layout(), VectorChoice(), capture, "residual").vectors
        pairs = [(each.vector, each.selection) for each in chosen]
        random = RandomDirections(reference, capture.n_layers, capture.d_model)
        streams = capture.prompt.residual, capture.response.residual
        found = project(*streams, pairs, random=random, held=capture.positions)
        levels.append([each.chance for each in found if each.chance is not None])
    rises = np.array([[each.rises for each in of_capture] for of_capture in levels])
    over_set = (rises - rises.mean(axis=0)) / rises.std(axis=0)
    over_reference = np.array([[each.standardised for each in of_capture] for of_capture in levels])
    return {"chance levels over the set": _shown(over_set), "over the reference prompts": _shown(over_reference)}


def _shown(rises: NDArray[np.float64]) -> list[str]:
    """Of `[n_prompts, n_traits, n_directions]`, the level of each prompt with the digits of the summary."""
    return [f"{np.quantile(each.max(axis=0), 1 - LEVEL):.1f}" for each in rises]


if __name__ == "__main__":
    main()
