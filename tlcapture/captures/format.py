"""The content of raw residual files, checked before any activation is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, Strict, field_validator, model_validator
from torch import Tensor

from tlcapture.captures.intervention_record import InterventionRecord
from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.names import PromptId, is_prompt_set, is_safe_name, prompt_id_problem
from tlcapture.prompts.spans import TokenSpan, check_spans
from tlcapture.storage.tensors import described, is_plain
from tlcapture.storage.validation import Count, FileContent, Layer, checked
from tlcapture.text import layers_named
from tlcapture.views.hooks import POINTS
from tlcapture.views.kept_points import KeptPoints, point_index
from tlcapture.views.kept_tokens import stated_positions
from tlcapture.views.residual import layers_with_attention

FORMAT_VERSION = 1

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=1)]
Spans = Annotated[tuple[TokenSpan, ...], Strict(False)]  # a list in files


def check_version(value: Any, path: Path) -> None:
    """Raise `StorageError` for a file of another version, and for one without a version, which no tlcapture wrote."""
    version = value.get("format_version") if isinstance(value, dict) else FORMAT_VERSION
    if version is None:
        raise StorageError(
            f"{path}: not a raw residual file of tlcapture, since it has no format_version: captures of other "
            "tools are not read, because their rows may belong to other tokens and their points to other hooks"
        )
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise StorageError(f"{path}: format version {version}, this tlcapture reads {FORMAT_VERSION}")


class CaptureMetadata(FileContent):
    """Metadata of a capture; further fields record more of how it was made."""

    prompt_set: str
    prompt_id: PromptId
    sample: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    n_layers: Annotated[int, Field(ge=1, le=10_000)]
    d_model: Size
    inference_model: str
    model_fingerprint: str | None = None
    prompt_text: str | None = None
    system_prompt: str | None = None
    chat_template: bool | None = None
    engine: str | None = None
    dtype: str | None = None
    stop_reason: str | None = None
    layers: Annotated[list[Layer] | None, Field(min_length=1)] = None
    points: Annotated[list[str] | None, Field(min_length=1)] = None
    attention_layers: list[Layer] | None = None
    messages: list[dict[str, Any]] | None = None
    template_args: dict[str, Any] | None = None
    thinking: dict[str, str] | None = None
    positions: list[Count] | None = None
    variant: str | None = None
    interventions: list[InterventionRecord] | None = None

    @field_validator("variant")
    @classmethod
    def _is_a_variant(cls, value: str | None) -> str | None:
        if value is not None and not is_safe_name(value):
            raise ValueError(f"{value!r} is not a safe file name")
        return value

    @field_validator("prompt_set")
    @classmethod
    def _is_a_prompt_set(cls, value: str) -> str:
        if not is_prompt_set(value):
            raise ValueError(f"{value!r} is not a safe file name")
        return value

    @field_validator("prompt_id")
    @classmethod
    def _is_an_id(cls, value: PromptId) -> PromptId:
        if problem := prompt_id_problem(value):
            raise ValueError(problem)
        return value


class PartContent(FileContent):
    """Prompt or response. Activations are `{layer: {point: [n_tokens, d_model]}}`, of the tokens that are held."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    text: str
    tokens: list[str]
    token_ids: list[TokenId]
    activations: dict[Layer, dict[str, Tensor]] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_whole(self) -> PartContent:
        if len(self.tokens) != len(self.token_ids):
            raise ValueError(f"{len(self.tokens)} tokens, but {len(self.token_ids)} token_ids: numbers must be equal")
        points = self.points
        if not points & set(POINTS) or points - {*POINTS, "attn_out"}:
            raise ValueError(f"activations of {', '.join(sorted(points))}: expected {', '.join(POINTS)} (, attn_out)")
        for layer, by_point in sorted(self.activations.items()):
            if set(by_point) | {"attn_out"} != points | {"attn_out"}:
                raise ValueError(
                    f"layers {layer} and {min(self.activations)} hold different activations: layer {layer} has "
                    f"{', '.join(sorted(by_point))}"
                )
            for point, tensor in by_point.items():
                self._check_tensor(f"activations[{layer}][{point!r}]", tensor, self.first)
            before = self.activations.get(layer - 1, {}).get("residual_out")
            if before is not None and "residual_in" in points and not _is_same(by_point["residual_in"], before):
                raise ValueError(f"residual_in of layer {layer} is not residual_out of layer {layer - 1}")
        self._check_memory()
        return self

    @property
    def points(self) -> set[str]:
        """The points of each layer, and `attn_out` if any layer has it."""
        return {*self.activations[min(self.activations)], *(["attn_out"] if self.output_layers else [])}

    @property
    def output_layers(self) -> tuple[int, ...]:
        """The layers with `attn_out`."""
        return tuple(layer for layer in sorted(self.activations) if "attn_out" in self.activations[layer])

    @property
    def first(self) -> Tensor:
        """The activation whose shape and dtype all others must have."""
        by_point = self.activations[min(self.activations)]
        return next(by_point[point] for point in POINTS if point in by_point)

    def _check_tensor(self, name: str, tensor: Tensor, first: Tensor) -> None:
        if not is_plain(tensor) or tensor.ndim != 2:
            raise ValueError(f"{name}: expected floats [n_tokens, d_model], got {described(tensor)}")
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(f"{name}: {described(tensor)}, but others are {described(first)}")

    def _check_memory(self) -> None:
        """Refuse layers that share memory: reading one tensor as thousands of layers would fill memory."""
        tensors = {
            (point_index(layer, point) if point in POINTS else (layer, point)): tensor
            for layer, by_point in self.activations.items()
            for point, tensor in by_point.items()
        }.values()
        stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        if sum(tensor.nbytes for tensor in tensors) > sum(stored.values()):
            raise ValueError("activations: more than the file stores: several share the same memory")


