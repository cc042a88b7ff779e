"""`tlcapture steer`: the effect of adding a trait's vectors on the model's responses, by layer and coefficient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from os.path import lexists
from typing import Any

import torch
from pydantic import ValidationError

from tlcapture.captures.provenance import now
from tlcapture.errors import InputError, StorageError, TlcaptureError
from tlcapture.extraction.judge import Judge
from tlcapture.extraction.steering import Question, SteeringQuestions, SteeringScore, SteeringScorer
from tlcapture.models.loading import Model
from tlcapture.names import Trait
from tlcapture.prompts.tokenization import TokenizedPrompt, tokenize
from tlcapture.runs.display import Display, Progress
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.model_worker import ModelWorker
from tlcapture.runs.report import RunReport
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.config import read_config
from tlcapture.storage.files import read_bytes, read_json, write_bytes, write_json
from tlcapture.storage.layout import Datasets, Layout
from tlcapture.storage.rounding import round_significant
from tlcapture.storage.validation import first_problem
from tlcapture.traits.projection import check_fits
from tlcapture.traits.selection import COHERENT, select
from tlcapture.traits.steering_files import SteeringResults, SteeringRun
from tlcapture.traits.vector_files import VectorFiles, traits_with_vectors
from tlcapture.traits.vectors import TraitVector, read_vector

COEFFICIENTS = (0.1, 0.2, 0.3)
_SEARCH_START, _SEARCH_STEPS = 0.1, 5
_DIGITS = 5


@dataclass(frozen=True)
class SteerOptions:
    """What to steer with; empty `traits` and `layers` mean all of them.

    Empty `methods` mean the selected one; `search` looks for each layer's largest coherent coefficient in place of
    `coefficients`.
    """

    traits: tuple[Trait, ...] = ()
    methods: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    coefficients: tuple[float, ...] = COEFFICIENTS
    search: bool = False
    judge: Judge | None = None


def run_steer(
    layout: Layout,
    options: SteerOptions,
    load: ModelLoader,
    display: Display = Display(),
    executor: Executor = LocalExecutor(),
) -> RunReport:
    """Steer with every trait's vectors and write `results.json` after every run; existing runs are skipped.

    Raises:
        InputError: a trait has no vectors or no steering questions, or questions that only a judge can score, without
            a judge; nothing was written.
    """
    layout.check_exists()
    tasks, left_out = _tasks(layout, options)
    run = Run.begin(layout, display)
    for reason in left_out:
        run.warn(f"left out: {reason}")
    make, n_runs = partial(ModelWorker, _steer_one, options), _n_runs(options, executor.known_model(load).n_layers)
    executor.run(Work(make, load, tasks, lambda task: n_runs, "run", str), run)
    return run.report


@dataclass(frozen=True)
class SteeringTask:
    """A trait and the questions that the model answers while it is steered."""

    trait: Trait
    asked: SteeringQuestions

    @property
    def questions(self) -> Sequence[Question]:
        """The questions."""
        return self.asked.questions

    def __str__(self) -> str:
        return str(self.trait)


def _tasks(layout: Layout, options: SteerOptions) -> tuple[list[SteeringTask], list[str]]:
    """The traits that can be steered and scored, and why others are left out, which no trait is that was named."""
    tasks, left_out = [], []
    for trait in traits_with_vectors(layout, options.traits):
        try:
            task = SteeringTask(trait, read_questions(Datasets(layout.root), trait))
            if options.judge is None:
                _check_completions(task)
            tasks.append(task)
        except InputError as error:
            if options.traits:
                raise
            left_out.append(error)
    if not tasks:
        raise left_out[0]
    return tasks, list(map(str, left_out))


def _steer_one(run: Run, model: Model, options: SteerOptions, task: SteeringTask) -> None:
    n_runs = _n_runs(options, model.n_layers)
    with run_lock(run, f"steering of {task.trait}"), run.progress(n_runs, str(task.trait), "run") as progress:
        trials = _Trials.begin(run, model, options.judge, task, progress)
        for vector in _vectors(run.layout, task.trait, model, options):
            if options.search:
                search_coefficient(partial(trials.score, vector))
            else:
                for coefficient in options.coefficients:
                    trials.score(vector, coefficient)
        run.report.n_prompts += len(task.questions)


def _check_completions(task: SteeringTask) -> None:
    missing = sum(question.completions is None for question in task.questions)
    if missing:
        raise InputError(
            f"{missing} of {len(task.questions)} steering questions of {task.trait} have no completions: likelihood "
            'scores need a "positive" and a "negative" one for each; add them there, or score with --judge URL'
        )


def read_questions(datasets: Datasets, trait: Trait) -> SteeringQuestions:
    """The steering questions of a trait, in `steering.json` next to its examples.

    Raises `InputError` if the file is missing or invalid.
    """
    path = datasets.trait_folder(trait) / "steering.json"
    try:
        return SteeringQuestions.model_validate(read_json(path))
    except StorageError as error:
        raise InputError(str(error)) from None
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from None


def _n_runs(options: SteerOptions, n_layers: int) -> int:
    """The number of runs per trait; 0 for a search, whose length is not known in advance."""
    per_layer = max(1, len(options.methods)) * len(options.coefficients)
    return 0 if options.search else len(options.layers or range(n_layers)) * per_layer


@dataclass(frozen=True)
class _Trials:
    """Scores a trait's vectors at coefficients and records each trial as a run of its `results.json`."""

    task: SteeringTask
    scorer: SteeringScorer
    judge: Judge | None
    definition: str
    results: _Results
    progress: Progress

    @classmethod
    def begin(cls, run: Run, model: Model, judge: Judge | None, task: SteeringTask, progress: Progress) -> _Trials:
        """Ready to score, with the baseline of the unsteered model recorded."""
        prompts = _prompts(run.layout, model, task.questions)
        results = _Results(run, task.trait, model, _scored_by(judge, task.asked.eval_prompt))
        definition = _definition(Datasets(run.layout.root), task.trait)
        scorer = SteeringScorer(model, prompts, [question.completions for question in task.questions])
        trials = cls(task, scorer, judge, definition, results, progress)
        results.set_baseline(trials._judged(scorer.baseline()))
        return trials

    def score(self, vector: TraitVector, coefficient: float) -> SteeringRun:
        """The run with this vector and coefficient: an earlier one, or one that is made and recorded now."""
        found = self.results.find(vector, coefficient)
        if found is None:
            steered = self._judged(self.scorer.score(vector.layer, vector.vector, coefficient))
            found = self.results.add(vector, coefficient, steered)
        done = f"{self.task.trait} layer {vector.layer} x {coefficient:g}: trait {found.trait_mean:.1f}, "
        self.progress.advance(1, done=f"{done}coherence {found.coherence_mean:.1f}")
        return found

    def _judged(self, score: SteeringScore) -> SteeringScore:
        """The score with the judge's verdicts in place of likelihoods, if there is a judge."""
        if self.judge is None:
            return score
        pairs = zip(self.task.questions, score.responses, strict=True)
        verdicts = [self._verdict(self.judge, question.question, response) for question, response in pairs]
        scored = [verdict for verdict in verdicts if verdict is not None]
        if not scored:
            raise TlcaptureError(f"judge {self.judge.url}: it answered REFUSAL to every response to {self.task.trait}")
        return replace(score, trait=torch.tensor([torch.nan if each is None else each for each in verdicts]))

    def _verdict(self, judge: Judge, question: str, response: str) -> float | None:
        eval_prompt = self.task.asked.eval_prompt
        if eval_prompt is not None:
            return judge.score_by(eval_prompt, question=question, response=response)
        trait = str(self.task.trait)
        return judge.score(trait=trait, definition=self.definition, question=question, response=response)


