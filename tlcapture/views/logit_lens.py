"""The logit lens: what each layer's residual stream would predict if it were the last.

Each layer's `residual_out` goes through the model's own final norm, unembedding, scale and soft cap,
with that layer's own normalisation scale. The last layer is the model's own next-token distribution.

Source: nostalgebraist, "interpreting GPT: the logit lens" (LessWrong, 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

import orjson
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlcapture.errors import InputError
from tlcapture.names import PromptId
from tlcapture.shapes import Logits, Residual
from tlcapture.storage.rounding import PROBABILITY_DIGITS, round_significant, rounded_for_json
from tlcapture.views.hooks import hook
from tlcapture.views.kept_tokens import Positions
from tlcapture.views.vocabulary_scan import GROUP, scanned

TOP_K = 50
_LANES = 128  # of eight bytes; each byte counts to at most 255
# Predictions whose logits over the whole vocabulary are in memory at one time: what stays near in a processor's caches,
# and what keeps all of a GPU busy.
CHUNK, CHUNK_ON_GPU = 128, 1024
_PIECE = 2**23  # logits whose exponentials a GPU has at one time, as many as stay in its cache
_TURNS: dict[torch.device, tuple[Lock, Any]] = {}  # a lock and a stream for each GPU


def logit_lens_hooks(n_layers: int, only: Sequence[int] = ()) -> list[str]:
    """The activations the view reads: of all layers, or `only` of some."""
    return [hook("residual_out", layer) for layer in only or range(n_layers)]


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens:
    """Predictions by layer for every token that has a next one, or for the ones in `positions` alone.

    Of all layers, or of those in `kept` of a model with `n_model_layers`.

    `top_ids` and `top_probs` are the `top_k` likeliest ids and their probabilities, likeliest first;
    `actual_rank` (from 1) and `actual_prob` are those of the actual next token.
    """

    top_ids: Int[Tensor, "n_layers n_predictions top_k"]
    top_probs: Float[Tensor, "n_layers n_predictions top_k"]
    actual_rank: Int[Tensor, "n_layers n_predictions"]
    actual_prob: Float[Tensor, "n_layers n_predictions"]
    positions: Positions | None = None
    kept: tuple[int, ...] | None = None
    n_model_layers: int | None = None

    def __repr__(self) -> str:
        n_layers, n_predictions, top_k = self.top_ids.shape
        return f"LogitLens({n_layers} layers, {n_predictions} predictions, top {top_k})"

    def to_json(
        self, *, tokens: Sequence[str], token_texts: Callable[[Sequence[int]], list[str]], **labels: Any
    ) -> dict[str, Any]:
        """The content of `{id}_logit_lens.json`; `labels` are those of `head`. Probabilities have 4 significant digits.

        The lists `top_k`, nearly all of the content, are encoded already: `write_json` writes fragments unchanged.
        """
        n_layers, n_predictions, top_k = self.top_ids.shape
        numbers = range(n_layers) if self.kept is None else self.kept
        pieces = _pieces_of_json(self.top_ids.flatten().tolist(), self.top_probs, token_texts)
        actual = round_significant(self.actual_prob.numpy(), PROBABILITY_DIGITS).tolist()
        ranks = self.actual_rank.tolist()

        def layer_json(layer: int, column: int) -> dict[str, Any]:
            start = 2 * (layer * n_predictions + column) * top_k
            tops = b"".join(pieces[start : start + 2 * top_k])
            return {
                "layer": numbers[layer],
                "top_k": orjson.Fragment(b"[%b}]" % tops[len(b"},") :]),
                "actual_rank": ranks[layer][column],
                "actual_prob": actual[layer][column],
            }

        after = range(n_predictions) if self.positions is None else self.positions.with_next
        return {
            **self.head(tokens=tokens, **labels),
            "predictions": [
                {
                    "token_idx": token,
                    "actual_next_token": tokens[token + 1],
                    "by_layer": [layer_json(layer, column) for layer in range(n_layers)],
                }
                for column, token in enumerate(after)
            ],
        }

    def head(
        self,
        *,
        prompt_id: PromptId,
        prompt_set: str,
        tokens: Sequence[str],
        n_prompt_tokens: int,
        sample: int | None = None,
    ) -> dict[str, Any]:
        """The content of the file without its predictions."""
        n_layers, _, top_k = self.top_ids.shape
        return {
            **({} if self.kept is None else {"layers": list(self.kept)}),
            **({} if self.positions is None else self.positions.record()),
            "prompt_id": prompt_id,
            **({} if sample is None else {"sample": sample}),
            "prompt_set": prompt_set,
            "tokens": list(tokens),
            "n_prompt_tokens": n_prompt_tokens,
            "n_response_tokens": len(tokens) - n_prompt_tokens,
            "n_layers": self.n_model_layers or n_layers,
            "top_k": top_k,
        }


def logit_lens_view(
    residual_out: Callable[[int], Residual],
    n_layers: int,
    token_ids: Sequence[int],
    unembed: Callable[[Residual], Logits],
    *,
    top_k: int = TOP_K,
    positions: Positions | None = None,
    device: torch.device | None = None,
    only: Sequence[int] = (),
) -> LogitLens:
    """Predictions from the residual stream after every layer of one prompt's run.

    Args:
        residual_out: the `[n_tokens, d_model]` residual stream after a layer, at the tokens in `positions`.
        token_ids: ids of the same tokens, in which the actual next tokens are ranked.
        unembed: the model's final norm, unembedding and soft cap; the tensor that it returns is overwritten.
        top_k: how many predictions of each layer are kept, at least 1.
        positions: the tokens that predictions are made after, as far as they have a next one; `None` means all.
        only: the layers whose predictions are made; all where empty.
        device: where `unembed` computes. Layers go there in chunks, and their predictions come back together.
    """
    if top_k < 1:
        raise InputError(f"top_k is {top_k}: expected at least 1")
    after = range(len(token_ids) - 1) if positions is None else positions.with_next
    next_ids = torch.tensor([token_ids[token + 1] for token in after], dtype=torch.long)
    layers = [residual_out(layer)[: len(next_ids)] for layer in only or range(n_layers)]
    place = torch.device("cpu") if device is None else device

    def predictions(rows: range) -> tuple[Tensor, ...]:
        chunk = _by_layer(rows, len(next_ids))
        residuals = _sent([layers[at][part] for at, part in chunk], place)
        return _predictions(unembed(residuals), _sent([next_ids[part] for _, part in chunk], place), top_k)

    with _on_own_stream(place) as turn:
        size = CHUNK if place.type == "cpu" else CHUNK_ON_GPU
        pieces = list(_in_chunks(predictions, len(layers) * len(next_ids), size, turn))
        shape = (len(layers), len(next_ids))
        columns = [torch.cat(each).unflatten(0, shape).cpu() for each in zip(*pieces, strict=True)]
    top_ids, top_probs, rank, prob = columns
    return LogitLens(top_ids, top_probs, rank, prob, positions, tuple(only) or None, n_layers)


def _in_chunks(
    compute: Callable[[range], tuple[Tensor, ...]], n_rows: int, size: int, turn: AbstractContextManager[object]
) -> Iterator[tuple[Tensor, ...]]:
    """Results for all rows, `size` of them at a time, or fewer where a GPU has no memory for more; one for no rows."""
    start = 0
    while not start or start < n_rows:
        rows, found = range(start, min(start + size, n_rows)), None
        with turn, suppress(torch.OutOfMemoryError) if len(rows) > 1 else nullcontext():
            found = compute(rows)
        if found is None:
            size = len(rows) // 2
            continue
        yield found
        start += max(1, len(rows))


def _by_layer(rows: range, n_predictions: int) -> list[tuple[int, slice]]:
    """Some of the predictions of all layers, which are counted layer by layer: each layer, and its share of them.

    Layers share a chunk, since a few rows take nearly as long as many: the unembedding is read for each chunk.
    """
    width = max(1, n_predictions)
    return [
        (layer, slice(max(0, rows.start - layer * width), min(rows.stop - layer * width, width)))
        for layer in range(rows.start // width, -(-rows.stop // width) or 1)
    ]


@contextmanager
def _on_own_stream(device: torch.device) -> Iterator[AbstractContextManager[object]]:
    """Within the context, a GPU computes on a stream that all threads share; yields the turn to use it for one chunk.

    Logits take much memory, which torch gives again only to work on the same stream: with a stream for each thread,
    the memory of a chunk would be taken by each.
    """
    if device.type != "cuda":
        yield nullcontext()
        return
    if device not in _TURNS:
        _TURNS.setdefault(device, (Lock(), torch.cuda.Stream(device)))
    turn, stream = _TURNS[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield turn


def _sent(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Parts as one tensor on a device: to a GPU through pinned memory, so that the host does not wait for it."""
    pinned = None
    if device.type == "cuda" and parts[0].device.type == "cpu":
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        with suppress(RuntimeError):
            pinned = torch.empty(shape, dtype=parts[0].dtype, pin_memory=True)
    return torch.cat(list(parts), out=pinned).to(device, non_blocking=pinned is not None)


