"""Contrastive examples of a trait: reading them and holding some out.

    datasets/traits/{category}/{trait}/positive.jsonl, negative.jsonl

One JSON object per line: `{"text"}`, `{"prompt", "response"}`, or `{"prompt"}`, to which the model itself
responds, with an optional `"pair"` that ties a positive example to the negative one on the same topic, and an
optional `"system_prompt"` of a prompt, in place of the experiment's.
`positive.txt` and `negative.txt` are read as well: each line is a bare text, or a scenario, a prompt that the model
completes. The files do not say which.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.files import read_bytes
from tlcapture.storage.json_text import lost
from tlcapture.storage.validation import first_problem
from tlcapture.text import decoded, listed

HELD_OUT_SHARE = 0.2
TEXTS, AUTO = "texts", "auto"  # what the lines of a .txt file are, or "scenarios"; auto: texts, a guess
GUESS = (
    "lines of .txt examples are read as bare texts, which is a guess: if the model is to complete them, pass "
    "--examples-as scenarios; if not, --examples-as texts"
)
_FEWEST = 4


class Example(BaseModel):
    """One example: a bare text, a prompt with the response to it, or a prompt that the model responds to.

    The `system_prompt` of a prompt takes the place of the experiment's.
    """

    model_config = ConfigDict(frozen=True)

    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    pair: str | None = None
    system_prompt: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_known_keys(cls, value: Any) -> Any:
        return only_known_keys(cls, value)

    @model_validator(mode="after")
    def _is_one_kind(self) -> Example:
        if (self.text is None) == (self.prompt is None) or (self.prompt is None and self.response is not None):
            raise ValueError('expected either "text", or "prompt" with or without "response"')
        if self.text is not None and self.system_prompt is not None:
            raise ValueError('a bare "text" has no "system_prompt": expected a "prompt" with it')
        given = (self.text, self.prompt, self.response)
        if any(part is not None and not part.strip() for part in given):
            raise ValueError("the text is empty")
        return self


@dataclass(frozen=True)
class LabelledExample:
    """An example, its side, and whether it is held out from fitting."""

    example: Example
    positive: bool
    held_out: bool


class Sides(NamedTuple):
    """The numbers of positive and of negative examples; `are_pairs` if those at the same position are pairs."""

    positive: Sequence[int]
    negative: Sequence[int]
    are_pairs: bool = False


@dataclass(frozen=True)
class Examples:
    """All examples of a trait, positive ones first, each side in the order of its file.

    `lines_as` says how the lines of .txt files were read, as `texts` or `scenarios`; `None` without such files.
    `is_guess` tells whether that was a guess.
    """

    trait: Trait
    items: list[LabelledExample]
    lines_as: str | None = None
    is_guess: bool = False

    def count(self, *, positive: bool, held_out: bool) -> int:
        """How many examples of a side are held out, or are not."""
        return sum(item.positive == positive and item.held_out == held_out for item in self.items)

    @property
    def groups(self) -> list[str]:
        """The group of each example: its pair, or itself, with all that repeat one of them. Groups are never split."""
        keys = [_key("positive" if i.positive else "negative", n, i.example) for n, i in enumerate(self.items)]
        return _grouped(keys, [item.example for item in self.items])

    def sides(self, numbers: Sequence[int]) -> Sides:
        """The sides of some examples without those that repeat others: of pairs that do, only the first one counts."""
        items, groups = self.items, self.groups
        positive, negative = ([n for n in numbers if items[n].positive == side] for side in (True, False))
        partners = {items[n].example.pair: n for n in negative}
        pairs = [items[n].example.pair for n in positive]
        if None not in pairs and len({*pairs}) == len(pairs) == len(negative) and {*pairs} == {*partners}:
            first = sorted({groups[n]: n for n in reversed(positive)}.values())
            return Sides(first, [partners[items[n].example.pair] for n in first], are_pairs=True)
        once = {*{(items[n].positive, content(items[n].example)): n for n in reversed(numbers)}.values()}
        return Sides([n for n in positive if n in once], [n for n in negative if n in once])

    def split_record(self, seed: int) -> dict[str, Any]:
        """The split as it is recorded in metadata: counts, the seed, and the pairs that are held out."""
        pairs = sorted({item.example.pair for item in self.items if item.held_out and item.example.pair})
        return {
            "seed": seed,
            "held_out_share": HELD_OUT_SHARE,
            "n_train_positive": self.count(positive=True, held_out=False),
            "n_train_negative": self.count(positive=False, held_out=False),
            "n_held_out_positive": self.count(positive=True, held_out=True),
            "n_held_out_negative": self.count(positive=False, held_out=True),
            "held_out_pairs": pairs,
        }


def read_examples(datasets: Datasets, trait: Trait, *, seed: int = 0, examples_as: str = AUTO) -> Examples:
    """Read both sides of a trait and choose the examples that are held out, both examples of a pair together.

    `examples_as` says what each line of a .txt file is: one of `texts`, `scenarios` and `auto`.

    Raises `InputError` if a side is missing or too small, and with file and line for an invalid example.
    """
    return examples_in(datasets.trait_folder(trait), trait, seed=seed, examples_as=examples_as)


def examples_in(folder: Path, trait: Trait, *, seed: int = 0, examples_as: str = AUTO) -> Examples:
    """The examples in a folder, as `read_examples` reads them."""
    lines_as = TEXTS if examples_as == AUTO else examples_as
    sides = {name: _read_side(folder, name, lines_as) for name in ("positive", "negative")}
    for name, examples in sides.items():
        if len(examples) < _FEWEST:
            raise InputError(f"{folder}: {len(examples)} {name} examples, expected at least {_FEWEST}")
    given = [(name, number, example) for name, each in sides.items() for number, example in enumerate(each)]
    groups = _grouped([_key(*each) for each in given], [example for _, _, example in given])
    n_positive = len(sides["positive"])
    held_out = _held_out_groups({*groups[:n_positive]}, {*groups[n_positive:]}, seed)
    items = [
        LabelledExample(example, name == "positive", group in held_out)
        for (name, _, example), group in zip(given, groups, strict=True)
    ]
    if not any(_lines_file(folder, name) for name in sides):
        return Examples(trait, items)
    return Examples(trait, items, lines_as, is_guess=examples_as == AUTO)


def content(example: Example) -> tuple[str, str]:
    """Prompt and text of an example, in lower case and without white space: equal for examples that repeat another.

    The system prompt is part of the prompt.
    """
    before = f"{example.system_prompt or ''} {example.prompt or ''}"
    texts = before, example.text or example.response or example.prompt or ""
    prompt, text = (" ".join(each.lower().split()) for each in texts)
    return prompt, text


def only_known_keys(model: type[BaseModel], value: Any) -> Any:
    """The value itself; raises `ValueError` for an object with a key that is not a field of the model."""
    known = list(model.model_fields)
    unknown = next((key for key in value if key not in known), None) if isinstance(value, dict) else None
    if unknown is not None:
        raise ValueError(f"unknown key {str(unknown)[:40]!r}: expected {listed(known)}")
    return value


def _held_out_groups(positive: set[str], negative: set[str], seed: int) -> set[str]:
    """A fifth of the groups with examples of both sides, and a fifth of the other ones of each side."""
    shared = positive & negative
    chosen: set[str] = set()
    for groups in (shared, positive - shared, negative - shared):
        ordered = sorted(groups)
        random.Random(seed).shuffle(ordered)
        chosen.update(ordered[: round(HELD_OUT_SHARE * len(ordered))])
    return chosen


def _grouped(keys: Sequence[str], examples: Sequence[Example]) -> list[str]:
    """The first key of each example's group, which are joined where an example of one repeats that of another."""
    joined = {key: key for key in keys}

    def first(key: str) -> str:
        while joined[key] != key:
            key = joined[key]
        return key

    seen: dict[tuple[str, str], str] = {}
    for key, example in zip(keys, examples, strict=True):
        joined[first(key)] = first(seen.setdefault(content(example), key))
    return [first(key) for key in keys]


