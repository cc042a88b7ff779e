"""`captures["single_trait"].plot`: figures of a whole prompt set, from its projection files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tlcapture.explore.doubts import noted, tell_of_vectors
from tlcapture.explore.figures.set_means import SetLine
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.projections.saved import scores_of_set
from tlcapture.traits.verdicts import UsedVector

if TYPE_CHECKING:
    from tlcapture.explore.figures.offline_figure import OfflineFigure


class SetFigures:
    """Figures of a prompt set.

    Example:
        exp.captures["single_trait"].plot.trajectory("behavioral/refusal")
    """

    def __init__(self, layout: Layout, prompt_set: str):
        self._layout = layout
        self.prompt_set = prompt_set

    def __repr__(self) -> str:
        return "figures: .trajectory(*traits)"

    def trajectory(
        self,
        *traits: str,
        beside: str | Sequence[str] = (),
        component: str = "residual",
        calibrated: bool = True,
    ) -> OfflineFigure:
        """Mean trajectories over the responses, one line per trait, and their spread: one standard deviation each way.

            captures.plot.trajectory("behavioral/refusal", beside="single_trait@formal")

        Token 0 is the first of the response, so that responses begin together; a token is drawn where at least two
        responses have it. By default, all traits that the set is projected onto.

        Args:
            traits: names of traits, `category/name`.
            beside: other prompt sets of the experiment, or variants such as `single_trait@steered`, drawn dashed.

        Raises `InputError`, naming the command to run, if a set has no projections.
        """
        from tlcapture.explore.figures.drawing import mean_trajectory_figure

        names = [self.prompt_set, *([beside] if isinstance(beside, str) else beside)]
        vectors: dict[UsedVector, None] = {}
        found = {}
        for name in names:
            projections = scores_of_set(self._layout, name, component=component, traits=traits or None)
            found[name] = [*map(SetLine.of, noted(projections, vectors))]
        tell_of_vectors(self._layout.root, vectors)
        return mean_trajectory_figure(found, calibrated=calibrated)