def _prompts(layout: Layout, model: Model, questions: Sequence[Question]) -> list[TokenizedPrompt]:
    config = read_config(layout)
    return [
        tokenize(
            model.tokenizer,
            question.question,
            prompt_set="steering",
            prompt_id=question.id,
            system_prompt=config.system_prompt,
            chat_template=config.use_chat_template,
        )
        for question in questions
    ]


def search_coefficient(score: Callable[[float], SteeringRun]) -> float:
    """The largest coefficient whose responses stay coherent, to within an eighth of a doubling step.

    Doubles from 0.1 until the responses are incoherent, then halves the interval.
    """
    low, high = 0.0, _SEARCH_START
    for _ in range(_SEARCH_STEPS):
        if score(high).coherence_mean < COHERENT:
            break
        low, high = high, high * 2
    for _ in range(3):
        middle = round((low + high) / 2, 4)
        if score(middle).coherence_mean < COHERENT:
            high = middle
        else:
            low = middle
    return low


def _vectors(layout: Layout, trait: Trait, model: Model, options: SteerOptions) -> Iterator[TraitVector]:
    """The vectors to steer with: of the methods in `options`, or of the selected one."""
    folder = VectorFiles(layout, trait)
    available = folder.available("residual")
    methods = options.methods or (select(folder, "residual", model.n_layers).method,)
    for method in methods:
        for layer in options.layers or available.get(method, ()):
            vector = read_vector(folder, "residual", method, layer)
            check_fits(vector, model.n_layers, model.d_model)
            yield vector


