"""Options for variants of a model: an adapter, and the tokens of other captures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from tlcapture.cli.options import completion
from tlcapture.cli.options.grouping import option
from tlcapture.errors import InputError
from tlcapture.names import of_variant

if TYPE_CHECKING:
    from tlcapture.commands.capturing.given_responses import GivenResponses
    from tlcapture.prompts.prompt_sets import PromptSet
    from tlcapture.runs.model_loader import ModelLoader
    from tlcapture.storage.experiments.layout import Layout

# Parameters of `capture`: those that say how tokens are chosen, and all that say which tokens there are.
_OF_GENERATION = (
    "max_new_tokens", "temperature", "sampling", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed",
    "chat_template", "system_prompt", "thinking", "template_arg",
)  # fmt: skip
_OF_TOKENS = ("prompt", "prompt_file", "all_prompt_sets", "replay", "samples", *_OF_GENERATION)


@dataclass(frozen=True)
class VariantOptions:
    """An adapter that is merged into the model, and captures whose tokens are run in place of generated ones."""

    adapter: str | None = option(
        "--adapter",
        metavar="FOLDER",
        help="Merge a LoRA or another PEFT adapter into the model. Captures are kept as the variant SET@FOLDER.",
    )
    responses_from: str | None = option(
        "--responses-from",
        metavar="EXPERIMENT[/SET[@VARIANT]]",
        shell_complete=completion.experiments,
        help="Generate nothing: run the stored tokens of these captures through this model.",
    )

    def adapted(self, load: ModelLoader) -> ModelLoader:
        """The loader of the model with the adapter."""
        return load if self.adapter is None else replace(load, adapter=self.adapter_path)

    @property
    def adapter_path(self) -> str | None:
        """The folder of the adapter, as an absolute path if it is a local one."""
        return None if self.adapter is None else str(Path(self.adapter).expanduser().resolve())

    def responses(self, root: Path) -> GivenResponses | None:
        """The captures whose tokens are run.

        Raises:
            click.UsageError: another option says what the tokens are.
            InputError: there are no such captures.
        """
        if self.responses_from is None:
            return None
        if given := _given_among(_OF_TOKENS):
            raise click.UsageError(f"--responses-from runs tokens that are stored: leave out {given[0]}")
        from tlcapture.commands.capturing.given_responses import GivenResponses
        from tlcapture.commands.comparing.compared_sets import CaptureSet

        return GivenResponses(CaptureSet.parse(root, self.responses_from))


def without_effect_on_replay() -> str | None:
    """The warning about options that a replay does not read; `None` if none was given."""
    given = _given_among(_OF_GENERATION)
    if not given:
        return None
    return f"--replay reads stored tokens: {', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect"


def _given_among(parameters: Sequence[str]) -> list[str]:
    """The options of those parameters that are given on the command line or in the environment."""
    source_of = click.get_current_context().get_parameter_source
    given = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return [f"--{name.replace('_', '-')}" for name in parameters if source_of(name) in given]


def check_target(given: GivenResponses, layout: Layout, sets: Sequence[PromptSet], variant: str | None) -> None:
    """Raise `InputError` if captures would replace those whose tokens they run, or others of the same prompts."""
    if given.source.layout != layout:
        return
    for each in sets:
        if variant is None or of_variant(each.name, variant) == given.source.name:
            raise InputError(
                f"--responses-from {given}: would replace captures of {layout.experiment}: name a variant with "
                "--variant, or another experiment"
            )
