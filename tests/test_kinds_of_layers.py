"""Latent attention, experts, and hybrids with other mixers than attention, next to Hugging Face's modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from click.testing import Result
from torch import Tensor

from tests import tiny
from tests.conftest import quick_evaluations
from tests.families import build
from tests.test_parity import as_prompt, random_ids, relative
from tlcapture.captures.capture import Capture
from tlcapture.captures.capture_names import INDEX
from tlcapture.commands.evaluating.reference import keep_reference
from tlcapture.errors import InputError, ModelError, StorageError
from tlcapture.extraction.readout import Reading, read_out
from tlcapture.generation.loop import generate, teacher_force
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.recording.recorder import Recorder
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.checkpoints.checkpoint import cast
from tlcapture.models.engines.hook_layouts import BY_HEAD, FLAT, PLAIN, layouts
from tlcapture.models.loading import Model, from_hugging_face
from tlcapture.page.contents import Contents
from tlcapture.runs.run import Run
from tlcapture.storage.archives import Archive
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_tensors
from tlcapture.traits.projections.token_scores import TokenScores
from tlcapture.traits.statistics.reference import read_reference
from tlcapture.views.attention import attention_hooks, attention_view
from tlcapture.views.hooks import hook
from tlcapture.views.internals import internals_hooks
from tlcapture.views.residual import residual_hooks, residual_view

BOUND = 1e-4
# Two prompts of different length; one has as many tokens as there are heads, the other fewer.
LENGTHS = (4, 3)


@cache
def hf_model(family: str) -> Any:
    return build(family)


@cache
def model(family: str) -> Model:
    source = copy.deepcopy(hf_model(family))
    return from_hugging_face(source, tiny.tokenizer(), name=f"tiny {family}")


def generated(family: str, hooks: Sequence[str]) -> list[Generation]:
    prompts = [as_prompt(random_ids(length, seed=length), str(length)) for length in LENGTHS]
    greedy = Sampling(temperature=0)
    outcomes = list(generate(model(family), prompts, hooks=hooks, max_new_tokens=4, sampling=greedy))
    assert all(isinstance(outcome, Generation) for outcome in outcomes)
    return outcomes  # type: ignore[return-value]


def seen_by_hugging_face(family: str, token_ids: Sequence[int], *modules: str, inputs: bool = False) -> list[Tensor]:
    """Outputs (or inputs) `[n_tokens, ...]` of modules of the Hugging Face model in one pass over the tokens."""
    found: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def keep(module: Any, args: Any, options: Any, output: Any) -> None:
            given = args[0] if args else options.get("hidden_states")
            value = given if inputs else output[0] if isinstance(output, tuple) else output
            found[name] = value.flatten(0, -2)

        return keep

    reference = hf_model(family)
    handles = [reference.get_submodule(name).register_forward_hook(record(name), with_kwargs=True) for name in modules]
    with torch.no_grad():
        reference(torch.tensor([list(token_ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [found[name] for name in modules]


@pytest.mark.parametrize("family", ["DeepSeek-V2", "DeepSeek-V3", "Youtu"])
def test_internals_of_latent_attention_lie_token_by_token_and_equal_hugging_face(family: str) -> None:
    runs = model(family)
    config = hf_model(family).config
    heads, nope, d_value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    for generation in generated(family, internals_hooks(0, runs.hook_names)):
        n_tokens = len(generation.token_ids)
        names = [f"model.layers.0.self_attn.{name}" for name in ("q_b_proj", "kv_b_proj")]
        queries, latent = (each.unflatten(-1, (heads, -1)) for each in seen_by_hugging_face(
            family, generation.token_ids, *names
        ))  # fmt: skip
        (mixed,) = seen_by_hugging_face(family, generation.token_ids, "model.layers.0.self_attn.o_proj", inputs=True)
        cache = generation.cache
        for name, expected in (
            # The part of queries and keys that is not rotated; the rest is rotated here and not yet there.
            ("query", queries[..., :nope]),
            ("key", latent[..., :nope]),
            ("value", latent[..., nope:]),
            ("mixed_values", mixed.unflatten(-1, (heads, d_value))),
        ):
            ours = cache[hook(name, 0)]
            assert ours.shape[:2] == (n_tokens, heads)
            assert relative(ours[..., : expected.shape[-1]], expected) < BOUND, name


EXPERTS = {
    "Mixtral": "mlp",
    "Qwen3 MoE": "mlp",
    "DeepSeek-V3": "mlp",
    "gpt-oss": "mlp",
    "Qwen3-Next": "mlp",
    "Jamba": "feed_forward",
    "LFM2 MoE": "feed_forward",
    "Llama 4": "feed_forward",
    "HunYuan MoE": "mlp",
}


@pytest.mark.parametrize("family", list(EXPERTS))
def test_router_scores_and_boundaries_of_experts_equal_hugging_face(family: str) -> None:
    """The oracle of the scores is the output `router_logits` of the whole model."""
    layer, module = 1, f"model.layers.1.{EXPERTS[family]}"
    names = internals_hooks(layer, model(family).hook_names)
    assert not {hook("mlp_pre", layer), hook("mlp_post", layer)} & set(names)
    for generation in generated(family, names):
        cache = generation.cache
        with torch.no_grad():
            tokens = torch.tensor([generation.token_ids])
            out = hf_model(family)(tokens, use_cache=False, output_router_logits=True)
        scores = cache[hook("router_scores", layer)]
        assert scores.shape == (len(generation.token_ids), 4)
        assert relative(scores, out.router_logits[-1].reshape(scores.shape)) < BOUND
        (before,) = seen_by_hugging_face(family, generation.token_ids, module, inputs=True)
        (after,) = seen_by_hugging_face(family, generation.token_ids, module)
        assert relative(cache[hook("experts_in", layer)], before) < BOUND
        assert relative(cache[hook("experts_out", layer)], after) < BOUND


def test_dense_layers_next_to_experts_keep_their_neurons() -> None:
    names = internals_hooks(0, model("DeepSeek-V3").hook_names)
    assert {hook("mlp_pre", 0), hook("mlp_post", 0)} <= set(names)
    assert not {hook("experts_in", 0), hook("router_scores", 0)} & set(names)


def test_attention_sinks_leave_rows_that_sum_to_less_than_1() -> None:
    runs, ids = model("gpt-oss"), random_ids(9)
    patterns = attention_view(teacher_force(runs, ids, attention_hooks(runs.n_layers, runs.hook_names)), 2).patterns
    with torch.no_grad():
        theirs = hf_model("gpt-oss")(torch.tensor([ids]), output_attentions=True).attentions
    assert float(patterns.sum(dim=-1).min()) < 0.9
    assert relative(patterns, torch.cat(list(theirs))) < BOUND


def test_gated_queries_are_recorded_without_their_gate() -> None:
    ids = random_ids(9)
    (both,) = seen_by_hugging_face("Qwen3-Next", ids, "model.layers.1.self_attn.q_proj")
    config = hf_model("Qwen3-Next").config
    query = both.unflatten(-1, (config.num_attention_heads, -1))[..., : config.head_dim]
    assert relative(teacher_force(model("Qwen3-Next"), ids, [hook("query", 1)])[hook("query", 1)], query) < BOUND


# The module whose output each of two layers adds to the residual stream first.
MIXERS = {
    "Qwen3-Next": ("model.layers.0.linear_attn", "model.layers.1.self_attn"),
    "Qwen3.5": ("model.layers.0.linear_attn", "model.layers.1.self_attn"),
    "LFM2": ("model.layers.0.conv", "model.layers.1.self_attn"),
    "LFM2 MoE": ("model.layers.0.conv", "model.layers.1.self_attn"),
    "Jamba": ("model.layers.0.mamba", "model.layers.1.self_attn"),
    "Bamba": ("model.layers.0.mamba", "model.layers.1.self_attn"),
    "OLMo Hybrid": ("model.layers.0.linear_attn", "model.layers.1.post_attention_layernorm"),
}
RECURRENT = {
    "Mamba": ("backbone.layers.0.mixer", "backbone.layers.1.mixer"),
    "Mamba 2": ("backbone.layers.0.mixer", "backbone.layers.1.mixer"),
}


@pytest.mark.parametrize("family", [*MIXERS, *RECURRENT])
def test_after_attn_is_residual_in_plus_the_output_of_the_mixer(family: str) -> None:
    runs = model(family)
    has_attention = family in MIXERS
    assert runs.attention_layers == ((1,) if has_attention else ())
    assert not runs.has_parallel_blocks
    hooks = residual_hooks(runs.n_layers, runs.hook_names, attn_out=has_attention)
    for generation in generated(family, hooks):
        mixers = seen_by_hugging_face(family, generation.token_ids, *(MIXERS | RECURRENT)[family])
        stream = residual_view(
            generation.cache, runs.n_layers, attn_out=has_attention, with_attention=runs.with_attention
        )
        for layer, mixed in enumerate(mixers):
            assert relative(stream.at(layer, "after_attn") - stream.at(layer, "residual_in"), mixed) < BOUND
        if has_attention:
            assert relative(stream.at(1, "attn_out"), mixers[1]) < BOUND
            with pytest.raises(InputError, match="layer 0 has no attention: attn_out has layer 1"):
                stream.at(0, "attn_out")


@pytest.mark.parametrize("family", ["Jamba", "Qwen3-Next", "Mamba", "Falcon-H1"])
def test_means_of_examples_that_begin_alike_are_those_of_each_example_alone(family: str) -> None:
    """Examples share their first tokens, which run once; recurrent layers must not begin anew after them."""
    start = random_ids(6)
    readings = [Reading((*start, *random_ids(5, seed=seed)), 7, 11, "response_mean") for seed in (1, 2)]
    together = read_out(model(family), readings, ["residual"])["residual"]
    alone = [read_out(model(family), [reading], ["residual"])["residual"] for reading in readings]
    assert relative(together, torch.cat(alone, dim=1)) < BOUND


def test_an_activation_that_does_not_lie_token_by_token_is_refused() -> None:
    recorder = Recorder(["blocks.0.attn.hook_q"], [5, 3], 4)
    for shape in ((2, 4, 5, 8), (10, 8), (2,), (1, 5, 8)):
        with pytest.raises(InputError, match=r"blocks\.0\.attn\.hook_q does not lie token by token"):
            recorder.record([0, 1], {"blocks.0.attn.hook_q": torch.zeros(shape)})


def test_layouts_are_found_whatever_the_other_axes_are() -> None:
    """Widths that equal the numbers of prompts or tokens of a pass do not confuse."""

    def shapes_of(n_prompts: int, n_tokens: int) -> dict[str, tuple[int, ...]]:
        return {
            **{f"plain {width}": (n_prompts, n_tokens, width) for width in range(1, 9)},
            **{f"heads {width}": (n_prompts, width, n_tokens, width) for width in range(1, 9)},
            **{f"flat {width}": (n_prompts * n_tokens, width) for width in range(1, 13)},
            "frequencies": (1, n_tokens, 4),
            "last token": (n_prompts, 4),
        }

    found = layouts(shapes_of)
    assert {name.split()[0]: layout for name, layout in found.items()} == {
        "plain": PLAIN,
        "heads": BY_HEAD,
        "flat": FLAT,
    }
    assert len(found) == 8 + 8 + 12


def test_the_reference_of_a_hybrid_is_zero_at_layers_without_attention(tmp_path: Path) -> None:
    layout, hybrid = Layout(tmp_path, "e"), model("LFM2")
    with quick_evaluations():
        keep_reference(Run.silent(layout), hybrid, ["attn_out"])
    found = read_reference(layout, "attn_out")
    assert found is not None and found.fits(hybrid.n_layers, hybrid.d_model)
    assert [bool(means.any()) for means in found.response_means] == [False, True]


# -- commands ------------------------------------------------------------------------------------------------------

CAPTURE = ("capture", "--experiment", "e", "--prompt", "abcdef", "--temperature", 0, "--max-new-tokens", 4)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Save a family as a checkpoint."""

    def save(family: str) -> Path:
        path = tmp_path / "checkpoint"
        hf_model(family).save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
        return path

    return save


