"""Comparisons as tidy data frames: one row per prompt, token and trait, or per prompt, token and layer.

| column | meaning |
| --- | --- |
| `prompt_set` | the set of `a`, with its variant |
| `prompt_id` | as in the prompt set, a text or a number |
| `sample` | the number of the sample; null for a prompt with one response |
| `token_idx` | index over prompt and response as one sequence |
| `token` | its text |
| `part` | `prompt` or `response` |
| `trait` | `category/name` (`by="trait"`) |
| `layer` | the layer of the trait's vector, or of the residual |
| `difference` | the projection of `b` less that of `a` (`by="trait"`) |
| `cosine`, `norm_ratio` | of `residual_out` at that layer: the angle, and the norm of `b` over that of `a` |
| `kl` | `D(a || b)` of the next token's distribution, in nats |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import nan
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

from tlcapture.commands.compare import CompareOptions, run_compare
from tlcapture.commands.comparing.compared_sets import CaptureSet, compared_sets
from tlcapture.commands.comparing.summary import SavedComparisons
from tlcapture.comparison.comparison_files import ComparisonFile
from tlcapture.errors import InputError, warn_user
from tlcapture.explore.doubts import tell_of_vectors
from tlcapture.names import Trait, split_name
from tlcapture.traits.choice import VectorChoice

if TYPE_CHECKING:
    from pandas import DataFrame

SHARED = ("prompt_set", "prompt_id", "sample", "token_idx", "token", "part")
COLUMNS = {
    "trait": (*SHARED, "trait", "layer", "difference", "cosine", "norm_ratio", "kl"),
    "layer": (*SHARED, "layer", "cosine", "norm_ratio", "kl"),
}
_KINDS = {"token_idx": "int64", "layer": "int64", "sample": "Int64"}
_NUMBERS = ("difference", "cosine", "norm_ratio", "kl")


def compare(
    a: CaptureSet,
    b: CaptureSet,
    *,
    by: str = "trait",
    traits: Iterable[str] | str | None = None,
    layer: SupportsIndex | str = "auto",
    method: str | None = None,
    vectors: str | None = None,
    vector_experiment: str | None = None,
    kl: bool = True,
    device: str = "auto",
) -> DataFrame:
    """Compare captures, keep the comparisons that are current, and return them as a data frame.

    Its `attrs["summary"]` is a list with the summary of each set's comparisons.

    Raises:
        InputError: there is nothing to compare, or an option is wrong.
        TlcaptureError: no pair could be compared; where only some could not, it warns.
    """
    if by not in COLUMNS:
        raise InputError(f"by={by!r}: expected 'trait' or 'layer'")
    named = [traits] if isinstance(traits, str) else list(traits or ())
    choice = VectorChoice(
        layer if isinstance(layer, str) else index(layer),
        method,
        vector_experiment,
        tuple(Trait.parse(name) for name in named),
    )
    sets = compared_sets(a, b)
    report = run_compare(sets, CompareOptions(choice, vectors, kl=kl, device=device, skip_existing=True))
    if report.failures and not report.n_files and not report.n_skipped:
        raise InputError(str(report.failures[0]))
    for text in (*report.warnings, *map(str, report.failures)):
        warn_user(text)
    names = [str(each) for each in choice.traits]
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS[by]}
    summaries = []
    for each in sets:
        found = SavedComparisons(each.a.layout, each.other, each.a.name or "")
        summary = found.summary(partial(_add_rows, columns, each.a.name or "", by, names))
        if summary.left_out is not None:
            warn_user(summary.left_out)
        summaries += [summary] if summary.n_files else []
    frame = _tidy_frame(columns)
    if by == "trait":
        tell_of_vectors(a.layout.root, [vector for each in summaries for vector in each.vectors])
    frame.attrs["summary"] = [each.to_json() for each in summaries]
    return frame


def _tidy_frame(columns: Mapping[str, Sequence[Any]]) -> DataFrame:
    import pandas

    frame = pandas.DataFrame(columns)
    kinds = {name: kind for name, kind in _KINDS.items() if name in columns}
    return frame.astype({**kinds, **{name: "float64" for name in _NUMBERS if name in columns}})


def _add_rows(
    columns: Mapping[str, list[Any]], prompt_set: str, by: str, traits: Sequence[str], name: str, file: ComparisonFile
) -> None:
    """Add the rows of a comparison, which has this name in its set, sorted by trait or layer, and token."""
    for row in _rows(prompt_set, file, by, traits):
        for column, values in columns.items():
            values.append(row[column])


def _rows(prompt_set: str, file: ComparisonFile, by: str, traits: Sequence[str]) -> Iterator[dict[str, Any]]:
    if by == "layer":
        for layer in range(file.metadata.n_layers):
            for token in range(len(file.tokens)):
                yield {**_of_token(prompt_set, file, token), **_of_layer(file, token, layer)}
        return
    for trait, each in file.traits.items():
        if traits and trait not in traits:
            continue
        for token in range(len(file.tokens)):
            difference = each.difference[token]
            own = {"trait": trait, "difference": nan if difference is None else difference}
            yield {**_of_token(prompt_set, file, token), **own, **_of_layer(file, token, each.layer)}


def _of_token(prompt_set: str, file: ComparisonFile, token: int) -> dict[str, Any]:
    kl = None if file.kl is None else file.kl[token]
    sample = file.metadata.sample
    prompt_id = file.metadata.prompt_id
    return {
        "prompt_set": prompt_set,
        "prompt_id": prompt_id if sample is None or isinstance(prompt_id, int) else split_name(str(prompt_id))[0],
        "sample": sample,
        "token_idx": token,
        "token": file.tokens[token],
        "part": "prompt" if token < file.n_prompt_tokens else "response",
        "kl": nan if kl is None else kl,
    }


def _of_layer(file: ComparisonFile, token: int, layer: int) -> dict[str, Any]:
    found: dict[str, Any] = {"layer": layer}
    for name in ("cosine", "norm_ratio"):
        row = getattr(file.residual, name)[token]
        found[name] = nan if row is None or row[layer] is None else row[layer]
    return found
