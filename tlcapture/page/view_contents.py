"""The page's content of one prompt's views: logit lens, attention, internals, and its layers' contributions."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

import numpy as np

from tlcapture.errors import InputError, TlcaptureError, refused_path
from tlcapture.page import missing
from tlcapture.page.internals import contributions_of, internals_of, internals_of_layer, internals_of_token
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.rounding import rounded_or_none
from tlcapture.views.head_summary import summarised, weights_of
from tlcapture.views.json_files import PerTokenHead
from tlcapture.views.saved_attention import SavedAttention, read_attention
from tlcapture.views.saved_lens import SavedLens, read_lens

_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True)
class ViewContents:
    """The content of a prompt's views, as JSON values; methods raise like those of `Contents`."""

    root: Path

    def problem(self, error: TlcaptureError | OSError) -> str:
        """The message of an error, with paths relative to the root."""
        said = refused_path(error) if isinstance(error, OSError) else error
        return str(said).replace(f"{self.root}/", "", 1)

    def lens(self, experiment: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """The most likely next token, and rank and probability of the actual one, for every token and kept layer."""
        saved = self._lens(experiment, prompt_set, prompt_id)
        found: dict[str, Any] = {name: [] for name in ("token_idx", "actual", "top", "prob", "rank", "actual_prob")}
        for predictions in saved.overview():
            found["token_idx"].append(predictions.token_idx)
            found["actual"].append(predictions.actual_next_token)
            found["top"].append([layer.first.token for layer in predictions.by_layer])
            found["prob"].append([layer.first.prob for layer in predictions.by_layer])
            found["rank"].append([layer.actual_rank for layer in predictions.by_layer])
            found["actual_prob"].append([layer.actual_prob for layer in predictions.by_layer])
        return {**head_content(saved.head), "top_k": saved.head.top_k, **found}

    def lens_token(self, experiment: str, prompt_set: str, prompt_id: str, token: str) -> dict[str, Any]:
        """All predictions of one token."""
        saved = self._lens(experiment, prompt_set, prompt_id)
        return saved.entry(_index(token)).model_dump(exclude_unset=True)

    def attention(self, experiment: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """The content of a prompt's attention file without the patterns."""
        saved = self._attention(experiment, prompt_set, prompt_id)
        return {**head_content(saved.head), "n_heads": saved.head.n_heads, "present_layers": saved.present_layers}

    def attention_token(self, experiment: str, prompt_set: str, prompt_id: str, token: str) -> dict[str, Any]:
        """The attention weights of one query token: `by_layer[layer][head][key]`, null for a layer without any."""
        saved = self._attention(experiment, prompt_set, prompt_id)
        return saved.entry(_index(token)).model_dump(exclude_unset=True)

    def attention_heads(self, experiment: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """What each head attends to on average over the response: `measures[name][layer][head]`.

        Over all tokens if the file has none of the response.
        """
        found = summarised(self._attention(experiment, prompt_set, prompt_id))
        measures = {
            name: [[rounded_or_none(each, 4) for each in row] for row in values]
            for name, values in found.measures.items()
        }
        return {"measures": measures, "n_queries": found.n_queries, "part": found.part}

    def attention_matrix(
        self, experiment: str, prompt_set: str, prompt_id: str, layer: str, head: str
    ) -> dict[str, Any]:
        """The weights of a head, or of the heads' `mean`: for each of the `queries` in turn, of the keys up to it.

        `weights` are float16 in base64. Smaller weights than 6e-8 are 0 there.
        """
        saved = self._attention(experiment, prompt_set, prompt_id)
        rows = list(weights_of(saved, _index(layer, "layer"), None if head == "mean" else _index(head, "head")))
        weights = np.concatenate([row for _, row in rows]) if rows else np.zeros(0)
        packed = base64.b64encode(weights.astype("<f2").tobytes()).decode("ascii")
        return {"queries": [query for query, _ in rows], "weights": packed}

    def contributions(self, experiment: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """The norms of each layer's attention and MLP contributions to the residual stream, by layer and token."""
        return contributions_of(self._layout(experiment), prompt_set, prompt_id)

    def internals(self, experiment: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """The layers whose internals are stored."""
        return internals_of(self._layout(experiment), prompt_set, prompt_id)

    def internals_layer(self, experiment: str, prompt_set: str, prompt_id: str, layer: str) -> dict[str, Any]:
        """The norms of a layer's hooks at every token, and its router's scores."""
        return internals_of_layer(self._layout(experiment), prompt_set, prompt_id, _index(layer, "layer"))

    def internals_token(
        self, experiment: str, prompt_set: str, prompt_id: str, layer: str, token: str
    ) -> dict[str, Any]:
        """The most active neurons of a token at a layer, its heads and its experts."""
        where = (prompt_set, prompt_id, _index(layer, "layer"), _index(token))
        return internals_of_token(self._layout(experiment), *where)

    def tokens_of(self, kind: str, experiment: str, prompt_set: str, prompt_id: str) -> list[int]:
        """Indices of the tokens that `attention` or the logit `lens` has entries for."""
        read: Callable[..., SavedAttention | SavedLens] = self._attention if kind == "attention" else self._lens
        return read(experiment, prompt_set, prompt_id).token_indices

    def _layout(self, experiment: str) -> Layout:
        layout = Layout(self.root, experiment)
        layout.check_exists()
        return layout

    def _attention(self, *where: str) -> SavedAttention:
        return read_attention(self._view_file("attention", *where))

    def _lens(self, *where: str) -> SavedLens:
        return read_lens(self._view_file("logit-lens", *where))

    def _view_file(self, kind: str, experiment: str, prompt_set: str, prompt_id: str) -> Path:
        layout = self._layout(experiment)
        path_of = layout.attention if kind == "attention" else layout.logit_lens
        path = layout.saved(path_of(prompt_set, prompt_id))
        if not lexists(path):
            raise missing.add_on(layout, prompt_set, kind)
        return path


def _index(text: str, what: str = "token") -> int:
    if not _NUMBER.fullmatch(text):
        raise InputError(f"{what} {text[:20]!r}: expected a number")
    return int(text)


def head_content(head: PerTokenHead) -> dict[str, Any]:
    """The page's form of the head of a file of attention or of the logit lens."""
    held = head.positions_held
    kept = {} if held.is_all else {"positions": list(held.kept), "kept": held.described()}
    layers = {} if head.layers is None else {"kept_layers": head.layers}
    return {"tokens": head.tokens, "n_prompt_tokens": head.n_prompt_tokens, "n_layers": head.n_layers, **layers, **kept}
