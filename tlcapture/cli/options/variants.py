"""Options for variants of a model: an adapter, and the tokens of other captures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from tlcapture.cli.options import completion
from tlcapture.cli.options.grouping import collected, together
from tlcapture.errors import InputError
from tlcapture.names import of_variant

if TYPE_CHECKING:
    from tlcapture.commands.capturing.given_responses import GivenResponses
    from tlcapture.prompts.prompt_sets import PromptSet
    from tlcapture.runs.model_loader import ModelLoader
    from tlcapture.storage.experiments.layout import Layout

_OF_GENERATION = {
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "sampling": "--sampling",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
    "stop": "--stop",
    "seed": "--seed",
    "chat_template": "--chat-template",
    "system_prompt": "--system-prompt",
    "thinking": "--thinking",
    "template_arg": "--template-arg",
}
_OF_THE_TOKENS = {
    "prompt": "--prompt",
    "prompt_file": "--prompt-file",
    "all_prompt_sets": "--all-prompt-sets",
    "replay": "--replay",
    "samples": "--samples",
    **_OF_GENERATION,
}


@dataclass(frozen=True)
class VariantOptions:
    """An adapter that is merged into the model, and captures whose tokens are run in place of generated ones."""

    adapter: str | None
    responses_from: str | None

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
        for option in _given_of(_OF_THE_TOKENS):
            raise click.UsageError(f"--responses-from runs tokens that are stored: leave out {option}")
        from tlcapture.commands.capturing.given_responses import GivenResponses
        from tlcapture.commands.comparing.compared_sets import CaptureSet

        return GivenResponses(CaptureSet.parse(root, self.responses_from))


def without_effect_on_replay() -> str | None:
    """The warning about options that a replay does not read; `None` if none was given."""
    found = _given_of(_OF_GENERATION)
    if not found:
        return None
    return f"--replay reads stored tokens: {', '.join(found)} {'has' if len(found) == 1 else 'have'} no effect"


def _given_of(options: Mapping[str, str]) -> list[str]:
    """The options, among some, that are given on the command line or in the environment."""
    source_of = click.get_current_context().get_parameter_source
    given = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return [option for name, option in options.items() if source_of(name) in given]


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


variant_options = together(
    click.option(
        "--adapter",
        metavar="FOLDER",
        help="Merge a LoRA or another PEFT adapter into the model. Captures are kept as the variant SET@FOLDER.",
    ),
    click.option(
        "--responses-from",
        metavar="EXPERIMENT[/SET[@VARIANT]]",
        shell_complete=completion.experiments,
        help="Generate nothing: run the stored tokens of these captures through this model.",
    ),
    collected(VariantOptions, "variants"),
)
