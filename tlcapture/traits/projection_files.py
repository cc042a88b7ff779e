"""What projection files hold, without torch."""

from __future__ import annotations

from typing import Any

from tlcapture.errors import StorageError


def trajectory_of_file(content: Any) -> tuple[list[float], list[float]]:
    """The trajectory that a projection file holds, prompt and response apart.

    Raises `StorageError` for what is no projection file.
    """
    try:
        layer = content["metadata"]["vector_source"]["layer"]
        parts = (content["projections"][part] for part in ("prompt", "response"))
        # Of a layer that was not kept there is null, which no trajectory can be taken from.
        prompt, response = ([float(token[layer][-1]) for token in part] for part in parts)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise StorageError(f"no projection file: {type(error).__name__}: {error}") from None
    return prompt, response
