"""Out of memory, a batch goes on in halves from the tokens that it has: outcomes are those of an undisturbed run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import tiny
from tests.test_parity import as_prompt, random_ids, relative
from tests.test_recording import A_COLUMN, as_on_a_device, hooks_of
from tlcapture.errors import OutOfMemoryError
from tlcapture.generation import batch as batch_module
from tlcapture.generation import loop
from tlcapture.generation.interventions.intervention import Add
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure, Generation, Outcome
from tlcapture.generation.recording.device_buffers import DeviceBuffer, Triangles
from tlcapture.generation.recording.recorder import Recorder
from tlcapture.generation.sampling.next_token import GREEDY, Sampling
from tlcapture.generation.sampling.noise import GumbelNoise
from tlcapture.generation.sampling.processors import LogitProcessors, LogitRules, PromptTokens
from tlcapture.models.engines.base import StepResult
from tlcapture.models.fast import decoder
from tlcapture.models.loading import Model
from tlcapture.models.memory import within_memory

LENGTHS = (31, 22, 15, 9, 4)
N_NEW = 8
RULES = LogitRules(
    repetition_penalty=1.3,
    encoder_repetition_penalty=1.1,
    no_repeat_ngram_size=2,
    min_new_tokens=3,
    forced_eos_token_id=7,
    exponential_decay_length_penalty=(2, 1.5),
    begin_suppress_tokens=[60, 61],
    top_k=200,
)
SAMPLINGS = {"greedy": GREEDY, "sampled": Sampling(3.0, seed=1), "with rules": Sampling(3.0, seed=1, rules=RULES)}
pytestmark = pytest.mark.usefixtures("quick_collections")
STEERED = [Add(layer=1, addend=torch.linspace(-2, 2, tiny.D_MODEL))]


def stop_at(patch: pytest.MonkeyPatch, n_ids: int) -> None:
    patch.setattr(batch_module, "stop_ids", lambda *args, **options: frozenset(range(n_ids)))


@pytest.fixture(autouse=True)
def early_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled responses end at different steps."""
    stop_at(monkeypatch, 30)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_library_that_gets_no_memory_is_out_of_memory(message: str) -> None:
    with pytest.raises(OutOfMemoryError, match="the prompt does not fit"), within_memory("the prompt does not fit"):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"), within_memory("the prompt does not fit"):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")


class Steps:
    """Counts the passes of a model, and lets some run out of memory once they have changed the state.

    Attributes:
        shapes: rows and positions of each pass, those that ran out of memory too.
    """

    def __init__(self, patch: pytest.MonkeyPatch, model: Model, runs_out: Callable[[int, int, int], bool]):
        self.shapes: list[tuple[int, int]] = []
        original = type(model).step

        def step(model: Model, tokens: Any, *args: Any, **options: Any) -> StepResult:
            self.shapes.append((tokens.shape[0], tokens.shape[1]))
            result = original(model, tokens, *args, **options)
            if runs_out(len(self.shapes) - 1, *self.shapes[-1]):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        patch.setattr(type(model), "step", step)

    @property
    def n_single(self) -> int:
        """Tokens that were run one per row."""
        return sum(rows for rows, positions in self.shapes if positions == 1)


def run(
    model: Model,
    sampling: Sampling = SAMPLINGS["sampled"],
    given: tuple[int, ...] | None = None,
    **options: Any,
) -> dict[str, Outcome]:
    prompts = [replace(as_prompt(random_ids(length, seed=length), str(length)), given=given) for length in LENGTHS]
    options = {"hooks": hooks_of(model), "max_new_tokens": N_NEW, "batch_size": len(prompts), **options}
    found = list(generate(model, prompts, sampling=sampling, **options))
    assert len({each.prompt.id for each in found}) == len(found)
    return {each.prompt.id: each for each in found}


def assert_same(found: dict[str, Outcome], expected: dict[str, Outcome], n_kept: int | None = None) -> None:
    """The same tokens, and activations up to rounding; those of prompt and first response tokens are bit-identical."""
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        other = found[name]
        assert isinstance(each, Generation) and isinstance(other, Generation)
        assert (other.response_ids, other.stop_reason) == (each.response_ids, each.stop_reason)
        assert list(other.cache) == list(each.cache)
        n_equal = 0 if n_kept is None else len(each.prompt.token_ids) + n_kept
        for hook, activation in each.cache.items():
            assert other.cache[hook].shape == activation.shape
            assert relative(other.cache[hook], activation) < 1e-5, hook
            kept = (slice(None), slice(n_equal)) if hook.endswith("pattern") else (slice(n_equal),)
            assert torch.equal(other.cache[hook][kept], activation[kept]), hook


