"""Plotly figures show the given numbers, exclude the attention sink from the scale, and load nothing."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import plotly.io as pio
import pytest

from tests.samples import HOSTILE, N_LAYERS, N_PROMPT, TOKENS, heads, predictions, projected
from tlcapture.errors import InputError
from tlcapture.explore.figures.drawing import attention_figure, layers_figure, lens_figure, trajectory_figure
from tlcapture.explore.figures.offline_figure import OfflineFigure, plotly_text
from tlcapture.explore.figures.static_figure import drawn
from tlcapture.traits.calibration import Calibration


def boundary(figure: OfflineFigure) -> float:
    """Position of the dashed vertical line."""
    (line,) = [shape for shape in figure.layout.shapes if shape.line.dash == "dash" and shape.x0 == shape.x1]
    return float(line.x0)


def test_a_trajectory_is_the_projection_at_the_vectors_layer_without_the_sink() -> None:
    figure = trajectory_figure([projected()])
    whole = figure.data[0]
    assert np.isnan(whole.y[0])
    assert whole.y[1:].tolist() == [21, 22, 23, 24, 25, 26, 27]  # token + 10 * layer 2
    assert "tone/loud (layer 2)" in whole.name
    assert "-5000" in figure.layout.annotations[0].text
    assert boundary(figure) == N_PROMPT - 0.5


def test_a_trajectory_marks_the_commitment_point_and_persistence() -> None:
    figure = trajectory_figure([projected(commitment_point=5, persistence=1)])
    _, span, diamond = figure.data
    assert (list(diamond.x), list(diamond.y)) == ([5], [25])
    assert list(span.x) == [7]  # the smoothed response peaks at its last token
    scores = projected().scores
    scores[1:, 2, -1] = [90, 80, 30, 8, 9, 3, -70]
    early = projected(scores=scores, commitment_point=None, persistence=3)
    _, span = trajectory_figure([early]).data  # no diamond
    assert list(span.x) == [3, 4, 5]
    (_,) = trajectory_figure([projected(commitment_point=None, persistence=None)]).data
    assert projected(definitions=1, persistence=2).peak is None  # its persistence counts from another peak


def test_trajectories_are_calibrated_where_all_vectors_have_a_scale() -> None:
    scale = Calibration(negative_mean=20.0, positive_mean=30.0)
    one, other = projected(calibration=scale), projected(calibration=Calibration(50.0, 0.0))
    both = trajectory_figure([one, other])
    lines = [trace for trace in both.data if trace.mode == "lines+markers" and len(trace.x) == len(one.tokens)]
    assert list(lines[0].y[1:]) == pytest.approx([(value - 20) / 10 for value in one.trajectory[1:]])
    assert list(lines[1].y[1:]) == pytest.approx([(50 - value) / 50 for value in one.trajectory[1:]])
    assert any(shape.y0 == shape.y1 == 0.5 for shape in both.layout.shapes)
    for raw in (trajectory_figure([one], calibrated=False), trajectory_figure([one, projected()])):
        assert list(raw.data[0].y[1:]) == list(one.trajectory[1:])


def test_there_is_one_line_per_trait_and_at_least_one_trait() -> None:
    figure = trajectory_figure([projected(), projected(trait="tone/warm", commitment_point=None)])
    assert {trace.legendgroup for trace in figure.data} == {"tone/loud (layer 2)", "tone/warm (layer 2)"}
    with pytest.raises(InputError, match="no trait to draw"):
        trajectory_figure([])


def test_the_layers_heatmap_is_symmetric_about_0_and_excludes_the_sink() -> None:
    figure = layers_figure(projected())
    (heatmap,) = figure.data
    assert np.isnan(heatmap.z[:, 0]).all()
    assert heatmap.z[3, 4] == 34  # layer 3, token 4
    assert (heatmap.zmin, heatmap.zmax) == (-37, 37)
    assert layers_figure(projected(), "after_attn").data[0].z[3, 4] == 33
    assert any(shape.y0 == shape.y1 == 2 for shape in figure.layout.shapes)  # the vector's own layer
    with pytest.raises(InputError, match=r"no point 'nix': the projection has residual_in, after_attn, residual_out"):
        layers_figure(projected(), "nix")


def test_the_lens_figure_has_one_cell_per_layer_and_prediction() -> None:
    (heatmap,) = lens_figure(predictions()).data
    assert heatmap.z.shape == (N_LAYERS, len(TOKENS) - 1)
    assert heatmap.z[:, 0] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert "rank 3, 0.05" in heatmap.customdata[0][0]
    assert "&lt;img" in heatmap.customdata[0][0]


def test_an_attention_figure_shows_one_head_and_nothing_above_the_diagonal() -> None:
    (heatmap,) = attention_figure(heads(), 0).data
    assert np.isnan(heatmap.z[np.triu_indices(len(TOKENS), 1)]).all()
    assert np.nansum(heatmap.z, axis=1) == pytest.approx(np.ones(len(TOKENS)))
    assert heatmap.z[3, 0] == pytest.approx(0.25)
    with pytest.raises(InputError, match="no head 2"):
        attention_figure(heads(), 2)


def test_a_capture_of_one_token_can_be_plotted() -> None:
    one = projected(
        tokens=["a"], n_prompt_tokens=1, scores=projected().scores[:1], commitment_point=None, persistence=0
    )
    assert len(trajectory_figure([one]).data) == 1
    assert layers_figure(one).data[0].zmax == 1


def test_tokens_are_escaped_for_plotly() -> None:
    assert plotly_text("<b>$x$ & y</b>") == "&lt;b&gt;&#36;x&#36; &amp; y&lt;/b&gt;"
    for figure in (trajectory_figure([projected()]), layers_figure(projected()), attention_figure(heads(), 0)):
        assert not any("<" in text or "$" in text for text in figure.layout.xaxis.ticktext)
    assert plotly_text(HOSTILE) in trajectory_figure([projected()]).layout.xaxis.ticktext
    hostile = replace(projected(), prompt_id="<b>")
    assert "<b>" not in trajectory_figure([hostile]).layout.title.text


def test_the_html_of_a_figure_loads_nothing() -> None:
    html = trajectory_figure([projected()])._repr_html_()
    assert not re.search(r"""<(script|link|img)[^>]*(src|href)=["']?https?:""", html)
    assert "mathjax/" not in html.lower().replace("mathjaxconfig", "")
    assert html == html.replace("cdnjs", "")