@pytest.mark.parametrize("family", ["Qwen3-Next", "LFM2"])
def test_a_hybrid_is_captured_projected_and_shown_with_everything(
    family: str, folder: Callable[[str], Path], root: Path, tlcapture: Callable[..., Result]
) -> None:
    experiment = root / "experiments" / "e"
    for component, width in (("", 32), ("attn_out_", 32)):
        vectors = experiment / "extraction/tone/loud/vectors"
        vectors.mkdir(parents=True, exist_ok=True)
        torch.save(torch.randn(width), vectors / f"{component}probe_layer1.pt")
    add_ons = ("--attention", "--logit-lens", "--layer-internals", "all", "--capture-attn", "--layer", 1)
    result = tlcapture(*CAPTURE, "--model", folder(family), *add_ons)
    assert result.exit_code == 0, result.output
    raw = experiment / "inference/raw/residual/adhoc/1.pt"
    stored = read_tensors(raw)
    for part in ("prompt", "response"):
        assert "attn_out" not in stored[part]["activations"][0] and "attn_out" in stored[part]["activations"][1]
    assert stored["metadata"]["attention_layers"] == [1]
    assert INDEX in Archive(raw)
    resaved = experiment / "resaved.pt"
    torch.save(stored, resaved)  # without an index
    for path in (raw, resaved):
        capture = Capture.open(path)
        assert capture.residual(1, "attn_out").shape == capture.residual(0).shape
        with pytest.raises(InputError, match="layer 0 has no attention"):
            capture.residual(0, "attn_out")
    del stored["prompt"]["activations"][1]["attn_out"], stored["response"]["activations"][1]["attn_out"]
    for part in ("prompt", "response"):
        stored[part]["activations"][0]["attn_out"] = stored[part]["activations"][0]["residual_out"].clone()
    torch.save(stored, resaved)
    with pytest.raises(StorageError, match="attn_out of layer 0: expected layer 1"):
        Capture.open(resaved)
    resaved.unlink()

    n_tokens = len(capture.tokens)
    attention = json.loads((experiment / "analysis/per_token/adhoc/1_attention.json").read_text())
    assert all(entry["by_layer"][0] is None for entry in attention["attention"])
    assert [len(entry["by_layer"][1][0]) for entry in attention["attention"]] == list(range(1, n_tokens + 1))
    lens = json.loads((experiment / "analysis/per_token/adhoc/1_logit_lens.json").read_text())
    assert [[layer["layer"] for layer in entry["by_layer"]] for entry in lens["predictions"]] == [[0, 1]] * (
        n_tokens - 1
    )
    for layer in (0, 1):
        internals = read_tensors(experiment / f"inference/raw/internals/adhoc/1_L{layer}.pt")
        assert (hook("pattern", layer) in internals) == (layer == 1)
        assert len(internals[hook("residual_out", layer)]) == n_tokens

    both = [
        TokenScores.read(experiment / f"inference/tone/loud/{stream}/adhoc/1.json")
        for stream in ("residual_stream", "attn_stream")
    ]
    assert [list(scores.layers) for scores in both] == [[0, 1], [1]]
    contents = Contents(root)
    assert contents.attention("e", "adhoc", "1")["n_heads"] == 4
    shown = orjson.loads(orjson.dumps(contents.attention_token("e", "adhoc", "1", "3")))
    assert shown["by_layer"][0] is None and len(shown["by_layer"][1][0]) == 4
    assert tlcapture("view", "--experiment", "e", "--export", root / "page.html").exit_code == 0
    assert tlcapture("project", "--experiment", "e", "--prompt-set", "adhoc", "--component", "attn_out").exit_code == 0
    again = tlcapture(*CAPTURE, *add_ons, "--skip-existing")
    assert again.exit_code == 0 and "0 files" in again.output.replace("nothing", "0 files"), again.output


