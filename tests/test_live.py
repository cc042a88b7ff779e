"""Invalid arguments of `capture` are one-line errors that state what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tlcapture import Experiment, Prompt, PromptSet, capture
from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError
from tlcapture.generation.sampling.checkpoint_sampling import CheckpointSampling
from tlcapture.views.kept_points import KeptPoints

INVALID: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no prompt": ([], {}, "no prompts: give at least one text"),
    "a number": ([1.5], {}, "expected texts, lists of messages, Prompts or a PromptSet: "),
    "a single number": (3, {}, "expected texts, lists of messages, Prompts or a PromptSet: got int"),
    "ids and texts": ([[1, 2], "hi"], {}, "expected token ids or texts, but not both at once"),
    "a table": (pd.DataFrame({"text": ["hi"]}), {}, "expected texts, lists of messages, .*: got DataFrame"),
    "bytes": (b"hi", {}, "expected texts, lists of messages, .*: got bytes"),
    "a list of bytes": ([b"hi"], {}, 'expected {"id", "text"} or {"id", "messages"}, found a bytes'),
    "ids that are no integers": (torch.rand(3), {}, r"expected a list of ids, .* got torch.float32 of shape \[3\]"),
    "ids of three axes": (np.ones((1, 2, 3), int), {}, r"expected a list of ids, .* got int64 of shape \[1, 2, 3\]"),
    "no ids": (torch.zeros(0, dtype=torch.long), {}, "prompt 1: it has no token ids: expected at least one"),
    "a negative id": ([[1, 2], [1, -2]], {}, "prompt 2: token id -2: expected ids from 0 to "),
    "an id that no row has": ([1, 10**9], {}, "prompt 1: token id 1000000000: expected ids from 0 to "),
    "ids with a system prompt": ([1], {"system_prompt": "x"}, "token ids are read as they are: leave out "),
    "an empty text": ("", {}, "text is empty"),
    "a negative length": ("hi", {"max_new_tokens": -2}, "max_new_tokens is -2: expected a whole number, at least 0"),
    "a length as text": ("hi", {"max_new_tokens": "2"}, "max_new_tokens is '2': expected a whole number"),
    "layers as text": ("hi", {"layers": "1,2"}, "layers '1,2': expected numbers from 0 to 2"),
    "a name of vectors": ("hi", {"vectors": "exp"}, r"expected an Experiment, got str: Experiment\('exp'\)"),
    "a missing layer": ("hi", {"layers": [99]}, "99"),
    "a bool as layer": ("hi", {"layers": True}, "layers True: expected numbers from 0 to 2"),
    "tokens that are no text": ("hi", {"tokens": 5}, "5 does not name tokens: expected response, last, first:N or A:B"),
    "a batch of none": ("hi", {"batch_size": 0}, "batch_size 0: expected a whole number of at least 1, or None"),
    "a negative batch": ("hi", {"batch_size": -1}, "batch_size -1: expected a whole number of at least 1, or None"),
    "a batch of a half": ("hi", {"batch_size": 1.5}, "batch_size 1.5: expected a whole number of at least 1, or None"),
    "a seed as text": ("hi", {"seed": "1"}, "seed '1': expected a whole number of at most 64 bits"),
    "a huge seed": ("hi", {"seed": 2**63}, "seed 9223372036854775808: expected a whole number of at most 64 bits"),
}


@pytest.mark.parametrize("what", INVALID)
def test_an_invalid_argument_is_a_one_line_error(what: str) -> None:
    prompts, options, expected = INVALID[what]
    with pytest.raises(InputError, match=expected) as caught:
        list(capture(tiny.model("llama"), prompts, **{"max_new_tokens": 1, **options}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", ["x", 1.5, None])
def test_a_layer_that_is_no_number_is_named(layer: Any) -> None:
    with pytest.raises(InputError, match=f"layer {layer!r} is not a number: the model has layers 0 to 2"):
        KeptPoints.of(3).row(layer, "residual_out")


def test_numbers_and_texts_of_numpy_are_stored_as_those_of_python(tmp_path: Path) -> None:
    """A file with NumPy's own could not be opened."""
    numbers: dict[str, Any] = {"seed": np.int64(3), "temperature": np.float32(0.5), "top_k": np.int64(9)}
    numbers |= {"top_p": np.float64(0.9), "stop": list(np.array(["zz"])), "layers": np.arange(1, 3)}
    (found,) = capture(tiny.model("llama"), "hi", max_new_tokens=np.int64(1), batch_size=np.int64(1), **numbers)
    found.save(tmp_path / "1.pt")
    metadata = torch.load(tmp_path / "1.pt", weights_only=True)["metadata"]
    assert (metadata["seed"], metadata["temperature"], metadata["layers"]) == (3, 0.5, [1, 2])
    assert type(metadata["max_new_tokens"]) is int
    assert metadata["sampling"] == {"source": "plain", "top_k": 9, "top_p": 0.9, "stop": ["zz"]}
    given = {"top_p": np.float64(0.9)}
    assert type(CheckpointSampling(seed=np.int64(3), given=given).seed) is int  # type: ignore[arg-type]
    assert Capture.open(tmp_path / "1.pt").kept.layers == (1, 2)


