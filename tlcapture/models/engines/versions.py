"""The installed versions of TransformerLens and transformers, and what to install where they do not fit a model."""

from __future__ import annotations

from tlcapture.version import installed as version

_NEWEST_TRIED = (5, 24)  # of transformers; see `make test-fresh`


def version_advice() -> str:
    """The versions found and the command that may help, to end the refusal of a model with."""
    lens, transformers = version("transformer_lens"), version("transformers")
    if _numbers(transformers) > _NEWEST_TRIED:
        other = f"transformers<{_NEWEST_TRIED[0]}.{_NEWEST_TRIED[1] + 1}"
    else:
        other = "transformer_lens>=4,<5" if _numbers(lens) < (4,) else "transformer_lens<4"
    return f'found TransformerLens {lens} and transformers {transformers}; pip install "{other}" may help'


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
