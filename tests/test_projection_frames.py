"""Tidy frames: one row per prompt, token, trait and layer, with the scores of the projection files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.samples import N_LAYERS, N_PROMPT, POINTS, TOKENS, projected
from tlcapture import Experiment
from tlcapture.errors import InputError, StorageError
from tlcapture.explore.projection_frames import COLUMNS, tidy_frame
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.projections.token_scores import TokenScores


def content(trait: str = "tone/loud", prompt_id: str = "1", **changes: Any) -> dict[str, Any]:
    """A projection file with the numbers of `projected()`."""
    scores = projected().scores.tolist()
    return {
        "prompt": {"text": "", "tokens": TOKENS[:N_PROMPT], "n_tokens": N_PROMPT},
        "response": {"text": "", "tokens": TOKENS[N_PROMPT:], "n_tokens": len(TOKENS) - N_PROMPT},
        "projections": {"prompt": scores[:N_PROMPT], "response": scores[N_PROMPT:]},
        "dynamics": {"commitment_point": 5, "peak_velocity": 1, "persistence": 0},
        "metadata": {
            "prompt_set": "short",
            "prompt_id": prompt_id,
            "vector_source": {"trait": trait, "method": "probe", "layer": 2, "component": "residual"},
            "sublayers": POINTS,
        },
        **changes,
    }


def write(layout: Layout, trait: str, prompt_id: str, value: Any = None) -> Path:
    """A projection file, and an empty file in place of the capture."""
    raw = layout.residual("short", prompt_id)
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.write_bytes(b"")
    path = layout.projection(Trait.parse(trait), "residual", "short", prompt_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content(trait, prompt_id) if value is None else value))
    return path


@pytest.fixture
def exp(tmp_path: Path) -> Experiment:
    """Two prompts, `2` and `10`, on two traits."""
    layout = Layout(tmp_path, "exp")
    for prompt_id in ("2", "10"):
        for trait in ("tone/loud", "tone/warm"):
            write(layout, trait, prompt_id)
    return Experiment("exp", tmp_path)


def test_a_frame_has_one_row_per_token_at_the_vectors_own_layer() -> None:
    found = tidy_frame([projected()])
    assert tuple(found.columns) == COLUMNS
    assert found.token_idx.tolist() == list(range(len(TOKENS)))
    assert found.token.tolist() == TOKENS
    assert found.part.tolist() == ["prompt"] * N_PROMPT + ["response"] * (len(TOKENS) - N_PROMPT)
    assert set(found.layer) == {2}
    assert found.score.tolist()[1:] == [21, 22, 23, 24, 25, 26, 27]
    assert [str(found[name].dtype) for name in ("token_idx", "layer", "score")] == ["int64", "int64", "float64"]


def test_layers_can_be_all_one_or_several() -> None:
    assert len(tidy_frame([projected()], "all")) == N_LAYERS * len(TOKENS)
    several = tidy_frame([projected()], [0, 3])
    assert several[several.token_idx == 4].score.tolist() == [4, 34]
    assert tidy_frame([projected()], 3).score.tolist()[1] == 31
    with pytest.raises(InputError, match="no layer 4: the projection has layers 0 to 3"):
        tidy_frame([projected()], 4)
    with pytest.raises(InputError, match="expected 'own', 'all'"):
        tidy_frame([projected()], "every")


def test_an_empty_frame_has_columns_and_dtypes() -> None:
    found = tidy_frame([])
    assert tuple(found.columns) == COLUMNS
    assert str(found.score.dtype) == "float64"


def test_an_experiments_frame_holds_all_prompts_and_traits_in_order(exp: Experiment) -> None:
    found = exp.to_pandas("short")
    assert len(found) == 2 * 2 * len(TOKENS)
    assert list(dict.fromkeys(zip(found.prompt_id, found.trait, strict=True))) == [
        ("2", "tone/loud"), ("2", "tone/warm"), ("10", "tone/loud"), ("10", "tone/warm"),
    ]  # fmt: skip
    assert set(exp.to_pandas("short", traits="tone/warm").trait) == {"tone/warm"}
    keys = ["prompt_id", "token_idx", "trait", "layer"]
    assert not exp.to_pandas("short", layers="all").duplicated(keys).any()


def test_the_error_for_missing_projections_names_the_command(exp: Experiment) -> None:
    with pytest.raises(
        InputError, match=r"no captures of prompt set 'nix'.*run 'tlcapture capture .*--prompt-set nix'"
    ):
        exp.to_pandas("nix")
    with pytest.raises(InputError, match=r"onto a/b; available traits: tone/loud, tone/warm; run 'tlcapture project"):
        exp.to_pandas("short", traits=["tone/loud", "a/b"])
    with pytest.raises(
        InputError, match=r"no attn_out projections.*available traits: none; run .* --component attn_out'"
    ):
        exp.to_pandas("short", component="attn_out")
    with pytest.raises(InputError, match="no component 'mlp'"):
        exp.to_pandas("short", component="mlp")


def test_a_warning_lists_captures_without_projections(exp: Experiment) -> None:
    exp.layout.residual("short", "11").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 of 3 captures of 'short' have no projection and are left out: 11"):
        exp.to_pandas("short")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exp.layout.residual("short", "11").unlink()
        exp.to_pandas("short")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": {"tokens": TOKENS[:2]}}, "the numbers of projections and tokens differ"),
        ({"projections": {"prompt": []}}, "not a valid projection file: projections.response: expected, but missing"),
        ({"metadata": []}, "not a valid projection file: metadata: expected"),
        ({"dynamics": {"commitment_point": 99, "persistence": 0}}, "commitment point 99 of 8 tokens"),
    ],
)
def test_a_damaged_file_is_named(exp: Experiment, change: dict[str, Any], expected: str) -> None:
    path = write(exp.layout, "tone/loud", "2", content() | change)
    with pytest.raises(StorageError, match=f"{path.name}: .*{expected}"):
        TokenScores.read(path)
    with pytest.raises(StorageError, match=expected):
        exp.to_pandas("short")


def test_a_layer_beyond_the_scores_and_nan_are_refused() -> None:
    with pytest.raises(StorageError, match="a vector of layer 7, but scores of 4 layers"):
        projected(layer=7)
    with pytest.raises(StorageError, match="NaN"):
        projected(scores=projected().scores * float("nan"))


def test_frames_of_files_load_no_torch(exp: Experiment) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from tlcapture import Experiment; "
        f"print(len(Experiment('exp', {str(exp.layout.root)!r}).to_pandas('short')), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["32", "False"]
