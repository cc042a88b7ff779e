"""The stream on which decode steps are recorded: one for all batches, whose work is waited for whatever happens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tlcapture.models.fast import recording


class Stream:
    """Stands in for a stream of a GPU, and notes what it waits for."""

    made: list[Stream]
    waits: list[tuple[Stream, Stream]]

    def __init__(self, device: torch.device, priority: int = 0):
        self.device = device
        self.made.append(self)

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((self, other))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "made", [], raising=False)
    monkeypatch.setattr(Stream, "waits", [], raising=False)
    current = Stream(torch.device("cpu"))
    stubs: dict[str, Any] = {
        "Stream": Stream,
        "current_stream": lambda device: current,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: (0, 0),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(recording, "_STREAMS", {})


def test_all_batches_record_on_one_stream() -> None:
    """cuBLAS would keep memory for each."""
    for _ in range(3):
        recording.Tape(torch.device("cpu")).run(lambda: None)
    assert len(Stream.made) == 2, "the current one and that of the tapes"


def test_work_queued_before_an_error_is_waited_for() -> None:
    """It writes to the buffers of the batch, which are freed after the error."""
    tape, (current, own) = recording.Tape(torch.device("cpu")), Stream.made

    def call() -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        tape.run(call)
    assert Stream.waits == [(own, current), (current, own)]
    assert tape.run(lambda: 1) == 1, "its turn has ended"
