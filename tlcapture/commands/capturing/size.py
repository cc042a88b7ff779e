"""How much a capture will write, estimated before it writes anything.

The size of tensors is exact. JSON is estimated from the average number of bytes per number in captures of the embedded
model. Responses are assumed to have the greatest length allowed, so that less is written where they stop early.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.captures.known_capture import KnownCapture
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.commands.capturing.tasks import CaptureTask
from tlcapture.commands.prompt_files.outputs import Outputs, wanted_positions
from tlcapture.commands.prompt_files.view_files import n_attention_weights
from tlcapture.errors import InputError, StorageError
from tlcapture.models.sizes import Measures
from tlcapture.names import Trait
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.runs.report import Failed
from tlcapture.storage.compact.compact_files import PER_PREDICTION, PER_SCORE, PER_WEIGHT, is_written_compact
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.statistics.chance import N_DIRECTIONS
from tlcapture.traits.vector_files import VectorFiles, traits_with_vectors
from tlcapture.views.kept_tokens import KeptTokens, Positions, kept_of

_PER_COMPACT_WEIGHT = 2
_PER_COMPACT_PREDICTION = 8  # its id and probability
_PER_COMPACT_SCORE = 4
_PER_TEXT = 12  # an id of the vocabulary with its text
_PER_RISE = 8.5  # 4 significant digits, a sign and an exponent at times
_PER_NULL = 5  # a layer without activations
_PER_FILE = 2000  # names, metadata, and what the container adds
_PER_PROJECTION_FILE = 1000  # the vector and where it comes from
_PER_CAPTURE = 850  # the metadata of a capture that is not kept
_PER_VIEW = 90  # the description of a tensor in a `.pt` file, and the padding before it
_PER_TOKEN = 6  # its text and id
_PER_TOKEN_OF_TENSORS = 24  # the same as Python values and, for raw residuals, in the index
_PER_POSITION = 5  # the index of a token
_PER_SPAN = 110  # twice in a raw file, with its mean and velocity in a projection
_N_SPANS = 6  # of a question, its answer, and the template around them
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}


@dataclass(frozen=True)
class LackingProjections:
    """The number of projections that a saved capture lacks, and whether it lacks other files as well."""

    capture: KnownCapture
    n_projections: int
    lacks_more: bool


@dataclass
class CaptureSize:
    """The number and size of the files that a capture will write.

    Attributes:
        n_prompts: prompts to capture.
        n_completed: saved captures to which files are added.
        by_kind: number of files and bytes, by kind of file.
        failures: prompts that would fail, with the reasons.
        memory: bytes that the largest prompt takes while it runs alone, in addition to the weights.
        replaces: paths of raw residual files that will be written, whether they exist or not.
    """

    n_prompts: int = 0
    n_completed: int = 0
    by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)
    replaces: list[Path] = field(default_factory=list)
    failures: list[Failed] = field(default_factory=list)
    memory: int = 0

    @classmethod
    def of(
        cls,
        tasks: Sequence[CaptureTask],
        layout: Layout,
        options: CaptureOptions,
        measures: Callable[[], Measures],
        n_vectors: int | None = None,
    ) -> CaptureSize:
        """The size of the files that tasks will write; `measures` is called only where there is something to do.

        `n_vectors` is the number of vectors that new captures are projected onto; by default all that may fit.
        """
        total = cls()
        n_vectors = len(projected_onto(layout, options)) if n_vectors is None else n_vectors
        for task in tasks:
            name = task.capture_set
            total.failures += task.failing
            for prompt in task.fresh_prompts:
                n_prompt = len(prompt.token_ids)
                kept = kept_of(options.tokens, n_prompt, n_prompt + task.max_new_tokens)
                wanted = options.outputs(measures().n_layers)
                total.n_prompts += 1
                total.replaces.append(layout.residual(name, prompt.name))
                total._add(file_sizes(measures(), kept, wanted, options, n_vectors, _labels(prompt)))
            for saved, wanted in task.saved.items():
                if wanted:
                    total.n_completed += 1
                    kept = _kept_of_saved(layout.residual(name, saved), options.tokens)
                    total._add(file_sizes(measures(), kept, wanted, options, 0))
        return total

    def add_projections(
        self, projected: Sequence[LackingProjections], options: CaptureOptions, measures: Measures
    ) -> None:
        """Count the projections that saved captures lack."""
        for each in projected:
            self.n_completed += not each.lacks_more
            capture = each.capture
            wanted = Outputs(capture.kept, residual=False, attn_out=capture.has_attn_out, parts=options.parts)
            self._add(file_sizes(measures, capture.positions, wanted, options, each.n_projections))

    @property
    def n_files(self) -> int:
        """The number of files of all kinds."""
        return sum(count for count, _ in self.by_kind.values())

    @property
    def n_bytes(self) -> int:
        """The size of all files together."""
        return sum(size for _, size in self.by_kind.values())

    def replaced(self) -> int:
        """The size in bytes of the existing captures that will be replaced."""
        return sum(path.stat().st_size for path in self.replaces if path.is_file())

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        kinds = {kind: {"files": count, "bytes": size} for kind, (count, size) in self.by_kind.items()}
        return {
            "prompts": self.n_prompts,
            "completed": self.n_completed,
            "files": self.n_files,
            "bytes": self.n_bytes,
            "memory": self.memory,
            "kinds": kinds,
            "failures": [failed._asdict() for failed in self.failures],
        }

    def _add(self, sizes: Iterator[tuple[str, float]]) -> None:
        for kind, size in sizes:
            count, before = self.by_kind.get(kind, (0, 0))
            self.by_kind[kind] = (count + 1, before + round(size))


def file_sizes(
    measures: Measures,
    tokens: Positions,
    wanted: Outputs,
    options: CaptureOptions,
    n_projections: int,
    labels: int = _N_SPANS * _PER_SPAN,
) -> Iterator[tuple[str, float]]:
    """Kind and size in bytes of each file of a prompt and its response, for the `tokens` that are kept.

    `labels` is the size of spans and messages.
    """
    kept = wanted.kept
    row = len(kept.layers) * len(kept.points) * PER_SCORE + (kept.n_layers - len(kept.layers)) * _PER_NULL
    each = 2 * PER_SCORE + _PER_TOKEN  # velocity and acceleration, of all tokens
    overhead = _PER_PROJECTION_FILE + N_DIRECTIONS * _PER_RISE + (0 if wanted.raw else _PER_CAPTURE)
    projection = overhead + tokens.n_tokens * each + len(tokens.kept) * row + _positions(tokens) + labels
    yield from chain(
        _tensors(measures, tokens, wanted, options, labels),
        _views(measures, tokens, wanted),
        _projections(tokens, wanted, n_projections, projection, overhead + labels),
    )


def _projections(
    tokens: Positions, wanted: Outputs, count: int, as_json: float, rest: float
) -> Iterator[tuple[str, float]]:
    """A prompt's projections: JSON files, or one shard per component, in which each has `rest` beside its numbers."""
    if not is_written_compact(wanted.parts.form, as_json):
        yield from (("projection", as_json) for _ in range(count))
    elif count:
        numbers = len(wanted.kept.layers) * len(wanted.kept.points) + 2
        text, n_shards = _PER_FILE + _PER_TOKEN * tokens.n_tokens, min(count, 1 + wanted.attn_out)
        each = text + count / n_shards * (rest + _PER_COMPACT_SCORE * tokens.n_tokens * numbers)
        yield from (("projection", each) for _ in range(n_shards))