class CaptureContent(FileContent):
    """A whole file."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    format_version: Literal[1]
    prompt: PartContent
    response: PartContent
    metadata: CaptureMetadata
    spans: Spans = ()

    @classmethod
    def check(cls, value: Any, path: Path) -> CaptureContent:
        """The content of a file; raises `StorageError` with file, field and reason."""
        check_version(value, path)
        return checked(cls, value, path, "raw residual")

    @model_validator(mode="after")
    def _is_of_one_model(self) -> CaptureContent:
        for name, part in (("prompt", self.prompt), ("response", self.response)):
            n_layers, width = len(part.activations), part.first.shape[1]
            stated = (len(self.metadata.layers or range(self.metadata.n_layers)), self.metadata.d_model)
            if (n_layers, width) != stated:
                raise ValueError(
                    f"the {name} has {n_layers} layers of width {width}, but metadata states {stated[0]} of width "
                    f"{stated[1]}"
                )
        if self.prompt.points != self.response.points or set(self.prompt.activations) != set(self.response.activations):
            raise ValueError("prompt and response hold different activations")
        try:
            with_attention = layers_with_attention(self.kept, self.metadata.attention_layers)
        except TlcaptureError as error:
            raise ValueError(str(error)) from None
        for part in (self.prompt, self.response):
            if part.output_layers not in ((), with_attention):
                raise ValueError(
                    f"attn_out of {layers_named(part.output_layers)}: expected {layers_named(with_attention)}"
                )
        return self

    @model_validator(mode="after")
    def _has_spans_of_its_tokens(self) -> CaptureContent:
        check_spans(self.spans, len(self.prompt.tokens) + len(self.response.tokens))
        return self

    @model_validator(mode="after")
    def _has_a_row_for_each_token(self) -> CaptureContent:
        for name, part in (("prompt", self.prompt), ("response", self.response)):
            n_rows, held = len(part.first), held_of_part(self, name)
            if n_rows != len(part.tokens if held is None else held):
                stated = f"tokens has {len(part.tokens)}" if held is None else f"positions names {len(held)} of them"
                raise ValueError(f"{name}: activations of {n_rows} tokens, but {stated}")
        return self

    @property
    def kept(self) -> KeptPoints:
        """Which layers and points the file holds; raises `StorageError` if its metadata disagrees."""
        stated = self.metadata.model_dump(include={"n_layers", "layers", "points"})
        return KeptPoints.of_file(stated, self.prompt.activations, self.prompt.points)


def held_of_part(content: Any, part: str) -> tuple[int, ...] | None:
    """Indices, within a part, of the tokens whose activations a file holds; `None` if it holds all.

    Raises `ValueError` for positions that no token has.
    """
    if content.metadata.positions is None:
        return None
    n_prompt = len(content.prompt.tokens)
    found = stated_positions(content.metadata, n_prompt, n_prompt + len(content.response.tokens))
    return found.prompt if part == "prompt" else found.response


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; tensors that share their memory are not read."""
    views = [(each.data_ptr(), each.shape, each.stride()) for each in (one, other)]
    return views[0] == views[1] or torch.equal(one, other)
