"""The overview of a prompt set: the first words of each prompt and answer, and the traits that stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tlcapture.commands.projecting.top_traits import TopTrait
from tlcapture.errors import TlcaptureError
from tlcapture.page.captured import captured_tokens
from tlcapture.page.long_reading import SHORT_REQUESTS, summary_read
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.verdicts import Doubts

_SHOWN = 300  # characters of an answer


def overview_of(
    layout: Layout, prompt_set: str, component: str, captures: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Each prompt of a set in `rows`, with the samples of a prompt in one; `captures` are those that the page lists.

    A row has the `id` of the prompt, its `captures`, and the first words of the `answer`. Where the prompt is
    projected it also has its `rises` by trait, the traits among them whose chance level is `unmeasured` and, for the
    trait that rose most, what `TopTrait` says of it. `traits` are all traits of the rises, `doubts` the doubts about
    their vectors. `problems` name projections that cannot be read, `unread` captures without projections that cannot.
    """
    unread: dict[str, None] = {}
    read = summary_read(layout, prompt_set, component)
    summary = read.summary
    tops = {(top.prompt_id, top.samples is not None): top for top in summary.tops}
    rows = []
    for (prompt, has_samples), names in _by_prompt(captures).items():
        SHORT_REQUESTS.give_way()
        top = tops.get((prompt, has_samples))
        row = {"id": prompt, "captures": names, "n_samples": len(names) if has_samples else 0}
        answer = top.response if top else _answer(layout, prompt_set, names[0], unread)
        rows.append({**row, "answer": answer[:_SHOWN], **({} if top is None else _findings(top))})
    traits = sorted({trait for top in summary.tops for trait in (*top.rises, *top.unmeasured)})
    found = None if summary.findings is None else asdict(summary.findings)
    shown = {"rows": rows, "traits": traits, "against": summary.against, "findings": found}
    doubts = Doubts(layout.root).lines(summary.vectors)
    return {**shown, "doubts": doubts, "problems": list(read.problems), "unread": list(unread)}


def _by_prompt(captures: Sequence[Mapping[str, Any]]) -> dict[tuple[str, bool], list[str]]:
    found: dict[tuple[str, bool], list[str]] = {}
    for each in captures:
        has_samples = "sample" in each
        key = (str(each["prompt"] if has_samples else each["id"]), has_samples)
        found.setdefault(key, []).append(str(each["id"]))
    return found


def _findings(top: TopTrait) -> dict[str, Any]:
    names = ("trait", "rise", "chance", "stands_out", "commitment_point", "token", "calibrated")
    samples = None if top.samples is None else asdict(top.samples)
    rises = {"rises": {**top.rises, **top.unmeasured}, "unmeasured": sorted(top.unmeasured)}
    return {name: getattr(top, name) for name in names} | rises | {"samples": samples}


def _answer(layout: Layout, prompt_set: str, name: str, unread: dict[str, None]) -> str:
    try:
        path = layout.residual(prompt_set, name)
        return str(captured_tokens(path)["text"]) if path.is_file() else ""
    except TlcaptureError as error:
        unread.setdefault(str(error))
        return ""
