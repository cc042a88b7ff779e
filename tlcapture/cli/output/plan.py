"""How `tlcapture plan` shows an estimate: as tables and sentences, or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.output.tables import Column, echo_table
from tlcapture.text import format_bytes, printable

if TYPE_CHECKING:
    from tlcapture.models.sizes import Measures
    from tlcapture.plan.cost import Cost, Pace, Workload
    from tlcapture.plan.memory import Memory
    from tlcapture.plan.reductions import Change, Changes, Reduction

_HOUR = 3600
_OPTION_NAMES = {"internals": "layer-internals"}  # options that are not named like their field of CaptureOptions


@dataclass(frozen=True)
class Estimate:
    """A workload on a model, its cost, the pace if one is known, and ways to fit a budget if one is given."""

    model: str
    measures: Measures
    workload: Workload
    cost: Cost
    pace: Pace | None
    workers: int
    budget: int | None
    reductions: Sequence[Reduction]
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        """The estimate as an object for JSON."""
        content = {"model": self.model, "workers": self.workers, **self.cost.to_json()}
        content["memory_per_prompt"] = asdict(self.memory)
        content |= {} if self.workload.options.samples is None else {"samples": self.workload.options.samples}
        content["new_tokens"] = self.workload.n_new_tokens
        if self.pace is not None:
            content["tokens_per_second"] = self.pace.tokens_per_second
            content["pace"] = self.pace.source
            content["worker_hours"] = self._worker_hours(self.pace)
            content["hours"] = self._worker_hours(self.pace) / self.workers
        if self.budget is not None:
            content["budget"] = self.budget
            content["reductions"] = [
                {
                    "options": options_text(each.changes),
                    "bytes": round(each.n_bytes),
                    "fits": each.n_bytes <= self.budget,
                }
                for each in self.reductions
            ]
        return content

    def echo(self) -> None:
        """Print the estimate to standard output."""
        prompt_tokens, new_tokens = self.workload.prompt_tokens, self.workload.options.max_new_tokens
        click.echo(f"{printable(self.model)}: {self.measures.n_layers} layers, d_model {self.measures.d_model}")
        samples = self.workload.options.samples
        responses = f"{samples} responses of {new_tokens}" if samples else f"{new_tokens}"
        click.echo(f"{self.cost.n_prompts} prompts of {prompt_tokens} tokens, with {responses} new tokens each")
        click.echo()
        self._echo_cost()
        click.echo()
        self._echo_memory()
        self._echo_time()
        if self.budget is not None:
            click.echo()
            self._echo_budget(self.budget)

    def _echo_cost(self) -> None:
        cost = self.cost
        columns = [Column("view"), *(Column(name, right=True) for name in ("files", "per prompt", "total"))]
        rows = [
            (name, str(cost.n_prompts * view.files), format_bytes(view.each), format_bytes(cost.n_prompts * view.each))
            for name, view in cost.by_view.items()
        ]
        total = ("total", str(cost.n_files), format_bytes(cost.bytes_per_prompt), format_bytes(cost.n_bytes))
        echo_table(columns, [*rows, total])

    def _echo_memory(self) -> None:
        again = self.memory.replayed
        replayed = "" if again is None else f"; {format_bytes(again)} where --replay adds attention, layer by layer"
        click.echo(
            f"memory of one prompt at a time in {self.memory.dtype}, beside the weights: "
            f"{format_bytes(self.memory.prompt)}{replayed}"
        )

    def _echo_time(self) -> None:
        n_new = self.workload.n_new_tokens
        if self.pace is None:
            click.echo(f"{n_new} new tokens; to estimate the time, give --tokens-per-second, --measure or --gpu")
            return
        hours = self._worker_hours(self.pace)
        click.echo(f"{n_new} new tokens at {self.pace.tokens_per_second:.4g} per second ({self.pace.source})")
        on_workers = f", {_duration(hours / self.workers)} on {self.workers} workers" if self.workers > 1 else ""
        click.echo(f"{hours:.3g} worker-hours ({_duration(hours)}){on_workers}")

    def _worker_hours(self, pace: Pace) -> float:
        return pace.seconds(self.workload) / _HOUR

    def _echo_budget(self, budget: int) -> None:
        # The totals are compared as they are shown.
        if round(self.cost.n_bytes) <= budget:
            click.echo(f"budget {format_bytes(budget)}: it fits")
            return
        click.echo(f"budget {format_bytes(budget)}: it does not fit; ways to write less:")
        click.echo()
        columns = [Column("total", right=True), Column("share", right=True), Column("verdict"), Column("options")]
        rows = [
            (
                format_bytes(each.n_bytes),
                f"{each.factor:.0%}",
                "fits" if each.n_bytes <= budget else "does not fit",
                options_text(each.changes),
            )
            for each in self.reductions
        ]
        echo_table(columns, rows)


def options_text(changes: Changes) -> str:
    """Changes as options of `tlcapture capture`, for example `without --attention, --layers 8,16`."""
    return ", ".join(map(_option_text, changes))


def _option_text(change: Change) -> str:
    option = f"--{_OPTION_NAMES.get(change.option, change.option.replace('_', '-'))}"
    if change.leaves_out:
        return f"without {option}"
    if change.value is True:
        return option
    return f"{option} {','.join(map(str, change.value)) if isinstance(change.value, tuple) else change.value}"


def _duration(hours: float) -> str:
    if hours * _HOUR < 90:
        return f"{hours * _HOUR:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1.5 else f"{hours:.1f} h"
