"""`cap.plot`: Plotly figures of one capture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

from tlcapture.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from tlcapture.explore.explorable_capture import ExplorableCapture
    from tlcapture.explore.figures.offline_figure import OfflineFigure


class CaptureFigures:
    """Plotly figures of a capture.

        cap.plot.trajectory("behavioral/refusal", "style/formality")

    `how` are the options of `cap.project`: layer, method, component, vector_experiment.
    """

    def __init__(self, capture: ExplorableCapture):
        self._capture = capture

    def __repr__(self) -> str:
        return (
            "figures: .trajectory(*traits), .layers(trait), .logit_lens(), .attention(layer, head), "
            ".attention_matrix(layer), .attention_heads(measure)"
        )

    def trajectory(self, *traits: str | Tensor, calibrated: bool = True, **how: Any) -> OfflineFigure:
        """Trajectories over the tokens, one line per trait; all traits with vectors if none is named.

        Where all vectors have a calibration, the negative examples are at 0 and the positive ones at 1;
        `calibrated=False` draws raw projections. Your own direction `[d_model]` can take the place of a trait:

            cap.plot.trajectory("behavioral/refusal", direction, layer=12)
        """
        from tlcapture.explore.figures.drawing import trajectory_figure

        return trajectory_figure(self._capture.projected(*traits, **how), calibrated=calibrated)

    def layers(self, trait: str | Tensor, point: str | None = None, **how: Any) -> OfflineFigure:
        """A heatmap, layers by tokens, of the projection onto a trait's vector.

            cap.plot.layers("behavioral/refusal")

        Args:
            point: a residual point; `residual_out` by default.
            how: the options of `project`; `layer` is the layer of the vector.

        Raises `InputError` for several layers.
        """
        from tlcapture.explore.figures.drawing import layers_figure

        found = self._capture.projected(trait, **how)
        if len(found) > 1:
            raise InputError("a heatmap shows one vector over all layers: give one layer, layer=12")
        return layers_figure(found[0], point)

    def logit_lens(self) -> OfflineFigure:
        """A heatmap, layers by tokens, of the most likely next token and its probability.

        Example:
            cap.plot.logit_lens().save("lens.png")
        """
        from tlcapture.explore.figures.drawing import lens_figure

        return lens_figure(self._capture.logit_lens())

    def attention(self, layer: SupportsIndex, head: SupportsIndex) -> OfflineFigure:
        """One head's attention pattern. Raises `InputError` if the layer or the head does not exist.

        Example:
            cap.plot.attention(12, 0)
        """
        from tlcapture.explore.figures.drawing import attention_figure

        return attention_figure(self._capture.attention(layer), head)

    def attention_matrix(self, layer: SupportsIndex, head: SupportsIndex | None = None) -> OfflineFigure:
        """The weights of all queries on all keys, in one head or in the mean over the heads of a layer.

            cap.plot.attention_matrix(12)

        Raises `InputError` if the layer or the head does not exist.
        """
        from tlcapture.explore.figures.drawing import attention_figure

        return attention_figure(self._capture.attention(layer), head)

    def attention_heads(self, measure: str = "entropy") -> OfflineFigure:
        """What each head attends to on average over the response, layers by heads: the numbers of `cap.head_summary()`.

            cap.plot.attention_heads("previous")

        Args:
            measure: `entropy` in nats, `distance` looked back in tokens, or the weight on the `first` token, on the
                `previous` one, or on it`self`.

        Raises `InputError` for another measure, and without stored or captured attention.
        """
        from tlcapture.explore.figures.head_figures import heads_figure

        return heads_figure(self._capture, measure)
