"""The output files of a prompt: which ones are requested, which ones are missing, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tlcapture.captures.capture import Capture, common_dtype
from tlcapture.captures.from_generation import is_alike
from tlcapture.captures.known_capture import KnownCapture
from tlcapture.captures.provenance import sample_record
from tlcapture.commands.prompt_files.known_files import PromptFiles
from tlcapture.commands.prompt_files.known_views import PresentFile
from tlcapture.commands.prompt_files.records import CaptureRecord
from tlcapture.commands.prompt_files.view_files import write_attention_file, write_lens_file
from tlcapture.commands.prompt_files.view_parts import ViewParts
from tlcapture.errors import NumericalError
from tlcapture.models.checkpoints.finite_weights import remedy
from tlcapture.models.loading import Model
from tlcapture.names import PromptId
from tlcapture.prompts.tokenization import token_texts
from tlcapture.runs.existing_files import remove_derived, saved_capture
from tlcapture.shapes import Residual
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import Written, remove, write_tensors
from tlcapture.text import dtype_name
from tlcapture.views.attention import attention_hooks
from tlcapture.views.cache import Cache
from tlcapture.views.hooks import hook
from tlcapture.views.internals import internals_hooks, internals_view
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.kept_tokens import KeptTokens, Positions, kept_of
from tlcapture.views.logit_lens import LogitLens, logit_lens_hooks, logit_lens_view
from tlcapture.views.residual import residual_hooks

Write = Callable[[], Written]


class HasHooks(Protocol):
    """The parts of a model that are needed to name its activations."""

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        ...

    @property
    def hook_names(self) -> Set[str]:
        """TransformerLens names of all activations that the model can return."""
        ...


@dataclass(frozen=True)
class Outputs:
    """The requested outputs of a prompt: its residual stream and add-ons.

    Attributes:
        kept: the layers and points of the residual stream to keep.
        residual: whether to capture the residual stream.
        raw: whether to write the captured residual stream, rather than only its projections.
        attn_out: whether to capture attention outputs as well.
        attention: whether to write attention patterns.
        logit_lens: whether to write logit-lens predictions.
        internals: the layers whose internals are written.
        parts: which layers, predictions and form of attention and lens are written.
        tokens: the tokens to keep in all outputs; `None` means all, or for a saved capture those that it holds.
    """

    kept: KeptPoints
    residual: bool = True
    raw: bool = True
    attn_out: bool = False
    attention: bool = False
    logit_lens: bool = False
    internals: tuple[int, ...] = ()
    tokens: KeptTokens | None = None
    parts: ViewParts = ViewParts()

    def __bool__(self) -> bool:
        return self.residual or self.has_add_ons

    @property
    def has_add_ons(self) -> bool:
        """Whether anything is wanted apart from the residual stream."""
        return self.needs_pass or self.logit_lens

    @property
    def needs_pass(self) -> bool:
        """Whether activations other than the residual stream are needed."""
        return self.attention or bool(self.internals)

    def is_held_by(self, saved: KnownCapture) -> bool:
        """Whether a saved capture has all requested layers, points and tokens."""
        fresh = kept_of(self.tokens, saved.n_prompt, saved.n_tokens)
        has_rows = not self.residual or saved.positions.includes(fresh)
        return saved.kept.includes(self.kept) and has_rows and (saved.has_attn_out or not self.attn_out)

    def add_on_files(self, layout: Layout, prompt_set: str, prompt_id: PromptId) -> list[Path]:
        """The files of the requested add-ons, whether they exist or not."""
        where = (prompt_set, prompt_id)
        return [
            *([layout.saved(layout.attention(*where))] if self.attention else []),
            *([layout.saved(layout.logit_lens(*where))] if self.logit_lens else []),
            *(layout.internals(*where, layer) for layer in self.internals),
        ]

    def existing_add_ons(self, files: PromptFiles) -> list[PresentFile]:
        """The files of the requested add-ons that exist."""
        present = [
            files.attention() if self.attention else None,
            files.logit_lens() if self.logit_lens else None,
            *(files.internals(layer) for layer in self.internals),
        ]
        return [each for each in present if each is not None]

    def missing_add_ons(
        self,
        files: PromptFiles,
        d_vocab: Callable[[], int],
        *,
        since: int = 0,
        overwrite: bool = False,
        captured: Positions | None = None,
    ) -> Outputs:
        """The requested add-ons that do not exist or were modified before `since`, in nanoseconds since the epoch.

        They lack tokens if they have not all that are wanted: of `captured` those, if there is no choice of tokens.
        `d_vocab` gives the number of predictions of a layer; it is called where a lens file has fewer than are wanted.
        """

        def lacks(file: PresentFile | None, parts: ViewParts | None = self.parts) -> bool:
            if file is None or file.mtime_ns < since:
                return True
            if file.view is None:  # which is reported by whoever replaces it
                return overwrite
            lacks_part = parts is not None and parts.are_lacked_by(file.view, d_vocab)
            return lacks_part or file.view.lacks(self.tokens, captured)

        return replace(
            self,
            residual=False,
            attention=self.attention and lacks(files.attention()),
            logit_lens=self.logit_lens and lacks(files.logit_lens()),
            internals=tuple(layer for layer in self.internals if lacks(files.internals(layer), None)),
        )

    def live_hooks(self, model: HasHooks) -> list[str]:
        """The activations that a generation captures; the ones to keep come first, in the order of their buffer."""
        names = residual_hooks(model.n_layers, model.hook_names, attn_out=self.attn_out, only=self.kept)
        names += logit_lens_hooks(model.n_layers, self.parts.lens_layers) if self.logit_lens else []
        return list(dict.fromkeys([*names, *self.pass_hooks(model)]))

    def pass_hooks(self, model: HasHooks) -> list[str]:
        """The activations that add-ons need beyond the residual stream."""
        only = self.parts.attention_layers
        names = attention_hooks(model.n_layers, model.hook_names, only) if self.attention else []
        for layer in self.internals:
            names += internals_hooks(layer, model.hook_names)
        return list(dict.fromkeys(names))


def write_capture(
    layout: Layout,
    capture: Capture,
    on_removed: Callable[[Sequence[Path]], object] = lambda paths: None,
    *,
    is_first: bool = False,
) -> Written:
    """Write the raw residual file, and remove files derived from another capture of the prompt, unless it `is_first`.

    They are removed after the new file was written completely and before it is renamed to its path, so that a derived
    file never exists next to a capture other than its source. `on_removed` is called with their paths.
    """
    where = (capture.capture_set, capture.name)
    path = layout.residual(*where)

    def before_replacing(new: Path) -> None:
        if not (is_first or is_alike(path, capture)):
            on_removed(remove_derived(layout, *where))

    return capture.save(path, before_replacing=before_replacing).knowing(KnownCapture.of(capture).facts())


def remove_stale(layout: Layout, capture: Capture) -> Sequence[Path]:
    """Remove the files derived from an earlier capture of a prompt whose new capture is only projected.

    A raw file of the prompt that cannot be read is removed too. Returns the paths of the removed files.
    """
    where = (capture.capture_set, capture.name)
    raw = layout.residual(*where)
    unreadable = [raw] if raw.is_file() and saved_capture(raw, overwrite=True) is None else []
    before = CaptureRecord.find(layout, *where)
    if not unreadable and before is not None and before.is_like(capture):
        return ()
    remove(unreadable)
    return [*unreadable, *remove_derived(layout, *where)]


@dataclass(frozen=True, eq=False)
class AddOns:
    """The add-ons that are wanted of a capture, and what they are computed from.

    Attributes:
        cache: the activations named by `Outputs.pass_hooks`.
        save_dtype: the dtype of internals in their files, or `auto`.
        lens: the logit lens, if it was computed already.
        fresh: whether the cache also has the residual stream of all tokens, which the logit lens is computed from;
            otherwise it is computed from the capture's stream, rounded to the dtype in which it was saved.
    """

    wanted: Outputs
    cache: Cache
    save_dtype: str
    lens: LogitLens | None = None
    fresh: bool = False


def computed_add_ons(layout: Layout, capture: Capture, model: Model, asked: AddOns) -> Iterator[Write]:
    """Compute the add-ons of a capture one after another; yields a function that writes each one's file."""
    wanted, cache, fresh = asked.wanted, asked.cache, asked.fresh
    names: dict[str, Any] = {
        "prompt_id": capture.prompt_id,
        **sample_record(capture.sample),
        "prompt_set": capture.prompt_set,
        "tokens": capture.tokens,
        "n_prompt_tokens": len(capture.prompt.tokens),
    }
    where = (capture.capture_set, capture.name)
    positions = wanted_positions(wanted.tokens, capture, fresh=fresh)
    parts = wanted.parts
    if wanted.attention:
        path = layout.attention(*where)
        yield partial(write_attention_file, layout, path, names, cache, model.n_layers, positions, parts)
    if wanted.logit_lens:
        lens = asked.lens
        if lens is None and fresh:
            lens = lens_of(model, capture.token_ids, len(capture.prompt.tokens), cache, wanted)
        lens = lens or lens_of_saved(model, capture, wanted)
        texts = partial(token_texts, model.tokenizer)
        yield partial(write_lens_file, layout, layout.logit_lens(*where), names, lens, texts, parts.form)
    for layer in wanted.internals:
        path, content = layout.internals(*where, layer), _internals_content(capture, cache, layer, positions, model)
        yield partial(_write_internals, path, content, asked.save_dtype)


