"""A capture: the tokens and activations of one prompt and its response, as an object and as a file.

    capture = Capture.open(path)
    capture.response.tokens
    capture.residual(5, "residual_out")        # [n_tokens, d_model], prompt and response as one sequence

The file is opened memory-mapped: activations are read only when they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlcapture.captures.capture_names import INDEX, CaptureNames, check_place
from tlcapture.captures.format import FORMAT_VERSION, CaptureContent, PartContent, held_of_part
from tlcapture.captures.index import index_record, read_index
from tlcapture.coloured_tokens import ColouredTokens
from tlcapture.errors import InputError, NumericalError, StorageError
from tlcapture.models.checkpoints.finite_weights import remedy
from tlcapture.names import PromptId
from tlcapture.prompts.spans import TokenSpan, labels_of
from tlcapture.shapes import Residual
from tlcapture.storage.archives import Row
from tlcapture.storage.files import Hook, Written, read_tensors, write_tensors
from tlcapture.text import counted
from tlcapture.views.cache import stacked
from tlcapture.views.hooks import point_named
from tlcapture.views.kept_points import KeptPoints, from_the_end, point_index
from tlcapture.views.kept_tokens import Positions, stated_positions
from tlcapture.views.residual import ResidualStream

SAVE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class CapturedPart:
    """Prompt or response: its text, its tokens, and the residual stream at each of them.

    `positions` are the indices within the part of those tokens whose activations are held; `None` means all.
    """

    text: str
    tokens: list[str]
    token_ids: list[int]
    residual: ResidualStream = field(repr=False)
    positions: tuple[int, ...] | None = None

    def _repr_html_(self) -> str:
        return ColouredTokens(self.tokens, 0)._repr_html_()

    def __post_init__(self) -> None:
        n_held = len(self.tokens if self.positions is None else self.positions)
        if len(self.tokens) != len(self.token_ids) or n_held != self.residual.n_tokens:
            raise StorageError(
                f"a part with {len(self.tokens)} tokens, {len(self.token_ids)} ids and activations of "
                f"{self.residual.n_tokens} tokens: numbers must be equal"
            )

    def only(self, positions: Sequence[int]) -> CapturedPart:
        """A copy of the part that holds the activations of some of its tokens only."""
        rows = positions if self.positions is None else [self.positions.index(each) for each in positions]
        return replace(self, residual=self.residual.select(rows), positions=tuple(positions))


@dataclass(frozen=True, eq=False)
class Capture(CaptureNames):
    """One prompt's capture. `metadata` is the metadata of the file format.

        cap.id, cap.sample, cap.name, cap.prompt_id, cap.prompt_set, cap.capture_set
        cap.text, cap.response.text, cap.tokens[-1], cap.token_ids[-1], cap.n_tokens == len(cap)
        cap.n_layers, cap.d_model, cap.kept.layers, cap.positions.kept, cap.lacks_answer
        cap.metadata["temperature"]

    `spans` say which tokens of prompt and response are which turn, thinking or answer; files of earlier versions
    have none.
    """

    prompt: CapturedPart
    response: CapturedPart
    metadata: Mapping[str, Any] = field(repr=False)
    spans: tuple[TokenSpan, ...] = field(default=(), kw_only=True, repr=False)

    def __repr__(self) -> str:
        tokens = f"{len(self.prompt.tokens)} + {len(self.response.tokens)} tokens"
        if turns := self.metadata.get("messages"):
            tokens = f"a conversation of {counted(len(turns), 'message')}, {tokens}"
        return f"{type(self).__name__}({self.capture_set}/{self.name}, {tokens}, {self.response.text[:60]!r})"

    def _repr_html_(self) -> str:
        facts = [
            f"{self.capture_set}/{self.name}",
            str(self.metadata["inference_model"]),
            f"{len(self.prompt.tokens)} prompt and {len(self.response.tokens)} response tokens",
            f"{self.n_layers} layers" + ("" if self.kept.is_all else f", {self.kept.described()}"),
            *([] if self.positions.is_all else [self.positions.described()]),
        ]
        if self.metadata.get("engine") and self.metadata.get("dtype"):
            facts.append(f"{self.metadata['engine']} in {self.metadata['dtype']}")
        if self.metadata.get("stop_reason"):
            facts.append(f"ended by {self.metadata['stop_reason']}")
        return self.coloured_by_part(", ".join(facts))._repr_html_()

    def coloured_by_part(self, label: str = "") -> ColouredTokens:
        """The tokens in the colours of their spans, or of prompt and response where there are none.

        Example:
            cap.coloured_by_part()
        """
        labels = labels_of(self.spans, len(self.tokens)) if self.spans else ()
        return ColouredTokens(self.tokens, len(self.prompt.tokens), label=label, spans=labels)

    @property
    def id(self) -> PromptId:
        """Id of the prompt in its set, `prompt_id`."""
        return self.prompt_id

    @property
    def text(self) -> str:
        """Prompt and response as one text, as the model read and wrote it."""
        return self.prompt.text + self.response.text

    @property
    def n_tokens(self) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompt.tokens) + len(self.response.tokens)

    def __len__(self) -> int:
        return self.n_tokens

    def __bool__(self) -> bool:
        return True  # also where it has no tokens

    @property
    def n_layers(self) -> int:
        """Layers of the model, whether kept or not."""
        return self.prompt.residual.n_layers

    @property
    def kept(self) -> KeptPoints:
        """Which layers and residual points the capture keeps."""
        return self.prompt.residual.kept

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.prompt.residual.points.shape[-1])

    @property
    def tokens(self) -> list[str]:
        """Texts of the tokens of prompt and response."""
        return self.prompt.tokens + self.response.tokens

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens of prompt and response."""
        return self.prompt.token_ids + self.response.token_ids

    @property
    def lacks_answer(self) -> bool:
        """Whether the response was cut off before its answer began: within its thinking, or right after it."""
        found = [span.kind for span in self.spans if span.found and span.found[0] >= len(self.prompt.tokens)]
        thinks = bool(found) and "thinking" in self.metadata
        return thinks and "answer" not in found and self.metadata.get("stop_reason") == "max_new_tokens"

    @cached_property
    def positions(self) -> Positions:
        """The tokens whose activations are held: all, unless it was captured with `--tokens`."""
        n_prompt = len(self.prompt.tokens)
        return stated_positions(self.metadata, n_prompt, n_prompt + len(self.response.tokens))

    def only(self, positions: Positions) -> Capture:
        """A copy of the capture that holds the activations of some of its tokens only.

            cap.only(cap.positions)

        Returns the capture itself if these are all its tokens. Raises `InputError` if it lacks one of them.
        """
        if positions.kept == self.positions.kept:
            return self
        if not self.positions.includes(positions):
            raise InputError(f"{self.capture_set}/{self.name}: only {self.positions.described()}")
        prompt, response = self.prompt.only(positions.prompt), self.response.only(positions.response)
        metadata = {**self.metadata, **positions.record()}
        return replace(self, prompt=prompt, response=response, metadata=metadata)

    def residual(self, layer: int, point: str = "residual_out", part: str = "all") -> Residual:
        """Activations `[n_tokens, d_model]` of a layer at a residual point, or its `attn_out`.

            cap.residual(12)                                # after layer 12
            cap.residual(-1, "after_attn", part="response")

        A negative layer counts from the last one. TransformerLens's names of points, such as `resid_post` or
        `hook_resid_post`, are accepted too. `part` is `prompt`, `response` or `all`. A capture of some tokens has rows
        for those in `positions` alone.

        Raises `InputError` for a layer or point that the capture does not keep, naming those that it does.
        """
        layer, point = from_the_end(layer, self.n_layers), point_named(point)
        if part == "all":
            parts = [self.prompt, self.response]
            return torch.cat([each.residual.at(layer, point) for each in parts])
        return self._part(part).residual.at(layer, point)

    def save(self, path: str | Path, *, before_replacing: Hook = lambda new: None) -> Written:
        """Write the capture in the format of raw residual files.

            cap.capture.save(Path("capture.pt"))

        `before_replacing` is called with the complete new file, before it replaces an earlier one.
        """
        value = {
            "format_version": FORMAT_VERSION,
            "prompt": _part_to_file(self.prompt),
            "response": _part_to_file(self.response),
            "metadata": dict(self.metadata),
            **({"spans": [span.to_json() for span in self.spans]} if self.spans else {}),
        }
        parts = {"prompt": self.prompt.residual, "response": self.response.residual}

        def index(storages: Sequence[Any]) -> dict[str, bytes]:
            record = index_record(value, parts, storages)
            return {INDEX: record} if record else {}

        return write_tensors(Path(path), value, more=index, before_replacing=before_replacing)

    @classmethod
    def open(cls, path: str | Path) -> Capture:
        """Open a raw residual file; raises `StorageError` for any other file, and for one of another prompt.

        The prompt must be the one in the path of a file in an experiment.

        Example:
            Capture.open(exp.layout.residual("single_trait", 1))
        """
        path = Path(path)
        if (found := read_index(path)) is not None:
            index, metadata, streams = found
            check_place(metadata, path)
            both = [
                CapturedPart(part.text, part.tokens, part.token_ids, streams[name], held_of_part(index, name))
                for name, part in (("prompt", index.prompt), ("response", index.response))
            ]
            return cls(both[0], both[1], metadata, spans=index.spans)
        value = read_tensors(path)
        content = CaptureContent.check(value, path)
        check_place(value["metadata"], path)
        parts = [
            _part_from_file(part, content, held_of_part(content, name))
            for name, part in (("prompt", content.prompt), ("response", content.response))
        ]
        return cls(parts[0], parts[1], dict(value["metadata"]), spans=content.spans)

    def _part(self, part: str) -> CapturedPart:
        if part not in ("prompt", "response"):
            raise InputError(f"no part {part!r}: choose one of prompt, response, all")
        return self.prompt if part == "prompt" else self.response


