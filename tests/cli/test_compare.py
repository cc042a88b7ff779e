"""`tlcapture compare`: the files, against Hugging Face and the projection files, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from tests import tiny
from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError
from tlcapture.explore.comparisons import COLUMNS
from tlcapture.storage.files import read_json
from tlcapture.traits.statistics.chance import RandomDirections

Run = Callable[..., Result]
TRAITS = ("tone/loud", "tone/warm")


@pytest.fixture
def both(capture: Run, extract: Run, tlcapture: Run, tuned_folder: Path) -> Callable[..., None]:
    """Captures of the set `short` by the tiny Llama in `exp`, with vectors, and by its finetune in `tuned`."""

    def make(*words: object) -> None:
        assert extract().exit_code == 0
        assert capture("--save-dtype", "float32", *words).exit_code == 0
        tuned = ("--experiment", "tuned", "--model", tuned_folder, "--prompt-set", "short", "--save-dtype", "float32")
        assert tlcapture("capture", *tuned, "--max-new-tokens", 6, *words).exit_code == 0

    return make


def compared(data: Path, a: str = "exp", b: str = "tuned", prompt_set: str = "short", name: str = "1") -> Any:
    return read_json(data / "experiments" / a / "analysis" / "compare" / b / prompt_set / f"{name}.json")


def raw(data: Path, experiment: str, name: str = "1", prompt_set: str = "short") -> Capture:
    return Capture.open(
        data / "experiments" / experiment / "inference" / "raw" / "residual" / prompt_set / f"{name}.pt"
    )


def hidden_states(folder: Path, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face's residual after each layer `[n_layers, n_tokens, d_model]`, the last unnormed, and its logits."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    kept: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out) or None
        )
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return torch.stack([each.reshape(-1, tiny.D_MODEL) for each in kept]).double(), logits.double()


def test_differences_on_the_same_tokens_are_those_of_hugging_faces_models(
    both: Callable[..., None], tlcapture: Run, data: Path, tiny_folder: Path, tuned_folder: Path
) -> None:
    both("--max-new-tokens", 0)
    result = tlcapture("compare", "exp", "tuned")
    assert result.exit_code == 0, result.output
    found = compared(data)
    capture = raw(data, "exp")
    assert (found["a"], found["b"], found["tokens"]) == ("exp/short", "tuned/short", capture.tokens)
    assert found["n_prompt_tokens"] == len(capture.tokens)
    (a, logits_a), (b, logits_b) = (hidden_states(folder, capture.token_ids) for folder in (tiny_folder, tuned_folder))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).T
    torch.testing.assert_close(torch.tensor(found["residual"]["cosine"]).double(), cosine, rtol=1e-4, atol=1e-4)
    ratio = (b.norm(dim=-1) / a.norm(dim=-1)).T
    torch.testing.assert_close(torch.tensor(found["residual"]["norm_ratio"]).double(), ratio, rtol=1e-4, atol=1e-4)
    of_a, of_b = (torch.distributions.Categorical(logits=each) for each in (logits_a, logits_b))
    kl = torch.distributions.kl_divergence(of_a, of_b)
    torch.testing.assert_close(torch.tensor(found["kl"]).double(), kl, rtol=1e-3, atol=1e-5)
    for trait in TRAITS:
        layer, method = found["traits"][trait]["layer"], found["traits"][trait]["method"]
        folder = data / "experiments" / "exp" / "extraction" / trait / "vectors"
        vector = torch.load(folder / f"{method}_layer{layer}.pt", weights_only=True).double()
        expected = (b[layer] - a[layer]) @ (vector / vector.norm())
        torch.testing.assert_close(
            torch.tensor(found["traits"][trait]["difference"]).double(), expected, rtol=1e-3, atol=1e-4
        )


def test_free_running_captures_are_compared_where_their_tokens_are_shared(
    both: Callable[..., None], tlcapture: Run, data: Path
) -> None:
    both("--temperature", 0)
    result = tlcapture("compare", "exp", "tuned")
    assert result.exit_code == 0, result.output
    assert "pairs of captures differ from some token on" in result.output
    assert "pairs share no token of the response: what is said of them by token is of their prompts" in result.output
    a, b = raw(data, "exp"), raw(data, "tuned")
    found = compared(data)
    n = len(found["tokens"])
    assert a.token_ids[:n] == b.token_ids[:n]
    assert a.token_ids[n : n + 1] != b.token_ids[n : n + 1]
    assert found["continuations"] == {"a": a.tokens[n:], "b": b.tokens[n:]}
    trait = found["traits"]["tone/loud"]
    assert len(trait["difference"]) == n
    vector = torch.load(
        data / f"experiments/exp/extraction/tone/loud/vectors/{trait['method']}_layer{trait['layer']}.pt",
        weights_only=True,
    ).double()
    for mean, each in (("mean_a", a), ("mean_b", b)):
        scores = each.response.residual.at(trait["layer"], "residual_out").double() @ (vector / vector.norm())
        assert trait[mean] == pytest.approx(float(scores.mean()), rel=1e-4)


def test_random_directions_change_as_the_activations_do(both: Callable[..., None], tlcapture: Run, data: Path) -> None:
    both()
    assert tlcapture("compare", "exp", "tuned", "--no-kl").exit_code == 0
    trait = compared(data)["traits"]["tone/loud"]
    layer = trait["layer"]
    means = [
        raw(data, name).response.residual.at(layer, "residual_out").double().mean(dim=0) for name in ("exp", "tuned")
    ]
    directions = RandomDirections(None, tiny.N_LAYERS, tiny.D_MODEL)
    expected = directions.projections("tone/loud", layer, means[1] - means[0])
    assert trait["random"]["changes"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
    assert trait["random"]["directions"] == directions.digest(layer)
    path = data / "experiments/exp/analysis/compare/tuned/short/1.json"
    written = path.read_bytes()
    del trait["random"]  # as in earlier versions
    path.write_text(json.dumps({**read_json(path), "traits": {"tone/loud": trait}}))
    words = ("--no-kl", "--skip-existing", "--traits", "tone/loud")
    assert "random" not in compared(data)["traits"]["tone/loud"]
    assert tlcapture("compare", "exp", "tuned", *words).exit_code == 0
    assert compared(data)["traits"]["tone/loud"] == json.loads(written)["traits"]["tone/loud"]


def test_captures_against_themselves_give_exact_zeros(capture: Run, extract: Run, tlcapture: Run, data: Path) -> None:
    extract()
    capture()
    result = tlcapture("compare", "exp", "exp/short")
    assert result.exit_code == 0, result.output
    for name in ("1", "2", "3"):
        found = compared(data, b="exp", name=name)
        assert set(found["kl"]) == {0.0}
        assert {value for row in found["residual"]["cosine"] for value in row} == {1.0}
        assert {value for row in found["residual"]["norm_ratio"] for value in row} == {1.0}
        assert all(set(found["traits"][trait]["difference"]) == {0.0} for trait in TRAITS)
        assert "continuations" not in found
    assert result.output.count("within chance") == 2


def test_the_summary_has_the_mean_change_of_each_trait(both: Callable[..., None], tlcapture: Run, data: Path) -> None:
    both()
    result = tlcapture("compare", "exp", "tuned", "--json")
    (summary,) = json.loads(result.stdout)["comparisons"]
    assert (summary["a"], summary["b"], summary["n_prompts"]) == ("exp/short", "tuned/short", 3)
    for trait in TRAITS:
        entries = [compared(data, name=name)["traits"][trait] for name in ("1", "2", "3")]
        changes = [each["mean_b"] - each["mean_a"] for each in entries]
        assert summary["traits"][trait]["mean"] == pytest.approx(sum(changes) / 3)
        assert not summary["traits"][trait]["stands_out"]  # three prompts are too few
    files = [compared(data, name=name) for name in ("1", "2", "3")]
    means = []
    for each in files:
        response = each["kl"][each["n_prompt_tokens"] :] or each["kl"][1:]
        means.append(sum(response) / len(response))
    assert summary["kl"]["mean"] == pytest.approx(sum(means) / 3)


def test_own_vectors_project_each_side_onto_its_own(
    both: Callable[..., None], tlcapture: Run, data: Path, tuned_folder: Path
) -> None:
    both()
    words = ("--experiment", "tuned", "--traits", "tone/loud")
    refused = tlcapture("compare", "exp", "tuned", "--vectors", "b")
    assert refused.exit_code == 2
    assert "experiment 'tuned' has no trait vectors" in refused.stderr
    assert tlcapture("extract", *words, "--layers", "1", "--methods", "mean_diff").exit_code == 0
    assert tlcapture("compare", "exp", "tuned", "--vectors", "own", "--no-kl", "--traits", "tone/loud").exit_code == 0
    found = compared(data)
    assert "kl" not in found
    trait = found["traits"]["tone/loud"]
    assert trait["b"] == {"experiment": "tuned", "layer": 1, "method": "mean_diff"}
    n, scores = len(found["tokens"]), []
    for experiment, own in (("exp", trait), ("tuned", trait["b"])):
        path = f"experiments/{experiment}/extraction/tone/loud/vectors/{own['method']}_layer{own['layer']}.pt"
        vector = torch.load(data / path, weights_only=True).double()
        scores.append(raw(data, experiment).residual(own["layer"]).double()[:n] @ (vector / vector.norm()))
    expected = scores[1] - scores[0]
    torch.testing.assert_close(torch.tensor(trait["difference"]).double(), expected, rtol=1e-4, atol=1e-5)


def test_traits_and_sets_can_be_chosen_and_existing_files_kept(
    both: Callable[..., None], tlcapture: Run, data: Path
) -> None:
    both()
    assert tlcapture("compare", "exp", "tuned", "--traits", "tone/warm", "--prompt-set", "short").exit_code == 0
    assert list(compared(data)["traits"]) == ["tone/warm"]
    path = data / "experiments/exp/analysis/compare/tuned/short/1.json"
    before = path.stat().st_mtime_ns
    again = tlcapture("compare", "exp", "tuned", "--traits", "tone/warm", "--skip-existing")
    assert (again.exit_code, path.stat().st_mtime_ns) == (0, before)
    assert "loading" not in again.output
    assert tlcapture("compare", "exp", "tuned", "--skip-existing").exit_code == 0
    assert sorted(compared(data)["traits"]) == sorted(TRAITS)
    missing = tlcapture("compare", "exp", "tuned", "--prompt-set", "other")
    assert missing.exit_code == 2
    assert "no prompt set in common among other" in missing.stderr


def test_a_comparison_with_vectors_of_another_experiment_is_made_again(
    both: Callable[..., None], extract: Run, tlcapture: Run, data: Path
) -> None:
    both("--max-new-tokens", 0)
    assert extract(experiment="tuned").exit_code == 0
    for side, experiment in (("b", "tuned"), ("a", "exp")):
        assert tlcapture("compare", "exp", "tuned", "--vectors", side).exit_code == 0
        assert compared(data)["traits"]["tone/loud"]["experiment"] == experiment
    again = tlcapture("compare", "exp", "tuned", "--vectors", "b", "--skip-existing")
    assert "wrote 3 files" in again.stdout
    assert compared(data)["traits"]["tone/loud"]["experiment"] == "tuned"
    assert "3 prompts skipped" in tlcapture("compare", "exp", "tuned", "--vectors", "b", "--skip-existing").stdout


def test_names_that_are_too_long_together_are_refused_at_once(capture: Run, tlcapture: Run, data: Path) -> None:
    assert capture("--limit", 1).exit_code == 0
    captured, long = data / "experiments" / "exp", "long" * 32
    shutil.copytree(captured, data / "experiments" / long)
    raws = data / "experiments" / long / "inference" / "raw" / "residual"
    (raws / "short").rename(raws / f"{long}@short")
    refused = tlcapture("compare", "exp/short", f"{long}/{long}@short")
    assert refused.exit_code == 2
    assert "a folder whose name has 263 characters" in refused.stderr
    assert refused.stderr.count("error") == 1


def test_without_vectors_and_models_residuals_are_compared(
    capture: Run, tlcapture: Run, data: Path, tuned_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture()
    words = ("--experiment", "tuned", "--model", tuned_folder, "--prompt-set", "short", "--max-new-tokens", 6)
    assert tlcapture("capture", *words).exit_code == 0

    def no_model(*args: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tlcapture.commands.comparing.unembeddings.load_unembedding", no_model)
    result = tlcapture("compare", "exp", "tuned", "--no-kl")
    assert result.exit_code == 0, result.output
    assert compared(data)["traits"] == {}
    assert "kl" not in compared(data)


def test_only_the_norm_and_unembedding_of_each_model_are_loaded_once(
    both: Callable[..., None], tlcapture: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlcapture.models import unembedding

    both()
    layers = []
    load = unembedding._loaded
    monkeypatch.setattr(unembedding, "load_model", lambda *args, **options: pytest.fail("all weights were loaded"))

    def counted(*args: Any) -> Any:
        found = load(*args)
        layers.append(found.n_layers)
        return found

    monkeypatch.setattr(unembedding, "_loaded", counted)
    assert tlcapture("compare", "exp", "tuned").exit_code == 0
    assert layers == [1, 1]
    assert tlcapture("compare", "exp", "exp").exit_code == 0
    assert layers == [1, 1, 1]


def test_a_model_that_changed_since_the_capture_is_refused(
    both: Callable[..., None], tlcapture: Run, data: Path, tuned_folder: Path
) -> None:
    both()
    path = data / "experiments/tuned/inference/raw/residual/short"
    for file in path.glob("*.pt"):
        capture = Capture.open(file)
        changed = {**capture.metadata, "model_fingerprint": "0" * 16}
        type(capture)(capture.prompt, capture.response, changed, spans=capture.spans).save(file)
    result = tlcapture("compare", "exp", "tuned")
    assert result.exit_code == 1
    assert "has the fingerprint" in result.stderr
    assert "--no-kl" in result.stderr


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a missing experiment": (("exp", "none"), "no experiment 'none'"),
    "a set alone": (("short@a", "exp"), "; expected EXPERIMENT, EXPERIMENT/SET or EXPERIMENT/SET@VARIANT"),
    "a missing set": (("exp/none", "exp"), "exp/none: no captures; captured sets of exp: other, short"),
    "a missing variant": (("exp", "exp/short@lora"), "exp/short@lora: no captures; captured sets of exp: other, short"),
    "an unsafe name": (("exp/../x", "exp"), "is not a safe file name"),
    "an unsafe variant": (("exp/short@../x", "exp"), "variant '../x' is not a safe file name"),
    "an unknown trait": (("exp", "exp", "--traits", "tone/none"), "experiment 'exp' has no trait vectors: run "),
    "vectors twice": (("exp", "exp", "--vectors", "a", "--vector-experiment", "exp"), "leave out --vectors"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line(what: str, capture: Run, tlcapture: Run, data: Path) -> None:
    capture(prompts=("--prompt-set", "short,other"))
    words, expected = REFUSED[what]
    result = tlcapture("compare", *words)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (data / "experiments/exp/analysis/compare").exists()


def test_models_of_other_sizes_and_tokenizers_are_refused(
    capture: Run, tlcapture: Run, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    capture()
    for experiment in ("wide", "words"):
        folder = data / "experiments" / experiment / "inference" / "raw" / "residual" / "short"
        folder.mkdir(parents=True)
        original = raw(data, "exp")
        if experiment == "words":
            part = original.prompt
            ids = [*part.token_ids[:-1], part.token_ids[-1] + 1]
            prompt = type(part)(part.text, part.tokens, ids, part.residual)
            type(original)(prompt, original.response, original.metadata).save(folder / "1.pt")
            continue
        small = tmp_path_factory.mktemp("small")
        config = tiny.CONFIGS["llama"]()
        config.num_hidden_layers = 2
        import transformers

        transformers.LlamaForCausalLM(config).save_pretrained(small)
        tiny.tokenizer().save_pretrained(small)
        words = ("--experiment", experiment, "--model", small, "--prompt-set", "short", "--max-new-tokens", 2)
        assert tlcapture("capture", *words).exit_code == 0
    wide = tlcapture("compare", "exp", "wide", "--no-kl")
    assert wide.exit_code == 1
    assert "the models have 3 layers of width 32 and 2 of width 32" in wide.stderr
    words = tlcapture("compare", "exp", "words", "--no-kl")
    assert words.exit_code == 1
    assert "the models have different tokenizers" in words.stderr


def test_sets_without_a_prompt_in_common_are_refused(capture: Run, tlcapture: Run, data: Path) -> None:
    capture()
    folder = data / "experiments/exp/inference/raw/residual"
    (folder / "short" / "3.pt").rename(folder / "lone.pt")
    (folder / "lone").mkdir()
    (folder / "lone.pt").rename(folder / "lone" / "3.pt")
    result = tlcapture("compare", "exp/short", "exp/lone")
    assert result.exit_code == 2
    assert "exp/short and exp/lone have no prompts in common: 1, 2 and 3" in result.stderr


def test_captures_of_some_tokens_are_compared_where_both_hold_them(
    both: Callable[..., None], tlcapture: Run, data: Path
) -> None:
    both("--tokens", "first:2", "--max-new-tokens", 3, "--temperature", 0)
    result = tlcapture("compare", "exp", "tuned")
    assert result.exit_code in (0, 1)
    result = tlcapture("compare", "exp", "exp")
    assert result.exit_code == 0, result.output
    found = compared(data, b="exp")
    n_prompt = found["n_prompt_tokens"]
    assert found["kl"][:n_prompt] == [None] * n_prompt
    assert found["kl"][n_prompt : n_prompt + 2] == [0.0, 0.0]
    assert found["residual"]["cosine"][0] is None


def test_a_damaged_comparison_is_replaced_only_when_that_is_asked_for(capture: Run, tlcapture: Run, data: Path) -> None:
    capture()
    tlcapture("compare", "exp", "exp", "--no-kl")
    path = data / "experiments/exp/analysis/compare/exp/short/1.json"
    path.write_text('{"a": 1}')
    result = tlcapture("compare", "exp", "exp", "--no-kl")
    assert result.exit_code == 1
    assert "not a valid comparison file" in result.stderr
    assert path.read_text() == '{"a": 1}'
    assert tlcapture("compare", "exp", "exp", "--no-kl", "--overwrite").exit_code == 0


def test_a_frame_has_a_row_for_each_token_and_trait_or_layer(both: Callable[..., None], data: Path) -> None:
    from tlcapture import Experiment

    both("--max-new-tokens", 0)
    exp = Experiment("exp", data)
    frame = exp.compare("tuned", "short")
    assert list(frame.columns) == list(COLUMNS["trait"])
    files = {name: compared(data, name=name) for name in ("1", "2", "3")}
    assert len(frame) == sum(len(each["tokens"]) * len(TRAITS) for each in files.values())
    for row in frame.itertuples():
        found, trait = files[row.prompt_id], files[row.prompt_id]["traits"][row.trait]
        at = row.token_idx
        assert (row.prompt_set, row.token, row.part, row.layer) == (
            "short",
            found["tokens"][at],
            "prompt",
            trait["layer"],
        )
        values = (trait["difference"][at], found["kl"][at], found["residual"]["cosine"][at][row.layer])
        assert (row.difference, row.kl, row.cosine) == values
        assert row.norm_ratio == found["residual"]["norm_ratio"][at][row.layer]
    layers = exp.compare(Experiment("tuned", data), by="layer", traits="tone/loud")
    assert list(layers.columns) == list(COLUMNS["layer"])
    assert len(layers) == sum(len(each["tokens"]) * 3 for each in files.values())
    assert layers.attrs["summary"][0]["n_prompts"] == 3
    assert exp.compare("tuned", "short", kl=False)["kl"].notna().all()  # what is there and current is kept


def test_a_frame_of_what_cannot_be_compared_is_refused(capture: Run, data: Path, tmp_path: Path) -> None:
    from tlcapture import Experiment

    capture()
    exp = Experiment("exp", data)
    with pytest.raises(InputError, match="by='token': expected 'trait' or 'layer'"):
        exp.compare("exp", by="token")
    with pytest.raises(InputError, match="no experiment 'none'"):
        exp.compare("none")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "experiments" / "exp").mkdir(parents=True)
    with pytest.raises(InputError, match="in another root"):
        exp.compare(Experiment("exp", elsewhere))


def test_captures_of_different_prompts_are_refused_whatever_their_ids(capture: Run, tlcapture: Run, data: Path) -> None:
    for experiment, what in (("rain", "rain"), ("snow", "snow"), ("again", "rain")):
        words = ("--experiment", experiment, "--prompt", f"Why does it {what}?", "--max-new-tokens", 2, "--no-project")
        assert capture(*words, prompts=()).exit_code == 0
    result = tlcapture("compare", "rain", "snow", "--no-kl")
    assert result.exit_code == 1
    expected = "'Why does it rain?' and 'Why does it snow?': expected captures of the same prompt"
    assert expected in " ".join(result.stderr.split())
    assert not (data / "experiments/rain/analysis/compare").exists()
    assert tlcapture("compare", "rain", "again", "--no-kl").exit_code == 0


def test_another_system_prompt_does_not_make_another_prompt(capture: Run, tlcapture: Run) -> None:
    capture("--system-prompt", "Be brief.")
    assert capture("--experiment", "formal", "--system-prompt", "Be formal.", "--no-project").exit_code == 0
    result = tlcapture("compare", "exp", "formal", "--no-kl")
    assert result.exit_code == 0
    assert re.search(r"\b(\d+) of \1 pairs share no token of the response: what is said of them", result.output)
    assert "over the tokens of the prompts that captures share" in " ".join(result.output.split())
    assert "mean over the responses" not in result.output


def test_residuals_that_are_equal_are_said_to_be(capture: Run, tlcapture: Run) -> None:
    capture()
    result = tlcapture("compare", "exp", "exp", "--no-kl")
    assert "residual: the same in every layer, over the responses" in result.output
    assert "cosine" not in result.output
    assert "no trait vectors, so no projections are compared: run 'tlcapture extract --experiment exp' first" in (
        " ".join(result.stderr.split())
    )


def test_captures_without_the_last_layer_are_compared_without_divergence(
    capture: Run, extract: Run, tlcapture: Run, data: Path
) -> None:
    extract("--layers", "1")
    capture("--layers", "0,1")
    result = tlcapture("compare", "exp", "exp")
    assert result.exit_code == 0, result.output
    warned = "short: next-token distributions are not compared: they need residual_out of layer 2, but the capture has "
    assert result.stderr.count(warned) == 1
    assert "kl" not in compared(data, b="exp") and compared(data, b="exp")["traits"].keys() == set(TRAITS)
    again = tlcapture("compare", "exp", "exp", "--skip-existing")
    assert "3 prompts skipped" in again.stdout and again.stderr.count(warned) == 1


def test_captures_of_a_model_of_another_loader_are_compared_without_divergence(
    capture: Run, tlcapture: Run, data: Path
) -> None:
    capture("--limit", 1)
    path = data / "experiments/exp/inference/raw/residual/short/1.pt"
    value = torch.load(path)
    value["metadata"]["model_fingerprint"] = "tl-0123"
    torch.save(value, path)
    result = tlcapture("compare", "exp", "exp")
    assert result.exit_code == 0, result.output
    assert "are not compared: a capture is from " in result.stderr
    assert "a model that tlcapture did not load" in result.stderr
    assert "kl" not in compared(data, b="exp")


def test_captures_made_again_leave_no_comparison_of_the_earlier_ones(
    both: Callable[..., None], capture: Run, tlcapture: Run, data: Path
) -> None:
    both("--temperature", 0)
    assert tlcapture("compare", "exp", "tuned", "--no-kl").exit_code == 0
    files = sorted((data / "experiments/exp/analysis/compare").rglob("*.json"))
    assert len(files) == 3
    result = capture("--limit", 1, "--no-project")
    assert result.exit_code == 0
    assert sorted((data / "experiments/exp/analysis/compare").rglob("*.json")) == files[1:]
    assert "removed and not written again" in result.output
