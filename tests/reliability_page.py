"""The format of docs/reliability.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.evidence import Evidence

HEAD = """# What was tested, with results

Each row comes from a test that passed: `make reliability` runs the tests and writes this page.
"""


def page(evidence: Evidence) -> str:
    """The page as Markdown."""
    return "\n".join([HEAD, *_faults(evidence), *_inputs(evidence), *_noise(evidence), *_architectures(evidence)])


def _faults(evidence: Evidence) -> list[str]:
    rows = [(name, *row) for name, row in evidence.faults.items()]
    return ["## Faults injected into the real command\n", _table(("fault", "how", "outcome"), rows)]


def _inputs(evidence: Evidence) -> list[str]:
    kinds: dict[str, list[tuple[str, int]]] = {}
    for (reader, kind), count in evidence.inputs.items():
        kinds.setdefault(reader, []).append((kind, count))
    rows = [
        (reader, str(sum(count for _, count in found)), ", ".join(f"{kind} {count}" for kind, count in sorted(found)))
        for reader, found in sorted(kinds.items())
    ]
    text = (
        "Each input was read correctly or refused with a one-line error that names the file and the reason: "
        "no traceback, no hang, no wrong number.\n"
    )
    return ["## Inputs tested\n", text, _table(("reader", "inputs", "by kind"), rows)]


def _noise(evidence: Evidence) -> list[str]:
    kinds = list(dict.fromkeys(kind for shares in evidence.noise.values() for kind in shares))
    rows = [
        (finding, null, *(f"{shares[kind]:.1%}" if kind in shares else "" for kind in kinds))
        for (finding, null), shares in evidence.noise.items()
    ]
    text = (
        "How often each finding is made in noise. The level is 5 %; where noise is not what a test assumes, it may be "
        "more. Prompts and examples are independent; along tokens, layers and coefficients, correlated noise is "
        "autoregressive with a coefficient of 0.5.\n"
    )
    return ["## Findings in noise\n", text, _table(("finding", "compared with", *kinds), rows)]


def _architectures(evidence: Evidence) -> list[str]:
    columns = sorted({what for _, _, what in evidence.deviations})
    pairs = sorted({(name, engine) for name, engine, _ in evidence.deviations} | set(evidence.refusals))
    rows = [
        (name, engine, *(_number(evidence.deviations.get((name, engine, what))) for what in columns),
         evidence.refusals.get((name, engine), ""))
        for name, engine in pairs
    ]  # fmt: skip
    text = (
        "Tiny models with random weights: the largest deviation from Hugging Face in hidden states, attention patterns "
        "and logits, as a fraction of the largest value.\n"
    )
    head = ("architecture", "engine", *columns, "refused, with the reason")
    return ["## Architectures and engines\n", text, _table(head, rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
