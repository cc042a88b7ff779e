"""`tlcapture steer`: the effect of adding a trait's vectors on the model's responses, by layer and coefficient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os.path import lexists

import torch
from pydantic import ValidationError

from tlcapture.commands.projecting.projections import random_directions
from tlcapture.commands.steering_results import Results, scored_by
from tlcapture.errors import InputError, StorageError, TlcaptureError
from tlcapture.extraction.judge import Judge
from tlcapture.extraction.monitoring import RANDOM_VECTORS as MONITORING_VECTORS
from tlcapture.extraction.monitoring import monitoring
from tlcapture.extraction.steering import (
    NEW_TOKENS,
    RANDOM_VECTORS,
    Addition,
    Question,
    SteeringQuestions,
    SteeringScore,
    SteeringScorer,
)
from tlcapture.models.loading import Model
from tlcapture.names import Trait
from tlcapture.prompts.tokenization import TokenizedPrompt, place_response, tokenize, unknown_token
from tlcapture.runs.display import Display, Progress
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.model_worker import ModelWorker
from tlcapture.runs.report import RunReport
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_bytes, read_json, write_bytes
from tlcapture.storage.validation import first_problem
from tlcapture.text import decoded
from tlcapture.traits.projections.projection import check_fits
from tlcapture.traits.selection import COHERENT, select
from tlcapture.traits.statistics.chance import RandomDirections
from tlcapture.traits.steering_files import SteeringResults, SteeringRun
from tlcapture.traits.vector_files import VectorFiles, check_available, traits_with_vectors
from tlcapture.traits.vectors import TraitVector, read_vector

COEFFICIENTS = (0.1, 0.2, 0.3)
N_NULLS = 3  # cells at which random vectors are added too
_SEARCH_START, _SEARCH_STEPS = 0.1, 5


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
    check_available(layout, traits_with_vectors(layout, options.traits), options.methods, options.layers)
    tasks, left_out = _tasks(layout, options)
    run = Run.begin(layout, display)
    for reason in left_out:
        run.warn(f"left out: {reason}")
    make, n_runs = partial(ModelWorker, _steer_one, options), _n_runs(options, executor.known_model(load).n_layers)
    executor.run(Work(make, load, tasks, lambda task: n_runs, "run"), run)
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
    """The traits that can be steered and scored, and why others are left out; a named trait never is."""
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
        vectors = list(_vectors(run.layout, task.trait, model, options))
        for vector in vectors:
            if options.search:
                search_coefficient(partial(trials.score, vector))
            else:
                trials.score_all(vector, options.coefficients)
        trials.add_nulls()
        for vector in vectors:
            trials.monitor(vector)
        run.report.n_prompts += len(task.questions)


def _check_completions(task: SteeringTask) -> None:
    missing = sum(question.completions is None for question in task.questions)
    if missing:
        raise InputError(
            f"{missing} of {len(task.questions)} steering questions of {task.trait} have no completions: likelihood "
            'scores need a "positive" and a "negative" one for each; add them there, or score with --judge URL'
        )


def is_steerable(layout: Layout, trait: Trait) -> bool:
    """Whether a trait has questions that need no judge."""
    try:
        return all(each.completions for each in read_questions(Datasets(layout.root), trait).questions)
    except InputError:
        return False


_QUESTIONS = '[{"question": "How was your day?", "positive": "Awful.", "negative": "Lovely."}]'


def read_questions(datasets: Datasets, trait: Trait) -> SteeringQuestions:
    """The steering questions of a trait, in `steering.json` next to its examples.

    Raises `InputError` if the file is missing or invalid.
    """
    path = datasets.trait_folder(trait) / "steering.json"
    if not lexists(path):
        raise InputError(f"{path}: no such file: expected questions to steer with, such as {_QUESTIONS}")
    try:
        return SteeringQuestions.model_validate(read_json(path, exact=True))
    except StorageError as error:
        raise InputError(str(error)) from None
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from None


def _n_runs(options: SteerOptions, n_layers: int) -> int:
    """The number of runs per trait; 0 for a search, whose length is not known in advance."""
    per_layer = max(1, len(options.methods)) * len(options.coefficients)
    cells = len(options.layers or range(n_layers)) * per_layer
    return 0 if options.search else cells + min(N_NULLS, cells)


@dataclass(frozen=True, eq=False)
class _Trials:
    """Scores a trait's vectors at coefficients and records each trial as a run of its `results.json`."""

    task: SteeringTask
    scorer: SteeringScorer
    judge: Judge | None
    definition: str
    results: Results
    baseline: SteeringScore
    random: RandomDirections
    progress: Progress

    @classmethod
    def begin(cls, run: Run, model: Model, judge: Judge | None, task: SteeringTask, progress: Progress) -> _Trials:
        """Trials that are ready to score, with the baseline of the unsteered model recorded."""
        prompts = _prompts(run.layout, model, task.questions)
        results = Results(run, task.trait, model, scored_by(judge, task.asked.eval_prompt), task.asked)
        definition = _definition(Datasets(run.layout.root), task.trait)
        scorer = SteeringScorer(model, prompts, [question.completions for question in task.questions])
        random = random_directions(run.layout, "residual", model.n_layers, model.d_model, run.warn)
        trials = cls(task, scorer, judge, definition, results, scorer.baseline(), random, progress)
        results.set_baseline(trials._judged(trials.baseline))
        return trials

    def score(self, vector: TraitVector, coefficient: float) -> SteeringRun:
        """The run with this vector and coefficient, from an earlier run or made and recorded now."""
        return self.score_all(vector, [coefficient])[0]

    def score_all(self, vector: TraitVector, coefficients: Sequence[float]) -> list[SteeringRun]:
        """The runs with this vector and several coefficients; new ones share batches."""
        missing = [each for each in coefficients if self.results.find(vector, each) is None]
        made = self.scorer.scores([Addition(vector.layer, vector.vector, each) for each in missing])
        for coefficient, score in zip(missing, made, strict=True):
            self.results.add(vector, coefficient, self._judged(score))
        runs = []
        for coefficient in coefficients:
            found = self.results.find(vector, coefficient)
            assert found is not None
            done = f"{self.task.trait} layer {vector.layer} x {coefficient:g}: gain {found.delta:+.1f}, "
            self.progress.advance(1, done=f"{done}coherence {found.coherence_mean:.1f}")
            runs.append(found)
        return runs

    def add_nulls(self) -> None:
        """Steer with random vectors of the same norm at the cells with the largest gains, unless that was done."""
        for run in self.results.largest_gains(N_NULLS):
            if run.null is None or self.random.covariance == "reference" != run.null_covariance:
                self.results.set_null(run, self._random_gains(run), self.random.covariance)
            cell = f"{self.task.trait} layer {run.layer} x {run.coefficient:g}"
            self.progress.advance(1, done=f"{cell}: random vectors added")

    def _random_gains(self, run: SteeringRun) -> list[float]:
        drawn = self.random.vectors(RANDOM_VECTORS, run.layer)
        additions = [Addition(run.layer, vector, run.coefficient) for vector in drawn]
        if self.judge is None:
            means = [float(100 * score.nanmean()) for score in self.scorer.trait_scores(additions)]
        else:
            means = [self._judged(score).trait_mean for score in self.scorer.scores(additions)]
        return [mean - self.results.baseline_mean for mean in means]

    def monitor(self, vector: TraitVector) -> None:
        """Read the vector's steered responses without steering, and record whether projections follow."""
        responses = {each: self.results.responses(vector, each) for each in self.results.coefficients(vector)}
        by_coefficient = {each: texts for each, texts in responses.items() if texts is not None} | {
            0.0: self.baseline.responses
        }
        coefficients = sorted(by_coefficient)
        if len(coefficients) < 2 or self.results.has_monitoring(vector, coefficients, self.random.covariance):
            return
        read = torch.stack([self.scorer.read(vector.layer, by_coefficient[each]) for each in coefficients])
        random = self.random.vectors(MONITORING_VECTORS, vector.layer)
        found = monitoring(coefficients, read, vector.vector, random)
        self.results.set_monitoring(vector, found, self.random.covariance)

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
    prompts = []
    for question in questions:
        prompt = tokenize(
            model.tokenizer,
            question.question,
            prompt_set="steering",
            prompt_id=question.id,
            system_prompt=config.system_prompt,
            chat_template=config.use_chat_template,
        )
        unknown = unknown_token(model.tokenizer, prompt.token_ids, model.d_vocab)
        if unknown is not None:
            raise InputError(f"steering question {question.id}: {unknown}")
        _check_length(model, prompt, question)
        prompts.append(prompt)
    return prompts