def test_one_layer_and_one_point_need_no_list() -> None:
    (found,) = capture(tiny.model("llama"), "hi", max_new_tokens=1, layers=1, points="residual_out", internals=2)
    assert (found.kept.layers, found.kept.points) == ((1,), ("residual_out",))


def test_a_system_prompt_that_is_given_takes_the_place_of_a_prompts_own() -> None:
    """As `--system-prompt` does."""
    messages = [{"role": "system", "content": "be rude"}, {"role": "user", "content": "hi"}]
    asked = PromptSet(
        name="mine", prompts=[Prompt(id=1, messages=messages), Prompt(id=2, text="hi", system_prompt="x")]
    )
    for given, expected in ((None, ["be rude", "x"]), ("be kind", ["be kind"] * 2)):
        found = capture(tiny.model("llama"), asked, max_new_tokens=1, system_prompt=given)
        assert [each.metadata["system_prompt"] for each in found] == expected


def test_a_direction_of_ones_own_is_projected_onto_the_tokens_that_are_kept() -> None:
    (found,) = capture(tiny.model("llama"), "hi", max_new_tokens=6, tokens="-2:", save_dtype="float32")
    direction = torch.randn(found.d_model, generator=torch.Generator().manual_seed(0))
    projection = found.project(direction, layer=1)
    assert projection.trajectory.isnan().tolist() == [True] * (len(found.tokens) - 2) + [False] * 2
    torch.testing.assert_close(projection.trajectory[-2:], found.residual(1) @ direction / direction.norm())
    assert (projection.selection.layer, projection.selection.method) == (1, "own")


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_token_ids_are_read_as_they_are_and_saved_captures_of_them_run_again(engine: str, tmp_path: Path) -> None:
    model = tiny.model("llama", engine)
    drawn = torch.randint(1, model.d_vocab, (2, 6), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([drawn, drawn], dim=1)
    found = sorted(
        capture(model, ids, max_new_tokens=2, temperature=0, save_dtype="float32"), key=lambda cap: cap.prompt_id
    )
    assert [list(cap.token_ids[:12]) for cap in found] == ids.tolist()
    with torch.no_grad():
        expected = tiny.hf_model("llama")(ids, output_hidden_states=True).hidden_states
    for row, cap in enumerate(found):
        for layer in range(model.n_layers - 1):  # the last one is normed there
            torch.testing.assert_close(cap.residual(layer)[:12], expected[layer + 1][row], atol=1e-5, rtol=1e-4)
    found[0].save(tmp_path / "experiments" / "exp")
    saved = Experiment("exp", root=tmp_path).captures["adhoc"].at(0)
    (again,) = capture(model, saved, save_dtype="float32")
    torch.testing.assert_close(again.residual(1), saved.residual(1), atol=1e-5, rtol=1e-4)
    for given in (ids[0].tolist(), tuple(ids[0].tolist()), ids[0].numpy(), [ids[0]], [ids[0].tolist()], ids[:1]):
        (one,) = capture(model, given, max_new_tokens=0)
        assert list(one.token_ids) == ids[0].tolist()
