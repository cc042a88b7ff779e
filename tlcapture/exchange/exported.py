"""One capture as it is exported: a record of plain values, and columns with a value for each token.

    found = read_exported(layout, "single_trait", "3", ChosenActivations(layers=(12,)))
    found.record["spans"]                       # plain values, as JSON holds them
    found.columns["behavioral/refusal"]         # [n_tokens] of [n_layers][n_points], as the projection file has them
    found.activations["residual_out_L12"]       # [n_tokens, d_model], with zeros where a token was not kept

`restore` writes the files of an experiment from it. They equal the files that were read to the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlcapture.captures.capture import Capture, CapturedPart
from tlcapture.captures.notes import Note, put_note, read_notes
from tlcapture.errors import StorageError
from tlcapture.names import Trait, prompt_id_problem
from tlcapture.prompts.spans import TokenSpan, check_spans, labels_of
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.experiments.projection_places import STREAM_FOLDERS
from tlcapture.storage.files import Written, write_json
from tlcapture.storage.validation import of_form
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.projections.saved import all_saved
from tlcapture.views.cache import stacked
from tlcapture.views.hooks import POINTS
from tlcapture.views.kept_points import KeptPoints, point_index
from tlcapture.views.kept_tokens import Positions, spread_rows
from tlcapture.views.residual import ResidualStream

BULK = ("token_idx", "part", "token", "token_id", "span", "role")  # the columns of every export
_ACTIVATION = re.compile(r"(residual_in|after_attn|residual_out|attn_out)_L(0|[1-9][0-9]{0,3})")


@dataclass(frozen=True)
class ChosenActivations:
    """Which activations to export: of some layers, at some points, where a capture keeps them. No layers: none."""

    layers: tuple[int, ...] = ()
    all_layers: bool = False
    points: tuple[str, ...] = ("residual_out",)

    def of(self, stream: ResidualStream) -> list[tuple[int, str]]:
        """The layers and points of a capture that are exported."""
        layers = [each for each in stream.kept.layers if self.all_layers or each in self.layers]
        outputs = () if stream.attn_out is None else stream.output_layers
        return [
            (layer, point)
            for layer in layers
            for point in self.points
            if (layer in outputs if point == "attn_out" else point in stream.kept.points)
        ]


@dataclass(frozen=True, eq=False)
class ExportedCapture:
    """A capture, its projections, or both.

    Attributes:
        record: `prompt_set`, `file`, texts, spans, `notes`, `capture` (the metadata of the raw file; null without one)
            and `projections`, a list of `trait`, `component` and `content`, the file without tokens and scores.
        columns: by name, a value for each token: the columns of `BULK`, and one for each projection.
        activations: by name such as `residual_out_L12`, `[n_tokens, d_model]`.
    """

    record: dict[str, Any]
    columns: dict[str, list[Any]]
    activations: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The prompt set and the name of the file, for messages."""
        return f"{self.record['prompt_set']}/{self.record['file']}"


def column_of(trait: Trait | str, component: str) -> str:
    """The column of a projection's scores."""
    return str(trait) if component == "residual" else f"{trait} {component}"


def activation_column(layer: int, point: str) -> str:
    """The column of a layer's activations at a point."""
    return f"{point}_L{layer}"


def read_exported(layout: Layout, prompt_set: str, file: str, wanted: ChosenActivations) -> ExportedCapture:
    """Read a prompt's capture and projections. `file` is the name that its files share.

    Raises `StorageError` for a damaged file, and if capture and projections have different tokens.
    """
    raw = layout.residual(prompt_set, file)
    capture = Capture.open(raw) if raw.is_file() else None
    saved = {each.json_path: each for each in all_saved(layout, prompt_set, file)}
    projections = {place: each.content() for place, each in saved.items()}
    contents = {place: ProjectionFile.parse(value, saved[place].path) for place, value in projections.items()}
    again = command_line(layout, "project", "--prompt-set", prompt_set)
    tokens = _common_tokens(raw, capture, contents, again)
    record, columns = _head(prompt_set, file, capture, contents, tokens)
    record["notes"] = [note.model_dump() for note in _notes(layout, prompt_set, file)]
    record["projections"] = []
    for path, value in projections.items():
        trait, component = layout.of_projection(path)
        rows = [*value["projections"]["prompt"], *value["projections"]["response"]]
        columns[column_of(trait, component)] = spread_rows(rows, contents[path].positions, None)
        record["projections"].append({"trait": str(trait), "component": component, "content": _without_bulk(value)})
    activations = {} if capture is None else _activations(capture, wanted)
    return ExportedCapture(record, columns, activations)