def _positions(tokens: Positions) -> int:
    """The size of the list `positions`."""
    return 0 if tokens.is_all else _PER_POSITION * len(tokens.kept)


def _labels(prompt: TokenizedPrompt) -> int:
    """The size of the spans of a prompt and its response, thinking and answer among them, and of its messages."""
    return _PER_SPAN * (len(prompt.spans) + 2) + 2 * len(json.dumps(prompt.messages))


def _tensors(
    m: Measures, tokens: Positions, wanted: Outputs, options: CaptureOptions, labels: int
) -> Iterator[tuple[str, float]]:
    n_kept = len(tokens.kept)
    text = _PER_FILE + _PER_TOKEN_OF_TENSORS * tokens.n_tokens + _positions(tokens)
    if wanted.residual and wanted.raw:
        n_layers = len(wanted.kept.layers)
        n_points = len(wanted.kept.point_indices) + n_layers * wanted.attn_out
        n_views = 2 * n_layers * (len(wanted.kept.points) + wanted.attn_out)
        n_bytes = n_points * n_kept * m.d_model * _BYTES[options.save_dtype]
        yield "raw residual", text + labels + n_views * _PER_VIEW + n_bytes
    # Queries, keys, values and their mix; pre-activation, gate, activation; the residual stream and both outputs.
    heads = (2 * m.n_heads + 2 * m.n_key_value_heads) * m.d_head
    row = heads + 3 * m.d_mlp + 5 * m.d_model + m.n_heads * tokens.n_tokens
    for _ in wanted.internals:
        yield "layer internals", text + _BYTES[options.save_dtype] * n_kept * row


def _views(m: Measures, tokens: Positions, wanted: Outputs) -> Iterator[tuple[str, float]]:
    parts, head = wanted.parts, _PER_FILE + _positions(tokens)
    if wanted.attention:
        n_weights = n_attention_weights(m, parts, tokens)
        is_compact = is_written_compact(parts.form, n_weights * PER_WEIGHT)
        yield "attention", head + n_weights * (_PER_COMPACT_WEIGHT if is_compact else PER_WEIGHT)
    if wanted.logit_lens:
        n_cells, top = len(tokens.with_next) * (len(parts.lens_layers) or m.n_layers), min(parts.lens_top, m.d_vocab)
        n_predictions = n_cells * top
        if is_written_compact(parts.form, n_predictions * PER_PREDICTION):
            texts = _PER_TEXT * min(m.d_vocab, n_predictions)
            yield "logit lens", head + texts + n_predictions * _PER_COMPACT_PREDICTION + n_cells * 12
        else:
            yield "logit lens", head + n_predictions * PER_PREDICTION


def projected_onto(layout: Layout, options: CaptureOptions) -> list[tuple[Trait, str]]:
    """The traits, each with a component, whose vectors new captures will be projected onto if these fit."""
    if not options.projects:
        return []
    source = options.vectors.layout(layout)
    try:
        traits = traits_with_vectors(source, options.vectors.traits)
    except InputError:  # there are no vectors
        return []
    pairs = ((trait, component) for trait in traits for component in options.components)
    return [(trait, component) for trait, component in pairs if VectorFiles(source, trait).available(component)]


def _kept_of_saved(raw: Path, tokens: KeptTokens | None) -> Positions:
    """The tokens that add-ons of a saved capture are kept of."""
    try:
        return wanted_positions(tokens, Capture.open(raw), fresh=False)
    except StorageError:
        return Positions((), 0, 0)
