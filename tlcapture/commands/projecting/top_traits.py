"""The summary of a projected prompt set: for each prompt, the trait that rose most, if it rose more than chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from tlcapture.commands.projecting.summarised import Summarised, as_written
from tlcapture.errors import StorageError
from tlcapture.names import PromptId
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.json_text import kept_json
from tlcapture.text import REPLACEMENT
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.projections.saved import ListedProjections, SavedProjection, projections_of_prompt
from tlcapture.traits.statistics.critical_values import critical_score, critical_score_within, critical_value, widening
from tlcapture.traits.verdicts import UsedVector

FEWEST_TO_COMPARE = 5  # among three, the largest of ten random directions is always as far out as can be
_ROUNDING = 1e-5  # of projections, which files keep with 6 digits
_TIE = 0.005  # standard deviations within which two rises are equal: files keep random ones with 4 digits

_Values = NDArray[np.float64]
_OnProblem = Callable[[StorageError], object]


class _Prompt(NamedTuple):
    id: str
    has_samples: bool  # whether its captures are samples of it


_ByPrompt = dict[_Prompt, list[Summarised]]


@dataclass(frozen=True)
class OverSamples:
    """The spread of a trait over the samples of a prompt.

    Attributes:
        n: the number of samples.
        n_commit: how many of them commit more clearly than random directions.
        rise, calibrated: standard deviations of these over the samples; `None` for one sample, or where not known.
    """

    n: int
    n_commit: int
    rise: float | None
    calibrated: float | None


@dataclass(frozen=True)
class TopTrait:
    """The trait that rose most in a prompt's response, and the chance level of its rise.

    A rise is the mean of the trajectory over the response less its mean over the prompt (without the first token, an
    attention sink), as a standard score: over the prompt set, so that it measures how far the prompt stands out; for a
    set of fewer than five prompts, over the reference prompts. For a prompt with samples it is the mean over them.

    Attributes:
        chance: what the largest rise of as many traits exceeds by chance in at most 5 % of cases: over 200 draws of as
            many random directions, and over prompts whose rises are normally distributed, whichever is larger; `None`
            if it was not measured.
        commitment_point, token: where it commits; `None` where it does not, or random directions do as clearly.
        calibrated: the mean of the response on the scale of the vector's examples; `None` where that is unknown.
        samples: the spread over the prompt's samples; `None` for a prompt without samples.
        pieces: the response (of the first sample) in pieces with the score of each, from -1 as in the negative examples
            to 1 as in the positive ones; as it was projected where `calibrated` is unknown.
        rises: the rise of every trait, that of this one included; `chance` is the level of the largest of them.
        unmeasured: the rises of traits whose chance level was not measured, where that of others was.
        own_id: the prompt's id as in its set, a number or a text; `None` where it is not known.
    """

    prompt_id: str
    trait: str
    rise: float
    chance: float | None
    commitment_point: int | None
    token: str | None
    calibrated: float | None
    response: str
    samples: OverSamples | None = None
    pieces: Sequence[tuple[str, float | None]] = ()
    rises: Mapping[str, float] = field(default_factory=dict)
    own_id: PromptId | None = None
    unmeasured: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_calibrated(self) -> bool:
        """Whether the scores of the pieces are on the scale of the vector's examples."""
        return self.calibrated is not None

    @property
    def stands_out(self) -> bool:
        """Whether the trait rose more than the largest of as many does by chance in 95 % of cases."""
        return is_beyond(self.rise, self.chance)


def is_beyond(rise: float, chance: float | None) -> bool:
    """Whether a standardised rise is larger than its chance level, by more than the rounding of random rises."""
    return chance is not None and rise > chance + _TIE


@dataclass(frozen=True)
class Findings:
    """How many projections commit and persist, and how many random directions on the same captures.

    Attributes:
        n_projections: projections with dynamics of the present definitions and a chance level.
        commit, persist: how many of them do.
        clearly_commit, clearly_persist: how many do more clearly than 95 % of random directions.
        random_commit, random_persist: the shares of random directions that do.
        is_isotropic: whether some random directions had no reference, and so not the activations' covariance.
    """

    n_projections: int
    commit: int
    persist: int
    clearly_commit: int
    clearly_persist: int
    random_commit: float
    random_persist: float
    is_isotropic: bool