def _key(side: str, number: int, example: Example) -> str:
    return f"pair {example.pair}" if example.pair is not None else f"{side} {number:06d}"


def _lines_file(folder: Path, name: str) -> Path | None:
    """The .txt file of a side, if the side is read from one."""
    path = folder / f"{name}.txt"
    return path if path.is_file() and not (folder / f"{name}.jsonl").is_file() else None


def _read_side(folder: Path, name: str, lines_as: str) -> list[Example]:
    objects_file, text_file = folder / f"{name}.jsonl", _lines_file(folder, name)
    if objects_file.is_file():
        return [_parse(objects_file, number, line) for number, line in _lines(objects_file)]
    if text_file is not None:
        return [Example(**{"text" if lines_as == TEXTS else "prompt": line}) for _, line in _lines(text_file)]
    raise InputError(f"{folder}: no {objects_file.name} (nor {name}.txt): expected one example per line")


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = decoded(read_bytes(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start}: not valid UTF-8") from None
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _parse(path: Path, number: int, line: str) -> Example:
    try:
        value = orjson.loads(line)
        if reason := lost(line):
            raise InputError(f"{path}: line {number}: {reason}")
        return Example.model_validate(value)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}: line {number}: not valid JSON: {error.msg}") from None
    except ValidationError as error:
        raise InputError(f"{path}: line {number}: {first_problem(error)}") from None
