"""The page's content of a prompt's layers: each one's contribution to the residual stream, and its stored internals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcapture.captures.capture_names import check_place
from tlcapture.errors import InputError, StorageError
from tlcapture.page import missing
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.tensor_arrays import read_arrays
from tlcapture.storage.validation import of_form
from tlcapture.views.hooks import HOOKS, POINTS, hook, is_pattern

_MOST_NEURONS = 30
_DIGITS = 5
_FIRST, _MIDDLE, _LAST = POINTS


def contributions_of(layout: Layout, prompt_set: str, prompt_id: str) -> dict[str, Any]:
    """The norms of each layer's attention and MLP contributions to the residual stream, and of the stream after it.

    `attn`, `mlp` and `stream` are `[layer][token]` over the kept `layers` and `tokens`; null for what was not kept.
    Raises `MissingError` without a raw file, and `StorageError` if it is damaged.
    """
    content, path = _capture(layout, prompt_set, prompt_id)
    with of_form(path, "raw residual file"):
        parts = [content[part]["activations"] for part in ("prompt", "response")]
        layers = sorted(parts[0])
        found: dict[str, list[Any]] = {"attn": [], "mlp": [], "stream": []}
        for layer in layers:
            at = {point: _joined(parts, layer, point) for point in POINTS}
            found["attn"].append(_norms(at[_MIDDLE], at[_FIRST]))
            found["mlp"].append(_norms(at[_LAST], at[_MIDDLE]))
            found["stream"].append(_norms(at[_LAST], 0))
        held = (_joined(parts, layers[0], point) for point in POINTS)
        tokens = _positions(content, next(len(each) for each in held if each is not None))
    return {"layers": layers, "tokens": tokens, **found}


def internals_of(layout: Layout, prompt_set: str, prompt_id: str) -> dict[str, Any]:
    """The layers whose internals are stored; raises `MissingError` if none are."""
    layers = sorted(int(path.stem.rpartition("_L")[2]) for path in layout.all_internals(prompt_set, prompt_id))
    if not layers:
        raise missing.internals(layout, prompt_set)
    return {"layers": layers}


def _internals_form(of: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Refuse an internals file whose content has another form than its reader `of` expects."""

    @wraps(of)
    def read(layout: Layout, prompt_set: str, prompt_id: str, layer: int, *more: Any) -> dict[str, Any]:
        with of_form(layout.internals(prompt_set, prompt_id, layer), "internals file"):
            return of(layout, prompt_set, prompt_id, layer, *more)

    return read


@_internals_form
def internals_of_layer(layout: Layout, prompt_set: str, prompt_id: str, layer: int) -> dict[str, Any]:
    """The norm of every hook at every token, `hooks[name]` with its `shape` and `norms`, and the `router` scores.

    `tokens` are those that are stored; `router` is `[expert][token]`, null where the layer has no experts, and
    `n_neurons` the width of the MLP's activations.
    """
    content = _internals(layout, prompt_set, prompt_id, layer)
    hooks, n_rows = {}, 0
    for kind in HOOKS:
        name = hook(kind, layer)
        if name in content and not is_pattern(name):
            values = _floats(content[name])
            n_rows = len(values)
            norms = _rounded(np.sqrt(np.square(values).sum(axis=tuple(range(1, values.ndim)))))
            hooks[name.removeprefix(f"blocks.{layer}.")] = {"shape": list(values.shape), "norms": norms}
    router, neurons = content.get(hook("router_scores", layer)), content.get(hook("mlp_post", layer))
    return {
        "hooks": hooks,
        "tokens": _positions(content, n_rows),
        "n_neurons": None if neurons is None else int(neurons.shape[-1]),
        "router": None if router is None else [_rounded(row) for row in _floats(router).T],
    }


@_internals_form
def internals_of_token(layout: Layout, prompt_set: str, prompt_id: str, layer: int, token: int) -> dict[str, Any]:
    """A token at a layer: its most active `neurons`, the norms of the outputs of its `heads`, and its `experts`.

    `share` is the listed neurons' share of the squared norm of all activations. Parts that the layer does not have
    are null. Raises `InputError` for a token that is not stored.
    """
    content = _internals(layout, prompt_set, prompt_id, layer)
    known = {kind: content.get(hook(kind, layer)) for kind in ("mlp_post", "mlp_pre", "mixed_values", "router_scores")}
    rows = _positions(content, max((len(each) for each in known.values() if each is not None), default=0))
    if token not in rows:
        raise InputError(f"token {token} is not stored in the internals of layer {layer}")
    at = {kind: None if each is None else _floats(each[rows.index(token)]) for kind, each in known.items()}
    heads, scores = at["mixed_values"], at["router_scores"]
    return {
        **_neurons(at["mlp_post"], at["mlp_pre"]),
        "heads": None if heads is None else _rounded(np.sqrt(np.square(heads).sum(axis=-1))),
        "experts": None if scores is None else _experts(scores),
    }


