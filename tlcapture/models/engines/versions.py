"""The installed versions of TransformerLens and transformers, and what to install where they do not fit a model."""

from __future__ import annotations

from tlcapture.version import installed as version

_NEWEST_TRIED = (5, 24)  # of transformers; see `make test-fresh`
# Architectures with an adapter in TransformerLens 4 alone. Of all others neither version has one, or both have.
ADDED_IN_4 = ("MuseGlimmerForConditionalGeneration",)


def found_versions() -> str:
    """The installed versions, in words."""
    return f"found TransformerLens {version('transformer_lens')} and transformers {version('transformers')}"


def version_advice() -> str:
    """The versions found and the command that may help, to end the refusal of a model with."""
    if _numbers(version("transformers")) > _NEWEST_TRIED:
        other = f"transformers<{_NEWEST_TRIED[0]}.{_NEWEST_TRIED[1] + 1}"
    else:
        other = "transformer_lens>=4,<5" if _numbers(version("transformer_lens")) < (4,) else "transformer_lens<4"
    return f'{found_versions()}; pip install "{other}" may help'


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
