"""Data that is not there, and the command that makes it."""

from __future__ import annotations

from tlcapture.errors import InputError
from tlcapture.storage.layout import Layout
from tlcapture.traits.missing_vectors import extract_command


class MissingError(InputError):
    """Something an experiment could have and has not; `command` makes it."""

    def __init__(self, what: str, command: str):
        super().__init__(f"{what}: run '{command}'")
        self.what = what
        self.command = command

    def to_json(self) -> dict[str, str]:
        return {"what": self.what, "command": self.command}


def captures(layout: Layout, prompt_set: str) -> MissingError:
    command = f"tlcapture capture --experiment {layout.experiment} --prompt-set {prompt_set}"
    return MissingError(f"no captures of {prompt_set}", command)


def projections(layout: Layout, prompt_set: str) -> MissingError:
    """The command for projections, or for the vectors they need first."""
    if not layout.traits():
        return MissingError("no trait vectors to project onto", extract_command(layout))
    command = f"tlcapture project --experiment {layout.experiment} --prompt-set {prompt_set}"
    return MissingError("not projected onto this trait", command)


def add_on(layout: Layout, prompt_set: str, kind: str) -> MissingError:
    """`kind` is `attention` or `logit-lens`; both can be made from what is stored, if more than projections is."""
    base = f"tlcapture capture --experiment {layout.experiment} --prompt-set {prompt_set} --{kind}"
    how = "--replay" if layout.captured(prompt_set) else "--projections-only"
    return MissingError(f"no {kind.replace('-', ' ')} of this prompt", f"{base} {how}")


def vectors(layout: Layout, trait: object) -> MissingError:
    return MissingError(f"no vectors of {trait}", extract_command(layout, [trait]))


def evaluation(layout: Layout) -> MissingError:
    return MissingError("not evaluated", f"tlcapture evaluate --experiment {layout.experiment}")


def steering(layout: Layout, trait: object) -> MissingError:
    return MissingError("not steered", f"tlcapture steer --experiment {layout.experiment} --traits {trait}")