def storage_dtype(residual: ResidualStream, dtype: str, model: str | None = None) -> torch.dtype:
    """The dtype to store a stream in; `model` is the name of its model, for messages.

    `auto` keeps the dtype of 16-bit activations. For wider ones it is float16 if every value fits, and otherwise
    bfloat16. Raises `NumericalError` for NaN or inf, and for a value that the dtype named cannot hold.
    """
    return common_dtype([residual.points] + ([] if residual.attn_out is None else [residual.attn_out]), dtype, model)


def common_dtype(tensors: Sequence[Tensor], dtype: str, model: str | None = None) -> torch.dtype:
    """The dtype to store float tensors in together, by the rule and with the errors of `storage_dtype`."""
    widest = max((tensor.dtype for tensor in tensors), key=lambda each: each.itemsize)
    extremes = [
        float(extreme) for tensor in tensors if tensor.numel() for extreme in _in_memory_order(tensor).aminmax()
    ]
    largest = max((abs(extreme) for extreme in extremes), default=0.0)
    largest = float("nan") if any(isnan(extreme) for extreme in extremes) else largest
    if not largest < float("inf"):  # NaN too
        raise NumericalError(f"the activations hold NaN or inf: {remedy(widest, model)}")
    target = _save_dtype(dtype, widest, largest)
    if largest > torch.finfo(target).max:
        raise NumericalError(
            f"an activation of {largest:.4g} does not fit {dtype} (at most {torch.finfo(target).max:.4g}): "
            "use --save-dtype auto, bfloat16 or float32"
        )
    return target


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A view whose last axis is the densest, which reductions read several times as fast."""
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


def _save_dtype(name: str, compute: torch.dtype, largest: float) -> torch.dtype:
    if name != "auto":
        return SAVE_DTYPES[name]
    if compute.itemsize <= 2:
        return compute
    return torch.float16 if largest <= torch.finfo(torch.float16).max else torch.bfloat16


def _part_to_file(part: CapturedPart) -> dict[str, Any]:
    stream = part.residual.checked()
    activations: dict[int, dict[str, Row]] = {}
    for layer, rows in zip(stream.kept.layers, stream.kept.rows, strict=True):
        activations[layer] = {
            point: Row(stream.points, row) for point, row in zip(stream.kept.points, rows, strict=True)
        }
    if stream.attn_out is not None:
        for row, layer in enumerate(stream.output_layers):
            activations[layer]["attn_out"] = Row(stream.attn_out, row)
    return {"text": part.text, "tokens": part.tokens, "token_ids": part.token_ids, "activations": activations}


def _part_from_file(part: PartContent, content: CaptureContent, positions: tuple[int, ...] | None) -> CapturedPart:
    activations, kept, attention = part.activations, content.kept, content.metadata.attention_layers
    by_index = {point_index(layer, point): activations[layer][point] for layer in kept.layers for point in kept.points}
    points = [by_index[number] for number in kept.point_indices]
    outputs = [activations[layer]["attn_out"] for layer in part.output_layers]
    # A file may hold parameters, which carry gradients.
    residual = ResidualStream(
        stacked(points).detach(),
        stacked(outputs).detach() if outputs else None,
        kept,
        None if attention is None else tuple(attention),
    )
    return CapturedPart(part.text, part.tokens, part.token_ids, residual, positions)
