"""Recording on a device: the same activations as on a CPU, whatever fits there and however late copies are done."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import tiny
from tests.test_parity import as_prompt, random_ids, relative
from tlcapture.generation import batch
from tlcapture.generation.interventions.intervention import Add
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.recording import device_buffers, transfers
from tlcapture.generation.recording import recorder as recording
from tlcapture.generation.recording.recorder import Recorder
from tlcapture.generation.recording.transfers import Copies
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.loading import Model, load_model
from tlcapture.views.attention import attention_hooks
from tlcapture.views.internals import internals_hooks
from tlcapture.views.residual import residual_hooks

LENGTHS = (31, 22, 15, 9, 4)


class LateCopies(Copies):
    """Copies of a device that are done as late as they may be."""

    def __init__(self, device: torch.device):
        self._begun: list[tuple[Tensor, Tensor]] = []
        self._n_done = 0

    def lend(self, tensor: Tensor) -> None:
        pass

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert source.is_contiguous() and target.is_contiguous(), "a copy in pieces holds up the host"
        self._begun.append((target.zero_(), source))

    def mark(self) -> int:
        return len(self._begun)

    def wait(self, mark: int) -> None:
        for target, source in self._begun[self._n_done : mark]:
            target.copy_(source)
        self._n_done = max(self._n_done, mark)

    def hold_up_device(self) -> None:
        self.wait(self.mark())


def stand_in_for_cuda(patch: pytest.MonkeyPatch, event: Any) -> None:
    """Let streams do nothing: what is copied to pinned memory is there when its event has come."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    patch.setattr(transfers, "_STREAMS", {})
    for name, stub in (
        ("Stream", lambda device: stream),
        ("current_stream", lambda device: stream),
        ("stream", lambda stream: nullcontext()),
        ("Event", event),
    ):
        patch.setattr(torch.cuda, name, stub)


class DoneAtOnce:
    """An event of a device that has done all of its work."""

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def test_copies_arrive_in_pieces_of_which_few_are_in_transit(monkeypatch: pytest.MonkeyPatch) -> None:
    released, begun = threading.Event(), []

    class Event:
        def record(self, stream: object) -> None:
            begun.append(self)

        def synchronize(self) -> None:
            assert released.wait(10)

    stand_in_for_cuda(monkeypatch, Event)
    monkeypatch.setattr(transfers, "_PIECE", 40)
    monkeypatch.setattr(transfers, "_IN_TRANSIT", 120)
    copies = Copies(torch.device("cpu"))
    source, target = torch.randn(5, 11), torch.zeros(5, 11)
    assert copies.mark()[1] is None
    begun.clear()
    copier = threading.Thread(target=copies.copy, args=(target, source))
    copier.start()
    copier.join(0.2)
    assert copier.is_alive() and len(begun) == 3 and not target.any(), "three pieces of forty bytes are in transit"
    released.set()
    copier.join(10)
    copies.wait(copies.mark())
    assert torch.equal(target, source)
    assert len(begun) == 6 + 1, "six pieces and a mark"