@dataclass(frozen=True)
class Summary:
    """What stands out in a projected prompt set; `is_against_set` says whether rises are measured over the set.

    `vectors` are the vectors that the set is projected onto.
    """

    tops: Sequence[TopTrait]
    findings: Findings | None
    is_against_set: bool = False
    vectors: Sequence[UsedVector] = ()

    @property
    def against(self) -> str:
        """What rises are measured against, in words."""
        if self.is_against_set:
            return "the other prompts of the set"
        has_chance = any(top.chance is not None for top in self.tops)
        return "the reference prompts" if has_chance else "its own spread along the tokens"


def essentials(content: Mapping[str, Any]) -> bytes:
    """The part of a projection file that a summary needs, as the JSON of a file with the vector's own layer alone."""
    metadata = content["metadata"]
    layer = metadata["vector_source"]["layer"]
    scores = {part: _of_layer(values, layer) for part, values in content["projections"].items()}
    dynamics = {name: value for name, value in content["dynamics"].items() if name not in ("velocity", "acceleration")}
    slim = {**metadata, "layers": [layer], "sublayers": metadata["sublayers"][-1:]}
    return kept_json({**content, "projections": scores, "dynamics": dynamics, "metadata": slim})


def _of_layer(scores: Any, layer: int) -> Any:
    """The last score of each token at a layer, `[n_tokens][1][1]`."""
    if isinstance(scores, np.ndarray):
        return np.ascontiguousarray(scores[:, layer : layer + 1, -1:])
    return [[at[layer][-1:]] for at in scores]


def summary_of(
    layout: Layout,
    prompt_set: str,
    component: str = "residual",
    known: Mapping[str, bytes] = {},
    on_problem: _OnProblem = lambda error: None,
    before_each: Callable[[], object] = lambda: None,
) -> Summary:
    """The trait that rose most in each prompt of a set that has projections, and how many commit and persist.

    `known` are the `essentials` of files that were just written, by path relative to the experiment; they are not read.
    Files that cannot be read are left out, and `on_problem` is called with the error. `before_each` is called before a
    prompt is read.
    """
    by_trait: dict[str, _ByPrompt] = {}
    prompts: dict[_Prompt, None] = {}  # in their order
    found: Summarised | None = None
    names, folder = layout.prompt_ids(prompt_set), f"{layout.folder.as_posix()}/"
    listed = _listed(layout, prompt_set, component) if names else None
    for name in names:
        before_each()
        for saved in _saved(layout, prompt_set, name, component, on_problem) if listed is None else listed.of(name):
            written = known.get(saved.json_path.as_posix().removeprefix(folder))
            if content := _read(saved, written, on_problem):
                found = Summarised.of(content, str(saved.trait), component, found)
                prompt = _Prompt(name if found.sample is None else str(found.prompt_id), found.sample is not None)
                prompts[prompt] = None
                by_trait.setdefault(str(saved.trait), {}).setdefault(prompt, []).append(found)
    rises = {trait: _rises(contents) for trait, contents in by_trait.items()}
    tops = []
    for prompt in prompts:
        candidates = {trait: values[prompt] for trait, values in rises.items() if prompt in values}
        if candidates:
            measured = {trait: rise for trait, rise in candidates.items() if rise.random is not None} or candidates
            top = max(measured, key=lambda name: measured[name].own)
            others = {trait: rise.own for trait, rise in candidates.items() if trait not in measured}
            tops.append(_top(prompt, top, measured, others, by_trait[top][prompt]))
    projections = [each for contents in by_trait.values() for found in contents.values() for each in found]
    vectors = {each.vector: None for each in projections}
    return Summary(tops, _findings(projections), len(prompts) >= FEWEST_TO_COMPARE, list(filter(None, vectors)))


