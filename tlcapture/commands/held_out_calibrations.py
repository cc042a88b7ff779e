"""Storing where held-out examples lie on the axes of a trait's vectors, in the vectors' metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.traits.calibration import HELD_OUT, merged_calibrations
from tlcapture.traits.vector_files import VectorFiles


def keep_held_out_calibrations(
    run: Run, files: VectorFiles, component: str, found: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add calibrations, by method and layer as text, to the metadata of the vectors that they are of."""
    with run_lock(run, f"vectors of {files.trait}"):
        metadata = files.metadata(component)
        files.write_metadata(component, {**metadata, HELD_OUT: merged_calibrations(metadata.get(HELD_OUT), found)})
