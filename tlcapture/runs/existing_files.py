"""The rule for replacing or removing existing files of an experiment: a file must be of the kind that its path says.

A file that cannot be read may belong to another program, or be worth saving, so it is kept unless the user
says otherwise.
"""

from __future__ import annotations

from os.path import lexists
from pathlib import Path

from tlcapture.captures.capture import Capture
from tlcapture.comparison.comparison_files import ComparisonFile
from tlcapture.errors import StorageError
from tlcapture.names import PromptId
from tlcapture.storage.compact.compact_files import is_compact
from tlcapture.storage.compact.projection_shards import Shard
from tlcapture.storage.experiments.layout import Layout, derived_files
from tlcapture.storage.files import read_json, read_tensors, remove
from tlcapture.storage.regular_files import check_regular
from tlcapture.storage.validation import not_valid
from tlcapture.traits.projections.saved import remove_sharded
from tlcapture.views.json_files import AttentionHead, LensHead
from tlcapture.views.saved_attention import read_attention
from tlcapture.views.saved_lens import read_lens

OVERWRITE = "use --overwrite to replace or remove it"
# Advice for a file at the path of a capture that cannot be read as one.
REPLACE = "use --overwrite to replace it and all files derived from it"


def check_replaceable(layout: Layout, path: Path, *, overwrite: bool = False, advice: str = OVERWRITE) -> None:
    """Raise `StorageError`, with `advice`, for an existing file that cannot be read, unless `overwrite` is set.

    Only the beginning and the end of potentially large JSON files are read.
    """
    if not lexists(path):
        return
    if path.exists():
        check_regular(path)  # a folder is never removed
    if overwrite:
        return
    try:
        check_regular(path)
        check_readable(layout, path)
    except StorageError as error:
        raise StorageError(f"{error}: {advice}") from None


def check_readable(layout: Layout, path: Path) -> None:
    """Raise `StorageError` for a file that is not of the kind that its path in an experiment says."""
    place = path.relative_to(layout.folder).parts
    if place[:3] == ("inference", "raw", "residual"):
        Capture.open(path)
    elif place[:3] == ("inference", "raw", "internals"):
        content = read_tensors(path, whole=False)
        if not isinstance(content, dict) or "token_ids" not in content:
            raise not_valid(path, "layer internals", "it has no token_ids")
    elif place[:2] == ("analysis", "compare"):
        ComparisonFile.read(path)
    elif place[:2] == ("analysis", "projections"):
        Shard.open(path)
    elif place[0] == "analysis":
        if is_compact(path):
            (read_attention if path.stem.endswith("_attention") else read_lens)(path)
        else:
            (AttentionHead if path.stem.endswith("_attention") else LensHead).check_file(path)
    else:
        content = read_json(path)
        if not isinstance(content, dict) or "projections" not in content:
            raise not_valid(path, "projection", "it has no projections")


def remove_derived(layout: Layout, prompt_set: str, prompt_id: PromptId) -> list[Path]:
    """Remove all files made from a capture, and its projections from shards; returns the files that are gone."""
    derived = derived_files(layout, prompt_set, prompt_id)
    remove(derived)
    return [*derived, *remove_sharded(layout, prompt_set, prompt_id)]


def saved_capture(raw: Path, *, overwrite: bool, advice: str = REPLACE) -> Capture | None:
    """The capture stored at `raw`; `None` if no file exists, or if `overwrite` is set and it cannot be read.

    Raises:
        StorageError: the path is not a regular file, or the file cannot be read and `overwrite` is not set. It is not
            replaced, since it may belong to another program; the message ends with `advice`.
    """
    if not lexists(raw):
        return None
    if raw.exists():
        check_regular(raw)
    try:
        check_regular(raw)
        return Capture.open(raw)
    except StorageError as error:
        if overwrite:
            return None
        raise StorageError(f"{error}: {advice}" if advice else str(error)) from None
