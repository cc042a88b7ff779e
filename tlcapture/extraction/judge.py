"""An optional judge for steering: any server with OpenAI's chat completions API.

Without a judge, the default, `trait_mean` comes from likelihoods. A request, one per response, contains the trait's
name and definition, the question and the steered response; or it is the trait's own `eval_prompt`, with the question
and the response in place of `{question}` and `{answer}`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from urllib.error import URLError
from urllib.request import Request, urlopen

from tlcapture.errors import InputError, TlcaptureError

_ASK = (
    "On a scale from 0 (not at all) to 100 (entirely), how much does the response show this trait?\n\n"
    "Trait: {trait}\n{definition}\n\nQuestion: {question}\nResponse: {response}\n\nAnswer with the number alone."
)


@dataclass(frozen=True)
class Judge:
    """A judge at a base URL, for example http://127.0.0.1:8000/v1; a key is read from OPENAI_API_KEY.

    `timeout` is in seconds. Raises `InputError` for a URL that is not http or https.
    """

    url: str
    model: str = "default"
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"--judge {self.url!r}: expected an http or https address")

    def score(self, *, trait: str, definition: str, question: str, response: str) -> float:
        """How much a response shows a trait, 0 to 1.

        Raises `TlcaptureError` if the server does not answer with a number from 0 to 100.
        """
        values = {"trait": trait, "definition": definition, "question": question, "response": response}
        return self._number(self._answer(_filled(_ASK, values)))

    def score_by(self, eval_prompt: str, *, question: str, response: str) -> float | None:
        """The score of a response, 0 to 1, that an `eval_prompt` asks for; `None` if the judge answers REFUSAL.

        Raises `TlcaptureError` if the server answers with anything but that word or a number from 0 to 100.
        """
        answer = self._answer(_filled(eval_prompt, {"question": question, "answer": response}))
        return None if answer.strip(" .\"'*[]").upper() == "REFUSAL" else self._number(answer)

    def _answer(self, text: str) -> str:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=self.timeout) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"])
        except (URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise TlcaptureError(f"judge {self.url}: no usable answer: {type(error).__name__}: {error}") from None

    def _number(self, content: str) -> float:
        number = re.search(r"\d+(?:\.\d+)?", content)
        if number is None or not 0 <= float(number[0]) <= 100:
            raise TlcaptureError(f"judge {self.url}: expected a number from 0 to 100, got {content[:80]!r}")
        return float(number[0]) / 100


def _filled(text: str, values: dict[str, str]) -> str:
    """The text with values in place of `{name}`; other braces, and those in the values, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)
