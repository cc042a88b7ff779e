"""`tlcapture compare`: how the captures of one model differ from those of another on the same tokens.

captures of a and b -> shared tokens -> differences of projections, residuals, next-token distributions -> files
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from os.path import lexists
from pathlib import Path
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.captures.provenance import now
from tlcapture.commands.capturing.places import chunks
from tlcapture.commands.comparing.compared_sets import ComparedSets
from tlcapture.commands.comparing.unembeddings import LoadedUnembeddings
from tlcapture.commands.projecting.projections import ChanceLevels, report_choice
from tlcapture.comparison.comparing import (
    Comparison,
    NoDistributionsError,
    Unembeddings,
    VectorPair,
    compare_captures,
)
from tlcapture.comparison.comparison_files import ComparisonFile, OtherVector, TraitDifference
from tlcapture.errors import InputError, StorageError
from tlcapture.runs.display import Display
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.report import RunReport
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_json
from tlcapture.traits.choice import ChosenVector, VectorChoice, VectorChooser
from tlcapture.traits.missing_vectors import extract_command, is_in_package, no_vectors
from tlcapture.traits.vector_files import VectorFiles, traits_with_vectors
from tlcapture.traits.vector_sources.packaged import (
    PROJECTED_ONTO_PACKAGED,
    packaged_layout,
    takes_packaged,
    vectors_layout,
)
from tlcapture.traits.vectors import TraitVector
from tlcapture.version import __version__


@dataclass(frozen=True)
class CompareOptions:
    """What to compare.

    Attributes:
        choice: the traits and vectors to compare projections of.
        vectors: whose vectors both captures are projected onto, `a` or `b`, or `own` for each onto its own; `None`:
            those of `a` if it has any, otherwise those of `b`, or those of the package.
        kl: whether to compare next-token distributions, for which the final norm and unembedding are loaded.
        device: where next-token distributions are computed.
        skip_existing: keep comparisons that are no older than the captures and vectors they were made from.
        overwrite: replace files that cannot be read, too.
    """

    choice: VectorChoice = VectorChoice()
    vectors: str | None = None
    kl: bool = True
    device: str = "auto"
    skip_existing: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class CompareTask:
    """Comparisons of one set; each of `pairs` names a comparison, its capture in `a`, and its capture in `b`."""

    sets: ComparedSets
    pairs: Sequence[tuple[str, str, str]]

    def split(self, most: int) -> list[CompareTask]:
        """Parts of at most `most` comparisons."""
        return [CompareTask(self.sets, pairs) for pairs in chunks(self.pairs, most)]

    def __str__(self) -> str:
        return f"{len(self.pairs)} prompts of {self.sets.a} and {self.sets.b}"

    def inputs(self) -> list[Path]:
        """The captures."""
        a, b = self.sets.a, self.sets.b
        return [path for _, one, other in self.pairs for path in (a.path(one), b.path(other))]


def run_compare(
    sets: Sequence[ComparedSets],
    options: CompareOptions,
    display: Display = Display(),
    executor: Executor = LocalExecutor(),
) -> RunReport:
    """Compare captures, and write a file for each prompt or sample.

    Raises:
        InputError: vectors or captures are missing; nothing was written.
    """
    for each in sets:
        each.check_name()
    layout = sets[0].a.layout
    sources = _vector_sources(sets[0], options)
    run = Run.begin(layout, display)
    if not sources:
        run.warn(f"no trait vectors, so no projections are compared: run '{extract_command(layout)}' first")
    elif is_in_package(sources[0]) and options.choice.experiment is None:
        run.line(f"{layout.experiment}: {PROJECTED_ONTO_PACKAGED}")
    tasks = [CompareTask(each, each.pairs()) for each in sets]
    with ExitStack() as stack:
        for each in sorted(sets, key=lambda found: str(found.a)):
            stack.enter_context(run_lock(run, f"comparisons of {each.a.name}"))
        executor.run(
            Work(
                partial(CompareWorker, options),
                None,
                tasks,
                size=lambda task: len(task.pairs),
                unit="prompt",
                split=CompareTask.split,
                reads=[*sources, sets[0].b.layout],
                inputs=CompareTask.inputs,
                overwrite=options.overwrite,
            ),
            run,
        )
    return run.report


def _vector_sources(sets: ComparedSets, options: CompareOptions) -> list[Layout]:
    """The experiments that vectors are taken from, for `a` and for `b`; none where there are no vectors.

    If neither has vectors and one of them uses the model of the packaged vectors, those are used.

    Raises `InputError` if an experiment that was asked for has none.
    """
    a, b, choice = sets.a.layout, sets.b.layout, options.choice
    if choice.experiment is not None:
        if options.vectors is not None:
            raise InputError("--vector-experiment names whose vectors are used: leave out --vectors")
        sources = [vectors_layout(a.root, choice.experiment)] * 2
        sources[0].check_exists()
    elif options.vectors == "own":
        sources = [a, b]
    elif options.vectors is not None:
        sources = [a if options.vectors == "a" else b] * 2
    else:
        with_some = [each for each in (a, b) if each.traits()]
        if not with_some and any(takes_packaged(each, read_config(each).inference_model) for each in (a, b)):
            with_some = [packaged_layout()]
        if not with_some and not choice.traits:
            return []
        sources = [(with_some or [a])[0]] * 2
    for source in sources:
        if not source.traits():
            raise no_vectors(source)
        traits_with_vectors(source, choice.traits)
        choice.check(source, "residual")
    return sources


class CompareWorker:
    """Compares captures one by one."""

    def __init__(self, options: CompareOptions, run: Run, load: object):
        self._options = options
        self._run = run
        self._unembeddings = LoadedUnembeddings(run, options.device)
        self._choosers: dict[Layout, VectorChooser] = {}
        self._levels = ChanceLevels(run)

    def prepare(self) -> None:
        """Load nothing: only the captures tell what is needed of a model."""

    def do(self, task: CompareTask) -> None:
        """Compare the captures of a task; a failure of one pair does not stop the others."""
        sources = _vector_sources(task.sets, self._options)
        with self._run.progress(len(task.pairs), f"{task.sets.a}", "prompt") as progress:
            for name, one, other in task.pairs:
                with self._run.attempt(f"{task.sets.a.name}/{name}"):
                    self._compare(task.sets, name, one, other, sources)
                progress.advance(1)

    def _compare(self, sets: ComparedSets, name: str, one: str, other: str, sources: Sequence[Layout]) -> None:
        sides = ((sets.a, one), (sets.b, other))
        raws = [side.path(captured) for side, captured in sides]
        path, options = sets.path(name), self._options
        existing = self._existing(path)
        a, b = (Capture.open(raw) for raw in raws)
        chosen = [self._chosen(source, each) for source, each in zip(sources, (a, b), strict=False)]
        vectors = _pairs(chosen, are_same=len({*sources}) == 1)
        if (
            options.skip_existing
            and existing
            and _is_current(self._run.layout.root, path, existing, raws, vectors)
            and (existing.kl is not None or self._unembeddings_of(sets, a, b) is None)
        ):
            self._run.report.n_skipped += 1
            return
        unembeddings = self._unembeddings_of(sets, a, b)
        random = [self._levels.of(each, [*of_side.values()]) for each, of_side in zip((a, b), chosen, strict=False)]
        found = compare_captures(a, b, vectors, unembeddings, random)
        content = found.to_json(str(sets.a), str(sets.b), self._metadata(found))
        self._run.wrote(write_json(path, content))
        self._run.report.n_prompts += 1
        if found.shared.held.n_tokens < max(len(a.tokens), len(b.tokens)):
            self._run.warn(
                f"{sets.a.name}: some responses differ: only the tokens that both begin with are compared; means of "
                "responses cover each response as a whole"
            )

    def _unembeddings_of(self, sets: ComparedSets, a: Capture, b: Capture) -> Unembeddings | None:
        """The unembeddings of two captures if next-token distributions are wanted; warns where they cannot be had."""
        try:
            return self._unembeddings.of(a, b) if self._options.kl else None
        except NoDistributionsError as error:
            self._run.warn(f"{sets.a.name}: next-token distributions are not compared: {error}")
            return None

    def _existing(self, path: Path) -> ComparisonFile | None:
        """The existing comparison; raises `StorageError` if it cannot be read and is not to be overwritten."""
        if not lexists(path):
            return None
        if not path.is_file():
            raise StorageError(f"{path}: expected a file, found something else: move it")
        try:
            return ComparisonFile.read(path)
        except StorageError as error:
            if self._options.overwrite:
                return None
            raise StorageError(f"{error}: use --overwrite to replace it") from None

    def _chosen(self, source: Layout, capture: Capture) -> dict[str, ChosenVector]:
        if source not in self._choosers:
            asked = self._options.choice
            leaves_out = asked.is_default and is_in_package(source)
            choice = replace(asked, experiment=None, leaves_out_others=leaves_out)
            self._choosers[source] = VectorChooser(source, choice, on_chosen=partial(report_choice, self._run))
        chosen: Sequence[ChosenVector] = self._choosers[source].vectors(capture, "residual")
        return {str(each.vector.trait): each for each in chosen}

    def _metadata(self, found: Comparison) -> dict[str, Any]:
        sample = next((each.metadata["sample"] for each in (found.a, found.b) if "sample" in each.metadata), None)
        return {
            **({} if sample is None else {"sample": sample}),
            "vectors": self._options.vectors or "one for both",
            "models": {name: _model(each) for name, each in (("a", found.a), ("b", found.b))},
            "comparison_date": now(),
            "tlcapture_version": __version__,
        }


_OF_A_MODEL = ("inference_model", "adapter", "variant", "interventions", "model_fingerprint", "engine", "dtype")


def _pairs(chosen: Sequence[Mapping[str, ChosenVector]], *, are_same: bool) -> list[VectorPair]:
    """The vectors of the traits that were chosen for both captures; of none where there are no vectors."""
    if not chosen:
        return []
    a, b = chosen
    return [VectorPair(each.vector, (a if are_same else b)[trait].vector) for trait, each in a.items() if trait in b]


def _model(capture: Capture) -> dict[str, Any]:
    """The model that made a capture's activations, as in its metadata."""
    return {name: capture.metadata[name] for name in _OF_A_MODEL if capture.metadata.get(name) is not None}


def _is_of(found: TraitDifference | OtherVector, vector: TraitVector) -> bool:
    """Whether a comparison records a vector; files of earlier versions name no experiment."""
    is_of_experiment = found.experiment in (None, vector.experiment)
    return is_of_experiment and (found.layer, found.method) == (vector.layer, vector.method)


def _is_current(
    root: Path, path: Path, existing: ComparisonFile, raws: Sequence[Path], vectors: Sequence[VectorPair]
) -> bool:
    """Whether a comparison uses these vectors and is no older than its sources."""
    made_from = list(raws)
    for pair in vectors:
        found = existing.traits.get(str(pair.a.trait))
        if found is None or not _is_of(found, pair.a):
            return False
        if (found.b is None) != (pair.b is pair.a) or (found.b is not None and not _is_of(found.b, pair.b)):
            return False
        if found.random is None and found.change is not None:  # as in earlier versions
            return False
        for vector in (pair.a, pair.b):
            layout = vectors_layout(root, vector.experiment)
            files = VectorFiles(layout, vector.trait)
            made_from += [files.file(vector.component, vector.method, vector.layer), layout.reference("residual")]
    return path.stat().st_mtime_ns >= max(each.stat().st_mtime_ns for each in made_from if each.is_file())
