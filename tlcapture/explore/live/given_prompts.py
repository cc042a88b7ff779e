"""What `capture` takes as prompts: texts, conversations, and token ids, such as random tokens that no text has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from tlcapture.errors import InputError
from tlcapture.models.loading import Model
from tlcapture.prompts.prompt_sets import ADHOC, Prompt, PromptSet
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.storage.validation import first_problem

_FORMS = "a list of ids, several of them, or a tensor [n_tokens] or [n_prompts, n_tokens] of integers"

_BYTES = (bytes, bytearray, memoryview)


def as_prompt_set(prompts: Any) -> PromptSet:
    """The prompt set of texts and conversations, numbered from 1; raises `InputError` for anything else."""
    if isinstance(prompts, PromptSet):
        return prompts
    is_table = getattr(prompts, "ndim", 1) > 1  # a data frame, over whose columns' names a loop would go
    if not isinstance(prompts, Iterable) or isinstance(prompts, _BYTES) or is_table:
        raise InputError(f"expected texts, lists of messages, Prompts or a PromptSet: got {type(prompts).__name__}")
    given = [prompts] if isinstance(prompts, str | Mapping | Prompt) else list(prompts)
    if given and all(isinstance(each, Mapping) for each in given):
        given = [given]  # the messages of one conversation
    if not given:
        raise InputError("no prompts: give at least one text")
    try:
        return PromptSet(name=ADHOC, prompts=[_as_prompt(number, each) for number, each in enumerate(given, start=1)])
    except ValidationError as error:
        raise InputError(f"expected texts, lists of messages, Prompts or a PromptSet: {first_problem(error)}") from None


def given_token_ids(prompts: Any) -> list[tuple[int, ...]] | None:
    """The token ids of each prompt, for ids `[n_tokens]` or `[n_prompts, n_tokens]`; `None` for other prompts.

    Raises `InputError` for ids mixed with texts, or for arrays of other shapes or of other numbers than integers.
    """
    if isinstance(prompts, Tensor | np.ndarray):
        return _rows(prompts)
    given = list(prompts) if isinstance(prompts, list | tuple) else []
    if given and all(map(_is_id, given)):
        return [tuple(map(int, given))]
    are_ids = [isinstance(each, Tensor | np.ndarray) or _is_ids(each) for each in given]
    if not any(are_ids):
        return None
    if not all(are_ids):
        raise InputError("expected token ids or texts, but not both at once")
    found = [_rows(each) if isinstance(each, Tensor | np.ndarray) else [tuple(map(int, each))] for each in given]
    return [row for rows in found for row in rows]


def prompt_of_ids(model: Model, number: int, token_ids: tuple[int, ...]) -> TokenizedPrompt:
    """A prompt of these tokens, without a chat template; raises `InputError` for ids that the model does not have."""
    if not token_ids:
        raise InputError(f"prompt {number}: it has no token ids: expected at least one")
    wrong = next((each for each in token_ids if not 0 <= each < model.d_vocab), None)
    if wrong is not None:
        raise InputError(f"prompt {number}: token id {wrong}: expected ids from 0 to {model.d_vocab - 1}")
    text = str(model.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))
    return TokenizedPrompt(ADHOC, str(number), text, text, token_ids, None, chat_template=False)


def _rows(ids: Tensor | np.ndarray) -> list[tuple[int, ...]]:
    values = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids
    if values.dtype.kind not in "iu" or values.ndim not in (1, 2):
        kind = f"{ids.dtype} of shape {list(ids.shape)}"
        raise InputError(f"token ids: expected {_FORMS}, got {kind}")
    return [tuple(row.tolist()) for row in np.atleast_2d(values)]


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def _is_ids(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, *_BYTES))
    return is_list and len(value) > 0 and all(map(_is_id, value))


def _as_prompt(number: int, given: Any) -> Any:
    if isinstance(given, str):
        return Prompt(id=str(number), text=given)
    if isinstance(given, list | tuple):
        return Prompt.model_validate({"id": str(number), "messages": given})
    return given
