"""What to capture and how: the options of `tlcapture capture`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tlcapture.commands.capturing.given_responses import GivenResponses
from tlcapture.commands.projecting.projections import ExistingProjections
from tlcapture.commands.prompt_files.outputs import Outputs
from tlcapture.commands.prompt_files.view_parts import ViewParts
from tlcapture.errors import InputError
from tlcapture.generation.sampling.checkpoint_sampling import AskedSampling
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.names import of_variant
from tlcapture.runs.prompt_shares import PromptShare
from tlcapture.text import as_ranges
from tlcapture.traits.choice import VectorChoice
from tlcapture.traits.interventions.requested import TraitIntervention
from tlcapture.traits.interventions.resolved import ResolvedIntervention
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.kept_tokens import KeptTokens

ALL_LAYERS = "all"
NO_CHOICE = VectorChoice()  # a command line without options for vectors


@dataclass(frozen=True)
class CaptureOptions:
    """What to capture, and how.

    Attributes:
        internals: layers whose internals are written, or `"all"`.
        layers: layers of the residual stream that are kept; all where empty.
        points: points of the residual stream that are kept; all where empty.
        tokens: tokens that all views are kept of; `None` means all.
        parts: which layers and predictions of attention and logit lens are kept, and the form of files.
        overwrite: replace or remove files that cannot be read, too.
        projections_only: write projections and no raw residual.
        shard: the share of the prompts that are captured, after `limit` is applied.
        max_new_tokens: the maximum length of a response.
        samples: the number of responses to each prompt; `None` means one, whose files have the name of the prompt.
        longer_where_thinking: raise this to at least `THINKING_TOKENS` if the chat template makes the model think.
        thinking: `on` or `off`, the chat template's switch; `None` leaves its default.
        template_args: other values for the chat template.
        interventions: changes to activations while the model generates.
        variant: the name of the captures beside those of the prompt set alone: `{prompt_set}@{variant}`.
        resolved: the interventions with their vectors; see `with_vectors`.
        adapter: the folder of an adapter that is merged into the model.
        responses_from: captures whose tokens are run in place of generated ones.
    """

    attention: bool = False
    logit_lens: bool = False
    internals: tuple[int, ...] | str = ()
    capture_attn: bool = False
    layers: tuple[int, ...] = ()
    points: tuple[str, ...] = ()
    tokens: KeptTokens | None = None
    parts: ViewParts = ViewParts()
    project: bool = True
    projections_only: bool = False
    replay: bool = False
    skip_existing: bool = False
    overwrite: bool = False
    vectors: VectorChoice = NO_CHOICE
    max_new_tokens: int = 50
    sampling: AskedSampling = Sampling()
    samples: int | None = None
    save_dtype: str = "auto"
    batch_size: int | None = None
    limit: int | None = None
    shard: PromptShare | None = None
    chat_template: bool | None = None
    system_prompt: str | None = None
    longer_where_thinking: bool = False
    thinking: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    interventions: tuple[TraitIntervention, ...] = ()
    variant: str | None = None
    resolved: tuple[ResolvedIntervention, ...] = ()
    adapter: str | None = None
    responses_from: GivenResponses | None = None

    def capture_set(self, prompt_set: str) -> str:
        """The set that captures of a prompt set are in: the prompt set, or its variant."""
        return of_variant(prompt_set, self.variant)

    @property
    def intervention_records(self) -> list[Mapping[str, Any]]:
        """The interventions as written to metadata, without the norms that still have to be measured."""
        return [each.record for each in self.resolved]

    @property
    def projects(self) -> bool:
        """Whether captures are projected; a replay leaves projections as they are."""
        return self.project and not self.replay

    @property
    def existing(self) -> ExistingProjections:
        """Which projections `skip_existing` keeps: if no vector is asked for, a projection onto any vector is kept."""
        onto_any = self.vectors.is_default and not self.projections_only
        return ExistingProjections(onto_any, self.overwrite)

    @property
    def components(self) -> tuple[str, ...]:
        """The components that are captured and projected."""
        return ("residual", "attn_out") if self.capture_attn else ("residual",)

    @property
    def names_layers(self) -> bool:
        """Whether a layer is named that the model may not have."""
        named = (self.layers, self.parts.attention_layers, self.parts.lens_layers, self._internals)
        return any(named) or self._projected_layer is not None

    @property
    def _internals(self) -> tuple[int, ...]:
        return () if self.internals == ALL_LAYERS else tuple(map(int, self.internals))

    @property
    def _projected_layer(self) -> int | None:
        """The layer whose vectors captures are projected onto, where one is named."""
        return self.vectors.layer if self.projects and isinstance(self.vectors.layer, int) else None

    def check_parts(self) -> None:
        """Raise `InputError` for parts of a view that is not written."""
        everything = self.internals == ALL_LAYERS
        self.parts.check_written(attention=self.attention or everything, logit_lens=self.logit_lens or everything)

    def outputs(self, n_layers: int) -> Outputs:
        """The outputs wanted of each prompt, for a model with `n_layers` layers.

        Raises:
            InputError: internals, layers or points that the model does not have.
        """
        everything = self.internals == ALL_LAYERS
        layers = tuple(sorted(set(range(n_layers) if everything else self._internals)))
        projected = () if self._projected_layer is None else (self._projected_layer,)
        for option, named in (
            ("--layer-internals", layers),
            ("--layer", projected),
            ("--attention-layers", self.parts.attention_layers),
            ("--lens-layers", self.parts.lens_layers),
        ):
            if beyond := [layer for layer in named if layer >= n_layers]:
                raise InputError(f"{option} {as_ranges(beyond)}: the model has layers 0 to {n_layers - 1}")
        self.check_parts()
        return Outputs(
            KeptPoints.of(n_layers, self.layers, self.points),
            residual=not self.replay,
            raw=not self.projections_only,
            attn_out=self.capture_attn,
            attention=self.attention or everything,
            logit_lens=self.logit_lens or everything,
            internals=layers,
            tokens=self.tokens,
            parts=self.parts,
        )