def test_a_figure_in_a_terminal_is_one_line_and_opens_no_browser(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import plotly.io as pio

    monkeypatch.setattr("webbrowser.open", lambda url: pytest.fail("opened"))
    monkeypatch.setattr(pio.renderers, "default", "browser")
    trajectory_figure([projected()])._ipython_display_()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "short/1" in out


def test_show_opens_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    import plotly.io as pio

    opened: list[str] = []
    monkeypatch.setattr(pio.renderers, "default", "browser")
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)) or True)
    trajectory_figure([projected()]).show()
    assert opened[0].startswith("file:///")
    assert opened[0].endswith(".html")


@pytest.mark.parametrize(
    ("renderer", "kind"), [("plotly_mimetype", "application/vnd.plotly.v1+json"), ("notebook", "text/html")]
)
def test_a_notebook_gets_the_figure_in_the_format_it_supports(
    monkeypatch: pytest.MonkeyPatch, renderer: str, kind: str
) -> None:
    import plotly.io as pio

    shown: list[dict[str, object]] = []
    monkeypatch.setattr(pio.renderers, "default", renderer)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    trajectory_figure([projected()])._ipython_display_()
    trajectory_figure([projected()]).show()
    assert [set(bundle) for bundle in shown] == [{kind, "image/png", "text/plain"}] * 2


@pytest.mark.parametrize("n_tokens", [20, 96, 250])
def test_labels_of_a_saved_picture_do_not_overlap_and_up_to_100_tokens_all_have_one(n_tokens: int) -> None:
    tokens = [f" token{number}" * (1 + number % 3) for number in range(n_tokens)]
    scores = np.random.default_rng(0).normal(size=(n_tokens, N_LAYERS, 3))
    ten = [projected(trait=f"tone/number{n}", tokens=tokens, scores=scores, n_prompt_tokens=9) for n in range(10)]
    canvas = drawn(trajectory_figure(ten))
    canvas.draw_without_rendering()
    (axis,) = canvas.axes
    places = [label.get_window_extent() for label in axis.get_xticklabels()]
    assert len(places) == n_tokens or n_tokens > 100
    assert all(one.x1 <= next_.x0 + 0.5 for one, next_ in pairwise(places))
    legend = canvas.legends[0].get_window_extent()
    assert legend.y1 <= min(place.y0 for place in places)
    assert legend.y0 >= 0


@pytest.mark.parametrize(("renderer", "drawn_by"), [("plotly_mimetype", None), ("notebook", "text/html")])
def test_a_notebook_stores_a_picture_beside_what_its_front_end_draws(
    monkeypatch: pytest.MonkeyPatch, renderer: str, drawn_by: str | None
) -> None:
    """nbconvert and GitHub, which run no scripts, show the richest form that they know: the PNG."""
    stored: list[dict[str, str]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: stored.append(data))
    monkeypatch.setattr(pio.renderers, "default", renderer)
    trajectory_figure([projected()])._ipython_display_()
    (data,) = stored
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert {*data} - {"image/png", "text/plain"} == {drawn_by or "application/vnd.plotly.v1+json"}


def test_a_figure_says_what_its_marks_mean_and_no_others() -> None:
    texts = [
        " ".join(note.text for note in trajectory_figure([projected(**changes)]).layout.annotations)
        for changes in ({"persistence": None}, {"commitment_point": None, "persistence": 2})
    ]
    assert "diamond: commits" in texts[0] and "thick" not in texts[0]
    assert "diamond" not in texts[1] and "thick: persists from the peak" in texts[1]
    assert all("dashed: the response begins" in text for text in texts)
    (note,) = layers_figure(projected(commitment_point=None)).layout.annotations
    assert "commitment" not in note.text and "the vector's own layer, 2" in note.text


def test_a_picture_of_the_lens_has_the_tokens_in_its_cells() -> None:
    canvas = drawn(lens_figure(predictions()))
    cells = [text.get_text() for text in canvas.axes[0].texts]
    assert cells.count("<img src"[:8]) == predictions().n_layers * predictions().n_predictions


def test_a_picture_of_the_lens_may_have_no_prediction() -> None:
    """Nothing follows the last token, which `tokens="last"` keeps alone."""
    of_last = replace(
        predictions(),
        positions=[len(TOKENS) - 1],
        top_tokens=[[]] * N_LAYERS,
        top_probs=np.empty((N_LAYERS, 0, 2)),
        actual_rank=np.empty((N_LAYERS, 0), int),
        actual_prob=np.empty((N_LAYERS, 0)),
    )
    assert "logit lens" in drawn(lens_figure(of_last)).axes[0].get_title(loc="left")
