"""The tokens at which an intervention acts. Loads no torch.

    Where.parse("first=5").of_tokens(n_prompt=3, n_tokens=10)

| where | tokens |
| --- | --- |
| `everywhere` | all of prompt and response |
| `from_last_prompt_token` | the last one of the prompt, and the response |
| `prompt` | all of the prompt |
| `response` | from the first generated token on |
| `thinking` | the response's thinking, from after its opening marker up to the token that completes its closing one |
| `first=N` | the first N of the response |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tlcapture.errors import InputError

FORMS = "prompt, response, thinking or first=N"
_FIRST = re.compile(r"first=([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Where:
    """The tokens of prompt and response at which an intervention acts; `n` belongs to `first=N`."""

    name: str
    n: int = 0

    @classmethod
    def parse(cls, text: str) -> Where:
        """Read one of the forms; raises `InputError` for anything else."""
        if text in _PLAIN:
            return _PLAIN[text]
        found = _FIRST.fullmatch(text)
        if found is None:
            raise InputError(f"{text!r} does not say where to act: expected {FORMS}")
        return cls("first", int(found[1]))

    def __str__(self) -> str:
        return f"first={self.n}" if self.name == "first" else self.name

    @property
    def needs_thinking(self) -> bool:
        """Whether it depends on which tokens are thinking."""
        return self.name == "thinking"

    def of_tokens(self, n_prompt: int, n_tokens: int, thinking: Sequence[bool] = ()) -> list[bool]:
        """Whether it acts at each token of a prompt of `n_prompt` tokens and the response after it.

        `thinking` says which tokens of the response are thinking.
        """
        if self.needs_thinking:
            return [False] * n_prompt + list(thinking)
        start, stop = {
            "everywhere": (0, n_tokens),
            "from_last_prompt_token": (n_prompt - 1, n_tokens),
            "prompt": (0, n_prompt),
            "response": (n_prompt, n_tokens),
            "first": (n_prompt, n_prompt + self.n),
        }[self.name]
        return [start <= token < stop for token in range(n_tokens)]

    def acts_at(self, number: int) -> bool:
        """Whether it acts at a token of the response, counted from 0; -1 is the last one of the prompt.

        Not for `thinking`, which depends on the tokens.
        """
        if number < 0:
            return self.name in ("everywhere", "from_last_prompt_token", "prompt")
        return self.name in ("everywhere", "from_last_prompt_token", "response") or number < self.n


EVERYWHERE, FROM_LAST_PROMPT_TOKEN = Where("everywhere"), Where("from_last_prompt_token")
PROMPT, RESPONSE, THINKING = Where("prompt"), Where("response"), Where("thinking")
_PLAIN = {each.name: each for each in (EVERYWHERE, FROM_LAST_PROMPT_TOKEN, PROMPT, RESPONSE, THINKING)}
