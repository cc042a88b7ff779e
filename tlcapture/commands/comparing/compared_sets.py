"""Choosing the captures to compare: two experiments, prompt sets of them, or variants of prompt sets.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tlcapture.errors import InputError
from tlcapture.names import base_set, check_capture_set, of_variant, split_name, variant_of
from tlcapture.storage.experiments.comparisons import comparison_file
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import beside, did_you_mean, listed

_LONGEST = 255  # characters of a folder's name
FORM = "EXPERIMENT, EXPERIMENT/SET or EXPERIMENT/SET@VARIANT"


@dataclass(frozen=True)
class CaptureSet:
    """The captures of a prompt set, or of a variant of it, in an experiment; without a `name`, those of all sets."""

    layout: Layout
    name: str | None

    def __str__(self) -> str:
        return self.layout.experiment if self.name is None else f"{self.layout.experiment}/{self.name}"

    @classmethod
    def parse(cls, root: Path, text: str) -> CaptureSet:
        """Read `EXPERIMENT[/SET[@VARIANT]]`.

        Raises `InputError` for anything else, for an experiment that does not exist, and for a set without captures.
        """
        experiment, _, name = text.partition("/")
        try:
            layout = Layout(root, experiment)
            layout.check_exists()
        except InputError as error:
            raise InputError(f"{error}; expected {FORM}") from None
        found = cls(layout, check_capture_set(name) if name else None)
        if not found.names:
            others = beside(name, layout.captured_prompt_sets(), f"captured sets of {experiment}")
            raise InputError(f"{text}: no captures{others}")
        return found

    @property
    def names(self) -> Sequence[str]:
        """The names of the captured sets."""
        captured = self.layout.captured_prompt_sets()
        return captured if self.name is None else [self.name] if self.name in captured else []

    def of_set(self, name: str) -> CaptureSet:
        """The captures of one set."""
        return CaptureSet(self.layout, name)

    def path(self, capture: str) -> Path:
        """The raw file of one of the set's captures."""
        assert self.name is not None
        return self.layout.residual(self.name, capture)

    @property
    def ids(self) -> Sequence[str]:
        """The names of the set's captures: ids of prompts, or of their samples."""
        assert self.name is not None
        return self.layout.captured(self.name)


@dataclass(frozen=True)
class ComparedSets:
    """Captures of a set that are compared with others, `b` against `a`."""

    a: CaptureSet
    b: CaptureSet

    @property
    def other(self) -> str:
        """The name of `b` in the paths of `a`: its experiment, its set if that differs, and its variant."""
        assert self.a.name is not None and self.b.name is not None
        own, name = base_set(self.a.name), base_set(self.b.name)
        other_set = "" if own == name else f"+{name.replace('/', '+')}"
        variant = variant_of(self.b.name)
        return f"{self.b.layout.experiment}{other_set}" + (f"@{variant}" if variant else "")

    def check_name(self) -> None:
        """Raise `InputError` if `other` is longer than the name of a folder may be."""
        if len(self.other) > _LONGEST:
            raise InputError(
                f"{self.a} and {self.b}: comparisons would be in a folder whose name has {len(self.other)} characters, "
                f"{self.other[:40]}..., and at most {_LONGEST} are possible: choose shorter names of experiment, set "
                "and variant"
            )

    def path(self, name: str) -> Path:
        """The comparison file of a prompt or sample."""
        assert self.a.name is not None
        return comparison_file(self.a.layout, self.other, self.a.name, name)

    def pairs(self) -> list[tuple[str, str, str]]:
        """Names of the comparison, of the capture in `a` and of the one in `b`, for each prompt or sample in both.

        If one side has samples of a prompt and the other a single response, each sample is compared with it.
        """
        names_a, names_b = set(self.a.ids), set(self.b.ids)
        found = [(name, name, name) for name in self.a.ids if name in names_b]
        found += [
            (name, name, split_name(name)[0])
            for name in self.a.ids
            if name not in names_b and split_name(name)[0] in names_b
        ]
        found += [
            (name, split_name(name)[0], name)
            for name in self.b.ids
            if name not in names_a and split_name(name)[0] in names_a
        ]
        return found


def compared_with(layout: Layout, other: str, prompt_set: str) -> CaptureSet:
    """The captures that those of a set were compared with, by their name `other` in paths (`ComparedSets.other`)."""
    rest, _, variant = other.partition("@")
    experiment, _, name = rest.partition("+")
    own = name.replace("+", "/") or base_set(prompt_set)
    return CaptureSet(Layout(layout.root, experiment), of_variant(own, variant or None))


def compared_sets(a: CaptureSet, b: CaptureSet, only: Sequence[str] = ()) -> list[ComparedSets]:
    """The sets to compare: those named, or all that both sides have captures of.

    A side without a set takes the other's: the same variant if another experiment has it, otherwise the set
    itself. `only` restricts them to some prompt sets of `a`.

    Raises `InputError` where there are none.
    """
    found = [each for each in _matched(a, b) if not only or {each.a.name, base_set(each.a.name or "")} & {*only}]
    if not found:
        captured = "; ".join(f"{side}: {listed(side.names)}" for side in (a, b))
        among = f" among {', '.join(only)}" if only else ""
        meant = next(filter(None, (did_you_mean(each, a.names) for each in only)), ";")
        raise InputError(f"{a} and {b} have no prompt set in common{among}{meant} captured sets of {captured}")
    without = [each for each in found if not each.pairs()]
    if len(without) == len(found):
        first = found[0]
        raise InputError(
            f"{first.a} and {first.b} have no prompts in common: {_some(first.a.ids)} and {_some(first.b.ids)}"
        )
    return [each for each in found if each not in without]


def _matched(a: CaptureSet, b: CaptureSet) -> Iterator[ComparedSets]:
    if a.name is not None and b.name is not None:
        yield ComparedSets(a, b)
    elif a.name is None and b.name is None:
        for name in a.names:
            if name in b.names:
                yield ComparedSets(a.of_set(name), b.of_set(name))
    elif a.name is not None:
        yield from (ComparedSets(a, b.of_set(name)) for name in _counterpart(a, b))
    else:
        yield from (ComparedSets(a.of_set(name), b) for name in _counterpart(b, a))


def _counterpart(named: CaptureSet, other: CaptureSet) -> list[str]:
    """The set of the other side that belongs to a named one, if there is one."""
    assert named.name is not None
    is_same = named.layout == other.layout
    wishes = [] if is_same and variant_of(named.name) else [named.name]
    return [name for name in [*wishes, base_set(named.name)] if name in other.names][:1]


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