@dataclass(frozen=True, eq=False)
class _Rise:
    """A standardised rise, the mean over samples, and the rises of random directions in the order of the draws.

    Attributes:
        spread: its standard deviation over samples, `None` where there is only one.
        n_values: the number of prompts of the set over which it is standardised; 0 for the reference prompts.
        n_reference: the number of these, `None` if unknown.
        widening: by which factor it varies more than theirs.
    """

    own: float
    random: _Values | None
    spread: float | None = None
    n_values: int = 0
    n_reference: int | None = None
    widening: float = 1.0

    def critical(self, n_traits: int) -> float:
        """The rise that the largest of as many traits exceeds in 5 % of prompts."""
        if self.n_values:
            return critical_score_within(n_traits, self.n_values)
        return self.widening * critical_score(n_traits, self.n_reference)


def _listed(layout: Layout, prompt_set: str, component: str) -> ListedProjections | None:
    """The projections of a set; `None` where some folder cannot be listed, which each prompt then says."""
    try:
        return ListedProjections(layout, prompt_set, component)
    except (StorageError, OSError):
        return None


def _saved(
    layout: Layout, prompt_set: str, prompt_id: str, component: str, on_problem: _OnProblem
) -> list[SavedProjection]:
    """A prompt's projections; none where a damaged shard may hold them."""
    try:
        return projections_of_prompt(layout, prompt_set, prompt_id, component)
    except StorageError as error:
        on_problem(error)
        return []


def _read(saved: SavedProjection, known: bytes | None, on_problem: _OnProblem) -> ProjectionFile | None:
    """A projection; `None` for a damaged one, and for one without dynamics."""
    try:
        content = saved.read() if known is None else as_written(orjson.loads(known))
    except StorageError as error:
        on_problem(error)
        return None
    return content if content.dynamics is not None else None


def _rises(contents: _ByPrompt) -> dict[_Prompt, _Rise]:
    """A trait's rise in each prompt of a set."""
    known = {prompt: [each for each in found if not isnan(each.rise)] for prompt, found in contents.items()}
    known = {prompt: found for prompt, found in known.items() if found}
    if len(known) < FEWEST_TO_COMPARE:
        return {prompt: _against_reference(found) for prompt, found in known.items()}
    raw = {prompt: np.array([each.rise for each in found]) for prompt, found in known.items()}
    means = np.array([each.mean() for each in raw.values()])
    own, deviation = _standardised(means), _deviation_of(means)
    chances = [each.chance for found in known.values() for each in found]
    is_comparable = len({None if each is None else (each.directions, each.n_directions) for each in chances}) == 1
    drawn = [_random_rises(found) for found in known.values()]
    is_known = is_comparable and all(each is not None for each in drawn)
    random = _standardised(np.array(drawn)) if is_known else None
    return {
        prompt: _Rise(
            float(own[row]), None if random is None else random[row], _spread(raw[prompt] / deviation), len(known)
        )
        for row, prompt in enumerate(known)
    }


def _random_rises(samples: Sequence[Summarised]) -> _Values | None:
    """The rises of random directions, the means over samples; `None` where they were not measured."""
    found = [None if each.chance is None else each.chance.rises for each in samples]
    known = [each for each in found if each is not None]
    return np.array(known).mean(axis=0) if len(known) == len(found) else None


def _against_reference(samples: Sequence[Summarised]) -> _Rise:
    """A rise in deviations over the reference prompts, or where there are none, of the trajectory along its tokens."""
    known = [(each, each.chance.reference_rises, each.chance.standardised_rises) for each in samples if each.chance]
    measured = [(each, over, random) for each, over, random in known if over is not None and random is not None]
    if len(measured) < len(samples) or len({len(random) for *_, random in measured}) != 1:
        own = np.array([each.rise / (each.deviation or 1.0) for each in samples])
        return _Rise(float(own.mean()), None, _spread(own))
    own = np.array([(each.rise - over.mean) / over.sd for each, over, _ in measured])
    n_response = sum(len(each.trajectory) for each in samples)
    wider = max(widening(over.sd, each.deviation, each.rise, each.n_prompt, n_response) for each, over, _ in measured)
    mean = np.mean([random for *_, random in measured], axis=0)
    return _Rise(float(own.mean()), mean, _spread(own), 0, measured[0][1].n, wider)


