"""Several responses to a prompt, each with its own random numbers, that share the keys and values of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tlcapture.errors import InputError
from tlcapture.names import capture_name
from tlcapture.prompts.tokenization import TokenizedPrompt


def check_samples(samples: Any) -> None:
    """Raise `InputError` unless this is a number of samples, or `None` for one response without a number."""
    if samples is not None and (type(samples) is not int or samples < 1):
        raise InputError(f"samples {samples!r}: expected a whole number of at least 1")


def check_names(prompt_set: str, ids: Sequence[object], samples: int | None) -> None:
    """Raise `InputError` where a sample of one prompt would have the name of another prompt."""
    known = set(map(str, ids))
    for prompt_id in ids if samples else ():
        for sample in range(1, (samples or 0) + 1):
            name = str(capture_name(str(prompt_id), sample))
            if name in known:
                raise InputError(
                    f"{prompt_set}: prompt {name} has the name of sample {sample} of prompt {prompt_id}: rename one, "
                    "or leave out --samples"
                )


def sampled(prompts: Sequence[TokenizedPrompt], samples: int | None) -> list[TokenizedPrompt]:
    """Each prompt once per sample, numbered from 1; the prompts unchanged if `samples` is `None`."""
    if samples is None:
        return list(prompts)
    return [replace(prompt, sample=sample) for prompt in prompts for sample in range(1, samples + 1)]


def n_together(prompts: Sequence[TokenizedPrompt], most: int, start: int = 0) -> int:
    """How many prompts from `start` on run together: up to `most`, with samples of a prompt together if possible."""
    end = last = min(start + most, len(prompts))
    while start < end < len(prompts) and _is_same(prompts[end - 1], prompts[end]):
        end -= 1
    return (end if end > start else last) - start


def by_prompt(prompts: Sequence[TokenizedPrompt]) -> list[list[int]]:
    """The indices of prompts in order, those of samples of one prompt as one list."""
    groups: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        if groups and _is_same(prompts[index - 1], prompt):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _is_same(one: TokenizedPrompt, other: TokenizedPrompt) -> bool:
    """Whether two are samples of one prompt."""
    are_samples = one.sample is not None and other.sample is not None
    return are_samples and (one.prompt_set, one.id, one.read_ids) == (other.prompt_set, other.id, other.read_ids)
