"""Whether a vector and the activations projected onto it belong together: mismatches raise, differences are noted.

Only fields that both record are compared: files of earlier versions and of other tools record less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlcapture.captures.provenance import RAW
from tlcapture.errors import VectorError
from tlcapture.views.hooks import COMPONENT_HOOKS, at_any_layer

if TYPE_CHECKING:
    from tlcapture.traits.vectors import TraitVector

Metadata = Mapping[str, Any]

_SHOWN = (
    "hook",
    "position",
    "model_fingerprint",
    "model_revision",
    "engine",
    "dtype",
    "weight_processing",
    "chat_template",
    "bos",
    "layer_convention",
    "imported",
    "tlcapture_version",
)


def check_origin(vector: TraitVector, capture: Metadata) -> None:
    """Raise `VectorError` for a vector that cannot match the activations of a capture, given its metadata."""
    origin = vector.metadata
    name = f"the {vector.method} vector of {vector.trait} at layer {vector.layer} in experiment {vector.experiment!r}"
    component = origin.get("component", vector.component)
    if component != vector.component:
        raise VectorError(f"{name} is recorded as a vector of {component}, not of {vector.component}: extract it again")
    hook, expected = origin.get("hook"), COMPONENT_HOOKS[vector.component]
    if hook is not None and at_any_layer(str(hook)) != expected:
        raise VectorError(f"{name} was read out at {hook}, but {expected} is projected: extract it at that hook")
    for what, metadata in ((name, origin), ("the capture", capture)):
        processing = metadata.get("weight_processing", RAW)
        if processing not in (RAW, None):
            raise VectorError(
                f"{what} has weight_processing {processing!r}, which changes the basis of activations: expected "
                f"{RAW!r}; make it again from unprocessed weights"
            )
    layers = (origin.get("num_layers"), capture.get("n_layers"))
    if _same_name(vector, capture) and _differ(layers):
        raise VectorError(
            f"{name} is from a model with {layers[0]} layers, the capture from one with {layers[1]}, although both are "
            f"named {vector.model!r}: extract it from the captured model"
        )


def origin_notes(vector: TraitVector, capture: Metadata, *, other_model_intended: bool) -> list[str]:
    """The differences between a vector's origin and a capture's: one note per difference, with both values.

    Another model is not noted if it was intended, or if it is the one that the capture's adapter was merged into;
    all other differences are noted anyway.
    """
    origin = vector.metadata
    if not origin:
        return ["the vectors have no metadata.json: their origin is unknown"]
    same_weights = _same_weights(vector, capture)
    is_intended = same_weights or other_model_intended or _is_of_the_base(vector, capture)
    notes = [] if is_intended else [_other_model(vector, capture)]
    if same_weights:
        ran = [_how_it_ran(metadata) for metadata in (origin, capture)]
        if _differ(ran):
            notes.append(f"the vector was extracted {ran[0]}, the capture made {ran[1]}: they differ by rounding")
    templates = [metadata.get("chat_template") for metadata in (origin, capture)]
    if _differ(templates):
        how = [f"with{'' if used else 'out'} a chat template" for used in templates]
        notes.append(f"the vector was extracted {how[0]}, the capture made {how[1]}")
    counts = [_bos_count(metadata) for metadata in (origin, capture)]
    if _differ(counts):
        notes.append(f"the vector's examples begin with {counts[0]} BOS, the capture's prompt with {counts[1]}")
    return notes


def recorded_origin(origin: Metadata) -> dict[str, Any]:
    """The fields of a vector's metadata that projection files repeat."""
    return {key: origin[key] for key in _SHOWN if key in origin}


def described_origin(origin: Metadata) -> str:
    """A vector's origin as one line of text, given its metadata; fields that are not recorded are left out."""
    if not origin:
        return "unknown origin: no metadata.json"
    known = {key: value for key, value in origin.items() if value is not None}
    versions = [f"{label} {str(known[key])[:8]}" for key, label in _VERSIONS.items() if key in known]
    parts = [str(known.get("extraction_model", "unknown model")) + (f" ({', '.join(versions)})" if versions else "")]
    parts += [_how_it_ran(origin) or "", str(known.get("hook", "")), str(known.get("position", ""))]
    if isinstance(known.get("imported"), Mapping):
        source = known["imported"]
        parts.append(f"imported from {source.get('file')} ({source.get('convention') or source.get('tool')})")
    if "chat_template" in known:
        parts.append("chat template" if known["chat_template"] else "no chat template")
    if _bos_count(origin) is not None:
        parts.append(f"{_bos_count(origin)} BOS")
    if "tlcapture_version" in known:
        parts.append(f"tlcapture {known['tlcapture_version']}")
    return ", ".join(part for part in parts if part)


_VERSIONS = {"model_revision": "revision", "model_fingerprint": "weights"}


def _differ(recorded: Sequence[Any]) -> bool:
    """Whether both of two values are recorded, and differ."""
    return None not in recorded and recorded[0] != recorded[1]


def _other_model(vector: TraitVector, capture: Metadata) -> str:
    detail = ""
    if _same_name(vector, capture):
        detail = ", whose weights differ although the name is the same"
        revisions = (vector.metadata.get("model_revision"), capture.get("model_revision"))
        if _differ(revisions):
            detail += f" (revision {revisions[0]} and {revisions[1]})"
    if vector.model is None:
        return "the vectors do not name their model: it is not known to be the captured one"
    return (
        f"the vector was extracted from model {vector.model!r}, the capture is from "
        f"{capture.get('inference_model')!r}{detail}; if this is intended, name the experiment with --vector-experiment"
    )


def _same_name(vector: TraitVector, capture: Metadata) -> bool:
    return vector.model == capture.get("inference_model")


def _is_of_the_base(vector: TraitVector, capture: Metadata) -> bool:
    """Whether a vector was extracted from the model that a capture's adapter was merged into."""
    base = capture.get("base_fingerprint")
    return base is not None and base == vector.metadata.get("model_fingerprint")


def _same_weights(vector: TraitVector, capture: Metadata) -> bool:
    fingerprints = [metadata.get("model_fingerprint") for metadata in (vector.metadata, capture)]
    # A model that the user loaded has a fingerprint of another kind: only its name can be compared.
    if all(fingerprints) and len({str(each).startswith("tl-") for each in fingerprints}) == 1:
        return fingerprints[0] == fingerprints[1]
    revisions = [metadata.get("model_revision") for metadata in (vector.metadata, capture)]
    return _same_name(vector, capture) and not _differ(revisions)


def _how_it_ran(metadata: Metadata) -> str | None:
    engine, dtype = metadata.get("engine"), metadata.get("dtype")
    return None if engine is None or dtype is None else f"on {engine} in {dtype}"


def _bos_count(metadata: Metadata) -> int | None:
    bos = metadata.get("bos")
    count = bos.get("count") if isinstance(bos, Mapping) else None
    return count if isinstance(count, int) else None