def _pieces_of_json(ids: list[int], probs: Tensor, token_texts: Callable[[Sequence[int]], list[str]]) -> list[bytes]:
    """Top predictions as JSON objects, as many as 150,000 per file, in two pieces each.

    The first piece of an object closes the object before it.
    """
    unique = list(set(ids))
    heads = {
        number: b'},{"token":%b,"prob":' % orjson.dumps(text)
        for number, text in zip(unique, token_texts(unique), strict=True)
    }
    rounded = rounded_for_json(probs.numpy().ravel(), PROBABILITY_DIGITS)
    pieces = [b""] * (2 * len(ids))
    pieces[::2] = map(heads.__getitem__, ids)
    pieces[1::2] = orjson.dumps(rounded, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",") if ids else []
    return pieces


def _predictions(logits: Logits, next_ids: Int[Tensor, " n_predictions"], top_k: int) -> tuple[Tensor, ...]:
    """For each row: ids of the likeliest tokens, their probabilities, rank and probability of the actual token.

    Logits of 16 bits on a GPU, whose memory is what takes time, are read as they are.
    """
    logits = logits if logits.is_cuda and logits.itemsize == 2 else logits.float()
    next_ids = next_ids.to(logits.device)[:, None]
    actual = logits.gather(-1, next_ids)
    scan = scanned(logits, actual[:, 0])
    top_ids = _top(logits, min(top_k, logits.shape[-1]), None if scan is None else scan.maxima)
    ids = torch.cat([next_ids, top_ids], dim=1)
    if scan is not None:
        n_above = scan.n_above
        probs = (logits.gather(-1, ids).float() - scan.largest[:, None]).exp_() / scan.total[:, None]
    else:
        n_above = _n_above(logits, actual)
        probs = (_exponentials if logits.is_cuda else _softmax)(logits, ids)
    return top_ids, probs[:, 1:], n_above + 1, probs[:, 0]


