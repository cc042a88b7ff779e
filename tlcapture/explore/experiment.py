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

from collections.abc import Iterable
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcapture.errors import InputError
from tlcapture.explore.captured_sets import AllCaptures
from tlcapture.explore.doubts import noted, tell_of_vectors
from tlcapture.explore.experiment_tables import (
    carry_over_frame,
    evaluation_frame,
    runs_frame,
    steering_frame,
    verdicts_frame,
)
from tlcapture.explore.experiment_vectors import ExperimentVectors
from tlcapture.explore.projection_frames import Layers, tidy_frame
from tlcapture.explore.roots import default_root, layout_of
from tlcapture.storage.experiments.config import ExperimentConfig, read_config
from tlcapture.storage.experiments.layout import Layout, existing_experiments
from tlcapture.storage.remote.roots import FRESH, refresh, root_folder
from tlcapture.text import counted
from tlcapture.traits.projections.saved import scores_of_set
from tlcapture.traits.vector_sources.packaged import listed_vectors, vectors_layout
from tlcapture.traits.verdicts import UsedVector

if TYPE_CHECKING:
    from pandas import DataFrame

    from tlcapture.models.loading import Model

Names = list[str]  # `list` is a method of Experiment


class Experiment:
    """An experiment: its configuration, captures, trait vectors and model.

        exp = Experiment("my_exp")
        exp.name, exp.root, exp.prompt_sets, exp.traits
        exp.captures["single_trait"][3], exp.vectors["behavioral/refusal"].tensors[12]

    Args:
        name: the experiment's name, or the path of its folder, `.../experiments/NAME`; or `packaged`, the vectors that
            come with the package.
        root: the folder with `experiments/` and `datasets/`, or a URL such as `s3://bucket/prefix`; `TLCAPTURE_ROOT` or
            the current folder by default.

    Raises `InputError` if the experiment does not exist.
    """

    def __init__(self, name: str, root: str | Path | None = None):
        is_folder = root is None and len(Path(name).parts) > 1
        self.layout = layout_of(name) if is_folder else vectors_layout(root_folder(root or default_root()), name)
        refresh(self.layout.folder, FRESH)
        self.layout.check_exists()

    @staticmethod
    def list(root: str | Path | None = None) -> Names:
        """The names of the experiments in a root, sorted: `Experiment.list()`.

        Example:
            Experiment.list()  # in the current folder
            Experiment.list("/data/captures")
        """
        folder = root_folder(root or default_root())
        refresh(folder / "experiments", FRESH)
        return existing_experiments(folder)

    @property
    def name(self) -> str:
        """The experiment's name, which is the name of its folder below `experiments/`."""
        return self.layout.experiment

    @property
    def root(self) -> Path:
        """The folder with `experiments/` and `datasets/`."""
        return self.layout.root

    @property
    def _listed(self) -> Layout:
        """The layout; in a remote root, it includes what others wrote up to a few seconds ago."""
        refresh(self.layout.folder, FRESH)
        return self.layout

    def __repr__(self) -> str:
        counts = [f"{name}: {len(self.captures(name))}" for name in self.prompt_sets]
        traits = counted(len(self.traits), "trait")
        return f"Experiment({self.layout.experiment!r}, captures {{{', '.join(counts)}}}, {traits})"

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
        """The content of `config.json`: models, chat template and system prompt.

        Example:
            exp.config.inference_model
        """
        return read_config(self._listed)

    @property
    def prompt_sets(self) -> Names:
        """Names of the prompt sets with captures.

        Example:
            for name in exp.prompt_sets:
                print(name, len(exp.captures[name]))
        """
        return self._listed.captured_prompt_sets()

    @property
    def traits(self) -> Names:
        """Names of the traits with vectors, as `category/name`.

        Example:
            [trait for trait in exp.traits if trait.startswith("style/")]
        """
        return [str(trait) for trait in self._listed.traits()]

    @property
    def captures(self) -> AllCaptures:
        """All captures by prompt set: `captures["single_trait"][3]`, or `captures("single_trait")[3]`."""
        refresh(self.layout.folder, FRESH)
        return AllCaptures(self)

    @property
    def vectors(self) -> ExperimentVectors:
        """The trait vectors: `vectors["behavioral/refusal"].tensors[16]`; `vectors("attn_out")` for that component."""

        return ExperimentVectors(self._listed)

    @property
    def evaluation(self) -> DataFrame:
        """What `tlcapture evaluate` measured, a row for each vector; empty before it ran.

            exp.evaluation.pivot_table(index="layer", columns="trait", values="cv_auroc")

        The best of many vectors has a high score by chance: `verdicts` has that of a choice among them.
        """

        return evaluation_frame(self._listed)

    @property
    def verdicts(self) -> DataFrame:
        """How far `tlcapture evaluate` trusts each trait's vector, a row for each trait; empty before it ran.

            exp.verdicts[["trait", "nested_auroc", "layer_0", "words", "lengths", "p", "verdict"]]

        Columns are what it prints: `nested_auroc`, `nested_sd` and `nested_effect_size` of pairs that took no part in
        the choice of layer and method; the AUROCs of the vector of `layer_0`, of `words` and of `lengths`; what the
        vector adds to the best of these (`gain`, `gain_low`, `gain_high`); `p` and the `verdict`.
        """

        return verdicts_frame(self._listed)

    @property
    def carry_over(self) -> DataFrame:
        """What `tlcapture evaluate --examples` measured, a row for each vector and dataset; empty before it ran.

        Example:
            exp.carry_over[["dataset", "trait", "auroc", "null_auroc_p95", "p"]]
        """

        return carry_over_frame(self._listed)

    @property
    def steering(self) -> DataFrame:
        """What `tlcapture steer` measured, a row for each layer, method and coefficient; empty before it ran.

        Example:
            exp.steering[["layer", "coefficient", "gain", "null_p95"]]
        """

        return steering_frame(self._listed)

    @property
    def runs(self) -> DataFrame:
        """The commands that wrote to the experiment, a row for each run, the earliest first.

        Example:
            exp.runs[["command", "status", "seconds"]]
        """

        return runs_frame(self._listed)

    def to_pandas(
        self,
        prompt_set: str,
        traits: Iterable[str] | str | None = None,
        layers: Layers = "own",
        component: str = "residual",
    ) -> DataFrame:
        """The projection files of a prompt set as a tidy data frame.

            frame = exp.to_pandas("single_trait", "behavioral/refusal")
            frame.groupby(["prompt_id", "part"])["score"].mean()

        Columns are `prompt_id`, `sample`, `token_idx`, `token`, `part`, `trait`, `layer` and `score`.

        Args:
            traits: one or several; all that the set is projected onto by default.
            layers: `own` (each vector's own layer), `all`, a layer, or several.
            component: `residual` or `attn_out`.

        Raises `InputError`, naming the command to run, if the set has no projections.
        """

        vectors: dict[UsedVector, None] = {}
        projections = scores_of_set(self._listed, prompt_set, component=component, traits=traits)
        frame = tidy_frame(noted(projections, vectors), layers)
        tell_of_vectors(self.layout.root, vectors)
        return frame

    def compare(self, other: Experiment | str, prompt_set: str | None = None, **how: Any) -> DataFrame:
        """Compare other captures of the same prompts with this experiment's, as `tlcapture compare` does.

            exp.compare("my_exp/single_trait@formal", "single_trait")

        Differences are `other` less this experiment. Existing comparisons that are current are kept, the
        others are written. `docs/compare.md` describes the columns.

        Args:
            other: an experiment, or `EXPERIMENT[/SET[@VARIANT]]` in the same root.
            prompt_set: the set, or `SET@VARIANT`, of this experiment; all that both have by default.
            how: `by` (a row for each `trait`, or each `layer`), `traits`, `layer`, `method`, `vectors` (`a`, `b` or
                `own`), `vector_experiment`, `kl=False` to leave out the next-token distributions, and `device`.

        Raises `InputError` if there is nothing to compare.
        """
        from tlcapture.commands.comparing.compared_sets import CaptureSet
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

            exp.model.n_layers

        Raises `InputError` if the experiment has no model yet, `ModelError` if it cannot be loaded.
        """
        return self._load(None)

    def model_with(self, adapter: str | None) -> Model:
        """The experiment's model with an adapter merged, loaded on first use; `model` itself without one.

        Example:
            exp.model_with(cap.metadata.get("adapter"))
        """
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
