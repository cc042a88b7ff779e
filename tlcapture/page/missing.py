"""Errors for missing data, with the command that creates it."""

from __future__ import annotations

from tlcapture.errors import InputError
from tlcapture.storage.layout import Layout
from tlcapture.traits.missing_vectors import extract_command


class MissingError(InputError):
    """Data that an experiment does not have yet.

    Attributes:
        what: what is missing.
        command: the command that creates it.
    """

    def __init__(self, what: str, command: str):
        super().__init__(f"{what}: run '{command}'")
        self.what = what
        self.command = command

    def to_json(self) -> dict[str, str]:
        """The error as the page shows it."""
        return {"what": self.what, "command": self.command}


def captures(layout: Layout, prompt_set: str) -> MissingError:
    """For a prompt set without captures."""
    command = f"tlcapture capture --experiment {layout.experiment} --prompt-set {prompt_set}"
    return MissingError(f"no captures of {prompt_set}", command)


def projections(layout: Layout, prompt_set: str) -> MissingError:
    """For a prompt without projections; the command extracts vectors first if there are none."""
    if not layout.traits():
        return MissingError("no trait vectors to project onto", extract_command(layout))
    command = f"tlcapture project --experiment {layout.experiment} --prompt-set {prompt_set}"
    return MissingError("not projected onto this trait", command)


def add_on(layout: Layout, prompt_set: str, kind: str) -> MissingError:
    """For a prompt without `attention` or `logit-lens`, which stored captures can be replayed for."""
    base = f"tlcapture capture --experiment {layout.experiment} --prompt-set {prompt_set} --{kind}"
    how = "--replay" if layout.captured(prompt_set) else "--projections-only"
    return MissingError(f"no {kind.replace('-', ' ')} of this prompt", f"{base} {how}")


def vectors(layout: Layout, trait: object) -> MissingError:
    """For a trait without vectors."""
    return MissingError(f"no vectors of {trait}", extract_command(layout, [trait]))


def evaluation(layout: Layout) -> MissingError:
    """For vectors that have not been evaluated."""
    return MissingError("not evaluated", f"tlcapture evaluate --experiment {layout.experiment}")


def steering(layout: Layout, trait: object) -> MissingError:
    """For a trait that has not been steered."""
    return MissingError("not steered", f"tlcapture steer --experiment {layout.experiment} --traits {trait}")


def comparison(layout: Layout, prompt_set: str) -> MissingError:
    """For a prompt or a set that was not compared."""
    command = f"tlcapture compare {layout.experiment}/{prompt_set} OTHER"
    return MissingError(f"{prompt_set} was not compared with other captures", command)
