"""`capture --steer`, `--ablate` and `--cap`: where the files are, what they record, and what a replay does with them.

The right values come from the same model run by `generate` without any command, or from the numbers in the metadata.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from tests import tiny
from tests.cli.conftest import make_prompt_set
from tlcapture.captures.capture import Capture
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json, read_tensors

Run = Callable[..., Result]
LOUD = "tone/loud"
STEER = ("--steer", f"{LOUD}:+0.5@1")
EXACT = ("--save-dtype", "float32", "--temperature", "0")


@pytest.fixture
def layout(data: Path) -> Layout:
    return Layout(data, "exp")


def captures(layout: Layout, name: str = "short") -> dict[str, Capture]:
    return {each: Capture.open(layout.residual(name, each)) for each in layout.captured(name)}


def variants(layout: Layout) -> list[str]:
    return [name for name in layout.captured_prompt_sets() if "@" in name]


def ok(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def unit(layout: Layout, layer: int, method: str = "probe") -> torch.Tensor:
    vector = read_tensors(layout.folder / f"extraction/{LOUD}/vectors/{method}_layer{layer}.pt")
    return torch.nn.functional.normalize(vector, dim=0)


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_a_steered_capture_lies_beside_the_unsteered_one_and_differs_by_the_addend(
    capture: Run, extract: Run, layout: Layout, engine: str
) -> None:
    ok(extract())
    ok(capture(*EXACT, "--engine", engine))
    before = {path: path.read_bytes() for path in layout.folder.rglob("short/*")}
    add_ons = ("--attention", "--logit-lens", "--layer-internals", "1")
    ok(capture(*EXACT, *STEER, *add_ons, "--engine", engine))
    (variant,) = variants(layout)
    assert variant.startswith("short@steer-loud-0.5-L1-")
    assert all(path.read_bytes() == content for path, content in before.items()), "the unsteered files are as before"
    folders = {path.parent.parent.relative_to(layout.folder).as_posix() for path in layout.folder.rglob(f"{variant}/*")}
    projected = {f"inference/tone/{name}/residual_stream" for name in ("loud", "warm")}
    assert folders == {"inference/raw/residual", "inference/raw/internals", "analysis/per_token", *projected}
    steered, plain = captures(layout, variant), captures(layout)
    assert steered.keys() == plain.keys()
    for prompt_id, found in steered.items():
        (record,) = found.metadata["interventions"]
        assert found.prompt_set == "short" and found.capture_set == variant
        assert found.metadata["variant"] == variant.partition("@")[2]
        assert (record["kind"], record["trait"], record["layers"]) == ("steer", LOUD, [1])
        assert (record["coefficient"], record["where"]) == (0.5, "from_last_prompt_token")
        (norm,) = record["typical_norms"]
        n_prompt = len(found.prompt.tokens)
        difference = found.prompt.residual.at(1, "residual_out") - plain[prompt_id].prompt.residual.at(
            1, "residual_out"
        )
        expected = torch.zeros_like(difference)
        expected[-1] = unit(layout, 1, record["methods"][0]) * 0.5 * norm
        torch.testing.assert_close(difference, expected, atol=1e-4, rtol=1e-3)
        earlier = [each.prompt.residual.at(0, "residual_out") for each in (found, plain[prompt_id])]
        torch.testing.assert_close(*earlier, atol=1e-5, rtol=1e-5)
        assert n_prompt == len(plain[prompt_id].prompt.tokens)


def test_extract_stores_the_median_norm_of_each_layer_which_is_the_unit(
    capture: Run, extract: Run, layout: Layout, tiny_folder: Path
) -> None:
    from tlcapture.extraction.examples import read_examples
    from tlcapture.extraction.prepared_examples import prepare_examples
    from tlcapture.generation.loop import teacher_force
    from tlcapture.models.loading import load_model
    from tlcapture.names import Trait
    from tlcapture.storage.experiments.datasets import Datasets

    ok(extract())
    model = load_model(str(tiny_folder))
    examples = read_examples(Datasets(layout.root), Trait.parse(LOUD))
    readings = prepare_examples(layout, model, examples).readings
    norms: list[list[float]] = [[] for _ in range(model.n_layers)]
    for reading in readings:
        for layer, each in enumerate(norms):
            cache = teacher_force(model, reading.token_ids, [f"blocks.{layer}.hook_resid_post"])
            each += cache[f"blocks.{layer}.hook_resid_post"][reading.start : reading.stop].norm(dim=-1).tolist()
    stored = read_json(layout.folder / f"extraction/{LOUD}/vectors/metadata.json")["typical_norms"]
    assert stored == pytest.approx([float(np.median(each)) for each in norms], rel=1e-4)
    ok(capture(*EXACT, "--steer", f"{LOUD}:-0.25@0,2:response", "--variant", "mine"))
    for found in captures(layout, "short@mine").values():
        (record,) = found.metadata["interventions"]
        assert record["typical_norms"] == [stored[0], stored[2]] and record["norms_from"] == "vectors"


def test_vectors_without_a_norm_are_scaled_by_the_median_over_the_unsteered_prompts(
    capture: Run, tlcapture: Run, extract: Run, layout: Layout
) -> None:
    ok(extract())
    path = layout.folder / f"extraction/{LOUD}/vectors/metadata.json"
    metadata = read_json(path)
    del metadata["typical_norms"]
    path.write_text(json.dumps(metadata))
    ok(capture(*EXACT))
    norms = [each.prompt.residual.at(1, "residual_out").norm(dim=-1) for each in captures(layout).values()]
    expected = float(np.median(torch.cat(norms).numpy()))
    result = ok(capture(*EXACT, *STEER, "--variant", "mine"))
    assert "no typical norm" in result.output
    for shard in ("1/2", "2/2"):
        ok(capture(*EXACT, *STEER, "--variant", "sharded", "--shard", shard))
    given = ("--prompt-set", "short", "--responses-from", "exp", "--variant", "given")
    ok(tlcapture("capture", "--experiment", "exp", *given, *STEER))
    for name in ("short@mine", "short@sharded", "short@given"):
        for found in captures(layout, name).values():
            (record,) = found.metadata["interventions"]
            assert record["typical_norms"] == [pytest.approx(expected, rel=1e-5)] and record["norms_from"] == "prompts"


def test_ablated_projections_are_zero_and_a_cap_holds_at_each_layer(capture: Run, extract: Run, layout: Layout) -> None:
    ok(extract())
    ok(capture(*EXACT, "--ablate", f"{LOUD}@all", "--variant", "ablated"))
    ok(capture(*EXACT, "--cap", f"{LOUD}:-0.1@1-2:response", "--variant", "capped"))
    for found in captures(layout, "short@ablated").values():
        methods = found.metadata["interventions"][0]["methods"]
        for layer in range(tiny.N_LAYERS):
            assert (found.residual(layer) @ unit(layout, layer, methods[layer])).abs().max() < 1e-5
    for found in captures(layout, "short@capped").values():
        methods = found.metadata["interventions"][0]["methods"]
        for layer, method in zip((1, 2), methods, strict=True):
            assert (found.residual(layer, part="response") @ unit(layout, layer, method)).max() < -0.1 + 1e-5
    projection = read_json(layout.folder / f"inference/{LOUD}/residual_stream/short@ablated/1.json")
    own = projection["metadata"]["vector_source"]["layer"]
    assert max(abs(token[own][2]) for token in projection["projections"]["response"]) < 1e-3
    assert projection["metadata"]["prompt_set"] == "short" and projection["metadata"]["variant"] == "ablated"
    assert projection["metadata"]["interventions"][0]["kind"] == "ablate"


def test_interventions_are_applied_in_the_order_of_the_command_line(capture: Run, extract: Run, layout: Layout) -> None:
    ok(extract())
    ablate, steer = ("--ablate", f"{LOUD}@1"), ("--steer", f"{LOUD}:1@1:response")
    ok(capture(*EXACT, *ablate, *steer, "--variant", "steered-last"))
    ok(capture(*EXACT, *steer, *ablate, "--variant", "ablated-last"))
    for name, kinds in (("steered-last", ["ablate", "steer"]), ("ablated-last", ["steer", "ablate"])):
        for found in captures(layout, f"short@{name}").values():
            records = found.metadata["interventions"]
            assert [each["kind"] for each in records] == kinds
            (norm,) = next(each for each in records if each["kind"] == "steer")["typical_norms"]
            along = found.residual(1, part="response") @ unit(layout, 1, records[0]["methods"][0])
            expected = torch.full_like(along, norm if name == "steered-last" else 0.0)
            torch.testing.assert_close(along, expected, atol=1e-4, rtol=1e-4)


def test_a_replay_applies_the_interventions_again(capture: Run, extract: Run, layout: Layout) -> None:
    ok(extract())
    make_prompt_set(layout.root, "ragged", ["hello there", "a", "what is a lighthouse for?", "x y z"])
    prompts = ("--prompt-set", "ragged")
    changes = (*STEER, "--ablate", "tone/warm@0:first=2", "--cap", f"{LOUD}:0.01@2:prompt")
    live = ("--attention", "--logit-lens", "--layer-internals", "all")
    ok(capture(*EXACT, *changes, *live, "--variant", "v", prompts=prompts))
    folders = [layout.folder / "analysis/per_token/ragged@v", layout.folder / "inference/raw/internals/ragged@v"]
    before = {path.name: _values(path) for folder in folders for path in sorted(folder.iterdir())}
    assert len(before) == 4 * (2 + tiny.N_LAYERS)
    for folder in folders:
        shutil.rmtree(folder)
    for words, sets in ((("--variant", "v"), prompts), ((), ("--prompt-set", "ragged@v"))):
        ok(capture("--replay", *live, *words, prompts=sets))
        after = {path.name: _values(path) for folder in folders for path in sorted(folder.iterdir())}
        assert after.keys() == before.keys()
        for name, value in after.items():
            torch.testing.assert_close(value, before[name], atol=2e-3, rtol=2e-3)


def _values(path: Path) -> torch.Tensor:
    """All numbers that a pass computes, of attention or internals; probabilities of the logit lens."""
    if path.suffix == ".pt":
        content = read_tensors(path)
        return torch.cat([value.flatten().float() for key, value in sorted(content.items()) if torch.is_tensor(value)])
    content = read_json(path)
    if "attention" in content:
        entries = [entry["by_layer"] for entry in content["attention"]]
        return torch.tensor([weight for layers in entries for heads in layers for head in heads for weight in head])
    return torch.tensor([each["actual_prob"] for entry in content["predictions"] for each in entry["by_layer"]])


def test_a_replay_refuses_vectors_that_were_replaced(capture: Run, extract: Run, layout: Layout) -> None:
    ok(extract())
    ok(capture(*EXACT, *STEER, "--variant", "v"))
    for path in (layout.folder / f"extraction/{LOUD}/vectors").glob("*_layer1.pt"):
        torch.save(torch.ones(tiny.D_MODEL), path)
    result = capture("--replay", "--attention", "--variant", "v")
    assert result.exit_code == 1 and "was replaced since the capture was made with it" in result.output


def test_skip_existing_completes_a_variant_alone(capture: Run, extract: Run, layout: Layout) -> None:
    ok(extract())
    ok(capture(*EXACT, *STEER))
    (variant,) = variants(layout)
    raw = layout.residual(variant, "2")
    times = {path: path.stat().st_mtime_ns for path in raw.parent.glob("*.pt")}
    raw.unlink()
    ok(capture(*EXACT, *STEER, "--skip-existing"))
    assert {path: path.stat().st_mtime_ns for path in times if path != raw} == {
        path: time for path, time in times.items() if path != raw
    }
    assert raw.is_file() and layout.captured_prompt_sets() == [variant]


def test_other_interventions_under_the_same_name_are_refused_or_overwrite(
    capture: Run, extract: Run, layout: Layout
) -> None:
    ok(extract())
    ok(capture(*EXACT, *STEER, "--variant", "v"))
    before = {path: path.read_bytes() for path in layout.folder.rglob("short@v/*")}
    for words in (("--steer", f"{LOUD}:+0.6@1"), ("--steer", f"{LOUD}:+0.5@1:response"), ()):
        for more in ((), ("--skip-existing",), ("--projections-only",), ("--dry-run",)):
            refused = capture(*EXACT, *words, *more, "--variant", "v")
            assert refused.exit_code == 2, refused.output
            assert "holds captures under other interventions (steer tone/loud +0.5 at layer 1" in refused.output
            assert "--overwrite" in refused.output
    assert {path: path.read_bytes() for path in layout.folder.rglob("short@v/*")} == before
    ok(capture(*EXACT, "--steer", f"{LOUD}:+0.6@1", "--variant", "v", "--overwrite"))
    assert {each.metadata["interventions"][0]["coefficient"] for each in captures(layout, "short@v").values()} == {0.6}


def test_an_automatic_name_is_that_of_the_interventions(capture: Run, extract: Run, layout: Layout) -> None:
    ok(extract())
    specs = (f"{LOUD}:+0.5@1", f"{LOUD}:-0.5@1", f"{LOUD}:+0.5@1:response", f"{LOUD}:+0.5@0-1")
    for spec in specs:
        ok(capture(*EXACT, "--steer", spec, "--limit", "1"))
    first = variants(layout)
    assert len(first) == len(specs)
    for spec in specs:
        ok(capture(*EXACT, "--steer", spec, "--limit", "2", "--skip-existing"))
    assert variants(layout) == first and all(layout.captured(name) == ["1", "2"] for name in first)


def test_variants_are_listed_projected_viewed_and_explored(
    capture: Run, extract: Run, layout: Layout, tlcapture: Run
) -> None:
    from tlcapture import Experiment
    from tlcapture.page.contents import Contents, address, from_address

    ok(extract())
    ok(capture(*EXACT, *STEER, "--variant", "v", "--no-project"))
    ok(tlcapture("project", "--experiment", "exp", "--prompt-set", "short@v"))
    ok(tlcapture("project", "--experiment", "exp", "--all-prompt-sets", "--dynamics-only"))
    assert layout.prompt_sets() == ["short@v"] and layout.prompt_ids("short@v") == ["1", "2", "3"]
    exp = Experiment("exp", layout.root)
    cap = exp.captures("short@v")["1"]
    assert repr(cap).startswith("SavedCapture(short@v/1") and exp.prompt_sets == ["short@v"]
    assert set(exp.to_pandas("short@v", LOUD)["prompt_id"]) == {"1", "2", "3"}
    assert exp.captures["short@v"]["1"].projected(LOUD)[0].prompt_set == "short@v"
    contents = Contents(layout.root)
    assert contents.experiments()[0]["prompt_sets"] == ["short@v"]
    assert [each["text"] for each in contents.prompt_set("exp", "short@v")["prompts"]][:2] == ["hello there", "what?"]
    found = contents.prompt("exp", "short@v", "1")
    assert found["interventions"] == ["steer tone/loud +0.5 at layer 1, from last prompt token"]
    where = {"experiment": "exp", "prompt_set": "general/short@v"}
    path = address("prompt_set", where)
    assert path == "exp/sets/general~short!v"
    assert from_address({"prompt_set": path.rpartition("/")[2]}) == {"prompt_set": "general/short@v"}
    page = layout.root / "page.html"
    ok(tlcapture("view", "--experiment", "exp", "--prompt-set", "short@v", "--export", page))
    assert "short@v" in page.read_text() or page.stat().st_size > 10_000


def test_a_saved_steered_capture_computes_attention_as_its_run_did(capture: Run, extract: Run, layout: Layout) -> None:
    from tlcapture import Experiment

    ok(extract())
    ok(capture(*EXACT, *STEER, "--variant", "v"))
    cap = Experiment("exp", layout.root).captures("short@v")["1"]
    computed = cap.attention(2).patterns
    ok(capture("--replay", "--attention", "--variant", "v"))
    saved = Experiment("exp", layout.root).captures("short@v")["1"].attention(2)
    assert saved.source.endswith(".json") and np.allclose(np.nan_to_num(saved.patterns), computed, atol=1e-3)


def test_the_same_text_keeps_its_number_in_variants(capture: Run, extract: Run, layout: Layout) -> None:
    ok(extract())
    ok(capture(*EXACT, *STEER, "--variant", "v", prompts=("--prompt", "hello")))
    ok(capture(*EXACT, prompts=("--prompt", "bye")))
    ok(capture(*EXACT, *STEER, "--variant", "v", prompts=("--prompt", "bye")))
    ok(capture(*EXACT, prompts=("--prompt", "hello")))
    for name in ("adhoc", "adhoc@v"):
        assert {each: found.metadata["prompt_text"] for each, found in captures(layout, name).items()} == {
            "1": "hello",
            "2": "bye",
        }


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no layers": (
        ("--steer", f"{LOUD}:+0.2"),
        "TRAIT:COEFFICIENT@LAYERS[:WHERE], for example behavioral/refusal:+0.2@16",
    ),
    "no coefficient": (("--steer", f"{LOUD}@1"), "TRAIT:COEFFICIENT@LAYERS[:WHERE]"),
    "no number": (("--steer", f"{LOUD}:much@1"), "'much' is not a number: expected TRAIT:COEFFICIENT@LAYERS"),
    "not finite": (("--steer", f"{LOUD}:nan@1"), "expected a finite number"),
    "a number to ablate": (("--ablate", f"{LOUD}:1@1"), "is not TRAIT@LAYERS[:WHERE]"),
    "no value": (("--cap", f"{LOUD}@1"), "is not TRAIT:VALUE@LAYERS[:WHERE]"),
    "bad layers": (("--ablate", f"{LOUD}@1,x"), "'1,x': expected layers such as 16 or 0,2,5-8, all, or auto"),
    "a range backwards": (("--ablate", f"{LOUD}@2-1"), "'2-1': expected layers"),
    "a place": (("--ablate", f"{LOUD}@1:answer"), "expected prompt, response, thinking or first=N"),
    "no trait": (("--ablate", "loud@1"), "is not of the form category/name"),
    "an unknown trait": (("--ablate", "tone/shy@1"), "no vectors for trait 'tone/shy' in experiment 'exp'; "),
    "a layer too many": (("--ablate", f"{LOUD}@9"), "there is no layer 9: the model has layers 0 to 2"),
    "a name": (("--ablate", f"{LOUD}@1", "--variant", "a b"), "variant 'a b' is not a safe file name"),
    "a long name": (("--ablate", f"{LOUD}@1", "--variant", "a" * 65), "at most 64 characters"),
    "a replay": (
        ("--ablate", f"{LOUD}@1", "--replay", "--attention"),
        "applies the interventions that captures were made",
    ),
    "two variants": (
        ("--ablate", f"{LOUD}@1", "--variant", "a", "--prompt-set", "short@b"),
        "expected the same variant",
    ),
}


@pytest.fixture
def wrong(capture: Run, extract: Run, layout: Layout) -> Run:
    ok(extract())
    return capture


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_is_one_line_that_says_the_right_form(wrong: Run, layout: Layout, what: str) -> None:
    words, expected = WRONG[what]
    result = wrong(*words)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error") or expected in line]
    assert expected in line and not (layout.folder / "inference").exists()


def test_a_missing_vector_of_a_layer_and_one_of_another_width_are_named(
    capture: Run, extract: Run, layout: Layout
) -> None:
    ok(extract())
    folder = layout.folder / f"extraction/{LOUD}/vectors"
    for path in folder.glob("*_layer1.pt"):
        path.unlink()
    result = capture("--ablate", f"{LOUD}@all")
    assert (
        result.exit_code == 1 and "no residual vector of tone/loud" in result.output and "at layer 1" in result.output
    )
    (folder / "metadata.json").unlink()
    for path in folder.glob("*_layer2.pt"):
        torch.save(torch.ones(7), path)
    result = capture("--steer", f"{LOUD}:1@2")
    assert result.exit_code == 1
    assert "has width 7, but the activations have width 32" in result.output


def test_auto_steers_at_the_selected_layer(capture: Run, extract: Run, layout: Layout) -> None:
    from tlcapture.names import Trait
    from tlcapture.traits.selection import select
    from tlcapture.traits.vector_files import VectorFiles

    ok(extract())
    done = ok(capture(*EXACT, "--steer", f"{LOUD}:+0.5@auto", "--variant", "v", "--limit", "1", "--no-project"))
    assert "tone/loud: layer 1 by default" in done.output
    selected = select(VectorFiles(layout, Trait.parse(LOUD)), "residual", tiny.N_LAYERS)
    (record,) = captures(layout, "short@v")["1"].metadata["interventions"]
    assert (record["layers"], record["methods"]) == ([selected.layer], [selected.method])


def test_interventions_of_a_settings_file_come_after_those_of_the_command_line(
    capture: Run, extract: Run, layout: Layout
) -> None:
    ok(extract())
    (layout.root / "tlcapture.toml").write_text(f'[capture]\nablate = ["{LOUD}@0", "{LOUD}@2"]\n')
    ok(capture(*EXACT, *STEER, "--variant", "v", "--limit", "1"))
    records = captures(layout, "short@v")["1"].metadata["interventions"]
    assert [(each["kind"], each["layers"]) for each in records] == [("steer", [1]), ("ablate", [0]), ("ablate", [2])]


def test_a_model_that_does_not_think_is_reported_where_an_intervention_acts_on_thinking(
    capture: Run, extract: Run, layout: Layout
) -> None:
    ok(extract())
    done = ok(capture(*EXACT, "--steer", f"{LOUD}:+0.5@1:thinking", "--variant", "v", "--limit", "1"))
    assert "interventions at :thinking may act at no token" in done.output
    ok(capture(*EXACT, "--limit", "1"))
    (steered, plain) = (captures(layout, name)["1"] for name in ("short@v", "short"))
    assert steered.token_ids == plain.token_ids and torch.equal(steered.residual(2), plain.residual(2))


def test_a_variant_of_projections_alone_is_told_by_its_record(capture: Run, extract: Run, layout: Layout) -> None:
    ok(extract())
    words = (*EXACT, "--projections-only", "--variant", "v")
    ok(capture(*words, *STEER))
    assert not (layout.folder / "inference/raw/residual/short@v").exists() or not layout.captured("short@v")
    again = ok(capture(*words, *STEER, "--skip-existing"))
    assert "3 skipped" in again.output or "nothing" in again.output.lower() or "skipped" in again.output
    refused = capture(*words, "--steer", f"{LOUD}:+0.9@1")
    assert refused.exit_code == 2 and "other interventions" in refused.output
    content: Any = read_json(layout.folder / f"inference/{LOUD}/residual_stream/short@v/1.json")
    assert content["metadata"]["capture"]["interventions"][0]["coefficient"] == 0.5
