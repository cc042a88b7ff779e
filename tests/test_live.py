"""Invalid arguments of `capture` are one-line errors that state what was expected."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests import tiny
from tlcapture import capture
from tlcapture.errors import InputError

INVALID: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no prompt": ([], {}, "no prompts: give at least one text"),
    "a number": ([3], {}, "expected texts, Prompts or a PromptSet: "),
    "an empty text": ("", {}, "text is empty"),
    "a negative length": ("hi", {"max_new_tokens": -2}, "max_new_tokens is -2: expected at least 0"),
    "a name of vectors": ("hi", {"vectors": "exp"}, r"expected an Experiment, got str: Experiment\('exp'\)"),
    "a missing layer": ("hi", {"layers": [99]}, "99"),
}


@pytest.mark.parametrize("what", INVALID)
def test_an_invalid_argument_is_a_one_line_error(what: str) -> None:
    prompts, options, expected = INVALID[what]
    with pytest.raises(InputError, match=expected) as caught:
        list(capture(tiny.model("llama"), prompts, **{"max_new_tokens": 1, **options}))
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_not_a_number_is_named() -> None:
    """In a process without the type checks of the tests, which would raise first."""
    code = (
        "from tlcapture.errors import InputError; from tlcapture.views.kept_points import KeptPoints\n"
        "for layer in ('x', 1.5, None):\n"
        "    for row in (lambda kept: kept.row(layer, 'residual_out'), lambda kept: kept.layer_row(layer)):\n"
        "        try: row(KeptPoints.of(3))\n"
        "        except InputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["'x'", "'x'", "1.5", "1.5", "None", "None"]
    assert all(line.endswith("the model has layers 0 to 2") for line in lines)
