"""How many projections of an experiment commit, with what p, beside the same projections with their response shuffled.

    python benchmarks/chance.py --experiment demo --prompt-set single_trait

The response tokens of each trajectory are permuted at random, many times. A commitment that says something about the
response is not found as often, nor at the same places, in shuffled tokens.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.statistics.critical_values import LEVEL
from tlcapture.traits.statistics.dynamics import Motion

SHUFFLES = 100


@click.command()
@click.option("--experiment", default="demo", show_default=True)
@click.option("--prompt-set", default="single_trait", show_default=True)
@click.option("--root", type=click.Path(path_type=Path), default=".")
def main(experiment: str, prompt_set: str, root: Path) -> None:
    """Print how many projections commit and persist, and how many with shuffled responses."""
    layout = Layout(root.resolve(), experiment)
    generator = np.random.default_rng(0)
    p, quarters, n_persist, random, n_clear = [], [], 0, [], 0
    shuffled_p, n_shuffled, n_shuffled_persist, shuffled_quarters = [], 0, 0, []
    for prompt_id in layout.prompt_ids(prompt_set):
        for path in layout.all_projections(prompt_set, prompt_id):
            content = ProjectionFile.read(path)
            if not content.positions.is_all:
                continue
            prompt, response = content.trajectory
            values = np.array([*prompt, *response])
            rows = np.tile(values, (1 + SHUFFLES, 1))
            rows[1:, len(prompt) :] = generator.permuted(rows[1:, len(prompt) :], axis=1)
            chance = content.metadata.chance
            if chance is not None:
                random.append(chance)
            motion = Motion.of(torch.from_numpy(rows), len(prompt))
            n_persist += bool(motion.persists[0])
            n_shuffled_persist += int(motion.persists[1:].sum())
            n_shuffled += SHUFFLES
            if motion.changes is None:
                p.append(1.0)
                shuffled_p += [1.0] * SHUFFLES
                continue
            p.append(float(motion.changes.p[0]))
            shuffled_p += motion.changes.p[1:].tolist()
            if chance is not None and motion.commits[0] and chance.commitment is not None:
                n_clear += chance.commitment <= LEVEL
            place = motion.changes.index / len(response)
            quarters += place[:1][motion.commits[:1]].tolist()
            shuffled_quarters += place[1:][motion.commits[1:]].tolist()
    if not p:
        raise click.ClickException(f"{experiment} has no projections of {prompt_set}")
    click.echo(f"{len(p)} projections: {sum(each <= LEVEL for each in p)} commit, {n_persist} persist")
    found = sorted(each for each in p if each <= LEVEL)
    click.echo(f"p of those that commit: {', '.join(f'{each:.4f}' for each in found) or 'none'}")
    click.echo(f"their place in the response, by quarters: {_quarters(quarters)}")
    share = np.mean(np.array(shuffled_p) <= LEVEL)
    click.echo(
        f"shuffled responses, {SHUFFLES} of each: {share:.1%} commit, {n_shuffled_persist / n_shuffled:.1%} persist; "
        f"places {_quarters(shuffled_quarters)}"
    )
    if random:
        n_random = sum(each.n_directions for each in random)
        commit, persist = (sum(getattr(each, name) for each in random) / n_random for name in ("commit", "persist"))
        click.echo(f"random directions on the same captures: {commit:.1%} commit, {persist:.1%} persist")
        click.echo(f"commit more clearly than 95 % of random directions: {n_clear}")


def _quarters(places: list[float]) -> str:
    counts, _ = np.histogram(places, bins=4, range=(0, 1))
    total = max(1, counts.sum())
    return " / ".join(f"{count / total:.0%}" for count in counts)


if __name__ == "__main__":
    main()
