"""A capture of an experiment, opened on first use."""

from __future__ import annotations

from functools import cached_property
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from tlcapture.captures.notes import Marked, Note, add_note, read_notes
from tlcapture.errors import InputError
from tlcapture.explore.explorable_capture import ExplorableCapture
from tlcapture.explore.figures.attention_heads import AttentionHeads
from tlcapture.explore.figures.logit_lens_table import LogitLensTable, table_of
from tlcapture.names import PromptId
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import did_you_mean
from tlcapture.views.saved_attention import SavedAttention, read_attention
from tlcapture.views.saved_lens import read_lens

if TYPE_CHECKING:
    from torch import Tensor

    from tlcapture.captures.capture import Capture
    from tlcapture.explore.applied_interventions import AppliedInterventions
    from tlcapture.explore.experiment import Experiment
    from tlcapture.models.loading import Model

_CAPTURE_ATTRIBUTES = (
    "prompt", "response", "metadata", "tokens", "token_ids", "positions", "residual", "n_layers", "d_model",
    "save", "spans", "sample", "id", "text", "n_tokens",
)  # fmt: skip


class SavedCapture(ExplorableCapture):
    """A capture of an experiment, opened (memory-mapped) on first use.

        cap = exp.captures["single_trait"][1]
        cap.prompt_id, cap.tokens[:5], cap.residual(12).shape

    Has every attribute of `Capture`, such as `tokens`, `prompt`, `response` and `residual(layer, point)`.
    """

    def __init__(self, experiment: Experiment, prompt_set: str, name: str):
        self.experiment = experiment
        self.prompt_set = prompt_set
        self._name = name  # of its files

    @property
    def prompt_id(self) -> PromptId:
        """Id of the prompt in its set: a text or a number."""
        return self.capture.prompt_id

    @cached_property
    def capture(self) -> Capture:
        """The opened file; raises `StorageError` if it is damaged.

        Example:
            cap.capture.metadata["seed"]
        """
        from tlcapture.captures.capture import Capture

        return Capture.open(self.experiment.layout.residual(self.prompt_set, self._name))

    @property
    def notes(self) -> list[Note]:
        """The notes that people made on this capture, in the order of its tokens; read again each time.

            for note in cap.notes:
                print(note.start, note.stop, note.text, note.fits(cap.tokens))

        Raises `StorageError` for a damaged note, naming it.
        """

        found = read_notes(self.experiment.layout, self.prompt_set, self._name)
        if found.problems:
            raise found.problems[0]
        return found.notes

    def add_note(self, text: str, start: SupportsIndex, stop: SupportsIndex | None = None) -> Note:
        """Make a note on a token, or on the tokens from `start` up to `stop`; it is kept in the experiment.

            cap.add_note("refuses here", 52, 55)

        Raises `InputError` for tokens that the capture does not have, and if the capture has since been removed.
        """

        layout = self.experiment.layout
        layout.check_exists()
        if self._name not in layout.prompt_ids(self.prompt_set):
            raise InputError(f"{layout.experiment}/{self.prompt_set} has no capture {self._name} any more")
        marked = Marked.of(self.capture.tokens, index(start), None if stop is None else index(stop))
        return add_note(layout, self.prompt_set, self._name, marked, text)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        capture = self.capture
        try:
            return getattr(capture, name)
        except AttributeError:
            if name in dir(capture):  # it was raised by a property
                raise
        meant = did_you_mean(name, [each for each in dir(self) if not each.startswith("_")])
        raise AttributeError(f"SavedCapture has no attribute {name!r}{meant}")

    def __len__(self) -> int:
        return len(self.capture)

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_CAPTURE_ATTRIBUTES})

    def __repr__(self) -> str:
        return f"Saved{self.capture!r}"

    def _repr_html_(self) -> str:
        return self.capture._repr_html_()

    @property
    def _captured(self) -> Capture:
        return self.capture

    def _vectors(self) -> Layout:
        return self.experiment.layout

    def _model(self) -> Model:
        """The experiment's model; raises `InputError` if the capture is from another one."""
        model = self.experiment.model_with(self.capture.metadata.get("adapter"))
        fingerprint = self.capture.metadata.get("model_fingerprint")
        if model.fingerprint != fingerprint:
            raise InputError(
                f"{self.prompt_set}/{self._name} was captured from {self.capture.metadata['inference_model']!r} "
                f"(fingerprint {fingerprint}), but the experiment's model is now {model.name!r} ({model.fingerprint})"
            )
        return model

    def _applied(self) -> AppliedInterventions:
        from tlcapture.explore.applied_interventions import AppliedInterventions
        from tlcapture.traits.interventions.resolved import of_records

        records = self.capture.metadata.get("interventions") or ()
        return AppliedInterventions(of_records(records, self.experiment.layout.root))

    def _stored_internals(self, layer: int) -> dict[str, Tensor] | None:
        from tlcapture.explore.internals import stored_internals

        path = self._current(self.experiment.layout.internals(self.prompt_set, self._name, layer))
        return None if path is None else stored_internals(path, self.capture, layer)

    def _stored_heads(self, layer: int) -> AttentionHeads | None:

        saved = self._stored_attention()
        if saved is None or saved.head.tokens != self.capture.tokens:  # of another capture
            return None
        if layer not in saved.head.kept_layers:  # a forward pass has it
            return None
        return AttentionHeads(**self._labels(), layer=layer, patterns=saved.heads(layer), source=saved.path.name)

    def _stored_attention(self) -> SavedAttention | None:

        layout = self.experiment.layout
        path = self._current(layout.saved(layout.attention(self.prompt_set, self._name)))
        return None if path is None else read_attention(path)

    def _stored_lens(self) -> LogitLensTable | None:

        layout = self.experiment.layout
        path = self._current(layout.saved(layout.logit_lens(self.prompt_set, self._name)))
        saved = None if path is None else read_lens(path)
        if saved is None or saved.head.tokens != self.capture.tokens:  # of another capture
            return None
        return table_of(saved, self._labels())

    def _current(self, path: Path) -> Path | None:
        """A file, if it was made from this capture; `None` if it is missing or of an earlier run of the prompt."""
        raw = self.experiment.layout.residual(self.prompt_set, self._name)
        is_current = path.is_file() and path.stat().st_mtime_ns >= raw.stat().st_mtime_ns
        return path if is_current else None
