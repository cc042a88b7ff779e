"""The records of interventions in metadata: comparing them, naming a variant, describing them. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from tlcapture.traits.interventions.requested import KINDS, layers_text

VECTORS, PROMPTS = "vectors", "prompts"  # where typical norms come from
_LONGEST_NAME = 48
_AMOUNTS = {"steer": " {coefficient:+g}", "cap": " to {value:g}"}


def identity(records: Sequence[Mapping[str, Any]] | None) -> str:
    """A key that is equal for the same interventions. It ignores norms, which may depend on the prompts of a
    measurement."""
    kept = [
        {
            key: value
            for key, value in record.items()
            if key != "experiment"
            and (record.get("norms_from") != PROMPTS or key not in ("typical_norms", "norms_from"))
        }
        for record in records or ()
    ]
    return json.dumps(kept, sort_keys=True)


def variant_name(records: Sequence[Mapping[str, Any]]) -> str:
    """The name of the variant by default, such as `steer-refusal-0.2-L16-3fa9c1d2`: readable, and only theirs."""
    parts = []
    for record in records:
        if record["kind"] == "hook":
            parts.append("hook")
            continue
        trait = str(record.get("trait") or "vector").rpartition("/")[2]
        number = record.get("coefficient", record.get("value"))
        amount = [] if number is None else [f"{number:g}".replace("+", "")]
        layers = "L" + layers_text(tuple(record["layers"])).replace(",", "_")
        is_default = record["where"] == str(KINDS[record["kind"]].default_where)
        where = [] if is_default else [record["where"].replace("=", "")]
        parts.append("-".join([record["kind"], trait, *amount, layers, *where]))
    digest = blake2b(identity(records).encode(), digest_size=4).hexdigest()
    return f"{'.'.join(parts)[:_LONGEST_NAME].rstrip('-.')}-{digest}"


def described(record: Mapping[str, Any]) -> str:
    """An intervention as a line of text, given its record: `steer behavioral/refusal +0.2 at layer 16, response`."""
    if record["kind"] == "hook":
        return f"hook {record['function']} at {record['hook']}"
    layers = record["layers"]
    at = f"at layer{'s' if len(layers) > 1 else ''} {layers_text(tuple(layers))}"
    trait = record.get("trait") or "along a vector given in Python"
    amount = _AMOUNTS.get(record["kind"], "").format(**record)
    where = record["where"].replace("_", " ")
    return f"{record['kind']} {trait}{amount} {at}, {where}"


def thinking_doubt(records: Sequence[Mapping[str, Any]], *, thinks: bool) -> str | None:
    """The warning if interventions act within thinking, and no prompt makes the model think."""
    if thinks or not any(record.get("where") == "thinking" for record in records):
        return None
    return "the chat template does not make the model think here: interventions at :thinking may act at no token"
