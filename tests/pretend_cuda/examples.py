"""What the pretended GPU refuses and finds: pytest runs this with its plugin, in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.pretend_cuda import streams
from tests.pretend_cuda.streams import FAULTS, FaultError


def on_gpu(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


@pytest.fixture
def side() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def test_tensors_are_on_the_gpu_and_compute_there() -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    x[:, 1] += 1
    assert x.is_cuda and x[1].device == torch.device("cuda", 0)
    assert (x @ x.T).tolist() == [[8, 20], [20, 59]]
    assert x.cpu().tolist() == [[0, 2, 2], [3, 5, 5]]
    assert torch.equal(x.to("cpu", torch.int64), torch.tensor([[0, 2, 2], [3, 5, 5]]))


def test_what_main_memory_computes_otherwise_is_computed_too() -> None:
    half = on_gpu(1, 2).half()
    assert half.softmax(-1, dtype=torch.float32).tolist() == [[0.5, 0.5]]
    assert torch.histc(torch.tensor([0, 1, 1]).cuda(), 2).tolist() == [1, 2]
    weight = on_gpu(2, 1, 1, 1)
    assert torch.conv2d(on_gpu(1, 2, 1, 1), weight, groups=2).tolist() == [[[[1.0]], [[1.0]]]]


def test_devices_are_mixed_as_on_a_gpu_only() -> None:
    x = on_gpu(3)
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert x[torch.tensor([0, 2])].tolist() == [1, 1]
    for call in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(1)]), lambda: x[None] @ torch.ones(3, 1)):
        with pytest.raises(RuntimeError, match="same device"):
            call()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_what_reads_numbers_waits() -> None:
    x = on_gpu(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x + 1
        x.to("cpu", non_blocking=True)
        for call in (x.sum().item, x.cpu, x.nonzero, lambda: x[x > 0]):
            with pytest.raises(RuntimeError, match="synchronizing"):
                call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_copy_that_is_not_waited_for_has_no_numbers() -> None:
    copy, event = on_gpu(3).to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    assert copy.is_pinned() and copy.isnan().all()
    event.synchronize()
    assert copy.tolist() == [1, 1, 1]


def test_a_copy_is_done_before_later_work_on_its_source() -> None:
    x = on_gpu(3)
    copy = x.to("cpu", non_blocking=True)
    x.zero_()
    torch.cuda.synchronize()
    assert copy.tolist() == [1, 1, 1]


def test_work_of_two_streams_needs_a_wait(side: torch.cuda.Stream) -> None:
    x = on_gpu(2, 3)
    with torch.cuda.stream(side):
        with pytest.raises(FaultError, match="without a wait"):
            x.sum()
        side.wait_stream(torch.cuda.default_stream())
        x[:, 1].add_(1)
    x[:, 2].sum()  # other numbers
    with pytest.raises(FaultError, match="without a wait"):
        x.sum()
    torch.cuda.synchronize()
    assert x.sum().item() == 8
    FAULTS.clear()


@pytest.mark.parametrize("is_lent", [False, True])
def test_memory_that_another_stream_uses_is_to_be_lent(side: torch.cuda.Stream, is_lent: bool) -> None:
    x = on_gpu(3)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.sum()
    if is_lent:
        x.record_stream(side)
    del x
    on_gpu(3)
    assert bool(FAULTS) != is_lent
    FAULTS.clear()


def test_a_replay_does_what_was_recorded_on_the_same_memory(side: torch.cuda.Stream) -> None:
    x, steps, graph = on_gpu(3), torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin()
        found = (x * 2).unbind()[1]
        steps.add_(1)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    assert steps.item() == 0 and found.isnan().item(), "nothing was run"
    for number in (3, 4):
        x.fill_(number)
        graph.replay()
        assert found.item() == 2 * number
    assert steps.item() == 2
    del x
    with pytest.raises(FaultError, match="freed"):
        graph.replay()
    FAULTS.clear()


def test_a_recording_in_which_python_reads_a_number_fails(side: torch.cuda.Stream) -> None:
    x, graph = on_gpu(3), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin()
        with pytest.raises(RuntimeError, match="capturing"):
            x.sum().item()
        with pytest.raises(RuntimeError, match="previous error"):
            graph.capture_end()


def test_streams_are_handed_out_again_and_again() -> None:
    made = {torch.cuda.Stream().cuda_stream for _ in range(3 * streams.N_STREAMS)}
    assert len(made) == streams.N_STREAMS
    assert torch.cuda.Stream(priority=-1).cuda_stream not in made