def _check_length(model: Model, prompt: TokenizedPrompt, question: Question) -> None:
    """Raise `InputError` if a question with a response, or with one of its completions, exceeds the context."""
    placed = [
        place_response(
            model.tokenizer,
            prompt.source_text,
            text,
            system_prompt=prompt.system_prompt,
            chat_template=prompt.chat_template,
        )
        for text in question.completions or ()
    ]
    longest = max(len(prompt.token_ids) + NEW_TOKENS, *(len(each.token_ids) for each in placed), 0)
    if longest > model.n_ctx:
        raise InputError(
            f"steering question {question.id}: {longest} tokens with its answer are more than the model's context of "
            f"{model.n_ctx}: shorten it"
        )


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
    """The vectors to steer with: those of the methods in `options`, or of the selected method."""
    folder = VectorFiles(layout, trait)
    available = folder.available("residual")
    methods = options.methods or (select(folder, "residual", model.n_layers).method,)
    for method in methods:
        for layer in options.layers or available.get(method, ()):
            vector = read_vector(folder, "residual", method, layer)
            check_fits(vector, model.n_layers, model.d_model)
            yield vector


def _definition(datasets: Datasets, trait: Trait) -> str:
    path = datasets.trait_folder(trait) / "definition.md"
    return decoded(read_bytes(path), "replace").strip() if path.is_file() else ""


def draw_curves(layout: Layout, traits: Sequence[Trait], report: RunReport) -> None:
    """Draw the steering curves of traits that have results to `steering.png` next to the results."""
    from tlcapture.commands.plots import steering_curves

    for trait in traits:
        path = layout.steering(trait)
        if lexists(path):
            results = SteeringResults.read(path)
            report.wrote(write_bytes(layout.picture(trait, "steering"), steering_curves(str(trait), results)))
