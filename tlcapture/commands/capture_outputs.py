"""The files one prompt's run leaves: which are wanted, which are there, and writing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tlcapture.captures.capture import Capture
from tlcapture.captures.from_generation import is_alike
from tlcapture.commands.capture_records import CaptureRecord
from tlcapture.errors import NumericalError, StorageError
from tlcapture.models.loading import Model
from tlcapture.prompts.tokenization import token_texts
from tlcapture.runs.background_writer import Write
from tlcapture.storage.files import Written, remove, write_json, write_tensors
from tlcapture.storage.layout import Layout, derived_files
from tlcapture.views.attention import attention_hooks, attention_view
from tlcapture.views.cache import Cache
from tlcapture.views.hooks import hook
from tlcapture.views.internals import internals_hooks, internals_view
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.logit_lens import logit_lens_hooks, logit_lens_view
from tlcapture.views.residual import residual_hooks


@dataclass(frozen=True)
class Outputs:
    """What is wanted of a prompt: its residual stream, with what is kept of the model, and the add-ons.

    `raw` says whether a residual stream that is captured is written, or projected and dropped.
    """

    kept: KeptPoints
    residual: bool = True
    raw: bool = True
    attn_out: bool = False
    attention: bool = False
    logit_lens: bool = False
    internals: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.residual or self.needs_pass or self.logit_lens

    @property
    def needs_pass(self) -> bool:
        """Whether more is wanted than the residual stream holds."""
        return self.attention or bool(self.internals)

    def _is_held_by(self, raw: Path) -> bool:
        """Whether a raw residual file is there, can be read, and keeps all that is wanted."""
        if not raw.is_file():
            return False
        try:
            capture = Capture.open(raw)
        except StorageError:
            return False
        has_attn_out = capture.prompt.residual.attn_out is not None
        return capture.kept.includes(self.kept) and (has_attn_out or not self.attn_out)

    def missing(self, layout: Layout, prompt_set: str, prompt_id: str) -> Outputs:
        """What of these is not there yet, or belongs to an earlier run of the prompt."""
        raw = layout.residual(prompt_set, prompt_id)
        if not self._is_held_by(raw):
            return self
        captured = raw.stat().st_mtime_ns

        return self.lacking(layout, prompt_set, prompt_id, since=captured)

    def lacking(self, layout: Layout, prompt_set: str, prompt_id: str, *, since: int = 0) -> Outputs:
        """The add-ons of these that are not there, or older than `since`, a modification time in nanoseconds."""

        def lacks(path: Path) -> bool:
            return not path.is_file() or path.stat().st_mtime_ns < since

        return Outputs(
            self.kept,
            residual=False,
            raw=self.raw,
            attn_out=self.attn_out,
            attention=self.attention and lacks(layout.attention(prompt_set, prompt_id)),
            logit_lens=self.logit_lens and lacks(layout.logit_lens(prompt_set, prompt_id)),
            internals=tuple(n for n in self.internals if lacks(layout.internals(prompt_set, prompt_id, n))),
        )

    def live_hooks(self, model: Model) -> list[str]:
        """All activations that a live run has to capture: what is kept first, and in the order of its buffer."""
        names = residual_hooks(model.n_layers, model.hook_names, attn_out=self.attn_out, only=self.kept)
        names += logit_lens_hooks(model.n_layers) if self.logit_lens else []
        return list(dict.fromkeys([*names, *self.pass_hooks(model)]))

    def pass_hooks(self, model: Model) -> list[str]:
        """The activations that the add-ons read and the residual stream does not hold."""
        names = attention_hooks(model.n_layers) if self.attention else []
        for layer in self.internals:
            names += internals_hooks(layer, model.hook_names)
        return list(dict.fromkeys(names))


def write_capture(
    layout: Layout, capture: Capture, on_removed: Callable[[Sequence[Path]], object] = lambda paths: None
) -> Written:
    """Write the raw residual file.

    What was derived from another capture of the prompt goes when the new file is whole, before it is in
    its place: nothing derived ever stands beside a capture it was not made from. `on_removed` is called with it.
    """
    prompt_set, prompt_id = capture.prompt_set, capture.prompt_id
    path = layout.residual(prompt_set, prompt_id)
    derived = [] if is_alike(path, capture) else derived_files(layout, prompt_set, prompt_id)

    def make_room(new: Path) -> None:
        remove(derived)
        on_removed(derived)

    return capture.save(path, before_replacing=make_room)


def remove_stale(layout: Layout, capture: Capture) -> Sequence[Path]:
    """Remove what was derived from another run of a prompt whose capture is not written but projected."""
    before = CaptureRecord.find(layout, capture.prompt_set, capture.prompt_id)
    if before is not None and before.is_like(capture):
        return ()
    derived = derived_files(layout, capture.prompt_set, capture.prompt_id)
    remove(derived)
    return derived


def add_ons(
    layout: Layout, capture: Capture, wanted: Outputs, model: Model, cache: Cache, residual_cache: Cache | None
) -> Iterator[Write]:
    """Compute the add-ons of a capture one after another; each is handed on as the function that writes its file.

    `cache` holds what `pass_hooks` names. The logit lens reads the activations of `residual_cache`, as
    they were computed, or those of the capture, as they were stored.
    """
    names = {"prompt_id": capture.prompt_id, "prompt_set": capture.prompt_set}
    where = (capture.prompt_set, capture.prompt_id)
    tokens, n_prompt = capture.tokens, len(capture.prompt.tokens)
    if wanted.attention:
        view = attention_view(cache, model.n_layers)
        yield lambda: write_json(
            layout.attention(*where), view.to_json(**names, tokens=tokens, n_prompt_tokens=n_prompt)
        )
    if wanted.logit_lens:
        lens = logit_lens_view(
            lambda layer: (
                capture.residual(layer) if residual_cache is None else residual_cache[hook("residual_out", layer)]
            ),
            model.n_layers,
            capture.token_ids,
            model.unembed,
        )
        yield lambda: write_json(
            layout.logit_lens(*where),
            lens.to_json(
                **names,
                tokens=tokens,
                n_prompt_tokens=n_prompt,
                token_texts=lambda ids: token_texts(model.tokenizer, ids),
            ),
        )
    for layer in wanted.internals:
        path, content = layout.internals(*where, layer), _internals_content(capture, cache, layer)
        yield partial(_write_internals, path, content)


def _write_internals(path: Path, content: dict[str, Any]) -> Written:
    for name, value in content.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise NumericalError(f"{name} holds NaN or inf: try --dtype float32 or bfloat16")
    return write_tensors(path, content)


def _internals_content(capture: Capture, cache: Cache, layer: int) -> dict[str, Any]:
    return {
        **internals_view(cache, layer),
        "tokens": capture.tokens,
        "token_ids": capture.token_ids,
        "n_prompt_tokens": len(capture.prompt.tokens),
        "metadata": dict(capture.metadata),
    }
