"""An experiment as an object, whose captures are opened on first use.

exp = Experiment("my_exp")
exp.vectors["behavioral/refusal"].scores       # a data frame; also exp.evaluation, exp.steering, exp.runs
cap = exp.captures["single_trait"][3]          # the prompt with the id 3; .at(0) is the first one
cap.residual(16, "residual_out")               # [n_tokens, d_model]
cap.project("behavioral/refusal").trajectory   # [n_tokens]
cap.plot.trajectory("behavioral/refusal")      # a Plotly figure
cap.cache["resid_post", 16]                    # TransformerLens's ActivationCache
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from tlcapture.errors import InputError
from tlcapture.explore.roots import default_root
from tlcapture.explore.saved_capture import SavedCapture
from tlcapture.names import split_name
from tlcapture.storage.config import ExperimentConfig, read_config
from tlcapture.storage.layout import Layout, existing_experiments
from tlcapture.storage.remote_roots import refresh, root_folder
from tlcapture.text import beside, printable
from tlcapture.traits.packaged_vectors import listed_vectors, vectors_layout

if TYPE_CHECKING:
    from pandas import DataFrame

    from tlcapture.explore.experiment_vectors import ExperimentVectors
    from tlcapture.explore.frames import Layers
    from tlcapture.explore.set_figures import SetFigures
    from tlcapture.models.loading import Model

_MOST_ROWS = 50
_FRESH = 5.0  # seconds for which the listing of a remote root holds
Names = list[str]  # `list` is a method of Experiment


class Experiment:
    """An experiment: its configuration, captures, trait vectors and model.

    Args:
        name: the experiment's folder below `experiments/`; or `packaged`, the vectors that come with the package.
        root: the folder with `experiments/` and `datasets/`, or a URL such as `s3://bucket/prefix`; `TLCAPTURE_ROOT` or
            the current folder by default.

    Raises `InputError` if the experiment does not exist.
    """

    def __init__(self, name: str, root: str | Path | None = None):
        self.layout = vectors_layout(root_folder(root or default_root()), name)
        refresh(self.layout.folder, _FRESH)
        self.layout.check_exists()

    @staticmethod
    def list(root: str | Path | None = None) -> Names:
        """The names of the experiments in a root, sorted: `Experiment.list()`."""
        folder = root_folder(root or default_root())
        refresh(folder / "experiments", _FRESH)
        return existing_experiments(folder)

    @property
    def name(self) -> str:
        """Its name, that of its folder below `experiments/`."""
        return self.layout.experiment

    @property
    def root(self) -> Path:
        """The folder with `experiments/` and `datasets/`."""
        return self.layout.root

    @property
    def _listed(self) -> Layout:
        """The layout; of a remote root, with what others wrote up to a few seconds ago."""
        refresh(self.layout.folder, _FRESH)
        return self.layout

    def __repr__(self) -> str:
        counts = [f"{name}: {len(self.captures(name))}" for name in self.prompt_sets]
        return f"Experiment({self.layout.experiment!r}, captures {{{', '.join(counts)}}}, {len(self.traits)} traits)"

    def _repr_html_(self) -> str:
        sets = "".join(
            f"<tr><td>{escape(name)}</td><td>{len(captures)}</td></tr>" for name, captures in self.captures.items()
        )
        return (
            f"<b>{escape(self.layout.experiment)}</b> <small>{escape(str(self.config.inference_model))}</small>"
            f"<table><tr><th>prompt set</th><th>captures</th></tr>{sets}</table>"
            f"<div>{escape(listed_vectors(self.layout))}</div>"
        )

    @property
    def config(self) -> ExperimentConfig:
        """The content of `config.json`: models, chat template and system prompt."""
        return read_config(self._listed)

    @property
    def prompt_sets(self) -> Names:
        """Names of the prompt sets with captures."""
        return self._listed.captured_prompt_sets()

    @property
    def traits(self) -> Names:
        """Names of the traits with vectors, as `category/name`."""
        return [str(trait) for trait in self._listed.traits()]

    @property
    def captures(self) -> AllCaptures:
        """All captures by prompt set: `captures["single_trait"][3]`, or `captures("single_trait")[3]`."""
        refresh(self.layout.folder, _FRESH)
        return AllCaptures(self)

    @property
    def vectors(self) -> ExperimentVectors:
        """The trait vectors: `vectors["behavioral/refusal"].tensors[16]`; `vectors("attn_out")` for that component."""
        from tlcapture.explore.experiment_vectors import ExperimentVectors

        return ExperimentVectors(self._listed)

    @property
    def evaluation(self) -> DataFrame:
        """What `tlcapture evaluate` measured, a row for each vector; empty before it ran."""
        from tlcapture.explore.experiment_tables import evaluation_frame

        return evaluation_frame(self._listed)

    @property
    def steering(self) -> DataFrame:
        """What `tlcapture steer` measured, a row for each layer, method and coefficient; empty before it ran."""
        from tlcapture.explore.experiment_tables import steering_frame

        return steering_frame(self._listed)

    @property
    def runs(self) -> DataFrame:
        """The commands that wrote to the experiment, a row for each run, the earliest first."""
        from tlcapture.explore.experiment_tables import runs_frame

        return runs_frame(self._listed)

    def to_pandas(
        self,
        prompt_set: str,
        traits: Iterable[str] | str | None = None,
        layers: Layers = "own",
        component: str = "residual",
    ) -> DataFrame:
        """The projection files of a prompt set as a tidy data frame.

        Columns are `prompt_id`, `sample`, `token_idx`, `token`, `part`, `trait`, `layer` and `score`.

        Args:
            traits: one or several; all that the set is projected onto by default.
            layers: `own` (each vector's own layer), `all`, a layer, or several.
            component: `residual` or `attn_out`.

        Raises `InputError`, naming the command to run, if the set has no projections.
        """
        from tlcapture.explore.doubts import tell_of_saved
        from tlcapture.explore.frames import tidy_frame
        from tlcapture.traits.saved_projections import saved_projections

        found = saved_projections(self._listed, prompt_set, component=component, traits=traits)
        tell_of_saved(self.layout.root, found)
        return tidy_frame(found, layers)

    def compare(self, other: Experiment | str, prompt_set: str | None = None, **how: Any) -> DataFrame:
        """Compare other captures of the same prompts with this experiment's, as `tlcapture compare` does.

        Differences are those of `other` less this experiment's. Comparisons that are there and current are kept, the
        others are written. `docs/compare.md` describes the columns.

        Args:
            other: an experiment, or `EXPERIMENT[/SET[@VARIANT]]` in the same root.
            prompt_set: the set, or `SET@VARIANT`, of this experiment; all that both have by default.
            how: `by` (`trait` or `layer`: what there is a row for), `traits`, `layer`, `method`, `vectors` (`a`, `b` or
                `own`), `vector_experiment`, `kl=False` to leave out the next-token distributions, and `device`.

        Raises `InputError` if there is nothing to compare.
        """
        from tlcapture.commands.compared_sets import CaptureSet
        from tlcapture.explore.comparisons import compare

        own, root = self.layout.experiment, self.layout.root
        if isinstance(other, Experiment) and other.layout.root != root:
            raise InputError(
                f"{other.layout.folder}: in another root than {root}: only experiments of one are compared"
            )
        named = other.layout.experiment if isinstance(other, Experiment) else other
        a = CaptureSet.parse(root, own if prompt_set is None else f"{own}/{prompt_set}")
        return compare(a, CaptureSet.parse(root, named), **how)

    @cached_property
    def model(self) -> Model:
        """The experiment's inference model, loaded on first use.

        Raises `InputError` if the experiment has no model yet, `ModelError` if it cannot be loaded.
        """
        return self._load(None)

    def model_with(self, adapter: str | None) -> Model:
        """The experiment's model with an adapter merged, loaded on first use; `model` itself without one."""
        if adapter is None:
            return self.model
        if adapter not in self._adapted:
            self._adapted[adapter] = self._load(adapter)
        return self._adapted[adapter]

    @cached_property
    def _adapted(self) -> dict[str, Model]:
        return {}

    def _load(self, adapter: str | None) -> Model:
        from tlcapture.models.loading import load_model

        name = self.config.inference_model or self.config.extraction_model
        if name is None:
            raise InputError(f"experiment {self.layout.experiment!r} has no model yet: capture or extract first")
        return load_model(name, adapter=adapter) if adapter else load_model(name)


class AllCaptures(Mapping[str, "Captures"]):
    """The captures of an experiment, a mapping from prompt set to `Captures`.

    Indexing raises `KeyError` for a prompt set without captures; calling returns an empty `Captures`.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment

    def __call__(self, prompt_set: str) -> Captures:
        """The captures of a prompt set, empty if it has none."""
        return Captures(self._experiment, prompt_set)

    def __getitem__(self, prompt_set: str) -> Captures:
        if prompt_set not in self._experiment.prompt_sets:
            raise KeyError(f"{prompt_set!r}{beside(prompt_set, self, 'prompt sets with captures')}")
        return self(prompt_set)

    def __iter__(self) -> Iterator[str]:
        return iter(self._experiment.prompt_sets)

    def __len__(self) -> int:
        return len(self._experiment.prompt_sets)

    def __repr__(self) -> str:
        return f"AllCaptures({', '.join(f'{name}: {len(found)}' for name, found in self.items()) or 'none'})"

    def _repr_html_(self) -> str:
        return self._experiment._repr_html_()

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class Captures:
    """The captures of one prompt set, in the order of their ids. Each is opened on first use.

    `captures[3]` and `captures["3"]` are the prompt with that id, `captures.at(0)` the first one; iterating gives the
    captures, `keys()` their ids. Indexing raises `KeyError` for a prompt without a capture.

    Samples of a prompt (`--samples`) are captures of their own: `captures["7.s1"]`.
    """

    def __init__(self, experiment: Experiment, prompt_set: str):
        self._experiment = experiment
        self.prompt_set = prompt_set
        self._ids = dict.fromkeys(experiment.layout.captured(prompt_set))

    def __getitem__(self, prompt_id: str | int) -> SavedCapture:
        if str(prompt_id) not in self._ids:
            only = str(prompt_id) in self._experiment.layout.prompt_ids(self.prompt_set)
            hint = "; only projections of this prompt were kept: use .to_pandas(...) of the experiment" if only else ""
            shown = ", ".join(list(self._ids)[:_MOST_ROWS]) + (", ..." if len(self._ids) > _MOST_ROWS else "")
            raise KeyError(f"{prompt_id!r}: prompt set {self.prompt_set!r} has captures {shown or 'none'}{hint}")
        return SavedCapture(self._experiment, self.prompt_set, str(prompt_id))

    def samples(self, prompt_id: str | int) -> list[SavedCapture]:
        """The samples of a prompt (`--samples`), in their order; none if it has none."""
        found = map(self.__getitem__, self._by_prompt.get(str(prompt_id), ()))
        return [capture for capture in found if capture.sample is not None]

    @cached_property
    def _by_prompt(self) -> dict[str, Names]:
        found: dict[str, Names] = {}
        for name in self._ids:
            found.setdefault(split_name(name)[0], []).append(name)
        return found

    @cached_property
    def _in_order(self) -> Sequence[str]:
        return tuple(self._ids)

    def at(self, position: SupportsIndex) -> SavedCapture:
        """The capture at a position in the order of ids; negative ones count from the end."""
        try:
            return self[self._in_order[index(position)]]
        except IndexError:
            raise IndexError(f"{position}: prompt set {self.prompt_set!r} has {len(self)} captures") from None

    def __iter__(self) -> Iterator[SavedCapture]:
        return (self[prompt_id] for prompt_id in self._ids)

    def __contains__(self, prompt_id: object) -> bool:
        return str(prompt_id) in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def keys(self) -> list[str]:
        """The ids of the captured prompts, as text."""
        return list(self._ids)

    def values(self) -> list[SavedCapture]:
        """The captures."""
        return list(self)

    def items(self) -> list[tuple[str, SavedCapture]]:
        """The captures with their ids."""
        return [(prompt_id, self[prompt_id]) for prompt_id in self._ids]

    def to_pandas(self, traits: Iterable[str] | str | None = None, **how: Any) -> DataFrame:
        """The projection files of the set as a tidy data frame; `how` are the options of `Experiment.to_pandas`."""
        return self._experiment.to_pandas(self.prompt_set, traits, **how)

    def rises(self, component: str = "residual") -> DataFrame:
        """How far each trait rises in each prompt, and which rises are more than chance: a row for each of them.

            rises = exp.captures["single_trait"].rises()
            rises[rises.stands_out]

        Columns are `prompt_id`, `n_samples` (missing for a prompt without samples), `trait`, `rise`, `chance`,
        `stands_out` and `doubt`. They are what `tlcapture capture` and the page show: `rise` is the mean projection of
        the response less that of the prompt, in standard deviations over the set (for fewer than three prompts over the
        reference prompts); `chance` what the largest of as many random directions as there are traits stays below in
        95 % of draws, NaN where that was not measured; `doubt` what `tlcapture evaluate` leaves in doubt of the vector.

        Raises `InputError`, naming the command to run, if the set has no projections.
        """
        from tlcapture.explore.experiment_tables import rises_frame

        return rises_frame(self._experiment.layout, self.prompt_set, component)

    @property
    def plot(self) -> SetFigures:
        """Figures of the whole set: `.trajectory("behavioral/refusal")`."""
        from tlcapture.explore.set_figures import SetFigures

        return SetFigures(self._experiment.layout, self.prompt_set)

    def __repr__(self) -> str:
        shown = list(self._ids)[:_MOST_ROWS]
        more = f", and {len(self) - len(shown)} more" if len(shown) < len(self) else ""
        return f"Captures({self.prompt_set!r}: {', '.join(shown)}{more})"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._ids)

    def _repr_html_(self) -> str:
        """A table of token counts and responses of the first captures."""
        shown = list(self._ids)[:_MOST_ROWS]
        rows = "".join(
            f"<tr><td>{escape(prompt_id)}</td><td>{len(self[prompt_id].prompt.tokens)}</td>"
            f"<td>{len(self[prompt_id].response.tokens)}</td>"
            f"<td>{escape(printable(self[prompt_id].response.text[:120]))}</td></tr>"
            for prompt_id in shown
        )
        more = f"<div>and {len(self) - len(shown)} more</div>" if len(shown) < len(self) else ""
        head = "<tr><th>id</th><th>prompt tokens</th><th>response tokens</th><th>response</th></tr>"
        return f"<b>{escape(self.prompt_set)}</b><table>{head}{rows}</table>{more}"
