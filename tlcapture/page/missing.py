"""Errors for missing data, with the command that creates it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tlcapture.errors import InputError, TlcaptureError
from tlcapture.names import base_set
from tlcapture.storage.experiments.command_lines import root_words
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.layout import Layout, existing_experiments
from tlcapture.storage.remote.roots import url_of
from tlcapture.text import shell_join
from tlcapture.traits.vector_sources.packaged import takes_packaged


class MissingError(InputError):
    """Data that an experiment does not have yet.

    Attributes:
        what: the missing data.
        command: the command that creates it.
    """

    def __init__(self, what: str, command: str):
        super().__init__(f"{what}: run '{command}'" if command else what)
        self.what = what
        self.command = command

    def to_json(self) -> dict[str, str]:
        """The error as the page shows it."""
        return {"what": self.what, "command": self.command}


def root_option(root: Path) -> str:
    """The option by which a command finds a root from any folder: ` --root FOLDER`; empty if the root is here."""
    is_here = root.resolve() == Path.cwd() and not root_words(root)
    return "" if is_here else f" --root {shell_join([url_of(root) or str(root.absolute())])}"


def _error(layout: Layout, what: str, command: str) -> MissingError:
    """The error for data that `command` creates, completed for the layout's root."""
    return MissingError(what, command + root_option(layout.root))


def captures(layout: Layout, prompt_set: str) -> MissingError:
    """For a prompt set without captures."""
    command = f"tlcapture capture --experiment {layout.experiment} --prompt-set {prompt_set}"
    return _error(layout, f"no captures of {prompt_set}", command)


def projections(layout: Layout, prompt_set: str) -> MissingError:
    """For a prompt without projections; the command extracts vectors first if there are none."""
    if not layout.traits() and not takes_packaged(layout, read_config(layout).inference_model):
        return _error(layout, "no trait vectors to project onto", f"tlcapture extract --experiment {layout.experiment}")
    command = f"tlcapture project --experiment {layout.experiment} --prompt-set {prompt_set}"
    return _error(layout, "not projected onto this trait", command)


def add_on(layout: Layout, prompt_set: str, kind: str) -> MissingError:
    """For a prompt without `attention` or `logit-lens`, which stored captures can be replayed for."""
    base = f"tlcapture capture --experiment {layout.experiment} --prompt-set {prompt_set} --{kind}"
    how = "--replay" if layout.has_captures(prompt_set) else "--projections-only"
    return _error(layout, f"no {kind.replace('-', ' ')} of this prompt", f"{base} {how}")


def internals(layout: Layout, prompt_set: str) -> MissingError:
    """For a prompt or a layer without internals, which stored captures can be replayed for."""
    base = f"tlcapture capture --experiment {layout.experiment} --prompt-set {prompt_set} --layer-internals all"
    how = " --replay" if layout.has_captures(prompt_set) else ""
    return _error(layout, "no internals of this prompt", base + how)


def raw(layout: Layout, prompt_set: str) -> MissingError:
    """For a prompt whose activations were not kept."""
    command = f"tlcapture capture --experiment {layout.experiment} --prompt-set {prompt_set}"
    return _error(layout, "the activations of this prompt were not kept", command)


def vectors(layout: Layout, trait: object) -> MissingError:
    """For a trait without vectors."""
    return _error(layout, f"no vectors of {trait}", _extraction(layout, trait))


def own_vectors(layout: Layout, trait: object) -> MissingError:
    """For the steering results of vectors that come with the package, which has none."""
    return _error(layout, "not steered: only vectors of your own can be", _extraction(layout, trait))


def _extraction(layout: Layout, trait: object) -> str:
    return f"tlcapture extract --experiment {layout.experiment} --traits {trait}"


def evaluation(layout: Layout) -> MissingError:
    """For vectors that have not been evaluated."""
    return _error(layout, "not evaluated", f"tlcapture evaluate --experiment {layout.experiment}")


def steering(layout: Layout, trait: object) -> MissingError:
    """For a trait that has not been steered."""
    return _error(layout, "not steered", f"tlcapture steer --experiment {layout.experiment} --traits {trait}")


def comparison(layout: Layout, prompt_set: str) -> MissingError:
    """For a prompt or a set that was not compared; the command compares it with the first suitable captures."""
    what, own = f"{prompt_set} was not compared with other captures", f"{layout.experiment}/{prompt_set}"
    for other in [layout.experiment, *existing_experiments(layout.root)]:
        with suppress(TlcaptureError):  # it cannot be listed
            for name in Layout(layout.root, other).captured_prompt_sets():
                if base_set(name) == base_set(prompt_set) and f"{other}/{name}" != own:
                    return _error(layout, what, f"tlcapture compare {own} {other}/{name}")
    command = f"tlcapture compare {own} OTHER/{base_set(prompt_set)}{root_option(layout.root)}"
    how = "capture its prompts again as a variant (--steer, --adapter) or in another experiment"
    return MissingError(f"{what}: {how}; then '{command}'", "")


def outdated(layout: Layout, prompt_set: str, other: str, what: str) -> MissingError:
    """For comparisons with captures `other`, such as `exp/set@variant`, some of which were made again since."""
    return _error(layout, what, f"tlcapture compare {layout.experiment}/{prompt_set} {other}")
