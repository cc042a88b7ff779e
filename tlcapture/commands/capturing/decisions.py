"""What is done about a prompt: it is captured anew, or its saved capture is kept and gets the files that it lacks.

|                    | without a capture | with one of this prompt and model | with any other capture |
| ------------------ | ----------------- | --------------------------------- | ---------------------- |
|                    | captured          | captured anew                     | captured anew          |
| --skip-existing    | captured          | completed if it holds all layers, | captured anew          |
|                    |                   | points and tokens asked for       |                        |
| --replay           | refused           | completed                         | completed              |
| --projections-only | captured          | completed with --skip-existing    | refused                |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tlcapture.captures.known_capture import KnownCapture
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.commands.capturing.places import NotCapturedError, Place, PromptError
from tlcapture.commands.capturing.prompt_wording import PromptWording
from tlcapture.commands.projecting.projections import without_projection
from tlcapture.commands.prompt_files.known_files import PromptFiles
from tlcapture.commands.prompt_files.outputs import Outputs
from tlcapture.errors import StorageError
from tlcapture.models.loading import Model, ModelOutline
from tlcapture.runs.existing_files import OVERWRITE, REPLACE, check_replaceable
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.layout import Layout, derived_files
from tlcapture.traits.choice import VectorChooser
from tlcapture.traits.interventions.records import identity
from tlcapture.traits.projections.saved import merged_files


@dataclass(frozen=True)
class Decision:
    """What is done about a prompt.

    Attributes:
        lacking: the outputs that its saved capture lacks, apart from projections; `None` where it is captured anew.
        kept: the facts about the capture that `--skip-existing` keeps, whose settings may be others than those asked
            for now.
    """

    lacking: Outputs | None
    kept: KnownCapture | None = None

    @property
    def is_anew(self) -> bool:
        """Whether the prompt is captured anew, which replaces all files that it has."""
        return self.lacking is None


_ANEW = Decision(lacking=None)


class CaptureDecider:
    """Decides about one prompt after another; `model` is called only if the number of layers is not known otherwise."""

    def __init__(
        self,
        layout: Layout,
        options: CaptureOptions,
        load: ModelLoader,
        model: Callable[[], Model | ModelOutline],
        wording: PromptWording,
    ):
        self._layout = layout
        self._options = options
        self._load = load
        self._model = model
        self._wording = wording
        self._chooser = VectorChooser(layout, options.vectors)

    def decide(self, place: Place, files: PromptFiles) -> Decision:
        """The decision about a prompt, or one of its samples, with its existing files.

        Raises:
            InputError: the model does not have the layers or points that are asked for, whatever the prompt.
            PromptError: the prompt cannot be captured as asked.
            StorageError: a file cannot be read that would be replaced, removed, or passed over as present.
        """
        options = self._options
        advice = "capture it again with --overwrite" if options.replay else REPLACE
        saved = files.capture(overwrite=options.overwrite, advice=advice)
        if saved is not None and saved.sample != place.sample:
            raise StorageError(
                f"{files.raw}: the capture of another prompt, {saved.prompt_id}: rename one of the prompts"
            )
        if options.replay:
            decision = self._replayed(files, saved)
        elif options.projections_only:
            decision = self._only_projected(place, files, saved)
        else:
            decision = self._captured(place, files, saved)
        self._check_replaceable(place, files, decision, saved)
        return decision

    def _replayed(self, files: PromptFiles, saved: KnownCapture | None) -> Decision:
        """With `--replay`: what the capture lacks with `--skip-existing`, otherwise all that is asked for."""
        if saved is None:
            raise NotCapturedError
        wanted = self._options.outputs(saved.n_layers)
        missing = self._missing(wanted, files, saved) if self._options.skip_existing else None
        return Decision(wanted if missing is None else missing)

    def _captured(self, place: Place, files: PromptFiles, saved: KnownCapture | None) -> Decision:
        if saved is None or not self._options.skip_existing:
            self._options.outputs(self._n_layers())  # raises for layers that the model does not have
            return _ANEW
        wanted = self._options.outputs(saved.n_layers)
        if not self._is_whole_and_of(saved, place, files):
            return _ANEW
        missing = self._missing(wanted, files, saved)
        if missing is None or (missing.logit_lens and not saved.kept.has_outputs(missing.parts.lens_layers)):
            return _ANEW
        return Decision(missing, kept=saved)

    def _only_projected(self, place: Place, files: PromptFiles, saved: KnownCapture | None) -> Decision:
        """With `--projections-only`: saved captures are only completed, since a new run would not replace them."""
        options = self._options
        if saved is not None:
            if options.skip_existing and self._is_whole_and_of(saved, place, files):
                wanted = options.outputs(saved.n_layers)
                missing = self._missing(wanted, files, saved)
                return Decision(replace(wanted, residual=False) if missing is None else missing)
            project = command_line(self._layout, "project", "--prompt-set", place.capture_set)
            raise PromptError(
                "--projections-only would leave projections of one run next to the raw capture of another, "
                f"{files.raw}: remove it, or run '{project}'"
            )
        is_free = not files.captured_ns  # a file that cannot be read is replaced, with all files derived from it
        projected = files.made_from() if options.skip_existing and is_free else None
        wanted = options.outputs(self._n_layers() if projected is None else projected.n_layers)
        if projected is None or not self._is_whole_and_of(projected, place, files):
            return _ANEW
        missing = wanted.missing_add_ons(files, self._d_vocab, overwrite=options.overwrite)
        is_done = (
            projected.kept.includes(wanted.kept)
            and projected.holds(wanted.tokens)
            and not missing
            and not any(
                without_projection(files, self._chooser.vectors(projected, component), options.existing)
                for component in options.components
            )
        )
        return Decision(missing, kept=projected) if is_done else _ANEW

    def _missing(self, wanted: Outputs, files: PromptFiles, saved: KnownCapture) -> Outputs | None:
        """The add-ons that a saved capture lacks; `None` if it does not hold all layers, points and tokens."""
        if not wanted.is_held_by(saved):
            return None
        since, overwrite = files.captured_ns, self._options.overwrite
        return wanted.missing_add_ons(files, self._d_vocab, since=since, overwrite=overwrite, captured=saved.positions)

    def _is_whole_and_of(self, saved: KnownCapture, place: Place, files: PromptFiles) -> bool:
        """Whether a capture is complete and of this prompt and model, with the same wording and interventions."""
        given, prompt = self._options.responses_from, place.prompt
        is_of_this_model = (
            not files.is_unfinished
            and identity(saved.metadata.get("interventions")) == identity(self._options.intervention_records)
            and saved.metadata["inference_model"] == self._load.name
            and saved.metadata.get("adapter") == self._options.adapter
        )
        if not is_of_this_model:
            return False
        if given is not None:
            return given.are_tokens_of(saved, place.prompt_set.name, prompt.id, place.sample)
        return self._wording.is_that_of(saved, place.prompt_set, prompt)

    def _check_replaceable(
        self, place: Place, files: PromptFiles, decision: Decision, saved: KnownCapture | None
    ) -> None:
        """Raise `StorageError` if a file cannot be read that would be replaced, removed, or passed over as present."""
        if decision.is_anew:
            paths = [*derived_files(self._layout, *place.where), *merged_files(self._layout, place.capture_set)]
        else:  # projections of a capture that was not saved have all been read
            asked = files.add_ons() if saved is None else self._options.outputs(saved.n_layers).existing_add_ons(files)
            paths = [each.path for each in asked if each.view is None]
        advice = f"leave out --replay and {OVERWRITE}" if self._options.replay else OVERWRITE
        for path in paths:
            check_replaceable(self._layout, path, overwrite=self._options.overwrite, advice=advice)

    def _n_layers(self) -> int:
        """The model's layers; from its config where some are named, which are checked before the weights are loaded."""
        return self._load.outline.n_layers if self._options.names_layers else self._model().n_layers

    def _d_vocab(self) -> int:
        return self._load.outline.measures.d_vocab