def test_copies_of_all_batches_have_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has 32, and would give the 33rd batch one that another thread has for other work."""
    made: list[torch.device] = []
    stand_in_for_cuda(monkeypatch, DoneAtOnce)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or SimpleNamespace())
    one, other = Copies(torch.device("cpu")), Copies(torch.device("cpu"))
    assert one._stream is other._stream and len(made) == 1


def hooks_of(model: Model) -> list[str]:
    names = model.hook_names
    found = residual_hooks(model.n_layers, names, attn_out=True) + attention_hooks(model.n_layers, names)
    return [*found, *(name for name in internals_hooks(1, names) if name not in found)]


def run(model: Model, *, n_new: int = 12, temperature: float = 3.0) -> dict[str, Generation]:
    """Generations of a batch of which some rows stop early; activations are read when all have ended."""
    prompts = [as_prompt(random_ids(length, seed=length), str(length)) for length in LENGTHS]
    sampling = Sampling(temperature, seed=1)
    outcomes = generate(
        model, prompts, hooks=hooks_of(model), max_new_tokens=n_new, sampling=sampling, batch_size=len(prompts)
    )
    return {each.prompt.id: each for each in list(outcomes) if isinstance(each, Generation)}


@pytest.fixture(autouse=True)
def early_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "stop_ids", lambda *args, **options: frozenset(range(30)))


def as_on_a_device(patch: pytest.MonkeyPatch, *, free: float, chunk: int = 5, few: int = 256) -> None:
    patch.setattr(recording, "Copies", LateCopies)
    patch.setattr(recording, "_has_own_memory", lambda device: True)
    patch.setattr(recording, "free_memory", lambda device: free)
    patch.setattr(device_buffers, "_CHUNK", chunk)
    patch.setattr(device_buffers, "_FEW", few)


A_COLUMN = 5 * 7 * tiny.D_MODEL * 4 * 2  # five rows, seven hooks, float32, of twice as many free bytes


@pytest.mark.parametrize(
    ("free", "chunk", "few"),
    [
        (2**40, 5, 256),
        (2**40, 1, 256),
        (2**40, 64, 256),
        (2**40, 5, 0),
        (40 * A_COLUMN, 5, 256),
        (7 * A_COLUMN, 7, 0),
        (A_COLUMN, 32, 0),
        (0, 5, 256),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_activations_recorded_on_a_device_are_those_recorded_in_main_memory(
    kind: str, free: int, chunk: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(kind, tiny.ENGINES[0])
    expected = run(model)
    as_on_a_device(monkeypatch, free=free, chunk=chunk, few=few)
    found = run(model)
    assert found.keys() == expected.keys() and len(found) == len(LENGTHS)
    assert len({len(each.response_ids) for each in found.values()}) > 1, "rows should end at different steps"
    for name, each in expected.items():
        assert found[name].response_ids == each.response_ids
        assert list(found[name].cache) == list(each.cache)
        n_bytes = recording.n_bytes_of(found[name].cache)
        assert n_bytes == recording.n_bytes_of(dict(each.cache))
        for hook, activation in each.cache.items():
            assert found[name].cache[hook].shape == activation.shape
            assert torch.equal(found[name].cache[hook], activation), hook


def test_what_fits_on_the_device_decides_how_many_columns_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(2, 3, 8)
    a_column = 10 * 4 * 8 * 4
    for free, n_held in ((2 * 100 * a_column, 100), (2 * 99 * a_column, 32), (2 * 9 * a_column, 9), (a_column, 0)):
        assert device_buffers.columns_that_fit(like, 4, 10, 100, free) == n_held


@given(st.integers(1, 2**40))
def test_rows_that_share_pinned_memory_waste_little_of_it(n_bytes: int) -> None:
    n_rows = device_buffers.pinned_together(n_bytes)
    taken = next(2**power for power in range(60) if 2**power >= n_rows * n_bytes)
    assert taken <= 1.25 * n_rows * n_bytes
    assert n_rows == 1 or taken / n_rows < next(2**power for power in range(60) if 2**power >= n_bytes)


def test_prompts_of_a_batch_share_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch, free=2**40, chunk=1)
    shapes: list[tuple[int, ...]] = []

    def noted(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Tensor:
        shapes.append(tuple(shape))
        return torch.empty(tuple(shape), dtype=dtype)

    monkeypatch.setattr(device_buffers, "in_main_memory", noted)
    lengths = [7, 2, 6, 7]
    recorder = Recorder(["a"], lengths, max_new_tokens=3)  # at most 10 tokens of 16 bytes: three rows in 512 bytes
    prompts = torch.arange(4.0 * 7).reshape(4, 7, 1).expand(-1, -1, 4).contiguous()
    recorder.record([0, 1, 2, 3], {"a": prompts})
    recorder.record([0, 1, 2, 3], {"a": torch.zeros(4, 1, 4)})
    for row, length in enumerate(lengths):
        found = recorder.take(row)["a"]
        assert torch.equal(found, torch.cat([prompts[row, 7 - length :], torch.zeros(1, 4)]))
    assert shapes == [(10 + 5 + 9, 1, 4), (10, 1, 4)]


def test_whole_prompts_are_not_stacked_on_a_device_whose_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(recording, "_has_own_memory", lambda device: False)
    stack, devices = torch.stack, []

    def watched(tensors: list[Tensor], **options: Any) -> Tensor:
        devices.append({each.device.type for each in tensors})
        return stack(tensors, **options)

    monkeypatch.setattr(torch, "stack", watched)
    with FakeTensorMode():
        recorder = Recorder(["a", "b"], [3, 2], max_new_tokens=2)
        for n_tokens in (3, 1):
            recorder.record([0, 1], {name: torch.empty(2, n_tokens, 4, device="cuda") for name in "ab"})
        assert recorder.take(0)["b"].shape == (4, 4)
    assert devices == [{"cpu"}, {"cpu"}, {"cuda"}], "two prompts, and a token of each"


def test_a_long_response_takes_only_the_main_memory_that_it_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch, free=2**40)
    recorder = Recorder(["a"], [3], max_new_tokens=100_000)
    recorder.record([0], {"a": torch.ones(1, 3, 4)})
    recorder.record([0], {"a": torch.full((1, 1, 4), 2.0)})
    taken = recorder.take(0)["a"]
    assert taken[:, 0].tolist() == [1, 1, 1, 2]
    assert taken.untyped_storage().nbytes() == 4 * 4 * 4


def test_a_cache_waits_for_its_own_copies_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch, free=2**40)
    waited: list[int] = []
    wait = LateCopies.wait
    monkeypatch.setattr(LateCopies, "wait", lambda self, mark: waited.append(mark) or wait(self, mark))
    recorder = Recorder(["a", "b"], [3, 2], max_new_tokens=1)
    recorder.record([0, 1], {name: torch.ones(2, 3, 4) for name in "ab"})
    first, second = recorder.take(0), recorder.take(1)
    assert not waited
    assert list(second) == ["a", "b"] and len(second) == 2 and "a" in second and "c" not in second
    assert second["a"].sum() == 8 and second["b"].sum() == 8
    assert waited == [2], "once for all activations of a buffer"
    assert first["b"].sum() == 12


def test_patterns_are_kept_as_triangles_and_are_zero_above_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "blocks.0.attn.hook_pattern"
    recorder = Recorder([name], [4, 2], max_new_tokens=2)
    generator = torch.Generator().manual_seed(0)
    prompt, step = torch.rand(2, 3, 4, 4, generator=generator), torch.rand(2, 3, 1, 5, generator=generator)
    recorder.record([0, 1], {name: prompt})
    recorder.record([0, 1], {name: step})
    (triangles,) = recorder._stores.values()
    assert isinstance(triangles, device_buffers.Triangles)
    assert triangles._buffer.shape == (2, 1, 3, 6 * 7 // 2)
    for row, pad in ((0, 0), (1, 2)):
        expected = torch.zeros(3, 5 - pad, 5 - pad)
        expected[:, :-1, :-1] = prompt[row, :, pad:, pad:].tril()
        expected[:, -1] = step[row, :, 0, pad:]
        assert torch.equal(recorder.take(row)[name], expected)


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("free", [None, 7 * A_COLUMN, 0])
def test_captures_on_cuda_equal_those_of_a_cpu_and_no_step_waits(
    free: int | None, engine: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, cuda = (load_model(str(tiny_folder), engine=engine, device=device) for device in ("cpu", "cuda"))
    expected = run(cpu)
    if free is not None:  # where triangles do not fit, those of every step are copied
        monkeypatch.setattr(recording, "free_memory", lambda device: free)
    else:

        def watched(original: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                with nothing_waits():
                    return original(*args, **options)

            return call

        run(cuda)  # what is made once may wait
        for name in ("_choose", "_keep", "_run_tokens"):
            monkeypatch.setattr(batch.Batch, name, watched(getattr(batch.Batch, name)))
        monkeypatch.setattr(Recorder, "record", watched(Recorder.record))
        monkeypatch.setattr(Recorder, "take", watched(Recorder.take))
    found = run(cuda)
    for name, each in expected.items():
        assert found[name].response_ids == each.response_ids
        for hook, activation in each.cache.items():
            assert relative(found[name].cache[hook], activation) < 1e-3, hook


@needs_cuda
def test_rows_with_addends_of_their_own_leave_without_a_wait() -> None:
    steered = Add(layer=0, addend=torch.arange(6.0).view(3, 2)).to(torch.device("cuda"))
    with nothing_waits():
        left = steered.of_rows(torch.tensor([True, False, True]))
    assert left.addend.tolist() == [[0, 1], [4, 5]]


def test_the_size_of_a_cache_is_known_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(LateCopies, "wait", lambda self, mark: waited.append(mark))
    names = ["a", "b", "blocks.0.attn.hook_pattern"]
    for free in (0, 2**40):
        as_on_a_device(monkeypatch, free=free)
        recorder = Recorder(names, [3, 2], max_new_tokens=2)
        step = {"a": torch.ones(2, 3, 4), "b": torch.ones(2, 3, 5), names[2]: torch.ones(2, 6, 3, 3)}
        recorder.record([0, 1], step)
        recorder.record([0, 1], {**{name: step[name][:, -1:] for name in "ab"}, names[2]: torch.ones(2, 6, 1, 4)})
        waited.clear()
        found = recorder.take(1)
        assert found.n_bytes == 4 * (3 * 4 + 3 * 5 + 6 * 3 * 3)
        assert not waited
        assert found.n_bytes == sum(each.nbytes for each in found.values())


def test_other_threads_may_wait_for_copies_while_more_are_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_cuda(monkeypatch, DoneAtOnce)
    copies = Copies(torch.device("cpu"))
    targets = [torch.zeros(4) for _ in range(1500)]
    begun: SimpleQueue[Any] = SimpleQueue()

    def wait() -> bool:
        while (found := begun.get()) is not None:
            number, mark = found
            copies.wait(mark)
            if targets[number].tolist() != [number] * 4:
                return False
        return True

    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(wait) for _ in range(2)]
        for number, target in enumerate(targets):
            copies.copy(target, torch.full((4,), float(number)))
            begun.put((number, copies.mark()))
        for _ in waiting:
            begun.put(None)
        assert all(each.result() for each in waiting)
