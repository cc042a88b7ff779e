"""Which existing files a capture will replace or remove, for `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.commands.capturing.size import LackingProjections, projected_onto
from tlcapture.commands.capturing.tasks import CaptureTask
from tlcapture.commands.projecting.projections import without_projection
from tlcapture.commands.prompt_files.known_files import KnownFiles
from tlcapture.commands.prompt_files.outputs import Outputs
from tlcapture.errors import StorageError
from tlcapture.names import PromptId, file_name
from tlcapture.runs.report import Failed
from tlcapture.storage.compact.projection_shards import shard_of_prompt
from tlcapture.storage.experiments.layout import Layout, derived_files
from tlcapture.traits.choice import VectorChooser


@dataclass
class AffectedFiles:
    """Existing files that a capture will change.

    Attributes:
        replaced: files that will be written again.
        removed: other files derived from captures that will be replaced; they are kept where the tokens stay the same.
        projected: saved captures that will be projected.
        failures: saved captures with a projection that cannot be read, and so are not completed.
    """

    replaced: list[Path] = field(default_factory=list)
    removed: list[Path] = field(default_factory=list)
    projected: list[LackingProjections] = field(default_factory=list)
    failures: list[Failed] = field(default_factory=list)

    @classmethod
    def of(cls, tasks: Sequence[CaptureTask], layout: Layout, options: CaptureOptions, n_layers: int) -> AffectedFiles:
        """The files that tasks will change, for a model with `n_layers` layers."""
        found, chooser = cls(), VectorChooser(layout, options.vectors)
        for task in tasks:
            name = task.capture_set
            for prompt in task.fresh_prompts:
                found._add_fresh(layout, options, name, prompt.name, options.outputs(n_layers))
            files = KnownFiles(layout, name, len(task.saved))
            for prompt_id, wanted in task.saved.items():
                found._add_saved(options, files, prompt_id, wanted, chooser)
        return found

    def _add_fresh(
        self, layout: Layout, options: CaptureOptions, name: str, prompt_id: PromptId, wanted: Outputs
    ) -> None:
        raw = layout.residual(name, prompt_id)
        existing = [path for path in (raw, *derived_files(layout, name, prompt_id)) if path.is_file()]
        if not existing:
            return
        written = {raw} if wanted.raw else set()
        written |= {*wanted.add_on_files(layout, name, prompt_id)}
        for trait, component in projected_onto(layout, options):
            written.add(layout.projection(trait, component, name, prompt_id))
            written.add(shard_of_prompt(layout.shards(component, name), file_name(prompt_id)))
        self.replaced += [path for path in existing if path in written]
        self.removed += [path for path in existing if path not in written]

    def _add_saved(
        self, options: CaptureOptions, files: KnownFiles, prompt_id: PromptId, wanted: Outputs, chooser: VectorChooser
    ) -> None:
        name, of_prompt = files.capture_set, files.of(prompt_id)
        self.replaced += [each.path for each in wanted.existing_add_ons(of_prompt)]
        if not options.projects:
            return
        try:
            capture = of_prompt.capture()
            if capture is None:
                return
            chosen = [
                vector
                for component in capture.components
                for vector in without_projection(of_prompt, chooser.vectors(capture, component), options.existing)
            ]
        except StorageError as error:
            self.failures.append(Failed(f"{name}/{prompt_id}", str(error)))
            return
        if chosen:
            self.projected.append(LackingProjections(capture, len(chosen), bool(wanted)))
        traits = ((each.vector.trait, each.vector.component) for each in chosen)
        paths = (files.layout.projection(*each, name, prompt_id) for each in traits)
        self.replaced += [path for path in paths if path.is_file()]
