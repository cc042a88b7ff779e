"""The captures of an experiment: of all prompt sets, and of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from operator import index
from os.path import lexists
from typing import TYPE_CHECKING, Any, SupportsIndex

from tlcapture.explore.experiment_tables import rises_frame
from tlcapture.explore.figures.set_figures import SetFigures
from tlcapture.explore.saved_capture import SavedCapture
from tlcapture.names import is_capture_set, is_safe_name, split_name
from tlcapture.text import beside, listed, printable

if TYPE_CHECKING:
    from pandas import DataFrame

    from tlcapture.explore.experiment import Experiment

_MOST_ROWS = 50
Names = list[str]


class AllCaptures(Mapping[str, "Captures"]):
    """The captures of an experiment, a mapping from prompt set to `Captures`.

        for name, captures in exp.captures.items():
            print(name, len(captures))

    Indexing raises `KeyError` for a prompt set without captures; calling returns an empty `Captures`.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment

    def __call__(self, prompt_set: str) -> Captures:
        """The captures of a prompt set, empty if it has none."""
        return Captures(self._experiment, prompt_set)

    def __getitem__(self, prompt_set: str) -> Captures:
        is_name = isinstance(prompt_set, str) and is_capture_set(prompt_set)
        if not (is_name and self._experiment.layout.has_captures(prompt_set)):
            raise KeyError(f"{prompt_set!r}{beside(str(prompt_set), self, 'prompt sets with captures')}")
        return self(prompt_set)

    def __iter__(self) -> Iterator[str]:
        return iter(self._experiment.prompt_sets)

    def __len__(self) -> int:
        return len(self._experiment.prompt_sets)

    def __repr__(self) -> str:
        return f"AllCaptures({', '.join(f'{name}: {len(captures)}' for name, captures in self.items()) or 'none'})"

    def _repr_html_(self) -> str:
        return self._experiment._repr_html_()

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class Captures:
    """The captures of one prompt set, in the order of their ids. Each is opened on first use.

        captures = exp.captures["single_trait"]
        for cap in captures:
            print(cap.id, cap.response.text)

    `captures[3]` and `captures["3"]` are the prompt with that id, `captures.at(0)` the first one; iterating gives the
    captures, `keys()` their ids. Indexing raises `KeyError` for a prompt without a capture.

    Samples of a prompt (`--samples`) are captures of their own: `captures["7.s1"]`.
    """

    def __init__(self, experiment: Experiment, prompt_set: str):
        self._experiment = experiment
        self.prompt_set = prompt_set

    @cached_property
    def _ids(self) -> dict[str, None]:
        return dict.fromkeys(self._experiment.layout.captured(self.prompt_set))

    def _holds(self, name: str) -> bool:
        """Whether there is a capture of a name; a set that was not listed yet is not, since it may be large."""
        if "_ids" in vars(self):
            return name in self._ids
        return is_safe_name(name) and lexists(self._experiment.layout.residual(self.prompt_set, name))

    def __getitem__(self, prompt_id: str | int) -> SavedCapture:
        if isinstance(prompt_id, slice):
            raise TypeError(
                "captures have the ids of their prompts as keys: several by position are list(captures)[:3]"
            )
        if not self._holds(str(prompt_id)):
            raise self._without_capture(prompt_id)
        return SavedCapture(self._experiment, self.prompt_set, str(prompt_id))

    def _without_capture(self, prompt_id: str | int) -> KeyError:
        """The error for an id without a capture, with what may have been meant."""
        hint = ""
        if str(prompt_id) in self._by_prompt:
            hint = f"; its samples: .samples({prompt_id!r})"
        elif isinstance(prompt_id, int) and -len(self) <= prompt_id < len(self):
            hint = f"; by position: .at({prompt_id})"
        elif str(prompt_id) in self._experiment.layout.prompt_ids(self.prompt_set):
            hint = "; only projections of this prompt were kept: use .to_pandas(...) of the experiment"
        captures = listed(self._ids, near=str(prompt_id))
        return KeyError(f"{prompt_id!r}: prompt set {self.prompt_set!r} has captures {captures}{hint}")

    def samples(self, prompt_id: str | int) -> list[SavedCapture]:
        """The samples of a prompt (`--samples`), in their order; none if it has none.

        Example:
            [cap.response.text for cap in captures.samples(1)]
        """
        samples = map(self.__getitem__, self._by_prompt.get(str(prompt_id), ()))
        return [capture for capture in samples if capture.sample is not None]

    @cached_property
    def _by_prompt(self) -> dict[str, Names]:
        by_prompt: dict[str, Names] = {}
        for name in self._ids:
            by_prompt.setdefault(split_name(name)[0], []).append(name)
        return by_prompt

    @cached_property
    def _in_order(self) -> Sequence[str]:
        return tuple(self._ids)

    def at(self, position: SupportsIndex) -> SavedCapture:
        """The capture at a position in the order of ids; negative ones count from the end.

        Example:
            first, last = captures.at(0), captures.at(-1)
        """
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
        """The ids of the captured prompts, as text.

        Example:
            captures.keys()[:3]
        """
        return list(self._ids)

    def values(self) -> list[SavedCapture]:
        """The captures.

        Example:
            longest = max(captures.values(), key=len)
        """
        return list(self)

    def items(self) -> list[tuple[str, SavedCapture]]:
        """The captures with their ids.

        Example:
            lengths = {prompt_id: len(cap) for prompt_id, cap in captures.items()}
        """
        return [(prompt_id, self[prompt_id]) for prompt_id in self._ids]

    def to_pandas(self, traits: Iterable[str] | str | None = None, **how: Any) -> DataFrame:
        """The projection files of the set as a tidy data frame; `how` are the options of `Experiment.to_pandas`.

        Example:
            captures.to_pandas("behavioral/refusal", layers="all")
        """
        return self._experiment.to_pandas(self.prompt_set, traits, **how)

    def rises(self, component: str = "residual") -> DataFrame:
        """How far each trait rises in each prompt, and which rises are more than chance: a row for each of them.

            rises = exp.captures["single_trait"].rises()
            rises[rises.stands_out]

        Columns are `prompt_id`, `n_samples` (missing for a prompt without samples), `trait`, `layer` (of the vector),
        `rise`, `chance`, `stands_out` and `doubt`. They are what `tlcapture capture` and the page show: `rise` is the
        mean projection of the response less that of the prompt, as a standard score over the set (for fewer than five
        prompts over the reference prompts), so that 0 is the mean rise; `chance` what the largest of as many
        rises exceeds in at most 5 % of random directions and of ordinary prompts, NaN if it was not measured: up to one
        prompt in twenty has a trait that stands out by chance alone; `doubt` a doubt that `tlcapture evaluate` leaves
        about the vector.

        Raises `InputError`, naming the command to run, if the set has no projections.
        """

        return rises_frame(self._experiment.layout, self.prompt_set, component)

    @property
    def plot(self) -> SetFigures:
        """Figures of the whole set: `.trajectory("behavioral/refusal")`.

        Example:
            captures.plot.trajectory("behavioral/refusal")
        """

        return SetFigures(self._experiment.layout, self.prompt_set)

    def __repr__(self) -> str:
        shown = list(self._ids)[:_MOST_ROWS]
        more = f", and {len(self) - len(shown)} more" if len(shown) < len(self) else ""
        return f"Captures({self.prompt_set!r}: {', '.join(shown)}{more})"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._ids)

    def _repr_html_(self) -> str:
        """A table of token counts and responses of the first captures."""
        shown = {prompt_id: self[prompt_id] for prompt_id in list(self._ids)[:_MOST_ROWS]}
        rows = "".join(
            f"<tr><td>{escape(prompt_id)}</td><td>{len(each.prompt.tokens)}</td><td>{len(each.response.tokens)}</td>"
            f"<td>{escape(printable(each.response.text[:120]))}</td></tr>"
            for prompt_id, each in shown.items()
        )
        more = f"<div>and {len(self) - len(shown)} more</div>" if len(shown) < len(self) else ""
        head = "<tr><th>id</th><th>prompt tokens</th><th>response tokens</th><th>response</th></tr>"
        return f"<b>{escape(self.prompt_set)}</b><table>{head}{rows}</table>{more}"
