"""Whether captures were made again since they were compared. Loads torch only where they were.

A capture that is made again removes the comparisons that its prompt set holds, but not those that hold it as `b`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tlcapture.captures.provenance import is_same_computation
from tlcapture.comparison.comparison_files import ComparisonFile
from tlcapture.errors import InputError, StorageError
from tlcapture.names import split_name
from tlcapture.storage.experiments.layout import Layout


def is_outdated(layout: Layout, prompt_set: str, path: Path, file: ComparisonFile) -> bool:
    """Whether a capture of a comparison was made again since, with other tokens or by another computation.

    `file` is the content of the comparison at `path`, which is of a prompt set of `layout`. A capture that is gone, or
    cannot be read, says nothing.

    Example:
        is_outdated(layout, "single_trait", path, ComparisonFile.read(path))
    """
    name = path.stem
    with suppress(FileNotFoundError, StorageError):
        written = path.stat().st_mtime_ns
        for side, raw in (("a", _capture(layout, prompt_set, name)), ("b", _of_other(layout, name, file))):
            if raw is not None and raw.stat().st_mtime_ns > written and not _is_of(file, side, raw):
                return True
    return False


def _of_other(layout: Layout, name: str, file: ComparisonFile) -> Path | None:
    """The capture `b`, which is that of a prompt if it has no sample of the name; `None` where there is none."""
    experiment, _, prompt_set = file.b.partition("/")
    own = file.a.partition("/")[0]  # by which `layout` was called then
    try:
        other = layout if experiment == own else Layout(layout.root, experiment)
        return _capture(other, prompt_set, name)
    except InputError:  # no name of an experiment or of a set
        return None


def _capture(layout: Layout, prompt_set: str, name: str) -> Path | None:
    paths = (layout.residual(prompt_set, each) for each in (name, split_name(name)[0]))
    return next((path for path in paths if path.is_file()), None)


def _is_of(file: ComparisonFile, side: str, raw: Path) -> bool:
    """Whether a capture has the tokens of one side of a comparison, and was computed as the comparison says."""
    from tlcapture.captures.capture import Capture

    capture = Capture.open(raw)
    rest = [] if file.continuations is None else getattr(file.continuations, side)
    made_by = file.metadata.models.get(side)
    is_same = made_by is None or is_same_computation(made_by, capture.metadata)
    return is_same and capture.tokens == [*file.tokens, *rest]