def test_a_model_without_attention_is_captured_and_says_what_it_has_not(
    folder: Callable[[str], Path], root: Path, tlcapture: Callable[..., Result]
) -> None:
    checkpoint = folder("Mamba")
    result = tlcapture(*CAPTURE, "--model", checkpoint, "--logit-lens", "--layer-internals", 0)
    assert result.exit_code == 0, result.output
    internals = read_tensors(root / "experiments/e/inference/raw/internals/adhoc/1_L0.pt")
    assert internals[hook("mixer_out", 0)].isfinite().all()
    for option, what in (("--attention", "no attention patterns"), ("--capture-attn", "no attn_out")):
        refused = tlcapture(*CAPTURE, "--overwrite", option)
        assert refused.exit_code != 0
        assert what in refused.output and "Traceback" not in refused.output


@pytest.mark.parametrize("family", ["Qwen3-Next", "LFM2", "Jamba", "Mamba", "DeepSeek-V3"])
def test_the_estimate_of_attention_and_raw_files_fits_what_is_written(
    family: str, folder: Callable[[str], Path], root: Path, tlcapture: Callable[..., Result]
) -> None:
    """Layers without attention have no weights in JSON; a long prompt, so that what they would add shows."""
    path = folder(family)
    add_ons = () if family == "Mamba" else ("--attention",)
    words = ("capture", "--experiment", "e", "--prompt", "abcdef" * 20, "--max-new-tokens", 1)
    options = (*words, "--model", path, *add_ons)
    said = json.loads(tlcapture(*options, "--dry-run", "--json").stdout)["estimate"]
    assert tlcapture(*options).exit_code == 0
    written = {"raw residual": "inference/raw/residual/adhoc/1.pt"}
    if add_ons:
        written["attention"] = "analysis/per_token/adhoc/1_attention.json"
    for kind, name in written.items():
        ratio = said["kinds"][kind]["bytes"] / (root / "experiments/e" / name).stat().st_size
        assert 0.7 < ratio < 1.4, (kind, ratio)


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("family", ["Mamba", "Jamba", "RWKV", "Zamba2"])
def test_doctor_says_what_it_cannot_check(
    family: str, folder: Callable[[str], Path], tlcapture: Callable[..., Result]
) -> None:
    result = tlcapture("doctor", "--model", folder(family))
    assert "Traceback" not in result.output
    if family in ("RWKV", "Zamba2"):
        assert result.exit_code == 2
        assert "has no blocks." in result.output
        return
    assert result.exit_code == 0, result.output
    expected = {
        "Mamba": "no layer has attention: there are no patterns and no attn_out",
        "Jamba": "at layer 1, the others have no attention",
    }
    assert expected[family] in result.output


