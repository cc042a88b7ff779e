"""Carrying out the tasks of a capture: generating from fresh prompts, and completing saved captures.

A prompt's files are written by another thread while the model continues. Meanwhile, a marker file is stored next to
them. A killed run leaves the marker, and the next run captures that prompt again. It does not complete the prompt from
its stored activations, which are rounded, so that the files are those of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from os.path import lexists
from pathlib import Path
from threading import Lock
from types import MappingProxyType

import torch

from tlcapture.captures.capture import Capture
from tlcapture.captures.from_generation import capture_of
from tlcapture.captures.provenance import dropped_warning, no_answer_warning
from tlcapture.commands.capturing.given_responses import generate_or_force, longest_forced
from tlcapture.commands.capturing.interventions import with_norms
from tlcapture.commands.capturing.memory_need import PromptLength, check_they_fit
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.commands.capturing.projections import CaptureProjections
from tlcapture.commands.capturing.tasks import CaptureTask
from tlcapture.commands.prompt_files.known_files import KnownFiles
from tlcapture.commands.prompt_files.known_views import with_facts
from tlcapture.commands.prompt_files.outputs import (
    AddOns,
    Outputs,
    computed_add_ons,
    lens_of,
    lens_of_saved,
    remove_stale,
    wanted_positions,
    write_capture,
)
from tlcapture.commands.prompt_files.replay import (
    InterventionsAgain,
    Pass,
    as_prompt,
    check_replayable,
    other_rounding,
    replayed,
)
from tlcapture.commands.prompt_files.view_files import WENT_COMPACT, weights_in_memory, went_compact
from tlcapture.errors import TlcaptureError
from tlcapture.generation.outcomes import Failure, Generation, Outcome
from tlcapture.generation.recording.pattern_spools import Spooling
from tlcapture.generation.recording.recorder import n_bytes_of
from tlcapture.generation.sampling.checkpoint_sampling import sampling_for, unfollowed, without_effect
from tlcapture.generation.sampling.next_token import GREEDY, Sampling
from tlcapture.models.loading import Model
from tlcapture.models.memory import within_memory
from tlcapture.models.streams import own_stream
from tlcapture.names import PromptId
from tlcapture.prompts.template_args import has_switch
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.runs.background_writer import BackgroundWriter
from tlcapture.runs.existing_files import check_replaceable, saved_capture
from tlcapture.runs.processes import Processes, leaving_processors
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.config import update_config
from tlcapture.storage.experiments.layout import derived_files
from tlcapture.storage.experiments.prompts_with_files import PromptsWithFiles
from tlcapture.storage.files import Written, remove, write_bytes
from tlcapture.traits.interventions.records import thinking_doubt
from tlcapture.traits.interventions.resolved import ResolvedIntervention
from tlcapture.traits.projections.saved import merged_files
from tlcapture.views.cache import Cache


@dataclass(frozen=True)
class _Fresh:
    """How the fresh prompts of a task are run, and which outputs are wanted of them."""

    wanted: Outputs
    sampling: Sampling
    max_new_tokens: int
    interventions: Sequence[ResolvedIntervention]


class CaptureWorker:
    """Carries out tasks with a model that is loaded when it is first needed.

    `norm_prompts` are the prompts of each set on which typical norms are measured; `lengths` are those of the
    prompts, if they have to fit in the memory of this machine.
    """

    def __init__(
        self,
        options: CaptureOptions,
        run: Run,
        load: Callable[[], Model] | None,
        norm_prompts: Mapping[str, Sequence[TokenizedPrompt]] = MappingProxyType({}),
        lengths: Sequence[PromptLength] = (),
    ):
        self.run = run
        self.layout = run.layout
        self.options = options
        self._load = load
        self._norm_prompts = norm_prompts
        self._lengths = lengths
        self._processes = Processes.of_context()
        self._projections = CaptureProjections(options, run, self._processes)
        self._lock = Lock()  # for what the threads of the writer share
        self._removed: list[Path] = []
        self._unanswered: list[str] = []
        self._had_files: dict[str, PromptsWithFiles] = {}
        self._is_recorded = False
        self._again = InterventionsAgain(run.layout.root)

    @cached_property
    def model(self) -> Model:
        """The model, loaded on first use."""
        assert self._load is not None
        return self._load()

    def prepare(self) -> None:
        """Load the model; raises `InputError` if a prompt does not fit in this machine's memory."""
        check_they_fit(self._lengths, self.model)

    def do(self, task: CaptureTask) -> None:
        """Complete the saved prompts of a task and capture its fresh ones.

        In this order: where a run is stopped, the next one finds as many saved prompts to read again, and puts them
        into the same batches.
        """
        self._complete(task)
        if task.fresh:
            try:
                self._generate(task)
            finally:
                self.run.removed(self._removed)
                if self._unanswered:  # which threads found in any order
                    named = {f"{task.capture_set}/{each.name}": index for index, each in enumerate(task.batched)}
                    can_be_off = has_switch(self.model.tokenizer, task.batched[0].template_args)
                    self.run.warn(
                        no_answer_warning(sorted(self._unanswered, key=named.__getitem__), has_switch=can_be_off)
                    )
                self._removed, self._unanswered = [], []

    # -- fresh prompts ----------------------------------------------------------------------------

    def _fresh(self, task: CaptureTask) -> _Fresh:
        """How to run the fresh prompts of a task; warns of everything doubtful about that."""
        model, options = self.model, self.options
        wanted = options.outputs(model.n_layers)
        sampling = sampling_for(options.sampling, model)
        notes = (unfollowed(sampling, model), without_effect(sampling, options.samples))
        for note in () if options.responses_from else filter(None, notes):
            self.run.warn(note)
        # A default that is longer for thinking must not keep prompts from fitting.
        most = longest_forced(task.batched) if options.responses_from else options.max_new_tokens
        max_new_tokens = max(most, min(task.max_new_tokens, model.n_ctx - task.longest))
        for prompt in task.batched:
            if prompt.dropped:
                self.run.warn(dropped_warning(prompt.dropped))
        if options.projections_only:
            self._projections.check_vectors(self.model, wanted)
        norm_prompts = self._norm_prompts.get(task.prompt_set.name, ())
        resolved = with_norms(options.resolved, model, norm_prompts, options.batch_size, self.run.warn)
        doubt = thinking_doubt(options.intervention_records, thinks=any(prompt.thinks for prompt in task.batched))
        if doubt is not None:
            self.run.warn(doubt)
        return _Fresh(wanted, sampling, max_new_tokens, resolved)

    def _generate(self, task: CaptureTask) -> None:
        model, options, fresh = self.model, self.options, self._fresh(task)
        wanted = fresh.wanted
        if options.project and wanted.raw and wanted.tokens is None:  # see `CaptureProjections`
            self._processes.announce(len(task.fresh))
        with (
            self.run.progress(len(task.fresh) * fresh.max_new_tokens, task.capture_set, "token") as progress,
            leaving_processors(len(self._processes), 12 * model.n_layers * model.d_model**2),
            BackgroundWriter(self.run, n_processes=len(self._processes)) as writer,
        ):

            def on_tokens(count: int) -> None:
                self.run.report.n_tokens += count
                writer.collect()
                progress.advance(count)

            for outcome in generate_or_force(
                model,
                task.batched,
                wanted=task.fresh,
                hooks=wanted.live_hooks(model),
                max_new_tokens=fresh.max_new_tokens,
                sampling=GREEDY if options.responses_from else fresh.sampling,
                interventions=[change for each in fresh.interventions for change in each.interventions()],
                batch_size=options.batch_size,
                on_tokens=on_tokens,
                spooling=self._spooling,
            ):
                name = f"{task.capture_set}/{outcome.prompt.name}"
                if isinstance(outcome, Failure):
                    self.run.failed(name, outcome.reason)
                    continue
                with _attempt(self.run, name):
                    # On a CPU the lens is computed here, with all threads; other devices compute it beside the model.
                    is_now = wanted.logit_lens and model.last_device.type == "cpu"
                    ids, n_prompt = outcome.token_ids, len(outcome.prompt.token_ids)
                    lens = lens_of(model, ids, n_prompt, outcome.cache, wanted) if is_now else None
                    asked = AddOns(wanted, outcome.cache, options.save_dtype, lens, fresh=True)
                    writer.submit(partial(self._write, outcome, fresh, asked), 2 * n_bytes_of(outcome.cache))
                n_new = len(outcome.response_ids)
                progress.advance(fresh.max_new_tokens - n_new, done=f"{name}: {n_new} tokens, {outcome.stop_reason}")

    @cached_property
    def _spooling(self) -> Spooling | None:
        """Where to keep attention patterns that are too large for memory; requested JSON is made in memory."""
        above = weights_in_memory(self.options.parts.form)
        return None if above is None else Spooling(self.layout.folder, above)

    def _write(self, generation: Generation, fresh: _Fresh, asked: AddOns, run: Run) -> None:
        """Write all files of a prompt, in a thread of the writer."""
        prompt = generation.prompt
        name = f"{self.options.capture_set(prompt.prompt_set)}/{prompt.name}"
        with _attempt(run, name), own_stream(self.model.last_device):
            self._write_files(name, generation, fresh, asked, run)

    def _check_replaceable(self, capture_set: str, name: PromptId) -> bool:
        """Raise `StorageError` for files that another tool may have put there since the run was planned.

        Returns whether the prompt may have any file.
        """
        overwrite, raw = self.options.overwrite, self.layout.residual(capture_set, name)
        if not lexists(raw) and not self._with_files(capture_set).may_have_any(name):
            return False
        saved_capture(raw, overwrite=overwrite)
        for path in [*derived_files(self.layout, capture_set, name), *merged_files(self.layout, capture_set)]:
            check_replaceable(self.layout, path, overwrite=overwrite)
        return True

    def _with_files(self, capture_set: str) -> PromptsWithFiles:
        """The prompts that had derived files when this worker began to write captures of a set."""
        with self._lock:
            if capture_set not in self._had_files:
                self._had_files[capture_set] = PromptsWithFiles(self.layout, capture_set)
            return self._had_files[capture_set]

    def _record_model(self) -> None:
        """Record the model in the experiment's config, once."""
        with self._lock:
            if not self._is_recorded:
                update_config(self.layout, inference_model=self.model.name)
                self._is_recorded = True

    def _write_files(self, name: str, generation: Generation, fresh: _Fresh, asked: AddOns, run: Run) -> None:
        options, wanted = self.options, asked.wanted
        capture_set = options.capture_set(generation.prompt.prompt_set)
        may_have_files = self._check_replaceable(capture_set, generation.prompt.name)
        capture = capture_of(
            generation,
            self.model,
            experiment=self.layout.experiment,
            sampling=fresh.sampling,
            max_new_tokens=fresh.max_new_tokens,
            attn_out=options.capture_attn,
            save_dtype=options.save_dtype,
            kept=wanted.kept,
            variant=options.variant,
            interventions=[each.record for each in fresh.interventions],
        )
        if capture.lacks_answer:
            self._unanswered.append(name)
        whole, capture = capture, capture.only(wanted_positions(wanted.tokens, capture, fresh=True))
        marker = self.layout.unfinished(capture.capture_set, capture.name)
        self._record_model()
        write_bytes(marker, b"")
        if wanted.raw:
            run.wrote(write_capture(self.layout, capture, self._removed.extend, is_first=not may_have_files))
        else:
            self._removed += remove_stale(self.layout, capture)
        device, kept = self.model.last_device, capture.positions
        self._projections.make(run, whole, with_metadata=not wanted.raw, kept=kept, device=device)
        del whole
        run.report.n_prompts += 1
        n_failures = len(run.report.failures)
        for write in computed_add_ons(self.layout, capture, self.model, asked):
            with run.attempt(name), within_memory("out of memory while its files were written"):
                self._wrote(run, write())
        if len(run.report.failures) == n_failures:
            remove([marker])

    def _wrote(self, run: Run, written: Written) -> None:
        run.wrote(with_facts(self.layout, written))
        if went_compact(written, self.options.parts.form):
            run.warn(WENT_COMPACT)

    # -- saved captures --------------------------------------------------------------------------------

    def _complete(self, task: CaptureTask) -> None:
        capture_set = task.capture_set
        to_read: set[PromptId] = set()
        files = KnownFiles(self.layout, capture_set, len(task.saved), self.run.report.learn)
        with (
            self.run.progress(len(task.saved), f"{capture_set}, saved", "prompt") as progress,
            BackgroundWriter(self.run, n_processes=len(self._processes)) as writer,
        ):
            for prompt_id, wanted in task.saved.items():
                name, of_prompt = f"{capture_set}/{prompt_id}", files.of(prompt_id)
                if self.options.projections_only and not of_prompt.captured_ns:
                    self.run.report.n_skipped += 1
                    continue
                with _attempt(self.run, name):
                    n_failures = len(self.run.report.failures)
                    if not wanted and self._projections.are_finished(of_prompt):
                        self.run.report.n_skipped += len(self.run.report.failures) == n_failures
                        progress.advance(1, done=name)
                        continue
                    if wanted.needs_pass:
                        to_read.add(prompt_id)
                        continue
                    capture = Capture.open(of_prompt.raw)
                    if wanted.has_add_ons:
                        check_replayable(capture, wanted, self.model)
                    self._submit_saved(writer, capture, wanted, {}, files)
                progress.advance(1, done=name)
            for outcome in self._read_again(task, files, to_read):
                prompt_id = outcome.prompt.id
                name = f"{capture_set}/{prompt_id}"
                with _attempt(self.run, name):
                    if isinstance(outcome, Failure):
                        raise outcome.error(outcome.reason)
                    capture = Capture.open(files.of(prompt_id).raw)
                    self._submit_saved(writer, capture, task.saved[prompt_id], outcome.cache, files)
                progress.advance(1, done=name)

    def _read_again(self, task: CaptureTask, files: KnownFiles, wanted: Collection[PromptId]) -> Iterator[Outcome]:
        """Read saved captures in the batches in which all of the task would be read, so that the bits are the same."""
        if not wanted:
            return
        model, asked = self.model, self.options.outputs(self.model.n_layers)
        sequences: dict[Pass, list[TokenizedPrompt]] = {}
        for prompt_id, lacking in task.saved.items():
            name = f"{task.capture_set}/{prompt_id}"
            with _attempt(self.run, name) if prompt_id in wanted else suppress(TlcaptureError):
                capture = Capture.open(files.of(prompt_id).raw)
                check_replayable(capture, lacking if prompt_id in wanted else asked, model)
                if prompt_id in wanted and (doubt := other_rounding(capture, model)) is not None:
                    self.run.warn(doubt)
                key = Pass(tuple(asked.pass_hooks(model)), self._again.of(capture))
                sequences.setdefault(key, []).append(as_prompt(capture, prompt_id))
        yield from replayed(model, sequences, self.options.batch_size, self._spooling, wanted)

    def _submit_saved(
        self, writer: BackgroundWriter, capture: Capture, wanted: Outputs, cache: Cache, files: KnownFiles
    ) -> None:
        lens, save_dtype = None, self.options.save_dtype
        if wanted.logit_lens and self.model.last_device.type == "cpu":  # where it has all threads
            lens = lens_of_saved(self.model, capture, wanted)
        if save_dtype == "auto" and capture.prompt.residual.points.dtype == torch.float32:
            save_dtype = "float32"  # as the capture was saved
        job = partial(self._complete_saved, capture, AddOns(wanted, cache, save_dtype, lens), files)
        writer.submit(job, 2 * (n_bytes_of(cache) + capture.response.residual.points.nbytes))

    def _complete_saved(self, capture: Capture, asked: AddOns, files: KnownFiles, run: Run) -> None:
        """Write what a saved capture lacks, in a thread of the writer."""
        with _attempt(run, f"{capture.capture_set}/{capture.name}"):
            if asked.wanted.has_add_ons:
                with own_stream(self.model.last_device):
                    for write in computed_add_ons(self.layout, capture, self.model, asked):
                        self._wrote(run, write())
            if not self.options.replay:
                of_capture = files.of(capture.name) if self.options.skip_existing else None
                self._projections.make(run, capture, files=of_capture)
        if not run.report.failures:
            run.report.n_prompts += run.report.n_files > 0
            run.report.n_skipped += run.report.n_files == 0


@contextmanager
def _attempt(run: Run, name: str) -> Iterator[None]:
    """Work on one prompt, whose failure, including lack of memory, does not stop the run."""
    with run.attempt(name), within_memory("out of memory: the outputs for this prompt do not fit in memory"):
        yield
