"""`tlcapture capture`: prompt sets through the model, into files.

    model, prompts -> generate -> one prompt after another: raw residual, add-ons, projections

With `skip_existing` each prompt gets just what it lacks; with `replay`, or where a prompt's raw
residual is there already, add-ons come from the saved capture and one teacher-forced pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tlcapture.captures import Capture
from tlcapture.chat import TokenizedPrompt, tokenize
from tlcapture.config import ExperimentConfig, read_config, record
from tlcapture.errors import InputError, StorageError, TlcaptureError
from tlcapture.generation import Failure, Generation, Sampling, generate, teacher_force
from tlcapture.layout import Layout
from tlcapture.memory import is_out_of_memory, release_memory
from tlcapture.models import Model
from tlcapture.prompts import Prompt, PromptSet
from tlcapture.runs.background import BackgroundWriter
from tlcapture.runs.outputs import Outputs, add_ons, capture_of, write_capture
from tlcapture.runs.report import Reporter, RunReport
from tlcapture.runs.vectors import Chooser, VectorChoice, project_capture, traits_to_project
from tlcapture.storage import sweep_temporaries
from tlcapture.views.residual import residual_hooks

ALL_LAYERS = "all"


@dataclass(frozen=True)
class CaptureOptions:
    """What to capture and how; `internals` is a tuple of layers, or `"all"`."""

    attention: bool = False
    logit_lens: bool = False
    internals: tuple[int, ...] | str = ()
    capture_attn: bool = False
    project: bool = True
    replay: bool = False
    skip_existing: bool = False
    vectors: VectorChoice = VectorChoice(layer="default")
    max_new_tokens: int = 50
    sampling: Sampling = Sampling()
    save_dtype: str = "auto"
    batch_size: int | None = None
    limit: int | None = None
    chat_template: bool | None = None
    system_prompt: str | None = None

    def outputs(self, n_layers: int) -> Outputs:
        """The files wanted of each prompt, for a model of so many layers."""
        everything = self.internals == ALL_LAYERS
        asked = range(n_layers) if self.internals == ALL_LAYERS else (int(layer) for layer in self.internals)
        layers = tuple(sorted(set(asked)))
        for layer in layers:
            if layer >= n_layers:
                raise InputError(f"--layer-internals {layer}: the model has layers 0 to {n_layers - 1}")
        return Outputs(
            residual=not self.replay,
            attn_out=self.capture_attn,
            attention=self.attention or everything,
            logit_lens=self.logit_lens or everything,
            internals=layers,
        )


def run_capture(
    layout: Layout,
    prompt_sets: Sequence[PromptSet],
    options: CaptureOptions,
    load: ModelLoader,
    reporter: Reporter = Reporter(),
) -> RunReport:
    """Capture prompt sets into an experiment. The model is loaded only when something needs it.

    Raises:
        InputError: the request is wrong; nothing was written.
    """
    if options.replay and options.capture_attn:
        raise InputError("--replay keeps raw residuals as they are: attention outputs need a capture of their own")
    if layout.folder.exists() and not os.access(layout.folder, os.W_OK):
        raise StorageError(f"{layout.folder}: cannot be written to")
    run = _Run(layout, options, load, reporter, RunReport(layout.folder), read_config(layout))
    if options.project and (options.vectors.experiment or options.vectors.traits):
        traits_to_project(layout, options.vectors)
    if layout.folder.exists():
        sweep_temporaries(layout.folder)
    for prompt_set in prompt_sets:
        run.prompt_set(prompt_set)
    return run.report


class _Run:
    """One invocation: the model and the vectors it has loaded so far, and its report."""

    def __init__(
        self,
        layout: Layout,
        options: CaptureOptions,
        load: ModelLoader,
        reporter: Reporter,
        report: RunReport,
        config: ExperimentConfig,
    ):
        self.layout = layout
        self.options = options
        self.reporter = reporter
        self.report = report
        self.config = config
        self._load = load
        self._model: Model | None = None
        self._chooser = Chooser(layout, options.vectors, report, reporter)

    @property
    def model(self) -> Model:
        if self._model is None:
            self._model = self._load()
        return self._model

    def prompt_set(self, prompt_set: PromptSet) -> None:
        prompts = prompt_set.prompts[: self.options.limit]
        lacking = {prompt.id: self._lacking(prompt_set, prompt) for prompt in prompts}
        fresh = [prompt for prompt in prompts if (wanted := lacking[prompt.id]) and wanted.residual]
        saved = [prompt for prompt in prompts if prompt not in fresh]
        if fresh:
            self._generate(prompt_set, fresh)
        self._revisit(prompt_set.name, saved, lacking)

    def _lacking(self, prompt_set: PromptSet, prompt: Prompt) -> Outputs | None:
        """What to make of a prompt; `None` where the raw residual cannot be replayed because it is not there."""
        options, raw = self.options, self.layout.residual(prompt_set.name, prompt.id)
        if options.replay and not raw.is_file():
            return None
        if not raw.is_file() or not (options.skip_existing or options.replay):
            return options.outputs(self.model.n_layers)
        try:
            saved = Capture.open(raw)
        except StorageError:
            return options.outputs(self.model.n_layers)
        wanted = options.outputs(saved.n_layers)
        if not options.skip_existing or (not options.replay and not self._is_of(saved, prompt_set, prompt)):
            return wanted
        return wanted.missing(self.layout, prompt_set.name, prompt.id)

    def _is_of(self, saved: Capture, prompt_set: PromptSet, prompt: Prompt) -> bool:
        """Whether a capture is of this prompt, put in this way to this model, rather than of an earlier wording."""
        asked = self._asked_template
        return (
            saved.metadata.get("prompt_text") == prompt.text
            and saved.metadata.get("system_prompt") == self._system_prompt(prompt_set, prompt)
            and saved.metadata["inference_model"] == self._load.name
            and asked in (None, saved.metadata.get("chat_template"))
        )

    @property
    def _asked_template(self) -> bool | None:
        option = self.options.chat_template
        return self.config.use_chat_template if option is None else option

    def _system_prompt(self, prompt_set: PromptSet, prompt: Prompt) -> str | None:
        if self.options.system_prompt is not None:
            return self.options.system_prompt
        return prompt_set.system_prompt_of(prompt, self.config.system_prompt)

    # -- fresh prompts ----------------------------------------------------------------------------

    def _generate(self, prompt_set: PromptSet, prompts: Sequence[Prompt]) -> None:
        model, options = self.model, self.options
        wanted = options.outputs(model.n_layers)
        tokenized = list(self._tokenized(prompt_set, prompts))
        points = residual_hooks(model.n_layers, model.hook_names, attn_out=wanted.attn_out)
        total = len(tokenized) * options.max_new_tokens
        with (
            self.reporter.progress(total, prompt_set.name, "token") as progress,
            BackgroundWriter(self.report) as writer,
        ):

            def on_tokens(count: int) -> None:
                self.report.n_tokens += count
                progress.advance(count)

            for outcome in generate(
                model,
                tokenized,
                hooks=list(dict.fromkeys([*points, *wanted.pass_hooks(model)])),
                max_new_tokens=options.max_new_tokens,
                sampling=options.sampling,
                batch_size=options.batch_size,
                on_tokens=on_tokens,
            ):
                name = f"{outcome.prompt.prompt_set}/{outcome.prompt.id}"
                if isinstance(outcome, Failure):
                    self.report.failed(name, outcome.reason)
                    continue
                try:
                    self._write(name, outcome, wanted, writer)
                except TlcaptureError as error:
                    self.report.failed(name, error)
                    continue
                progress.advance(
                    options.max_new_tokens - len(outcome.response_ids),
                    done=f"{name}: {len(outcome.response_ids)} tokens, {outcome.stop_reason}",
                )

    def _tokenized(self, prompt_set: PromptSet, prompts: Sequence[Prompt]) -> Iterator[TokenizedPrompt]:
        for prompt in prompts:
            yield tokenize(
                self.model.tokenizer,
                prompt.text,
                prompt_set=prompt_set.name,
                prompt_id=prompt.id,
                system_prompt=self._system_prompt(prompt_set, prompt),
                chat_template=self._asked_template,
            )

    def _write(self, name: str, generation: Generation, wanted: Outputs, writer: BackgroundWriter) -> None:
        options = self.options
        capture = capture_of(
            generation,
            self.model,
            experiment=self.layout.experiment,
            sampling=options.sampling,
            max_new_tokens=options.max_new_tokens,
            attn_out=options.capture_attn,
            save_dtype=options.save_dtype,
        )
        self.report.wrote(write_capture(self.layout, capture))
        record(self.layout, inference_model=self.model.name)
        cache = generation.cache
        writer.write(name, add_ons(self.layout, capture, wanted, self.model, cache, residual_cache=cache))
        self._project(capture)
        self.report.n_prompts += 1

    # -- prompts that were captured before -------------------------------------------------------------

    def _revisit(self, prompt_set: str, prompts: Sequence[Prompt], lacking: dict[str, Outputs | None]) -> None:
        with self.reporter.progress(len(prompts), f"{prompt_set}, saved", "prompt") as progress:
            for prompt in prompts:
                name, wanted = f"{prompt_set}/{prompt.id}", lacking[prompt.id]
                if wanted is None:
                    path = self.layout.residual(prompt_set, prompt.id)
                    self.report.failed(name, f"--replay needs a saved capture, there is none at {path}")
                    continue
                before = self.report.n_files
                try:
                    self._replay(Capture.open(self.layout.residual(prompt_set, prompt.id)), wanted)
                except TlcaptureError as error:
                    self.report.failed(name, error)
                    continue
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self.report.failed(name, "out of memory: it cannot be replayed in one pass on this device")
                    release_memory()
                    continue
                if self.report.n_files > before:
                    self.report.n_prompts += 1
                else:
                    self.report.n_skipped += 1
                progress.advance(1, done=f"{name}: {self.report.n_files - before} files")

    def _replay(self, capture: Capture, wanted: Outputs) -> None:
        if wanted.needs_pass or wanted.logit_lens:
            self._check_model(capture)
            hooks = wanted.pass_hooks(self.model)
            cache = teacher_force(self.model, capture.token_ids, hooks) if hooks else {}
            for write in add_ons(self.layout, capture, wanted, self.model, cache, residual_cache=None):
                self.report.wrote(write())
        self._project(capture, only_missing=self.options.skip_existing)

    def _check_model(self, capture: Capture) -> None:
        mark = capture.metadata.get("model_fingerprint")
        if mark != self.model.fingerprint:
            raise InputError(
                f"it was captured from {capture.metadata.get('inference_model')!r} (fingerprint {mark}), not from "
                f"{self.model.name!r} ({self.model.fingerprint}): replay it with the same model"
            )

    # -- projection ---------------------------------------------------------------------------------------

    def _project(self, capture: Capture, *, only_missing: bool = False) -> None:
        if not self.options.project:
            return
        components = ["residual"] + (["attn_out"] if capture.prompt.residual.attn_out is not None else [])
        for component in components:
            choose = self._chooser.missing if only_missing else self._chooser.vectors
            project_capture(
                self.layout,
                capture,
                choose(capture, component),
                self.report,
                self.reporter,
                other_model_intended=self.options.vectors.experiment is not None,
            )