def wanted_positions(tokens: KeptTokens | None, capture: Capture, *, fresh: bool) -> Positions:
    """The tokens that outputs of a capture should hold: the chosen ones, or without a choice those of the capture.

    Without a choice, a `fresh` capture should hold all.
    """
    if tokens is None and not fresh:
        return capture.positions
    return kept_of(tokens, len(capture.prompt.tokens), len(capture.tokens))


def lens_of(model: Model, token_ids: Sequence[int], n_prompt: int, cache: Cache, wanted: Outputs) -> LogitLens:
    """The wanted logit lens of a prompt and its response, from the residual stream of all tokens in a cache."""
    kept, whole = (kept_of(tokens, n_prompt, len(token_ids)) for tokens in (wanted.tokens, None))
    return _lens(model, token_ids, lambda layer: cache[hook("residual_out", layer)], kept, whole, wanted.parts)


def lens_of_saved(model: Model, capture: Capture, wanted: Outputs) -> LogitLens:
    """The wanted logit lens of a capture, from the activations that it holds."""
    kept = wanted_positions(wanted.tokens, capture, fresh=False)
    return _lens(model, capture.token_ids, capture.residual, kept, capture.positions, wanted.parts)


def _lens(
    model: Model,
    token_ids: Sequence[int],
    residual_out: Callable[[int], Residual],
    positions: Positions,
    held: Positions,
    parts: ViewParts,
) -> LogitLens:
    """The logit lens at some tokens and in some layers, computed on the device of the model's unembedding.

    `residual_out` returns a layer's residual stream at the tokens in `held`, which include these.
    """
    rows = positions.rows_in(held)
    return logit_lens_view(
        residual_out if rows is None else lambda layer: residual_out(layer)[rows],
        model.n_layers,
        token_ids,
        model.unembed,
        top_k=parts.lens_top,
        positions=positions,
        device=model.last_device,
        only=parts.lens_layers,
    )


def _write_internals(path: Path, content: dict[str, Any], save_dtype: str) -> Written:
    floats = {name: value for name, value in content.items() if isinstance(value, Tensor) and value.is_floating_point()}
    for name, value in floats.items():
        if not value.isfinite().all():
            model = content["metadata"]["inference_model"]
            raise NumericalError(f"{name} holds NaN or inf: {remedy(value.dtype, model)}")
    dtype = common_dtype(list(floats.values()), save_dtype)
    stored = {
        name: value if save_dtype == "auto" and value.itemsize <= dtype.itemsize else value.to(dtype)
        for name, value in floats.items()
    }
    return write_tensors(path, {**content, **stored})


def _internals_content(
    capture: Capture, cache: Cache, layer: int, positions: Positions, model: Model
) -> dict[str, Any]:
    metadata = {key: value for key, value in capture.metadata.items() if key != "positions"}
    metadata |= {"engine": model.engine, "dtype": dtype_name(model.dtype)}  # a replay may run on others
    return {
        **positions.record(),
        **internals_view(cache, layer, positions),
        "tokens": capture.tokens,
        "token_ids": capture.token_ids,
        "n_prompt_tokens": len(capture.prompt.tokens),
        "metadata": {**metadata, **positions.record()},
    }