def _softmax(logits: Logits, ids: Int[Tensor, "n_predictions n"]) -> Float[Tensor, "n_predictions n"]:
    """The probabilities of some tokens, the second of which is the likeliest; writes all of them over the logits.

    Nothing else uses the logits, and allocating memory of their size costs as much as the softmax.
    """
    return torch.softmax(logits, dim=-1, out=logits).gather(-1, ids)


def _exponentials(logits: Logits, ids: Int[Tensor, "n_predictions n"]) -> Float[Tensor, "n_predictions n"]:
    """As `_softmax`, which reads the logits of a large vocabulary three times and writes them in 32 bits.

    The exponentials of few rows at a time are added up where they do not leave a GPU's cache.
    """
    chosen = logits.gather(-1, ids).float()
    largest = chosen[:, 1:2]
    n_rows = max(1, min(len(logits), _PIECE // logits.shape[-1]))
    terms = torch.empty(n_rows, logits.shape[-1], dtype=torch.float32, device=logits.device)
    totals = [
        torch.sub(part, most, out=terms[: len(part)]).exp_().sum(dim=-1, keepdim=True)
        for part, most in zip(logits.split(n_rows), largest.split(n_rows), strict=True)
    ]
    return chosen.sub(largest).exp_().div_(torch.cat(totals))


def _top(logits: Logits, top_k: int, maxima: Tensor | None) -> Int[Tensor, "n_predictions top_k"]:
    """Indices of `logits.topk(top_k)`, searched in the `top_k` groups of neighbours with the largest maxima.

    No other group can hold one of the largest, and a group's maximum is cheaper than sorting it. `maxima` are those of
    all groups, `[n_predictions, n_groups]`, if they are known.
    """
    n_groups = logits.shape[-1] // GROUP
    if n_groups <= top_k:
        return logits.topk(top_k, dim=-1).indices
    if maxima is None:
        maxima = logits[:, : n_groups * GROUP].unflatten(-1, (n_groups, GROUP)).amax(dim=-1)
    groups = maxima.topk(top_k, dim=-1, sorted=False).indices.sort(dim=-1).values
    candidates = (groups[..., None] * GROUP + torch.arange(GROUP, device=logits.device)).flatten(1)
    rest = torch.arange(n_groups * GROUP, logits.shape[-1], device=logits.device).expand(len(logits), -1)
    candidates = torch.cat([candidates, rest], dim=1)
    return candidates.gather(-1, logits.gather(-1, candidates).topk(top_k, dim=-1).indices)


def _n_above(logits: Logits, actual: Tensor) -> Int[Tensor, " n_predictions"]:
    """How many logits of each row are above the row's `actual`.

    Booleans are bytes of 0 and 1. They are added eight at a time, as 64-bit integers, which is faster on a CPU than
    `sum`, which widens each boolean first.
    """
    width = logits.shape[-1]
    n_groups = -(-width // (8 * _LANES))
    above = torch.empty(len(logits), n_groups * 8 * _LANES, dtype=torch.bool, device=logits.device)
    above[:, width:] = False
    torch.gt(logits, actual, out=above[:, :width])
    return above.view(torch.int64).unflatten(-1, (n_groups, _LANES)).sum(dim=-1).view(torch.uint8).sum(dim=-1)