def _spread(values: _Values) -> float | None:
    """The standard deviation over samples; `None` for fewer than two, and where a value is not known."""
    found = float(values.std(ddof=1)) if len(values) > 1 else nan
    return None if isnan(found) else found


def _standardised(values: _Values) -> _Values:
    """Standard scores over the first axis; 0 where all values are equal up to rounding, as for equal prompts."""
    differ = values.std(axis=0) > _ROUNDING * np.abs(values).max(axis=0)
    return np.where(differ, (values - values.mean(axis=0)) / _deviation_of(values), 0.0)


def _deviation_of(values: _Values) -> _Values:
    """The standard deviation over the first axis; 1 where all values are equal up to rounding."""
    deviation = values.std(axis=0)
    return np.where(deviation > _ROUNDING * np.abs(values).max(axis=0), deviation, 1.0)


def _top(
    prompt: _Prompt,
    trait: str,
    candidates: Mapping[str, _Rise],
    unmeasured: Mapping[str, float],
    contents: Sequence[Summarised],
) -> TopTrait:
    random = [each.random for each in candidates.values() if each.random is not None]
    is_known = len(random) == len(candidates) and len({len(each) for each in random}) == 1
    by_prompts = max(each.critical(len(candidates)) for each in candidates.values())
    chance = max(float(critical_value(np.max(random, axis=0))), by_prompts) if is_known else None
    first, rise = contents[0], candidates[trait]
    commits = [each.commits_clearly for each in contents]
    is_shown = commits[0] and not prompt.has_samples
    scales = [(each.calibration, each.response_mean) for each in contents]
    values = np.array([float(scale.calibrated(np.float64(mean))) for scale, mean in scales if scale is not None])
    samples = OverSamples(len(contents), sum(commits), rise.spread, _spread(values)) if prompt.has_samples else None
    return TopTrait(
        prompt.id,
        trait,
        rise.own,
        chance,
        commitment_point=first.commitment_point if is_shown else None,
        token=first.token if is_shown else None,
        calibrated=float(values.mean()) if len(values) == len(contents) else None,
        response=first.response.text,
        samples=samples,
        pieces=pieces_of(first.response.text, first.response.tokens, first.scaled),
        rises={name: each.own for name, each in candidates.items()},
        own_id=first.prompt_id,
        unmeasured=unmeasured,
    )


def pieces_of(text: str, tokens: Sequence[str], scores: Sequence[float | None]) -> list[tuple[str, float | None]]:
    """A text in pieces with a score each: one piece per token, or per group of tokens that share a character.

    Such tokens hold replacement marks. A token that is not in the text, such as an end mark, is left out.
    """
    pieces: list[tuple[str, float | None]] = []
    at, parts = 0, []
    for token, score in zip(tokens, scores, strict=True):
        start = text.find(token, at)
        if REPLACEMENT in token and start != at:
            parts.append(score)
        elif token and start >= 0:
            if parts and start > at:
                pieces.append((text[at:start], _mean_of(parts)))
                at = start
            pieces.append((text[at : start + len(token)], score))
            at, parts = start + len(token), []
    return [*pieces, (text[at:], _mean_of(parts))] if at < len(text) else pieces


def _mean_of(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def _findings(projections: Sequence[Summarised]) -> Findings | None:
    known = [(each, each.chance) for each in projections if each.is_current and each.chance is not None]
    if not known:
        return None
    n_random = sum(chance.n_directions for _, chance in known)
    n_risen = sum(chance.n_directions for _, chance in known if chance.persist is not None)
    return Findings(
        len(known),
        sum(each.commitment_point is not None for each, _ in known),
        sum(each.persists for each, _ in known),
        sum(each.commits_clearly for each, _ in known),
        sum(each.persists and each.is_clear("persistence") for each, _ in known),
        sum(chance.commit for _, chance in known) / n_random,
        sum(chance.persist or 0 for _, chance in known) / max(1, n_risen),
        any(chance.is_isotropic for _, chance in known),
    )
