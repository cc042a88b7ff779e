"""Options for interventions: `--steer`, `--ablate` and `--cap`, in the order in which they are given."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import click

from tlcapture.cli.command import Command
from tlcapture.cli.options.grouping import option
from tlcapture.cli.options.types import Intervention
from tlcapture.traits.interventions.requested import Ablate, Cap, Steer, TraitIntervention

_ORDER = "tlcapture.order"  # names of the options as they were given, each as often as it was


class InOrder(Command):
    """A command that notes in which order its options were given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as other commands do; the order goes to `ctx.meta`."""
        given = self.make_parser(ctx).parse_args(args=list(args))[2]
        ctx.meta[_ORDER] = [each.name for each in given]
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class InterventionOptions:
    """The interventions while the model generates, and the name of the variant."""

    steer: tuple[Steer, ...] = option(
        "--steer",
        type=Intervention(Steer),
        multiple=True,
        help="Add a trait's vector, COEFFICIENT times as long as the residual stream typically is, from the last "
        "prompt token on. LAYERS: such as 16 or 0,2,5-8; all; auto, the selected one. WHERE: only the prompt, "
        "response, thinking, or first=N tokens of the response. Repeatable.",
    )
    ablate: tuple[Ablate, ...] = option(
        "--ablate",
        type=Intervention(Ablate),
        multiple=True,
        help="Remove what lies along a trait's vector, at all tokens, or at those of WHERE. Repeatable.",
    )
    cap: tuple[Cap, ...] = option(
        "--cap",
        type=Intervention(Cap),
        multiple=True,
        help="Keep the projection onto a trait's vector at or below VALUE, at all tokens, or at those of WHERE. "
        "Repeatable.",
    )
    variant: str | None = option(
        "--variant",
        metavar="NAME",
        help="Keep these captures as a variant of their prompt set, SET@NAME.  [default: a name made from the "
        "interventions, if there are any]",
    )

    @property
    def are_given(self) -> bool:
        """Whether there are any interventions."""
        return bool(self.steer or self.ablate or self.cap)

    def in_order(self) -> tuple[TraitIntervention, ...]:
        """All interventions, in the order in which they were given; then those of `tlcapture.toml`, kind by kind."""
        kinds = {name: iter(getattr(self, name)) for name in ("steer", "ablate", "cap")}
        order: list[str] = click.get_current_context().meta[_ORDER]
        given = [next(kinds[name]) for name in order if name in kinds]
        return (*given, *chain.from_iterable(kinds.values()))
