"""An optional judge for steering: any server with OpenAI's chat completions API.

Without a judge, the default, `trait_mean` comes from likelihoods. A request, one per response, contains the trait's
name and definition, the question and the steered response.
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
        text = _ASK.format(trait=trait, definition=definition, question=question, response=response)
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=self.timeout) as answer:
                content = str(json.load(answer)["choices"][0]["message"]["content"])
        except (URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise TlcaptureError(f"judge {self.url}: no usable answer: {type(error).__name__}: {error}") from None
        number = re.search(r"\d+(?:\.\d+)?", content)
        if number is None or not 0 <= float(number[0]) <= 100:
            raise TlcaptureError(f"judge {self.url}: expected a number from 0 to 100, got {content[:80]!r}")
        return float(number[0]) / 100
