"""Options that say how `capture` chooses tokens, when a response ends, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from tlcapture.cli.options.grouping import option
from tlcapture.cli.options.types import Count, Text

if TYPE_CHECKING:
    from tlcapture.generation.sampling.checkpoint_sampling import AskedSampling


def _own_temperature(context: click.Context, option: click.Parameter, value: float) -> float | None:
    """The temperature; `None`, the checkpoint's own, if only `--sampling checkpoint` was given."""
    is_default = context.get_parameter_source("temperature") is ParameterSource.DEFAULT
    return None if is_default and context.params["sampling"] == "checkpoint" else value


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; `None` where an option was not given."""

    temperature: float | None = option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=0.7,
        show_default=True,
        callback=_own_temperature,
        help="Sampling temperature; 0 is greedy. With --sampling checkpoint, the default is the checkpoint's own.",
    )
    sampling: str = option(
        "--sampling",
        type=click.Choice(["plain", "checkpoint"]),
        default="plain",
        show_default=True,
        is_eager=True,  # the default of --temperature depends on it
        help="plain: the rules given here; checkpoint: also those of the model's generation config that are not "
        "given here.",
    )
    top_p: float | None = option(
        "--top-p",
        type=click.FloatRange(0, 1),
        metavar="P",
        help="Sample from the smallest set of most likely tokens whose probabilities add up to at least P.  "
        "[default: off]",
    )
    top_k: int | None = option(
        "--top-k",
        type=Count(0),
        metavar="K",
        help="Sample from the K most likely tokens; 0: from all.  [default: off]",
    )
    min_p: float | None = option(
        "--min-p",
        type=click.FloatRange(0, 1),
        metavar="P",
        help="Sample from tokens with at least P times the probability of the most likely one.  [default: off]",
    )
    repetition_penalty: float | None = option(
        "--repetition-penalty",
        type=click.FloatRange(0, min_open=True),
        metavar="X",
        help="Divide positive logits of tokens in prompt and response by X, and multiply negative ones.  "
        "[default: off]",
    )
    stop: tuple[str, ...] = option(
        "--stop",
        type=Text(),
        metavar="TEXT",
        multiple=True,
        help="End a response with the token that completes TEXT; repeatable. In bash, $'\\n' is a newline.",
    )
    samples: int | None = option(
        "--samples",
        type=click.IntRange(1, 100_000),  # each is looked at before any is generated
        metavar="N",
        help="N responses to each prompt, captured as ID.s1, ID.s2, ... The prompt is read once.  "
        "[default: one, as ID]",
    )

    def asked(self, seed: int) -> AskedSampling:
        """The sampling that is asked for; raises `InputError` for a value that is not valid."""
        from tlcapture.generation.sampling.checkpoint_sampling import asked_sampling

        return asked_sampling(
            self.sampling,
            self.temperature,
            seed,
            self.stop,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