def test_an_encoder_and_decoder_is_refused_by_name(
    folder: Callable[[str], Path], tlcapture: Callable[..., Result]
) -> None:
    result = tlcapture(*CAPTURE, "--model", folder("T5"))
    assert result.exit_code != 0
    assert "has an encoder and a decoder (T5ForConditionalGeneration)" in result.output


def test_a_hook_that_does_not_lie_token_by_token_is_refused_by_the_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = from_hugging_face(copy.deepcopy(hf_model("Mixtral")), tiny.tokenizer(), name="tiny", engine="bridge")
    monkeypatch.setattr(runs, "_layouts", {})
    with pytest.raises(ModelError, match=r"blocks\.0\.attn\.hook_q of MixtralForCausalLM does not lie token by token"):
        teacher_force(runs, random_ids(5), [hook("query", 0)])


@pytest.mark.parametrize("family", ["Falcon Mamba", "Mamba 2"])
def test_a_residual_stream_in_float32_may_be_rounded_as_the_weights_are(family: str) -> None:
    """Tolerated as float32, it was refused: its layers compute in bfloat16."""
    hf = copy.deepcopy(hf_model(family))
    cast(hf, torch.bfloat16)
    runs = from_hugging_face(hf, tiny.tokenizer(), name="tiny", engine="bridge")
    name = hook("residual_out", 0)
    assert runs.dtype == torch.bfloat16
    assert teacher_force(runs, random_ids(5), [name])[name].dtype == torch.float32
