"""Pictures from projection files: valid PNG files, one per prompt and trait, drawn without torch."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.conftest import unrendered_figures
from tests.samples import TOKENS, projected
from tests.test_projection_frames import write
from tlcapture.commands import plots
from tlcapture.commands.pictures import write_pictures
from tlcapture.commands.plots import PERSISTS, evaluation_heatmaps, projection_picture, steering_curves
from tlcapture.errors import InputError, StorageError
from tlcapture.explore.figures.drawing import trajectory_figure
from tlcapture.names import Trait
from tlcapture.page.assets import STATIC
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.evaluation_files import EvaluationRow
from tlcapture.traits.steering_files import SteeringResults


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout(tmp_path, "exp")
    for prompt_id in ("1", "2.5"):
        write(found, "tone/loud", prompt_id)
    write(found, "tone/warm", "1")
    return found


def colours(data: bytes) -> int:
    """The number of different colours in a PNG."""
    image = matplotlib.image.imread(io.BytesIO(data), format="png")
    assert image.shape[0] > 300
    assert image.shape[1] > 600
    levels = (image[..., :3] * 255).round().astype(np.int64)
    return len(np.unique(levels @ np.array([1 << 16, 1 << 8, 1])))


def test_a_picture_is_a_png_named_by_all_that_it_shows(layout: Layout, tmp_path: Path) -> None:
    paths = write_pictures(layout, "short", ["1", "2.5"], tmp_path / "out")
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in paths) == [
        "tone/loud/residual_stream/short/exp_tone_loud_short_1.png",
        "tone/loud/residual_stream/short/exp_tone_loud_short_2.5.png",
        "tone/warm/residual_stream/short/exp_tone_warm_short_1.png",
    ]
    assert colours(paths[0].read_bytes()) > 50


def test_no_two_pictures_have_the_same_name(layout: Layout, tmp_path: Path) -> None:
    other = Layout(tmp_path, "other")
    for prompt_id in ("1", "1.s1"):
        write(other, "tone/loud", prompt_id)
        write(other, "style/loud", prompt_id)
    out = tmp_path / "out"
    with unrendered_figures():
        paths = [
            path
            for each, ids in ((layout, ["1", "2.5"]), (other, ["1", "1.s1"]))
            for path in write_pictures(each, "short", ids, out)
        ]
    assert len({path.name for path in paths}) == len(paths) == 7
    assert len(list(out.rglob("*.png"))) == 7


def test_a_picture_of_the_longest_names_is_written(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "e" * 128)
    write(layout, f"{'c' * 60}/{'t' * 100}", "1" * 120)
    with unrendered_figures():
        (path,) = write_pictures(layout, "short", ["1" * 120], tmp_path / "out")
    assert path.is_file() and path.stem == "1" * 120


def test_heat_maps_of_an_evaluation_have_axes_for_each_component_even_where_no_effect_size_is_defined() -> None:
    effects = {"residual": [None] * 4, "attn_out": [None, 0.5, -1.0, 2.0]}
    rows = [
        EvaluationRow(trait="tone/loud", method=method, layer=layer, component=component, val_effect_size=effect,
                      val_auroc=None if layer == 2 else 0.5 + layer / 10)
        for component in effects for method in ("probe", "mean_$") for layer, effect in enumerate(effects[component])
    ]  # fmt: skip
    one, both = (
        matplotlib.image.imread(io.BytesIO(evaluation_heatmaps("tone/loud", rows[:n])), format="png") for n in (8, 16)
    )
    assert both.shape[0] > 1.4 * one.shape[0]
    assert len(np.unique(one)) > 50


def test_curves_of_steering_have_a_line_for_each_layer_and_bars_where_there_are_random_vectors() -> None:
    runs = [
        {"config": {"layers": [layer], "methods": ["probe"], "coefficients": [coefficient]},
         "result": {"trait_mean": 50 + 9 * layer * coefficient, "coherence_mean": 90.0}}
        for layer in (1, 2) for coefficient in (0.5, 1.0)
    ]  # fmt: skip
    pictures = []
    for null in (None, [-3.0, 4.0]):
        runs[0]["result"]["null"] = null  # type: ignore[index]
        for n in (2, 4):
            content = {"baseline": {"trait_mean": 40.0, "coherence_mean": 100.0}, "runs": runs[:n]}
            pictures.append(steering_curves("tone/loud", SteeringResults.parse(content, Path("results.json"))))
    assert len({colours(each) for each in pictures}) > 1
    assert len(set(pictures)) == 4


def test_only_the_traits_and_prompts_asked_for_are_drawn(layout: Layout, tmp_path: Path) -> None:
    with unrendered_figures():
        paths = write_pictures(layout, "short", ["1"], tmp_path / "out", traits=[Trait("tone", "warm")])
    assert [path.parts[-4] for path in paths] == ["warm"]


def test_without_projections_the_error_names_the_command(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no attn_out projections of prompt set 'short'.*run 'tlcapture project"):
        write_pictures(layout, "short", ["1"], tmp_path / "out", component="attn_out")
    with pytest.raises(InputError, match="no component 'mlp'"):
        write_pictures(layout, "short", ["1"], tmp_path / "out", component="mlp")
    assert not (tmp_path / "out").exists()


def test_a_damaged_projection_is_named(layout: Layout, tmp_path: Path) -> None:
    path = write(layout, "tone/loud", "1", {"prompt": 1})
    with unrendered_figures(), pytest.raises(StorageError, match=str(path)):
        write_pictures(layout, "short", ["1"], tmp_path / "out")


def test_the_sink_changes_only_its_label() -> None:
    """Another sink, whose value is printed as wide, leaves the lower nine tenths of the picture unchanged."""
    line = projected()
    far = line.scores.copy()
    far[0] *= 1.8
    images = [
        matplotlib.image.imread(io.BytesIO(projection_picture(each)), format="png")
        for each in (line, projected(scores=far))
    ]
    height = images[0].shape[0]
    assert images[0].shape == images[1].shape
    assert (images[0][height // 10 :] == images[1][height // 10 :]).all()
    assert (images[0] != images[1]).any()


def test_persistence_is_marked_and_named_alike_in_all_figures() -> None:
    line = projected(commitment_point=None, persistence=1)
    axis = Figure().subplots()
    plots._draw_trajectory(axis, line)
    (whole, *_), (thick,) = axis.lines, [each for each in axis.lines if str(each.get_label()).startswith(PERSISTS)]
    assert thick.get_label() == f"{PERSISTS}: 1 token from token 7"
    (drawn, marked) = trajectory_figure([line]).data
    assert list(thick.get_xdata()) == list(marked.x)
    assert (thick.get_color(), thick.get_linewidth(), thick.get_alpha()) == (whole.get_color(), 5, marked.opacity)
    assert (marked.line.color, marked.line.width) == (drawn.line.color, 5)
    assert PERSISTS in (STATIC / "dynamics.js").read_text()


def test_tokens_of_any_script_and_formulas_are_drawn_as_they_are() -> None:
    odd = ["<bos>", "$\\frac{", "\u6f22", "\U0001f600", "\u202e", "\n", "_^", "$"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colours(projection_picture(projected(tokens=odd))) > 50


def test_long_captures_and_captures_of_one_token_are_drawn() -> None:
    line = projected()
    many = projected(
        tokens=TOKENS * 60, scores=np.tile(line.scores, (60, 1, 1)), n_prompt_tokens=100, commitment_point=None
    )
    assert colours(projection_picture(many)) > 50
    one = projected(tokens=["a"], n_prompt_tokens=1, scores=line.scores[:1], commitment_point=None)
    assert colours(projection_picture(one)) > 2


def test_pictures_load_no_torch(layout: Layout, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tlcapture.storage.experiments.layout import Layout\n"
        "from tlcapture.commands.pictures import write_pictures\n"
        f"root = Path({str(tmp_path)!r})\n"
        "write_pictures(Layout(root, 'exp'), 'short', ['2.5'], root / 'out')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
