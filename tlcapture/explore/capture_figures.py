"""Figures of one capture: what `cap.plot` offers. Each returns a Plotly figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

if TYPE_CHECKING:
    from tlcapture.explore.explorable_capture import ExplorableCapture
    from tlcapture.explore.offline_figure import OfflineFigure


class CaptureFigures:
    """The figures of a capture. `how` stands for the options of `cap.project`: layer, method, component,
    vector_experiment."""

    def __init__(self, capture: ExplorableCapture):
        self._capture = capture

    def __repr__(self) -> str:
        return ".plot has .trajectory(*traits), .layers(trait), .logit_lens(), .attention(layer, head)"

    def trajectory(self, *traits: str, **how: Any) -> OfflineFigure:
        """Trajectories over the tokens, one line a trait; of all traits with vectors where none is named."""
        from tlcapture.explore.figures import trajectory_figure

        return trajectory_figure(self._capture.projected(*traits, **how))

    def layers(self, trait: str, point: str | None = None, **how: Any) -> OfflineFigure:
        """A heatmap, layer by token, of the projection onto a trait's vector, at a residual point
        (`residual_out` unless given)."""
        from tlcapture.explore.figures import layers_figure

        return layers_figure(self._capture.projected(trait, **how)[0], point)

    def logit_lens(self) -> OfflineFigure:
        """What each layer would predict behind each token, coloured by its probability."""
        from tlcapture.explore.figures import lens_figure

        return lens_figure(self._capture.logit_lens())

    def attention(self, layer: SupportsIndex, head: SupportsIndex) -> OfflineFigure:
        """One head's pattern, token by token. Raises `InputError` for a layer or head there is not."""
        from tlcapture.explore.figures import attention_figure

        return attention_figure(self._capture.attention(layer), head)
