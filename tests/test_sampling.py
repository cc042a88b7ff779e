"""The sampling of a checkpoint's generation config, compared with Hugging Face's `generate`."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import Result

from tests import tiny
from tests.test_parity import as_prompt, random_ids
from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.sampling.checkpoint_sampling import CheckpointSampling, sampling_for, unfollowed
from tlcapture.generation.sampling.next_token import GREEDY, Sampling
from tlcapture.models.loading import Model

N_NEW = 8
PROMPTS = {str(length): random_ids(length, seed=length) for length in (3, 11, 24)}
GREEDY_RULES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "suppress_tokens": {"suppress_tokens": list(range(40, 160))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(20, 200))},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(60, 120)]},
    "sequence_bias": {"sequence_bias": [[[token], 4.0] for token in range(60, 120)]},
    "min_new_tokens": {"min_new_tokens": 5, "sequence_bias": [[[1], 60.0]]},
    "min_length": {"min_length": 20, "sequence_bias": [[[1], 60.0]]},
    "forced_eos_token_id": {"forced_eos_token_id": 1},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 1.9]},
    "several": {"repetition_penalty": 1.3, "suppress_tokens": [50, 51], "no_repeat_ngram_size": 3},
}


def with_config(engine: str, **settings: Any) -> Model:
    """The tiny Llama with a generation config of its own."""
    model = copy.copy(tiny.model("llama", engine))
    model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, **settings)
    return model


def generated(model: Model, sampling: Sampling, batch_size: int = 3, **options: Any) -> dict[str, tuple[int, ...]]:
    prompts = [as_prompt(ids, name) for name, ids in PROMPTS.items()]
    options = {"max_new_tokens": N_NEW, "hooks": [], **options}
    outcomes = list(generate(model, prompts, sampling=sampling, batch_size=batch_size, **options))
    assert all(isinstance(outcome, Generation) for outcome in outcomes)
    return {outcome.prompt.id: outcome.response_ids for outcome in outcomes}


def by_hugging_face(model: Model, ids: list[int], **options: Any) -> list[int]:
    """What `generate` adds to a prompt that runs alone."""
    hf = tiny.hf_model("llama")
    tokens = torch.tensor([ids])
    made = hf.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=copy.deepcopy(model.generation_config),
        max_new_tokens=N_NEW,
        **options,
    )
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("rules", "engine"),
    [*((rules, tiny.ENGINES[0]) for rules in GREEDY_RULES), *(("several", engine) for engine in tiny.ENGINES[1:])],
)
def test_greedy_tokens_under_a_rule_equal_those_of_generate_in_every_batch(rules: str, engine: str) -> None:
    model = with_config(engine, **GREEDY_RULES[rules])
    sampling = sampling_for(CheckpointSampling(), model)
    assert sampling.temperature == 0
    expected = {name: by_hugging_face(model, list(ids)) for name, ids in PROMPTS.items()}
    plain = generated(model, GREEDY)
    assert any(expected[name] != list(plain[name]) for name in PROMPTS)
    for batch_size in (1, 3):
        found = generated(model, sampling, batch_size)
        assert {name: list(ids) for name, ids in found.items()} == expected


SAMPLED_RULES = {
    "defaults of generate": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6, "top_k": 0},
    "min_p": {"min_p": 0.2, "top_k": 0},
    "typical_p": {"typical_p": 0.5, "top_k": 0},
    "several": {"temperature": 1.6, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("rules", SAMPLED_RULES)
def test_sampled_tokens_have_the_distribution_of_generate(rules: str) -> None:
    model = with_config(tiny.ENGINES[0], do_sample=True, **SAMPLED_RULES[rules])
    sampling = sampling_for(CheckpointSampling(), model)
    ids, count = PROMPTS["11"], 3000
    prompts = [as_prompt(ids, str(number)) for number in range(count)]
    drawn = generate(model, prompts, hooks=[], max_new_tokens=1, sampling=sampling, batch_size=500)
    shares = Counter(outcome.response_ids[0] for outcome in drawn)
    scores = tiny.hf_model("llama").generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        generation_config=copy.deepcopy(model.generation_config),
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
    )
    expected = scores.scores[0][0].softmax(-1)
    assert {token for token, share in enumerate(expected.tolist()) if not share}.isdisjoint(shares)
    for token, share in enumerate(expected.tolist()):
        assert shares[token] / count == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5 + 1e-9)


def test_sampling_under_rules_does_not_depend_on_the_batch() -> None:
    model = with_config(tiny.ENGINES[0], do_sample=True, top_p=0.9, repetition_penalty=1.3, no_repeat_ngram_size=2)
    sampling = sampling_for(CheckpointSampling(seed=3), model)
    assert generated(model, sampling, 1) == generated(model, sampling, 2) == generated(model, sampling, 3)


def test_a_temperature_takes_the_place_of_the_checkpoints_own() -> None:
    model = with_config(tiny.ENGINES[0], do_sample=True, temperature=1.5, top_k=7)
    assert sampling_for(CheckpointSampling(), model).temperature == 1.5
    assert sampling_for(CheckpointSampling(temperature=0.2), model).temperature == 0.2
    greedy = sampling_for(CheckpointSampling(temperature=0), model)
    assert generated(model, greedy) == generated(model, GREEDY)
    assert greedy.record()["sampling"] == {"source": "checkpoint"}


def test_near_zero_temperatures_under_rules_choose_the_likeliest_token() -> None:
    model = with_config(tiny.ENGINES[0], do_sample=True, top_p=0.9, top_k=0)
    for temperature in (1e-30, 5e-324):
        sampling = sampling_for(CheckpointSampling(temperature=temperature), model)
        assert generated(model, sampling) == generated(model, GREEDY)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 4}, "num_beams 4"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha 0.6"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens 3"),
        ({"guidance_scale": 1.5}, "guidance_scale 1.5"),
        ({"watermarking_config": {"bias": 2.0}}, "watermarking_config"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    model = with_config(tiny.ENGINES[0], **settings)
    with pytest.raises(InputError, match="cannot be followed") as caught:
        sampling_for(CheckpointSampling(), model)
    assert named in str(caught.value)
    assert named in (unfollowed(GREEDY, model) or "")


def test_values_that_a_rule_cannot_have_are_one_line() -> None:
    for settings in ({"top_p": -1.0, "do_sample": True}, {"repetition_penalty": -2.0}, {"bad_words_ids": [[9999]]}):
        model = with_config(tiny.ENGINES[0])
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        with pytest.raises(InputError, match="the generation config is not valid: ") as caught:
            sampling_for(CheckpointSampling(), model)
        assert "\n" not in str(caught.value)


def test_only_what_would_have_an_effect_is_said_to_be_unfollowed() -> None:
    model = with_config(tiny.ENGINES[0], do_sample=True, top_k=20, repetition_penalty=1.1, temperature=0.6)
    assert "repetition_penalty 1.1, top_k 20 (--sampling checkpoint" in str(unfollowed(Sampling(0.7), model))
    assert "top_k" not in str(unfollowed(GREEDY, model))
    assert unfollowed(sampling_for(CheckpointSampling(), model), model) is None
    assert unfollowed(Sampling(), with_config(tiny.ENGINES[0], do_sample=True, top_p=1.0)) is None


def test_token_0_can_be_forced() -> None:
    model = with_config(tiny.ENGINES[0], forced_eos_token_id=0)
    sampling = sampling_for(CheckpointSampling(), model)
    assert {ids[-1] for ids in generated(model, sampling).values() if len(ids) == N_NEW} == {0}


@pytest.fixture
def penalising_folder(tmp_path: Path, tiny_folder: Path) -> Path:
    folder = shutil.copytree(tiny_folder, tmp_path / "penalising")
    settings = {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.2, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_capture_follows_the_checkpoint_or_says_once_that_it_does_not(
    tlcapture: Callable[..., Result], root: Path, penalising_folder: Path
) -> None:
    words = ("--experiment", "e", "--prompt", "x", "--model", penalising_folder, "--max-new-tokens", 5)
    plain = tlcapture("capture", *words)
    assert plain.stderr.count("the checkpoint's own sampling is not followed: repetition_penalty 1.2, top_p 0.8") == 1
    file = root / "experiments/e/inference/raw/residual/adhoc/1.pt"
    assert "sampling" not in Capture.open(file).metadata
    kept = tlcapture("capture", *words, "--sampling", "checkpoint", "--skip-existing")
    assert "kept the capture of prompt 1 made with another temperature" in kept.stderr
    followed = tlcapture("capture", *words, "--sampling", "checkpoint")
    assert "not followed" not in followed.stderr
    metadata = Capture.open(file).metadata
    assert metadata["temperature"] == 0.9
    rules = {"repetition_penalty": 1.2, "top_k": 50, "top_p": 0.8}
    assert metadata["sampling"] == {"source": "checkpoint", **rules}
    again = tlcapture("capture", *words, "--sampling", "checkpoint", "--skip-existing")
    assert "another temperature" not in again.stderr
