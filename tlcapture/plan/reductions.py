"""Ways to write less than a workload does, as data: the options of a capture to change, and the bytes that remain.

for reduction in reductions(workload, measures, budget):
    reduction.changes, reduction.n_bytes, reduction.factor
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.models.sizes import Measures
from tlcapture.plan.cost import Workload, cost_of


@dataclass(frozen=True)
class Change:
    """Another value for one option of a capture.

    Attributes:
        option: a field of `CaptureOptions`.
        value: its new value; an empty one means that the option is left out.
    """

    option: str
    value: Any

    @property
    def leaves_out(self) -> bool:
        """Whether the option is left out, rather than passed."""
        return not self.value


Changes = tuple[Change, ...]


@dataclass(frozen=True)
class Reduction:
    """A way to write less.

    Attributes:
        changes: the options to change, together.
        n_bytes: bytes of all prompts after the changes.
        factor: those bytes as a share of the bytes before, between 0 and 1.
    """

    changes: Changes
    n_bytes: float
    factor: float


def reductions(workload: Workload, measures: Measures, budget: float) -> list[Reduction]:
    """Each change that saves bytes by itself, then as many of them together as a budget of bytes requires.

    Where layers are dropped, as many are kept as fit the budget.
    """
    before = cost_of(workload, measures).n_bytes
    found: dict[Changes, Reduction] = {}
    for changes in [*_single(workload, measures, budget), *_combined(workload, measures, budget)]:
        n_bytes = _bytes_with(workload, measures, changes)
        if n_bytes < before and changes not in found:
            found[changes] = Reduction(changes, n_bytes, n_bytes / before)
    return list(found.values())


def _bytes_with(workload: Workload, measures: Measures, changes: Sequence[Change]) -> float:
    options = replace(workload.options, **{change.option: change.value for change in changes})
    return cost_of(replace(workload, options=options), measures).n_bytes


def _smaller_outputs(options: CaptureOptions) -> Iterator[Change]:
    """Views to leave out, the largest first, then smaller forms of the residual stream."""
    if options.internals:
        yield Change("internals", ())
    if options.attention:
        yield Change("attention", False)
    if options.logit_lens:
        yield Change("logit_lens", False)
    if options.save_dtype == "float32" and not options.projections_only:
        yield Change("save_dtype", "bfloat16")
    if options.points != ("residual_out",):
        yield Change("points", ("residual_out",))


def _single(workload: Workload, measures: Measures, budget: float) -> Iterator[Changes]:
    for change in _smaller_outputs(workload.options):
        yield (change,)
    yield (_fewer_layers(workload, measures, budget, ()),)
    if _can_keep_projections_only(workload):
        # `capture` refuses the internals of layers without raw activations.
        internals = (Change("internals", ()),) if workload.options.internals else ()
        yield (*internals, _PROJECTIONS_ONLY)


def _combined(workload: Workload, measures: Measures, budget: float) -> Iterator[Changes]:
    changes: Changes = ()
    for change in _smaller_outputs(workload.options):
        if _bytes_with(workload, measures, changes) <= budget:
            break
        changes = (*changes, change)
    if _bytes_with(workload, measures, changes) <= budget:
        yield changes
        return
    yield (*changes, _fewer_layers(workload, measures, budget, changes))
    if _can_keep_projections_only(workload):
        yield (*(change for change in changes if change.leaves_out), _PROJECTIONS_ONLY)


_PROJECTIONS_ONLY = Change("projections_only", True)


def _can_keep_projections_only(workload: Workload) -> bool:
    return bool(workload.n_projections) and not workload.options.projections_only


def _fewer_layers(workload: Workload, measures: Measures, budget: float, changes: Changes) -> Change:
    """As many evenly spread layers as fit the budget after other changes, at least one."""
    layers = workload.options.layers or tuple(range(measures.n_layers))

    def spread(count: int) -> Change:
        return Change("layers", tuple(layers[(2 * n + 1) * len(layers) // (2 * count)] for n in range(count)))

    counts = range(len(layers), 1, -1)
    fitting = (n for n in counts if _bytes_with(workload, measures, (*changes, spread(n))) <= budget)
    return spread(next(fitting, 1))