@pytest.mark.parametrize("engine", [*tiny.ENGINES, *(["plain"] if "hooked" in tiny.ENGINES else [])])
@pytest.mark.parametrize(
    ("kind", "sampling", "steered"),
    [
        ("llama", "greedy", False),
        ("llama", "with rules", True),
        ("gemma2", "sampled", True),
        ("gpt2", "with rules", False),
    ],
)
def test_after_an_error_at_any_step_the_outcome_is_that_of_an_undisturbed_run(
    engine: str, kind: str, sampling: str, steered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(kind, engine)
    options: Any = {"sampling": SAMPLINGS[sampling], "interventions": STEERED if steered else ()}
    with monkeypatch.context() as patch:
        steps = Steps(patch, model, lambda number, rows, positions: False)
        expected = run(model, **options)
    n_tokens, last = steps.n_single, len(steps.shapes) - 1
    for failing in (0, 1, last // 2, last):
        counted: list[int] = []
        n_rows_failing, n_positions_failing = steps.shapes[failing]
        with monkeypatch.context() as patch:
            disturbed = Steps(patch, model, lambda number, *shape, failing=failing: number == failing)
            found = run(model, on_tokens=counted.append, **options)
        assert_same(found, expected, n_kept=failing - 1 if failing else None)
        assert sum(counted) == sum(len(each.response_ids) for each in found.values() if isinstance(each, Generation))
        assert min(counted) >= 0
        repeated = n_rows_failing if n_positions_failing == 1 else 0
        assert disturbed.n_single == n_tokens + repeated, "only the failing step is run again"


@pytest.mark.parametrize(
    ("free", "chunk", "few"), [(2**40, 5, 256), (2**40, 5, 0), (7 * A_COLUMN, 7, 0), (A_COLUMN, 32, 0), (0, 5, 256)]
)
def test_activations_recorded_on_a_device_are_kept(
    free: int, chunk: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("gemma2", tiny.ENGINES[0])
    expected = run(model)
    as_on_a_device(monkeypatch, free=free, chunk=chunk, few=few)
    for failing in (1, 4, 6):
        with monkeypatch.context() as patch:
            Steps(patch, model, lambda number, *shape, failing=failing: number == failing)
            assert_same(run(model), expected, n_kept=failing - 1)


def test_what_was_recorded_leaves_the_device_before_prompts_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, on_device = tiny.model("llama", tiny.ENGINES[0]), []
    as_on_a_device(monkeypatch, free=2**40)
    recorders: list[Recorder] = []
    record = Recorder.record
    monkeypatch.setattr(Recorder, "record", lambda self, *args: recorders.append(self) or record(self, *args))

    def runs_out(number: int, rows: int, positions: int) -> bool:
        if number > 3:
            on_device.append(any(isinstance(store, DeviceBuffer) for store in recorders[0]._stores.values()))
        return number == 3

    Steps(monkeypatch, model, runs_out)
    run(model)
    assert len(set(recorders)) == 1
    assert on_device and not any(on_device)


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_the_state_that_was_too_large_is_gone_when_memory_is_released(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama", engine)
    states: list[weakref.ref[Any]] = []
    gone: list[bool] = []
    start = type(model).start

    def started(self: Model, batch_size: int) -> Any:
        state = start(self, batch_size)
        states.append(weakref.ref(state))
        return state

    monkeypatch.setattr(type(model), "start", started)

    def released() -> None:
        gc.collect()  # as release_memory does before it empties the device's memory
        gone.extend(state() is None for state in states)

    monkeypatch.setattr(loop, "release_memory", released)
    Steps(monkeypatch, model, lambda number, *shape: number == 3)
    run(model)
    assert gone and all(gone)


def test_patterns_leave_the_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, n_steps = tiny.model("llama", tiny.ENGINES[0]), []
    steps = Steps(monkeypatch, model, lambda number, *shape: number == 3)
    monkeypatch.setattr(Triangles, "leave_device", lambda self: n_steps.append(len(steps.shapes)))
    run(model)
    assert n_steps[0] == 4, "before the next pass"


@tiny.needs_hooked
def test_steps_of_fixed_shape_go_on_in_buffers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", "hooked")
    expected = run(model)
    monkeypatch.setattr(decoder, "FIXED_ON", {"cpu", "cuda"})
    Steps(monkeypatch, model, lambda number, *shape: number == 4)
    assert_same(run(model), expected)
    model.release()


@pytest.mark.parametrize("part", ["keep", "choose", "record", "take", "part of take"])
@pytest.mark.parametrize("device", [False, True])
def test_an_error_between_passes_loses_no_outcome(part: str, device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave, tokens are chosen, and activations are recorded and taken with memory of their own."""
    model, n_calls = tiny.model("llama", tiny.ENGINES[0]), 0
    expected = run(model)
    if device:
        as_on_a_device(monkeypatch, free=2**40)
    owner, name = {
        "keep": (type(model), "keep"),
        "choose": (batch_module, "choose_tokens"),
        "record": (Recorder, "record"),
        "take": (Recorder, "take"),
        "part of take": (Recorder, "_part"),
    }[part]
    original = getattr(owner, name)
    failing_calls = {"keep": [1], "choose": [3], "record": [4], "take": [1, 2], "part of take": [1, 2, 4]}[part]
    for failing in failing_calls:
        n_calls = 0

        def once(*args: Any, failing: int = failing, **options: Any) -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls == failing:
                if part in ("keep", "record"):
                    original(*args, **options)
                raise MemoryError("can't allocate memory")
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, once)
            found = run(model)
        assert n_calls > failing
        assert_same(found, expected)


def test_repeated_errors_go_down_to_one_prompt_at_a_time_without_a_lost_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", tiny.ENGINES[0])
    stop_at(monkeypatch, 0)
    with monkeypatch.context() as patch:
        undisturbed = Steps(patch, model, lambda *args: False)
        expected = run(model)
    # Each batch of several gets on by two tokens.
    seen: dict[int, int] = {}

    def runs_out(number: int, rows: int, positions: int) -> bool:
        seen[rows] = seen.get(rows, 0) + 1 if positions == 1 else 0
        return rows > 1 and seen[rows] == 3

    counted: list[int] = []
    steps = Steps(monkeypatch, model, runs_out)
    assert_same(run(model, on_tokens=counted.append), expected, n_kept=2)
    assert min(counted) > 0
    assert sum(counted) == sum(len(each.response_ids) for each in expected.values() if isinstance(each, Generation))
    assert [rows for rows, positions in steps.shapes if positions > 1].count(1) >= 2
    assert steps.n_single < 2 * undisturbed.n_single


def test_a_prompt_that_fits_alone_from_its_start_only_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading prompt and response at once may take more than what the prompt took."""
    model = tiny.model("llama", tiny.ENGINES[0])
    expected = run(model, batch_size=1)
    longest, counted = max(LENGTHS), []
    Steps(monkeypatch, model, lambda number, rows, positions: positions > longest or (rows > 1 and number == 3))
    found = run(model, on_tokens=counted.append)
    assert_same(found, expected)
    assert sum(counted) == sum(len(each.response_ids) for each in found.values() if isinstance(each, Generation))


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_a_prompt_that_does_not_fit_alone_fails_by_itself(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = tiny.model("llama", engine), []
    expected = run(model, GREEDY)
    original = type(model).step

    def step(self: Model, tokens: Any, mask: Any, state: Any, *args: Any, **options: Any) -> StepResult:
        result = original(self, tokens, mask, state, *args, **options)
        so_far = state.mask if engine == "bridge" else state.previous_attention_mask
        if so_far.shape[1] > 31 + 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(type(model), "step", step)
    found = run(model, GREEDY, on_tokens=counted.append)
    failed = found.pop("31")
    del expected["31"]
    assert isinstance(failed, Failure) and failed.error is OutOfMemoryError
    assert failed.reason == "out of memory with 31 prompt tokens, alone in its batch"
    assert_same(found, expected)
    assert sum(counted) == sum(len(each.response_ids) for each in found.values() if isinstance(each, Generation))


def test_only_wanted_prompts_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = tiny.model("llama", tiny.ENGINES[0]), []
    stop_at(monkeypatch, 0)
    expected = run(model, GREEDY)
    steps = Steps(monkeypatch, model, lambda number, *shape: number == 3)
    found = run(model, GREEDY, wanted={"22", "4"}, on_tokens=counted.append)
    assert_same(found, {name: expected[name] for name in ("22", "4")}, n_kept=2)
    assert sum(counted) == sum(len(each.response_ids) for each in found.values() if isinstance(each, Generation))
    assert max(rows for rows, _ in steps.shapes[4:]) == 2


@pytest.mark.parametrize("given", [None, (50, 51, 52)])
def test_no_new_tokens_are_taken_again(given: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, n_calls = tiny.model("llama", tiny.ENGINES[0]), 0
    expected = run(model, max_new_tokens=0, given=given)
    take = Recorder.take

    def second_fails(self: Recorder, index: int) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise MemoryError
        return take(self, index)

    monkeypatch.setattr(Recorder, "take", second_fails)
    assert_same(run(model, max_new_tokens=0, given=given), expected)


@pytest.mark.parametrize("name", RULES.active(greedy=False))
def test_rules_that_begin_at_a_later_token_change_logits_as_those_that_saw_every_token(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rules = LogitRules(**{name: getattr(RULES, name)})
    prompts = [PromptTokens(ids, frozenset({1}), 6) for ids in ([5, 6, 7], [8, 9])]
    whole, later = (LogitProcessors(rules, 1.0, prompts) for _ in range(2))
    tokens = torch.randint(2, 12, (5, 2), generator=generator)
    for each in tokens:
        whole(torch.randn(2, 300, generator=generator))
        whole.append(each)
        later.append(each)
    logits = torch.randn(2, 300, generator=generator)
    assert torch.equal(whole(logits), later(logits))


@pytest.mark.parametrize("n_steps", [5, 40])
def test_noise_from_a_later_step_on_is_that_of_the_whole_stream(n_steps: int) -> None:
    starts, device = [3, 4], torch.device("cpu")
    whole = GumbelNoise(starts, 6, n_steps, device)
    expected = [whole.next() for _ in range(n_steps)]
    for first in range(n_steps):
        later = GumbelNoise(starts, 6, n_steps, device, first)
        assert all(torch.equal(later.next(), each) for each in expected[first:])
