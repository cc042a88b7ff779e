"""`capture(..., interventions=[...], hooks=[...])` and captures run once more, by closed form."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import tlcapture
from tests import tiny
from tlcapture import Ablate, Cap, Steer, capture
from tlcapture.captures.capture import Capture
from tlcapture.captures.intervention_record import InterventionRecord
from tlcapture.commands.capturing.given_responses import prompt_of
from tlcapture.errors import InputError, StorageError, TlcaptureError, VectorError
from tlcapture.generation.loop import teacher_force
from tlcapture.storage.validation import checked

VECTOR = torch.linspace(-1, 2, tiny.D_MODEL)
UNIT = torch.nn.functional.normalize(VECTOR, dim=0)
TEXTS = ["hello there", "a", "what is a lighthouse for?"]
OPTIONS: Any = {"max_new_tokens": 6, "temperature": 0, "save_dtype": "float32"}
each_engine = pytest.mark.parametrize("engine", tiny.ENGINES)


def captures(model: Any, prompts: Any = TEXTS, **options: Any) -> list[Any]:
    return sorted(capture(model, prompts, **OPTIONS, **options), key=lambda each: str(each.prompt_id))


@each_engine
@pytest.mark.parametrize("batch_size", [1, 3])
def test_steering_with_a_vector_adds_medians_of_the_unsteered_prompts(engine: str, batch_size: int) -> None:
    model = tiny.model("llama", engine)
    plain = captures(model)
    norms = torch.cat([each.prompt.residual.at(1, "residual_out") for each in plain]).norm(dim=-1)
    for cap in captures(model, interventions=[Steer(VECTOR, 0.5, layers=1)], batch_size=batch_size):
        (record,) = cap.metadata["interventions"]
        assert record["typical_norms"] == [pytest.approx(float(norms.quantile(0.5)), rel=1e-5)]
        again = teacher_force(model, cap.token_ids, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
        expected = torch.zeros_like(again)
        expected[len(cap.prompt.tokens) - 1 :] = UNIT * 0.5 * record["typical_norms"][0]
        torch.testing.assert_close(cap.residual(1) - again, expected, atol=2e-4, rtol=1e-4)
        assert cap.metadata["variant"].startswith("steer-vector-0.5-L1-") and cap.capture_set.startswith("adhoc@steer")


@each_engine
def test_the_same_tokens_with_and_without_an_intervention(engine: str) -> None:
    model = tiny.model("llama", engine)
    steered = captures(
        model, interventions=[Steer(VECTOR, 2, layers=0), Ablate(VECTOR, layers=[1, 2], where="response")]
    )
    plain = captures(model, steered)
    again = captures(model, steered, interventions=[Steer(VECTOR, 2, layers=0)])
    for cap, without, other in zip(steered, plain, again, strict=True):
        assert cap.token_ids == without.token_ids == other.token_ids and cap.spans == without.spans
        assert "variant" not in without.metadata and without.metadata["stop_reason"] == cap.metadata["stop_reason"]
        assert without.metadata["tokens_from"]["variant"] == cap.metadata["variant"]
        forced = teacher_force(model, cap.token_ids, ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
        torch.testing.assert_close(without.residual(2), forced, atol=2e-5, rtol=1e-4)
        n_prompt = len(cap.prompt.tokens)
        assert (cap.residual(2, part="response") @ UNIT).abs().max() < 1e-5
        torch.testing.assert_close(other.residual(0), cap.residual(0), atol=2e-5, rtol=1e-4)
        difference = other.residual(0) - without.residual(0)
        assert difference[: n_prompt - 1].abs().max() < 1e-5
        norm = other.metadata["interventions"][0]["typical_norms"][0]
        expected = (2 * norm * UNIT).expand(len(cap.tokens) - n_prompt + 1, -1)
        torch.testing.assert_close(difference[n_prompt - 1 :], expected, atol=2e-5, rtol=1e-4)


@each_engine
def test_attention_of_a_steered_capture_is_that_of_the_steered_model(engine: str) -> None:
    model = tiny.model("llama", engine)
    (cap,) = captures(model, TEXTS[2], interventions=[Steer(VECTOR, 5, layers=0, where="prompt")])
    (plain,) = captures(model, [cap])

    def add(activation: Any, hook: Any) -> Any:
        length = 5 * cap.metadata["interventions"][0]["typical_norms"][0]
        activation[:, : len(cap.prompt.tokens)] += length * UNIT.to(activation.device)
        return activation

    name = "blocks.1.attn.hook_pattern"
    with model.tl.hooks(fwd_hooks=[("blocks.0.hook_resid_post", add)]):
        expected = teacher_force(model, cap.token_ids, [name])[name].numpy()
    assert abs(cap.attention(1).patterns - expected).max() < 1e-5
    assert abs(plain.attention(1).patterns - expected).max() > 1e-2


THINKING_TEMPLATE = (
    "{% for message in messages %}{% if message.reasoning_content is defined %}◁hm▷{{ message.reasoning_content }}◁/hm▷"
    "{% endif %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}◁hm▷{% endif %}"
)


@each_engine
@pytest.mark.parametrize("templated", [True, False])
def test_tokens_run_again_are_thinking_where_they_were_when_they_were_generated(
    engine: str, templated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts that the chat template rendered: nothing else reveals these markers, which are many tokens."""
    model = tiny.model("llama", engine)
    monkeypatch.setattr(model, "tokenizer", tiny.tokenizer(chat_template=THINKING_TEMPLATE))
    change = {"interventions": [Steer(VECTOR, 2, layers=0, where="thinking")]}
    text = TEXTS[0] if templated else f"{TEXTS[0]}◁hm▷"
    (steered,) = captures(model, text, chat_template=templated, **change)
    (plain,), (again,) = captures(model, [steered]), captures(model, [steered], **change)
    n_prompt = len(steered.prompt.tokens)
    differs = (steered.residual(0) - plain.residual(0)).abs().amax(dim=1) > 1e-3
    assert differs.tolist() == [templated and token >= n_prompt for token in range(len(steered.tokens))]
    torch.testing.assert_close(again.residual(2), steered.residual(2), atol=2e-5, rtol=1e-4)
    forced = prompt_of(steered._captured)
    assert forced.chat_template == templated and forced.opening.endswith("◁hm▷") == templated