def restore(layout: Layout, exported: ExportedCapture, source: Path) -> list[Written]:
    """Write a capture's files to an experiment: the raw file where activations were exported, and projections.

    `source` is the export, for messages.

    Raises `StorageError` for a record or columns that do not belong together, and then writes nothing.
    """
    with of_form(source, "export"):
        prompt_set, file = str(exported.record["prompt_set"]), exported.record["file"]
        raw = layout.residual(prompt_set, file)
        capture = _capture(exported)
        projections = [_projection(exported, each) for each in exported.record["projections"]]
        for path, value in ((Path(exported.name), value) for _, _, value in projections):
            ProjectionFile.parse(value, path)
        notes = [_checked_note(exported, each) for each in exported.record.get("notes", ())]
    written = [] if capture is None else [capture.save(raw)]
    for note in notes:
        put_note(layout, note)
    for trait, component, value in projections:
        written.append(write_json(layout.projection(trait, component, prompt_set, file), value))
    return written


def _notes(layout: Layout, prompt_set: str, file: str) -> list[Note]:
    found = read_notes(layout, prompt_set, file)
    if found.problems:
        raise found.problems[0]
    return found.notes


def _checked_note(exported: ExportedCapture, value: Any) -> Note:
    note = Note.model_validate(value)
    if (note.prompt_set, note.name) != (exported.record["prompt_set"], exported.record["file"]):
        raise ValueError("a note on another capture")
    return note


# -- reading the files of an experiment ---------------------------------------------------------


def _common_tokens(
    raw: Path, capture: Capture | None, contents: Mapping[Path, ProjectionFile], again: str
) -> tuple[list[str], list[str]]:
    """The tokens that all files of a prompt must have, of prompt and response; `again` is the command that projects."""
    found = [(path, (content.prompt.tokens, content.response.tokens)) for path, content in contents.items()]
    if capture is not None:
        found.insert(0, (raw, (capture.prompt.tokens, capture.response.tokens)))
    first, tokens = found[0]
    for path, others in found[1:]:
        if others != tokens:
            raise StorageError(f"{path}: its tokens differ from the tokens of {first}: run '{again}', and then export")
    return tokens


