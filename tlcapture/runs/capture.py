"""`tlcapture capture`: prompt sets through the model, into files.

    model, prompts -> generate -> one prompt after another: raw residual, add-ons, projections

With `skip_existing` each prompt gets just what it lacks; with `replay`, or where a prompt's raw
residual is there already, add-ons come from the saved capture and one teacher-forced pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tlcapture.captures import Capture
from tlcapture.chat import TokenizedPrompt, tokenize
from tlcapture.config import ExperimentConfig, read_config, record
from tlcapture.errors import InputError, StorageError, TlcaptureError
from tlcapture.generation import Failure, Generation, Sampling, generate, teacher_force
from tlcapture.layout import Layout
from tlcapture.models import Model
from tlcapture.names import Trait
from tlcapture.prompts import Prompt, PromptSet
from tlcapture.runs.outputs import Outputs, capture_of, write_add_ons, write_capture
from tlcapture.runs.report import Reporter, RunReport
from tlcapture.runs.vectors import Chosen, VectorChoice, choose_vectors, project_capture, traits_to_project
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
    load: Callable[[], Model],
    reporter: Reporter = Reporter(),
) -> RunReport:
    """Capture prompt sets into an experiment. The model is loaded only when something needs it.

    Raises:
        InputError: the request is wrong; nothing was written.
    """
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
        load: Callable[[], Model],
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
        self._chosen: dict[tuple[str, int], Chosen] = {}

    @property
    def model(self) -> Model:
        if self._model is None:
            self._model = self._load()
            record(self.layout, inference_model=self._model.name)
        return self._model

    def prompt_set(self, prompt_set: PromptSet) -> None:
        prompts = prompt_set.prompts[: self.options.limit]
        lacking = {prompt.id: self._lacking(prompt_set.name, prompt) for prompt in prompts}
        fresh = [prompt for prompt in prompts if (wanted := lacking[prompt.id]) and wanted.residual]
        saved = [prompt for prompt in prompts if prompt not in fresh]
        if fresh:
            self._generate(prompt_set, fresh)
        self._revisit(prompt_set.name, saved, lacking)

    def _lacking(self, prompt_set: str, prompt: Prompt) -> Outputs | None:
        """What to make of a prompt; `None` where the raw residual cannot be replayed because it is not there."""
        raw = self.layout.residual(prompt_set, prompt.id)
        if self.options.replay and not raw.is_file():
            return None
        if not raw.is_file() or not (self.options.skip_existing or self.options.replay):
            return self.options.outputs(self.model.n_layers)
        try:
            saved = Capture.open(raw)
        except StorageError:
            return self.options.outputs(self.model.n_layers)
        wanted = self.options.outputs(saved.n_layers)
        # A prompt that was edited since is another prompt, and what is there is not its capture.
        if not self.options.skip_existing or prompt.text.strip() not in saved.prompt.text:
            return wanted
        return wanted.missing(self.layout, prompt_set, prompt.id)

    # -- fresh prompts ----------------------------------------------------------------------------

    def _generate(self, prompt_set: PromptSet, prompts: Sequence[Prompt]) -> None:
        model, options = self.model, self.options
        wanted = options.outputs(model.n_layers)
        tokenized = list(self._tokenized(prompt_set, prompts))
        points = residual_hooks(model.n_layers, model.hook_names, attn_out=wanted.attn_out)
        total = len(tokenized) * options.max_new_tokens
        with self.reporter.progress(total, prompt_set.name, "token") as progress:

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
                    self._write(outcome, wanted)
                except TlcaptureError as error:
                    self.report.failed(name, error)
                    continue
                progress.advance(
                    options.max_new_tokens - len(outcome.response_ids),
                    done=f"{name}: {len(outcome.response_ids)} tokens, {outcome.stop_reason}",
                )

    def _tokenized(self, prompt_set: PromptSet, prompts: Sequence[Prompt]) -> Iterator[TokenizedPrompt]:
        options, config = self.options, self.config
        asked = options.chat_template if options.chat_template is not None else config.use_chat_template
        for prompt in prompts:
            system = prompt_set.system_prompt_of(prompt, config.system_prompt)
            yield tokenize(
                self.model.tokenizer,
                prompt.text,
                prompt_set=prompt_set.name,
                prompt_id=prompt.id,
                system_prompt=system if options.system_prompt is None else options.system_prompt,
                chat_template=asked,
            )

    def _write(self, generation: Generation, wanted: Outputs) -> None:
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
        kept = wanted.paths(self.layout, capture.prompt_set, capture.prompt_id)
        self.report.wrote(write_capture(self.layout, capture, kept))
        cache = generation.cache
        for size in write_add_ons(self.layout, capture, wanted, self.model, cache, residual_cache=cache):
            self.report.wrote(size)
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
            for size in write_add_ons(self.layout, capture, wanted, self.model, cache, residual_cache=None):
                self.report.wrote(size)
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
            chosen = self._vectors(component, capture.n_layers)
            if only_missing:
                raw = self.layout.residual(capture.prompt_set, capture.prompt_id)
                chosen = [pair for pair in chosen if not self._is_projected(capture, pair[0].trait, component, raw)]
            project_capture(
                self.layout,
                capture,
                chosen,
                self.report,
                self.reporter,
                other_model_intended=self.options.vectors.experiment is not None,
            )

    def _is_projected(self, capture: Capture, trait: Trait, component: str, raw: Path) -> bool:
        path = self.layout.projection(trait, component, capture.prompt_set, capture.prompt_id)
        return path.is_file() and path.stat().st_mtime_ns >= raw.stat().st_mtime_ns

    def _vectors(self, component: str, n_layers: int) -> Chosen:
        key = (component, n_layers)
        if key not in self._chosen:
            choice = self.options.vectors
            self._chosen[key] = choose_vectors(self.layout, choice, component, n_layers, self.report, self.reporter)
        return self._chosen[key]
