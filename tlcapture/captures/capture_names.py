"""The names of a capture, which its metadata decides: its id, its set, its sample. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlcapture.errors import StorageError
from tlcapture.names import PromptId, capture_name, of_variant

INDEX = "tlcapture.json"  # the index in the archive of a raw residual file


class CaptureNames:
    """The names of a capture according to its metadata."""

    metadata: Mapping[str, Any]

    @property
    def prompt_set(self) -> str:
        """Name of the prompt set."""
        return str(self.metadata["prompt_set"])

    @property
    def capture_set(self) -> str:
        """The set that the capture's files are in: its prompt set, or a variant of it, `SET@VARIANT`."""
        return of_variant(self.prompt_set, self.metadata.get("variant"))

    @property
    def prompt_id(self) -> PromptId:
        """Id of the prompt in its set: a text or a number."""
        found = self.metadata["prompt_id"]
        return found if isinstance(found, int) else str(found)

    @property
    def sample(self) -> int | None:
        """The number of the response, from 1, among several to the same prompt; `None` if it is the only one."""
        return self.metadata.get("sample")

    @property
    def name(self) -> PromptId:
        """The capture's name within its set, also used in file names: `7`, or `7.s1` for a sample."""
        return capture_name(self.prompt_id, self.sample)


def check_place(metadata: Mapping[str, Any], path: Path) -> None:
    """Raise `StorageError` where metadata name another capture than the path of a raw file in an experiment."""
    parts = path.parts
    starts = [at for at in range(3, len(parts)) if parts[at - 3 : at] == ("inference", "raw", "residual")]
    is_named = metadata.get("prompt_id") is not None and metadata.get("prompt_set") is not None
    if not starts or path.suffix != ".pt" or not is_named:  # another suffix: it is about to be moved here
        return
    name = capture_name(metadata["prompt_id"], metadata.get("sample"))
    named = (of_variant(str(metadata["prompt_set"]), metadata.get("variant")), str(name))
    if named != ("/".join(parts[starts[-1] : -1]), path.name.removesuffix(".pt")):
        raise StorageError(f"{path}: its metadata names prompt {'/'.join(named)}: it was moved or renamed")