def _neurons(post: NDArray[Any] | None, pre: NDArray[Any] | None) -> dict[str, Any]:
    if post is None:
        return {"neurons": None, "share": None}
    order = np.argsort(-np.abs(post), kind="stable")[:_MOST_NEURONS]
    total = float(np.square(post).sum())
    before = None if pre is None or pre.shape != post.shape else pre
    rows = [
        {"neuron": int(n), "post": _short(post[n]), "pre": None if before is None else _short(before[n])} for n in order
    ]
    return {"neurons": rows, "share": _short(np.square(post[order]).sum() / total) if total else None}


def _experts(scores: NDArray[Any]) -> list[dict[str, Any]]:
    """All experts, the one with the highest router score first; `share` is its softmax."""
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    order = np.argsort(-scores, kind="stable")
    return [{"expert": int(n), "score": _short(scores[n]), "share": _short(shares[n])} for n in order]


def _internals(layout: Layout, prompt_set: str, prompt_id: str, layer: int) -> Mapping[str, Any]:
    """The content of a layer's file, checked to have the tokens of the capture next to it."""
    path = layout.internals(prompt_set, prompt_id, layer)
    if not path.is_file():
        raise missing.internals(layout, prompt_set)
    content = read_arrays(path, whole=True)
    names = [name for name in content if str(name).startswith(f"blocks.{layer}.")] if isinstance(content, dict) else []
    if not names or not all(isinstance(content[name], np.ndarray) and content[name].ndim for name in names):
        raise StorageError(f"{path}: not a valid internals file: it holds no activations of layer {layer}")
    n_rows = {len(content[name]) for name in names if not is_pattern(name)}
    stated = content.get("positions")
    if len(n_rows) > 1 or (stated is not None and n_rows - {len(stated)}):
        raise StorageError(f"{path}: not a valid internals file: its activations have different numbers of tokens")
    raw = layout.residual(prompt_set, prompt_id)
    if raw.is_file() and content.get("token_ids") != _token_ids(read_arrays(raw)):
        raise StorageError(f"{path}: its tokens differ from the capture's: make it again with --replay")
    found: Mapping[str, Any] = content
    return found


def _token_ids(content: Any) -> Any:
    try:
        return [*content["prompt"]["token_ids"], *content["response"]["token_ids"]]
    except (KeyError, TypeError, IndexError):  # also of another array than a dict
        return None


def _capture(layout: Layout, prompt_set: str, prompt_id: str) -> tuple[Any, Path]:
    path = layout.residual(prompt_set, prompt_id)
    if not path.is_file():
        raise missing.raw(layout, prompt_set)
    content = read_arrays(path, whole=True)
    check_place((content.get("metadata") or {}) if isinstance(content, dict) else {}, path)
    return content, path


def _positions(content: Mapping[str, Any], n_rows: int) -> list[int]:
    """The tokens of the rows of a file's activations."""
    stated = content.get("positions", (content.get("metadata") or {}).get("positions"))
    if stated is None:
        return list(range(n_rows))
    tokens = [int(each) for each in stated]
    if len(tokens) != n_rows:
        raise ValueError("as many rows as positions")
    return tokens


def _joined(parts: Iterable[Mapping[int, Mapping[str, Any]]], layer: int, point: str) -> NDArray[Any] | None:
    """The activations of prompt and response at a point; `None` if it was not kept."""
    found = [_floats(part[layer][point]) for part in parts if point in part[layer]]
    return np.concatenate(found) if found else None


def _norms(after: NDArray[Any] | None, before: NDArray[Any] | int | None) -> list[float] | None:
    if after is None or before is None:
        return None
    return _rounded(np.sqrt(np.square(after - before).sum(axis=1)))


def _floats(values: NDArray[Any]) -> NDArray[np.float64]:
    return values.astype(np.float64)


def _rounded(values: NDArray[Any]) -> list[float]:
    return [_short(value) for value in values.tolist()]


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
