"""`tlcapture compare`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlcapture.cli.command import command
from tlcapture.cli.options import completion
from tlcapture.cli.options.cluster import ClusterOptions
from tlcapture.cli.options.grouping import option, options_of, shared
from tlcapture.cli.options.shared import Location, VectorOptions, root_option
from tlcapture.cli.options.types import PromptSets, Traits
from tlcapture.cli.output.console import Console
from tlcapture.cli.output.tables import Column
from tlcapture.cli.work import working
from tlcapture.names import Trait
from tlcapture.text import counted

if TYPE_CHECKING:
    from tlcapture.commands.comparing.summary import ComparisonSummary


@dataclass(frozen=True)
class _Settings:
    """The options of `compare`."""

    a: str = shared(click.argument("a", metavar="A", shell_complete=completion.experiments))
    b: str = shared(click.argument("b", metavar="B", shell_complete=completion.experiments))
    root: Path = shared(root_option)
    prompt_set: tuple[str, ...] | None = option(
        "--prompt-set", type=PromptSets(), help="Only these prompt sets of A, comma-separated."
    )
    traits: tuple[Trait, ...] = option(
        "--traits", type=Traits(), default="all", show_default=True, help="Traits to compare projections onto."
    )
    vectors_of: str | None = option(
        "--vectors",
        "vectors_of",
        type=click.Choice(["a", "b", "own"]),
        help="Whose vectors to project both onto; own: each onto its own.  "
        "[default: A's, or B's, or the packaged ones]",
    )
    vectors: VectorOptions = shared(VectorOptions)
    no_kl: bool = option("--no-kl", is_flag=True, help="Leave out the next-token distributions; no model is loaded.")
    device: str = option(
        "--device",
        default="auto",
        show_default=True,
        help="Device for those distributions: cuda, mps or cpu; auto: the first available.",
    )
    skip_existing: bool = option("--skip-existing", is_flag=True, help="Write only missing and outdated files.")
    overwrite: bool = option("--overwrite", is_flag=True, help="Also replace files that cannot be read.")


@command(
    "tlcapture compare my_exp/single_trait my_exp/single_trait@refusing",
    "tlcapture compare my_exp/single_trait my_exp/single_trait@refusing --traits style/formality --no-kl",
)
@options_of(_Settings, "settings")
@options_of(ClusterOptions, "cluster")
@working
def compare(console: Console, settings: _Settings, cluster: ClusterOptions) -> None:
    """Compare captures B with captures A of the same prompts, token by token.

    Prompts are matched by id, and refused if their texts differ.

    A and B are EXPERIMENT, EXPERIMENT/SET or EXPERIMENT/SET@VARIANT. Compares projections (B minus A), residuals
    (cosine and norm ratio by layer), and next-token distributions (KL of A from B, in nats). Writes
    experiments/A/analysis/compare.
    """
    from tlcapture.commands.comparing.compared_sets import CaptureSet, compared_sets

    a, b = (CaptureSet.parse(settings.root, text) for text in (settings.a, settings.b))
    sets = compared_sets(a, b, settings.prompt_set or ())
    from tlcapture.commands.compare import CompareOptions, run_compare

    options = CompareOptions(
        settings.vectors.choice("auto", settings.traits),
        vectors=settings.vectors_of,
        kl=not settings.no_kl,
        device=settings.device,
        skip_existing=settings.skip_existing,
        overwrite=settings.overwrite,
    )
    executor = cluster.make_executor(can_collect=False)
    report = run_compare(sets, options, console, executor)
    if report.failures and not report.n_files:
        return
    from tlcapture.commands.comparing.summary import SavedComparisons

    found = [SavedComparisons(each.a.layout, each.other, each.a.name or "").summary() for each in sets]
    summaries = [each for each in found if each.n_files]
    console.uses(comparisons=[each.to_json() for each in summaries])
    for summary in summaries:
        _show(console, summary)
        for line in _doubts(settings.root, summary):
            console.line(line)
    for each in found:
        if each.left_out is not None:
            console.line(each.left_out)
    console.next = Location(a.layout.experiment, settings.root).command("view")


def _show(console: Console, summary: ComparisonSummary) -> None:
    console.line()
    samples = "" if summary.n_files == summary.n_prompts else f", {counted(summary.n_files, 'sample')}"
    console.line(f"{summary.b} less {summary.a}, {counted(summary.n_prompts, 'prompt')}{samples}")
    if summary.traits:
        columns = [
            Column("trait"),
            Column("change", right=True),
            Column("95 % interval", right=True),
            Column("p", right=True),
            Column(),
        ]
        console.table(columns, [_row(trait, summary) for trait in summary.traits])
    for line in _notes(summary):
        console.line(line)


def _doubts(root: Path, summary: ComparisonSummary) -> Iterator[str]:
    """The doubts about the traits that stand out."""
    from tlcapture.traits.verdicts import Doubts

    shown = {trait for trait, change in summary.traits.items() if change.stands_out}
    yield from Doubts(root).lines(each for each in summary.vectors if each.trait in shown)


def _row(trait: str, summary: ComparisonSummary) -> tuple[str, ...]:
    found = summary.traits[trait]
    if not found.n:
        return trait, "unknown", "", "", ""
    interval = "" if found.low is None or found.high is None else f"{found.low:+.3g} to {found.high:+.3g}"
    p = "" if found.p is None else f"{found.p:.3f}"
    return trait, f"{found.mean:+.3g}", interval, p, "stands out" if found.stands_out else "within chance"


def _notes(summary: ComparisonSummary) -> Iterator[str]:
    from tlcapture.comparison.paired import LEVEL, smallest_p

    if summary.traits:
        n_traits = len(summary.traits)
        corrected = f", corrected for the {n_traits} traits, as intervals are" if n_traits > 1 else ""
        yield (
            "change: of the mean projection over the response; p: the largest of sign flips over prompts, a t test of "
            f"the mean and random directions{corrected}"
        )
        if smallest_p(summary.n_prompts) > LEVEL:
            n_prompts = counted(summary.n_prompts, "prompt")
            yield f"no change can stand out from chance with {n_prompts}: expected at least 6"
    n_apart = summary.n_apart
    over = "the responses" if n_apart < summary.n_files else "the tokens of the prompts that captures share"
    if summary.kl is not None:
        interval = summary.kl.interval
        bounds = "" if interval is None else f" ({interval[0]:.3g} to {interval[1]:.3g})"
        yield f"next token: D(a || b) of {summary.kl.mean:.3g} nats{bounds}, mean over {over}"
    layer = summary.least_alike
    if layer is not None and summary.is_alike:
        yield f"residual: the same in every layer, over {over}"
    elif layer is not None:
        yield (
            f"residual: cosine {summary.cosine[layer]:.6g} at layer {layer}, where it is lowest; norm ratio "
            f"{summary.norm_ratio[layer]:.4g} there; means over {over}"
        )
    if summary.tokens:
        listed = ", ".join(f"{each.token!r} ({each.prompt_id}, token {each.index})" for each in summary.tokens)
        yield f"tokens that differ most: {listed}"
    if summary.n_cut:
        cut = f"{summary.n_cut} of {summary.n_files} pairs of captures differ from some token on"
        yield f"{cut}: token by token, only their beginnings are compared"
    if n_apart:
        pairs = f"{n_apart} of {summary.n_files} pairs share no token of the response"
        yield f"{pairs}: what is said of them by token is of their prompts"
    yield from (f"not read: {problem}" for problem in summary.problems)