@each_engine
def test_own_hooks_act_and_are_recorded_by_name(engine: str) -> None:
    model = tiny.model("llama", engine)

    def negated(activation: Any, hook: Any) -> Any:
        return -activation

    (cap,) = captures(model, TEXTS[0], hooks=[("blocks.2.hook_resid_post", negated)])
    plain = teacher_force(model, cap.token_ids, ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    torch.testing.assert_close(cap.residual(2), -plain, atol=2e-5, rtol=1e-4)
    (record,) = cap.metadata["interventions"]
    assert record["hook"] == "blocks.2.hook_resid_post" and not record["replayable"]
    assert record["function"].endswith("negated") and cap.metadata["variant"].startswith("hook-")
    (several,) = captures(
        model, TEXTS[0], hooks=[(lambda name: name.endswith("hook_resid_post"), negated)], variant="v"
    )
    assert len(several.metadata["interventions"]) == tiny.N_LAYERS and several.metadata["variant"] == "v"


def test_a_steered_capture_is_saved_and_opened_with_its_interventions(tmp_path: Any) -> None:
    (cap,) = captures(tiny.model("llama"), TEXTS[0], interventions=[Cap(VECTOR, 0.5, layers="all", where="first=2")])
    cap.save(tmp_path / "1.pt")
    saved = Capture.open(tmp_path / "1.pt")
    assert saved.metadata == cap.metadata and saved.capture_set == cap.capture_set
    (record,) = saved.metadata["interventions"]
    assert (record["layers"], record["value"], record["where"]) == ([0, 1, 2], 0.5, "first=2")


def test_reprs_say_what_they_are_and_survive_a_pickle() -> None:
    expected = {
        "Steer('behavioral/refusal', +0.2, layers='16')": Steer("behavioral/refusal", 0.2, 16),
        "Steer('behavioral/refusal', -3, layers='0,2,5-8', where='response')": Steer.parse(
            "behavioral/refusal:-3@0,2,5-8:response"
        ),
        "Ablate('behavioral/refusal', layers='all')": Ablate("behavioral/refusal", "all"),
        "Cap('tone/loud', 1.5, layers='auto', where='first=5')": Cap("tone/loud", 1.5, where="first=5"),
        f"Ablate(<vector of {tiny.D_MODEL}>, layers='1,2')": Ablate(VECTOR, [2, 1]),
    }
    for text, each in expected.items():
        assert repr(each) == text and repr(pickle.loads(pickle.dumps(each))) == text
    assert Steer.parse("a/b:+0.2@16") == Steer("a/b", 0.2, layers=(16,)) != Steer("a/b", 0.2, layers=15)


def nothing(activation: Any, hook: Any) -> None:
    return None


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no experiment": (lambda: [Steer("a/b", 1, 1)], {}, "name the experiment with vectors of a/b"),
    "a layer too many": (lambda: [Ablate(VECTOR, 9)], {}, "there is no layer 9: the model has layers 0 to 2"),
    "a width": (lambda: [Ablate(VECTOR[:-1], 0)], {}, "a vector of width 31, but the model has width 32"),
    "a zero vector": (lambda: [Ablate(0 * VECTOR, 0)], {}, "the vector is zero"),
    "a matrix": (lambda: [Ablate(torch.ones(2, 2), 0)], {}, "expected a trait such as"),
    "no layer": (lambda: [Ablate(VECTOR)], {}, "has no selected layer"),
    "a coefficient": (lambda: [Steer(VECTOR, float("inf"), 0)], {}, "expected a finite number"),
    "no coefficient": (lambda: [Steer(VECTOR, cast(Any, None), 0)], {}, "Steer: coefficient None: expected a finite"),
    "a text for a value": (lambda: [Cap(VECTOR, cast(Any, "x"), 0)], {}, "Cap: value 'x': expected a finite number"),
    "negative": (lambda: [Ablate(VECTOR, -1)], {}, "expected layers such as"),
    "half a layer": (lambda: [Ablate(VECTOR, 1.5)], {}, "layers 1.5: expected layers such as"),
    "a place": (lambda: [Ablate(VECTOR, 0, "answer")], {}, "expected prompt, response, thinking or first=N"),
    "no intervention": (lambda: ["a/b"], {}, "expected Steer(...), Ablate(...) or Cap(...)"),
    "no hook": (lambda: [], {"hooks": [("blocks.9.hook_resid_post", nothing)]}, "the model has no hook"),
    "no pair": (lambda: [], {"hooks": ["blocks.0.hook_resid_post"]}, "expected pairs of a hook name and a function"),
    "no function": (lambda: [], {"hooks": [("blocks.0.hook_resid_post", 3)]}, "expected pairs"),
    "a mixture": (lambda: [], {"prompts": ["a", "captures"]}, "captures, whose tokens are run again, or prompts"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_one_line(what: str) -> None:
    make, options, expected = WRONG[what]
    model, prompts = tiny.model("llama"), options.pop("prompts", TEXTS[0]) if "prompts" in options else TEXTS[0]
    if isinstance(prompts, list):
        prompts = ["a", *captures(model, TEXTS[0])]
    with pytest.raises((InputError, VectorError)) as caught:
        captures(model, prompts, interventions=make(), **options)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_captures_of_another_tokenizer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    found = captures(model, TEXTS[0])
    other = tiny.tokenizer()
    other.add_tokens(["hello"])
    monkeypatch.setattr(model, "tokenizer", other)
    found[0].prompt.tokens[3] = "hello"
    with pytest.raises(TlcaptureError, match="another tokenizer"):
        captures(model, found)


def test_the_interventions_are_public_names() -> None:
    assert {"Steer", "Ablate", "Cap"} <= set(tlcapture.__all__)


def test_a_damaged_record_is_named_with_its_field() -> None:
    steer = {
        "kind": "steer",
        "trait": "tone/loud",
        "experiment": "exp",
        "methods": ["probe"],
        "layers": [1],
        "vector_digests": ["00"],
        "where": "response",
        "coefficient": 0.5,
    }
    hook = {"kind": "hook", "hook": "blocks.0.hook_resid_post", "function": "mine.f", "replayable": False}
    for whole in (steer, hook):
        checked(InterventionRecord, whole, Path("x.json"), "projection")
    damaged = [{key: value for key, value in steer.items() if key != name} for name in steer if name != "trait"]
    damaged += [{**hook, "function": None}, {**steer, "kind": "tilt"}, {**steer, "typical_norms": [1.0, 2.0]}, {}]
    for each in damaged:
        with pytest.raises(StorageError, match=r"x.json: not a valid projection file: ") as caught:
            checked(InterventionRecord, each, Path("x.json"), "projection")
        assert "\n" not in str(caught.value)