class _Results:
    """A trait's `results.json`, written after every run."""

    def __init__(self, run: Run, trait: Trait, model: Model, scored_by: str):
        layout = run.layout
        self._path = layout.steering(trait)
        self._files = VectorFiles(layout, trait)
        self._run = run
        self._content: dict[str, Any] = {"baseline": {}, "runs": []}
        if lexists(self._path):
            before = read_json(self._path)
            metadata = SteeringResults.parse(before, self._path).metadata
            if (metadata.get("model_fingerprint"), metadata.get("scored_by")) == (model.fingerprint, scored_by):
                self._content = before
        self._content["metadata"] = {
            "model": model.name,
            "model_fingerprint": model.fingerprint,
            "engine": model.engine,
            "scored_by": scored_by,
            "timestamp": now(),
        }

    def set_baseline(self, score: SteeringScore) -> None:
        self._content["baseline"] = _means(score)

    def find(self, vector: TraitVector, coefficient: float) -> SteeringRun | None:
        """The recorded run with the same vector and coefficient, if there is one."""
        config, made = _config(vector, coefficient), vector.metadata.get("timestamp")
        digest = self._files.digest(vector.component, vector.method, vector.layer)
        for run in self._content["runs"]:
            has_same_vector = run.get("vector_timestamp") == made and run.get("vector_digest") in (None, digest)
            if run["config"] == config and has_same_vector:
                return self._parsed(run)
        return None

    def add(self, vector: TraitVector, coefficient: float, score: SteeringScore) -> SteeringRun:
        config = _config(vector, coefficient)
        run = {
            "config": config,
            "result": {**_means(score), "n": int((~score.trait.isnan()).sum())},
            "vector_timestamp": vector.metadata.get("timestamp"),
            "vector_digest": self._files.digest(vector.component, vector.method, vector.layer),
            "responses": score.responses,
        }
        self._content["runs"] = [*(each for each in self._content["runs"] if each["config"] != config), run]
        self._run.wrote(write_json(self._path, self._content, indent=True))
        return self._parsed(run)

    def _parsed(self, run: dict[str, Any]) -> SteeringRun:
        return SteeringResults.parse({**self._content, "runs": [run]}, self._path).single_layer_runs[0]


def _scored_by(judge: Judge | None, eval_prompt: str | None) -> str:
    """What scores `trait_mean`; runs that were scored in different ways are never mixed."""
    if judge is None:
        return "likelihood"
    asked = "" if eval_prompt is None else f", eval_prompt {blake2b(eval_prompt.encode(), digest_size=4).hexdigest()}"
    return f"judge {judge.url}{asked}"


def _definition(datasets: Datasets, trait: Trait) -> str:
    path = datasets.trait_folder(trait) / "definition.md"
    return read_bytes(path).decode("utf-8", "replace").strip() if path.is_file() else ""


def _config(vector: TraitVector, coefficient: float) -> dict[str, Any]:
    return {
        "layers": [vector.layer],
        "methods": [vector.method],
        "coefficients": [coefficient],
        "component": vector.component,
    }


def _means(score: SteeringScore) -> dict[str, float]:
    means = {"trait_mean": score.trait_mean, "coherence_mean": score.coherence_mean}
    return {name: float(round_significant(value, _DIGITS)) for name, value in means.items()}


def draw_curves(layout: Layout, traits: Sequence[Trait], report: RunReport) -> None:
    """Draw the steering curves of traits that have results to `steering.png` next to the results."""
    from tlcapture.commands.plots import steering_curves

    for trait in traits:
        path = layout.steering(trait)
        if lexists(path):
            results = SteeringResults.read(path)
            report.wrote(write_bytes(layout.picture(trait, "steering"), steering_curves(str(trait), results)))
