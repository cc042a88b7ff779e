"""The page's content: values of the files, missing data and the command that creates it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from tests.page.conftest import N_LAYERS, N_PROMPT, TOKENS, TRAIT, projection, scores, write
from tlcapture.errors import InputError, StorageError
from tlcapture.page.average import average_trajectory
from tlcapture.page.contents import Contents
from tlcapture.page.missing import MissingError


@pytest.fixture
def contents(page_root: Path) -> Contents:
    return Contents(page_root)


def path_of(root: Path, prompt: int = 1) -> Path:
    return root / "experiments" / "exp" / "inference" / TRAIT / "residual_stream" / "odd" / f"{prompt}.json"


def test_experiments_list_prompt_sets_and_traits(contents: Contents) -> None:
    assert contents.experiments() == [{"name": "exp", "prompt_sets": ["odd"], "traits": [TRAIT]}]


def test_a_prompt_set_lists_its_captured_prompts_and_their_files(contents: Contents) -> None:
    found = contents.prompt_set("exp", "odd")
    assert [prompt["id"] for prompt in found["prompts"]] == ["1", "2", "3"]
    assert found["prompts"][0] == {"id": "1", "text": "".join(TOKENS[:N_PROMPT]), "attention": True, "logit_lens": True}
    assert found["prompts"][2] == {"id": "3", "text": "", "attention": False, "logit_lens": False}
    assert found["traits"] == [TRAIT]


def test_a_prompt_is_shown_as_in_its_prompt_set_if_it_was_captured_like_that(contents: Contents) -> None:
    prompts = [{"id": "1", "text": TOKENS[1]}, {"id": "2", "text": "changed after the capture"}]
    write(contents.root / "datasets" / "inference" / "odd.json", {"name": "odd", "prompts": prompts})
    found = contents.prompt_set("exp", "odd")["prompts"]
    assert [prompt["text"] for prompt in found] == [TOKENS[1], "".join(TOKENS[:N_PROMPT]), ""]


def test_a_trajectory_is_taken_at_the_layer_of_the_vector(contents: Contents) -> None:
    found = contents.prompt("exp", "odd", "2")
    assert found["tokens"] == TOKENS
    assert (found["n_prompt_tokens"], found["n_layers"], found["problems"]) == (N_PROMPT, N_LAYERS, [])
    assert found["projections"][0]["trajectory"] == [token[1][-1] for token in scores(2)]
    assert found["projections"][0]["dynamics"] == projection(2)["dynamics"]


def test_layers_hold_the_scores_of_prompt_and_response_as_one_sequence(contents: Contents) -> None:
    found = contents.layers("exp", "odd", "1", "style", "odd", "residual")
    assert found == {"sublayers": ["residual_in", "after_attn", "residual_out"], "scores": scores(1)}


def test_the_lens_has_the_top_prediction_of_every_token_and_layer(contents: Contents) -> None:
    found = contents.lens("exp", "odd", "1")
    assert found["token_idx"] == list(range(len(TOKENS) - 1))
    assert found["rank"] == [[token + layer + 1 for layer in range(N_LAYERS)] for token in range(len(TOKENS) - 1)]
    assert found["actual"] == TOKENS[1:]
    assert (found["n_layers"], found["top_k"]) == (N_LAYERS, 2)
    assert [each["prob"] for each in contents.lens_token("exp", "odd", "1", "3")["by_layer"][2]["top_k"]] == [0.5, 0.25]


def test_the_attention_of_one_token_is_read_on_its_own(contents: Contents) -> None:
    assert contents.attention("exp", "odd", "1")["n_heads"] == 2
    entry = contents.attention_token("exp", "odd", "1", "3")
    assert entry["by_layer"][1][0] == [0.25] * 4


def test_a_mean_is_aligned_at_the_response_and_excludes_first_tokens() -> None:
    trajectories = [([900.0, 1.0, 2.0], [3.0, 4.0]), ([800.0, 5.0], [6.0])]
    found = average_trajectory(trajectories)
    assert found["position"] == [-2, -1, 0, 1]
    assert found["mean"] == [1.0, mean([2.0, 5.0]), mean([3.0, 6.0]), 4.0]
    assert found["sd"] == [None, pytest.approx(stdev([2.0, 5.0])), pytest.approx(stdev([3.0, 6.0])), None]
    assert (found["n"], found["n_captures"]) == ([1, 2, 2, 1], 2)


def test_the_mean_of_a_prompt_set_covers_all_its_projections(contents: Contents) -> None:
    found = contents.average("exp", "odd", "style", "odd", "residual")
    expected = [mean([scores(1)[token][1][-1], scores(2)[token][1][-1]]) for token in range(1, len(TOKENS))]
    assert found["mean"] == expected


def test_vectors_include_the_selected_one_and_the_reason(contents: Contents) -> None:
    found = contents.vectors("exp", "style", "odd")
    residual = found["components"]["residual"]
    assert residual["selected"]["layer"] == 1
    assert residual["selected"]["selected_by"] == "effect_size"
    assert residual["selected"]["score"] == 2.0
    assert residual["runner_up"]["layer"] in (0, 2)
    assert len(found["evaluation"]["rows"]) == N_LAYERS
    assert found["steering"]["missing"]["command"] == "tlcapture steer --experiment exp --traits style/odd"


def test_steering_runs_are_listed_with_their_baseline(contents: Contents) -> None:
    run = {"config": {"layers": [1], "methods": ["probe"], "coefficients": [0.2], "component": "residual"},
           "result": {"trait_mean": 60.0, "coherence_mean": 90.0, "n": 15}}  # fmt: skip
    baseline = {"trait_mean": 50.0, "coherence_mean": 100.0}
    write(
        contents.root / "experiments" / "exp" / "steering" / TRAIT / "results.json",
        {"baseline": baseline, "runs": [run]},
    )
    found = contents.vectors("exp", "style", "odd")
    assert found["steering"]["baseline"] == baseline
    assert found["steering"]["runs"][0]["coefficient"] == 0.2
    assert found["steering"]["runs"][0]["gain"] == 10.0
    assert found["steering"]["chance"] is None
    assert found["components"]["residual"]["selected"]["selected_by"] == "steering"


def test_gains_come_with_their_null_and_vectors_with_their_verdict(contents: Contents) -> None:
    folder = contents.root / "experiments" / "exp"
    config = {"layers": [1], "methods": ["probe"], "coefficients": [0.2], "component": "residual"}
    null = [float(n) for n in range(21)]
    result = {"trait_mean": 60.0, "coherence_mean": 90.0, "standard_error": 2.0, "null": null}
    monitored = {"layer": 1, "method": "probe", "coefficients": [0.0, 0.2], "rank_correlation": 0.9, "null": null,
                 "p": 0.05}  # fmt: skip
    content = {"baseline": {"trait_mean": 50.0}, "runs": [{"config": config, "result": result}],
               "monitoring": [monitored]}  # fmt: skip
    write(folder / "steering" / TRAIT / "results.json", content)
    rows = [{"trait": TRAIT, "method": "probe", "layer": 1, "val_auroc": 0.9, "val_effect_size": 1.0}]
    best = {TRAIT: {"layer": 1, "method": "probe", "nested_auroc": 0.8, "verdict": "adds nothing", "p": 0.2}}
    evaluation = {"all_results": rows, "best_vectors": best, "cross_trait": {TRAIT: {TRAIT: 0.9, "a/b": 0.4}}}
    evaluation |= {"cross_trait_chance": 0.25}
    write(folder / "extraction" / "extraction_evaluation.json", evaluation)
    found = contents.vectors("exp", "style", "odd")
    assert found["steering"]["runs"][0]["null"] == [0.0, 20.0]
    assert found["steering"]["runs"][0]["standard_error"] == 2.0
    assert found["steering"]["chance"] == 20.0
    assert found["steering"]["monitoring"] == [
        {"layer": 1, "method": "probe", "rank_correlation": 0.9, "p": 0.05, "null": 20.0}
    ]
    assert found["components"]["residual"]["selected"]["selected_by"] == "effect_size"  # 10 is less than 20
    assert found["evaluation"]["trait"]["verdict"] == "adds nothing"
    assert contents.cross_traits("exp", "exp") == {
        "traits": ["a/b", TRAIT], "aurocs": [[None, None], [0.4, 0.9]], "by_chance": (0.25, 0.75)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ask", "command"),
    [
        (lambda c: c.prompt_set("exp", "never"), "capture --experiment exp --prompt-set never"),
        (lambda c: c.layers("exp", "odd", "3", "style", "odd", "residual"),
         "project --experiment exp --prompt-set odd"),
        (lambda c: c.attention("exp", "odd", "2"), "capture --experiment exp --prompt-set odd --attention --replay"),
        (lambda c: c.lens("exp", "odd", "2"), "capture --experiment exp --prompt-set odd --logit-lens --replay"),
        (lambda c: c.vectors("exp", "style", "none"), "extract --experiment exp --traits style/none"),
    ],
)  # fmt: skip
def test_missing_data_comes_with_the_command_that_creates_it(contents: Contents, ask: object, command: str) -> None:
    with pytest.raises(MissingError) as caught:
        ask(contents)  # type: ignore[operator]
    assert caught.value.command == f"tlcapture {command}"


def test_a_prompt_without_projections_has_the_tokens_of_its_attention_file(contents: Contents) -> None:
    path_of(contents.root).unlink()
    found = contents.prompt("exp", "odd", "1")
    assert found["tokens"] == TOKENS
    assert found["missing"]["command"] == "tlcapture project --experiment exp --prompt-set odd"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"projections": 3}', '{"prompt": {"tokens": 1}}', "null"])
def test_a_damaged_projection_is_reported_and_the_rest_is_shown(contents: Contents, content: str) -> None:
    path_of(contents.root).write_text(content)
    assert str(path_of(contents.root).relative_to(contents.root)) in contents.prompt("exp", "odd", "1")["problems"][0]
    with pytest.raises((StorageError, TypeError, KeyError)):
        contents.layers("exp", "odd", "1", "style", "odd", "residual")
    assert contents.prompt_set("exp", "odd")["prompts"]
    assert len(contents.average("exp", "odd", "style", "odd", "residual")["problems"]) == 1


def test_a_projection_with_different_tokens_is_reported_and_not_shown(contents: Contents) -> None:
    other = projection(1)
    other["response"]["tokens"] = [*other["response"]["tokens"][:-1], "another"]
    other["metadata"]["vector_source"]["trait"] = "style/zz"
    write(path_of(contents.root).parents[3] / "zz" / "residual_stream" / "odd" / "1.json", other)
    found = contents.prompt("exp", "odd", "1")
    assert [each["trait"] for each in found["projections"]] == [TRAIT]
    assert "tokens differ" in found["problems"][0]


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "", "x" * 300])
def test_unsafe_names_never_become_paths(contents: Contents, name: str) -> None:
    for ask in (
        lambda: contents.prompt_set(name, "odd"),
        lambda: contents.prompt_set("exp", name),
        lambda: contents.prompt("exp", "odd", name),
        lambda: contents.layers("exp", "odd", "1", name, "odd", "residual"),
        lambda: contents.vectors("exp", "style", name),
        lambda: contents.lens("exp", "odd", name),
    ):
        with pytest.raises(InputError):
            ask()


def test_the_page_loads_no_torch(page_root: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path; from tlcapture.page.contents import Contents\n"
        f"c = Contents(Path({str(page_root)!r})); c.experiments(); c.prompt('exp', 'odd', '1')\n"
        "c.vectors('exp', 'style', 'odd')\n"
        "import tlcapture.page.server; print(json.dumps('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False


def test_a_file_that_may_not_be_read_is_told_without_numbers_and_without_advice_to_replace_it(
    page_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tlcapture.page.captured.Archive", closed)
    said = Contents(page_root).prompt("exp", "odd", "3")["unread"]
    assert said == ["experiments/exp/inference/raw/residual/odd/3.pt: cannot be read: Permission denied"]
    assert Contents(page_root).problem(PermissionError(13, "Permission denied", "a/b")) == "a/b: Permission denied"


def test_commands_name_the_root_where_the_environment_names_another(
    contents: Contents, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(contents.root)
    assert contents.root_folder()["option"] == ""
    monkeypatch.setenv("TLCAPTURE_ROOT", str(tmp_path / "other"))
    assert contents.root_folder()["option"] == f" --root {contents.root}"
