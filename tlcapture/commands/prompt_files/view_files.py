"""Writing the files of attention and of the logit lens: as JSON, or in the compact form if JSON would be too large.

Only one form of a file exists: the other is removed once the new one is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tlcapture.commands.prompt_files.view_parts import ViewParts
from tlcapture.models.sizes import Measures
from tlcapture.storage.compact.compact_files import (
    MOST_JSON,
    PER_PREDICTION,
    PER_WEIGHT,
    is_compact,
    is_written_compact,
)
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import Written, remove, write_json
from tlcapture.text import format_bytes
from tlcapture.views.attention import attention_head, attention_view, triangle
from tlcapture.views.cache import Cache
from tlcapture.views.hooks import attention_layers, hook
from tlcapture.views.kept_tokens import Positions
from tlcapture.views.logit_lens import LogitLens
from tlcapture.views.saved_attention import write_attention
from tlcapture.views.saved_lens import write_lens

WENT_COMPACT = (
    f"files that would exceed {format_bytes(MOST_JSON)} as JSON were written in the compact form (.safetensors), "
    "which all commands read; --format json writes JSON"
)


def weights_in_memory(form: str | None) -> int | None:
    """The most attention weights of a prompt that are kept in memory while it runs; `None` for any number.

    Up to this number the file may be JSON, which is made in memory; requested JSON always is.
    """
    return None if form == "json" else int(MOST_JSON / PER_WEIGHT)


def n_attention_weights(measures: Measures, parts: ViewParts, tokens: Positions) -> int:
    """The number of attention weights that are kept of some tokens, in all layers or in those of `parts`."""
    n_layers = len(parts.attention_layers) or measures.n_attention_layers or measures.n_layers
    return n_layers * measures.n_heads * sum(token + 1 for token in tokens.kept)


def write_attention_file(
    layout: Layout,
    path: Path,
    names: dict[str, Any],
    cache: Cache,
    n_layers: int,
    positions: Positions,
    parts: ViewParts,
) -> Written:
    """Write a prompt's attention patterns, whose JSON path is `path`.

    `names` are the keyword arguments of `attention_head`; `parts` says which layers are kept, and in which form.
    """
    only = parts.attention_layers
    layers = [layer for layer in attention_layers(n_layers, cache.keys()) if not only or layer in only]
    n_heads = next(triangle(cache, hook("pattern", layers[0]))).shape[1]
    n_weights = len(layers) * n_heads * sum(query + 1 for query in positions.kept)
    compact = is_written_compact(parts.form, n_weights * PER_WEIGHT)
    with _alone(layout, path, compact=compact) as target:
        if not compact:
            return write_json(target, attention_view(cache, n_layers, only).only(positions).to_json(**names))
        head = attention_head(n_layers, n_heads, positions, only or None, **names)
        return write_attention(target, head, positions, layers, lambda layer: triangle(cache, hook("pattern", layer)))


def write_lens_file(
    layout: Layout,
    path: Path,
    names: dict[str, Any],
    lens: LogitLens,
    token_texts: Callable[[Sequence[int]], list[str]],
    form: str | None,
) -> Written:
    """Write a prompt's logit lens, whose JSON path is `path`, in a form of `ViewParts`."""
    compact = is_written_compact(form, lens.top_ids.numel() * PER_PREDICTION)
    with _alone(layout, path, compact=compact) as target:
        if not compact:
            return write_json(target, lens.to_json(**names, token_texts=token_texts))
        tops, ranks, probs = (lens.top_ids.numpy(), lens.top_probs.numpy()), lens.actual_rank, lens.actual_prob
        return write_lens(target, lens.head(**names), *tops, ranks.numpy(), probs.numpy(), token_texts)


@contextmanager
def _alone(layout: Layout, path: Path, *, compact: bool) -> Iterator[Path]:
    """The path of one form of a file, which is written within the context; afterwards the other form is removed."""
    json, other = layout.forms(path)
    yield other if compact else json
    remove([json if compact else other])


def went_compact(written: Written, form: str | None) -> bool:
    """Whether a file was written in the compact form without having been asked for."""
    return form is None and is_compact(written.path)
