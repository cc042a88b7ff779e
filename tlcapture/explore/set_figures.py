"""`captures["single_trait"].plot`: figures of a whole prompt set, from its projection files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlcapture.storage.layout import Layout
from tlcapture.traits.saved_projections import saved_projections

if TYPE_CHECKING:
    from tlcapture.explore.offline_figure import OfflineFigure


class SetFigures:
    """Figures of a prompt set."""

    def __init__(self, layout: Layout, prompt_set: str):
        self._layout = layout
        self.prompt_set = prompt_set

    def __repr__(self) -> str:
        return "figures: .trajectory(*traits)"

    def trajectory(self, *traits: str, component: str = "residual", calibrated: bool = True) -> OfflineFigure:
        """Mean trajectories over the prompts, one line per trait, and their spread: one standard deviation each way.

        Token 0 is the first of the response, so that responses begin together; a token is drawn where at least two
        prompts have it. All traits that the set is projected onto by default.

        Raises `InputError`, naming the command to run, if the set has no projections.
        """
        from tlcapture.explore.figures import mean_trajectory_figure

        found = saved_projections(self._layout, self.prompt_set, component=component, traits=traits or None)
        return mean_trajectory_figure(found, self.prompt_set, calibrated=calibrated)
