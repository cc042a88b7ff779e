"""How often do vectors without a meaning follow their coefficient? `python benchmarks/monitoring_null.py`.

Random combinations of the reference prompts' responses, and isotropic vectors, steer the embedded model in place of a
trait's. Their steered responses are read back as `steer` does, and compared with random vectors as `monitoring` is.
Needs an experiment with a reference, which `evaluate` makes. Half an hour on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import torch

from tlcapture.commands.projecting.projections import random_directions
from tlcapture.commands.steer import read_questions
from tlcapture.extraction.monitoring import RANDOM_VECTORS, monitoring
from tlcapture.extraction.steering import Addition, SteeringScorer
from tlcapture.models.loading import Model, load_model
from tlcapture.names import Trait
from tlcapture.prompts.tokenization import tokenize
from tlcapture.shapes import Vectors
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.statistics.chance import RandomDirections
from tlcapture.traits.statistics.critical_values import LEVEL

TRAITS = ("style/formality", "behavioral/sycophancy", "affect/positivity")
LAYERS = (8, 14, 20)
COEFFICIENTS = (0.1, 0.2, 0.3)


@click.command()
@click.option("--experiment", default="demo", show_default=True)
@click.option("--root", type=click.Path(path_type=Path), default=".")
@click.option("--vectors", default=8, show_default=True, help="Vectors of each kind, by trait and layer.")
def main(experiment: str, root: Path, vectors: int) -> None:
    """Print how many random vectors follow with a p of at most 0.05."""
    model = load_model("smollm2", device="cpu")
    layout = Layout(root.resolve(), experiment)
    random = random_directions(layout, "residual", model.n_layers, model.d_model, click.echo)
    if random.reference is None:
        raise click.ClickException(f"{experiment} has no reference: run 'tlcapture evaluate'")
    generator = torch.Generator().manual_seed(1)
    found: dict[tuple[str, str], list[bool]] = {}
    for trait in TRAITS:
        questions = read_questions(Datasets(root.resolve()), Trait(*trait.split("/"))).questions
        prompts = [
            tokenize(model.tokenizer, each.question, prompt_set="steering", prompt_id=str(number))
            for number, each in enumerate(questions)
        ]
        scorer = SteeringScorer(model, prompts, [each.completions for each in questions])
        unsteered = scorer.baseline().responses
        for layer in LAYERS:
            nulls = {
                "the reference's": random.vectors(RANDOM_VECTORS, layer),
                "isotropic": RandomDirections(None, model.n_layers, model.d_model).vectors(RANDOM_VECTORS, layer),
            }
            for kind, drawn in _drawn(random, model, layer, vectors, generator):
                for vector in drawn:
                    scores = scorer.scores([Addition(layer, vector, each) for each in COEFFICIENTS])
                    texts = [unsteered, *(score.responses for score in scores)]
                    read = torch.stack([scorer.read(layer, each) for each in texts])
                    for name, directions in nulls.items():
                        p = monitoring([0.0, *COEFFICIENTS], read, vector, directions).p
                        found.setdefault((kind, name), []).append(p is not None and p <= LEVEL)
            click.echo(f"{trait} layer {layer}", err=True)
    for (kind, name), follows in found.items():
        click.echo(f"{kind}: {sum(follows)} of {len(follows)} follow more clearly than 95 % of {name} random vectors")


def _drawn(
    random: RandomDirections, model: Model, layer: int, n: int, generator: torch.Generator
) -> Iterator[tuple[str, Vectors]]:
    """Vectors that steer, none of which is among those that `monitoring` compares with."""
    combined = random.vectors(RANDOM_VECTORS + n * len(TRAITS), layer)
    choice = RANDOM_VECTORS + torch.randperm(n * len(TRAITS), generator=generator)[:n]
    yield "combinations of responses", combined[choice]
    yield "isotropic vectors", torch.nn.functional.normalize(torch.randn(n, model.d_model, generator=generator), dim=1)


if __name__ == "__main__":
    main()