def _head(
    prompt_set: str,
    file: str,
    capture: Capture | None,
    contents: Mapping[Path, ProjectionFile],
    tokens: tuple[list[str], list[str]],
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    prompt, response = tokens
    n_tokens = len(prompt) + len(response)
    texts = capture if capture is not None else next(iter(contents.values()))
    spans = texts.spans
    metadata = None if capture is None else dict(capture.metadata)
    record: dict[str, Any] = {
        "prompt_set": prompt_set,
        "file": file,
        "prompt": texts.prompt.text,
        "response": texts.response.text,
        "n_prompt_tokens": len(prompt),
        "n_tokens": n_tokens,
        "spans": [span.to_json() for span in spans],
        "capture": metadata,
    }
    labels = labels_of(spans, n_tokens)
    columns: dict[str, list[Any]] = {
        "token_idx": list(range(n_tokens)),
        "part": ["prompt"] * len(prompt) + ["response"] * len(response),
        "token": [*prompt, *response],
        "token_id": [None] * n_tokens if capture is None else capture.token_ids,
        "span": [kind for kind, _ in labels],
        "role": [role for _, role in labels],
    }
    return record, columns


def _without_bulk(value: Mapping[str, Any]) -> dict[str, Any]:
    """A projection file with null in place of its scores and tokens, which are columns."""
    without = {**value, "projections": None}
    for part in ("prompt", "response"):
        without[part] = {**value[part], "tokens": None}
    return without


def _activations(capture: Capture, wanted: ChosenActivations) -> dict[str, Tensor]:
    n_tokens, held = len(capture.tokens), list(capture.positions.kept)
    found = {}
    for layer, point in wanted.of(capture.prompt.residual):
        rows = capture.residual(layer, point)
        if len(held) != n_tokens:
            whole = rows.new_zeros(n_tokens, rows.shape[1])
            whole[held] = rows
            rows = whole
        found[activation_column(layer, point)] = rows
    return found


# -- writing the files of an experiment ---------------------------------------------------------


def _capture(exported: ExportedCapture) -> Capture | None:
    """The capture; `None` where its activations were not exported."""
    record, metadata = exported.record, exported.record["capture"]
    if metadata is None or not exported.activations:
        return None
    for name, tensor in exported.activations.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{exported.name}: {name} holds NaN or infinity")
    by_point = {_layer_and_point(name): tensor for name, tensor in exported.activations.items()}
    points = [point for point in POINTS if any(at == point for _, at in by_point)]
    if not points:
        return None  # attention outputs alone are not a residual stream
    layers = sorted({layer for layer, point in by_point if point != "attn_out"})
    kept = KeptPoints(int(metadata["n_layers"]), tuple(layers), tuple(points))
    metadata = {**metadata, **({} if kept.is_all else {"layers": layers, "points": points})}
    n_prompt, n_tokens = int(record["n_prompt_tokens"]), int(record["n_tokens"])
    held = Positions.of(metadata.get("positions"), n_prompt, n_tokens)
    spans = tuple(TokenSpan.model_validate(each) for each in record["spans"])
    check_spans(spans, n_tokens)
    _check_names(record, metadata)

    def part(name: str, start: int, stop: int, positions: tuple[int, ...]) -> CapturedPart:
        rows = torch.tensor([start + position for position in positions], dtype=torch.long)
        stream = _stream({at: tensor[rows] for at, tensor in by_point.items()}, kept, metadata)
        tokens, ids = (exported.columns[key][start:stop] for key in ("token", "token_id"))
        return CapturedPart(record[name], tokens, ids, stream, None if held.is_all else positions)

    prompt, response = part("prompt", 0, n_prompt, held.prompt), part("response", n_prompt, n_tokens, held.response)
    return Capture(prompt, response, metadata, spans=spans)


def _stream(
    by_point: Mapping[tuple[int, str], Tensor], kept: KeptPoints, metadata: Mapping[str, Any]
) -> ResidualStream:
    """A part's activations, given by layer and point."""
    by_index = {point_index(*at): tensor for at, tensor in by_point.items() if at[1] != "attn_out"}
    output_layers = sorted(layer for layer, point in by_point if point == "attn_out")
    outputs = [by_point[layer, "attn_out"] for layer in output_layers]
    return ResidualStream(
        stacked([by_index[index] for index in kept.point_indices]),
        stacked(outputs) if outputs else None,
        kept,
        _with_attention(metadata, kept.layers, output_layers),
    )


def _with_attention(
    metadata: Mapping[str, Any], layers: Sequence[int], outputs: Sequence[int]
) -> tuple[int, ...] | None:
    stated = metadata.get("attention_layers")
    if stated is not None:
        return tuple(stated)
    return tuple(outputs) if outputs and list(outputs) != list(layers) else None


def _check_names(record: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    problem = prompt_id_problem(metadata["prompt_id"])
    if problem:
        raise ValueError(problem)
    if metadata["prompt_set"] is None or record["prompt_set"] is None:
        raise ValueError("no prompt set")


def _layer_and_point(name: str) -> tuple[int, str]:
    match = _ACTIVATION.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of activations")
    return int(match[2]), match[1]


def _projection(exported: ExportedCapture, found: Mapping[str, Any]) -> tuple[Trait, str, dict[str, Any]]:
    """Trait, component and content of a projection file."""
    trait, component = Trait.parse(found["trait"]), found["component"]
    if component not in STREAM_FOLDERS:
        raise ValueError(f"a projection of the component {component!r}")
    n_prompt = exported.record["n_prompt_tokens"]
    scores, tokens = exported.columns[column_of(trait, component)], exported.columns["token"]
    halves = {"prompt": slice(0, n_prompt), "response": slice(n_prompt, None)}
    value = {**found["content"]}
    value["projections"] = {part: [row for row in scores[half] if row is not None] for part, half in halves.items()}
    for part, half in halves.items():
        value[part] = {**value[part], "tokens": tokens[half]}
    return trait, component, value
