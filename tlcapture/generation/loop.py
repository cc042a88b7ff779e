"""Generation with capture: TransformerLens's `run_with_cache` over batches, token by token.

    for outcome in generate(model, prompts, hooks=hooks, max_new_tokens=50):
        ...  # a Generation for each prompt, as soon as it has stopped

In float32 the outcome of a prompt does not depend on the prompts in the same batch: padding is masked and cut off,
rows that have stopped leave the batch, and sampling noise comes from the prompt's own generator. In 16 bits it depends
on the batch's shape by rounding; the same batches give the same bits. The last generated token gets one more forward
pass, so that every token has its activations.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, SupportsIndex

import torch

from tlcapture.errors import InputError, OutOfMemoryError
from tlcapture.generation.batch import Batch, Settings
from tlcapture.generation.interventions.intervention import HookFunction, Intervention
from tlcapture.generation.outcomes import Failure, Outcome
from tlcapture.generation.padding import left_pad
from tlcapture.generation.recording.pattern_spools import Spooling
from tlcapture.generation.recording.recorder import check_hooks
from tlcapture.generation.samples import n_together
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.loading import Model
from tlcapture.models.memory import fitting_batch_size, release_memory, within_memory
from tlcapture.names import PromptId
from tlcapture.prompts.tokenization import TokenizedPrompt, unknown_token
from tlcapture.views.cache import Cache

_log = logging.getLogger(__name__)


def generate(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    *,
    hooks: Sequence[str],
    max_new_tokens: int = 50,
    sampling: Sampling = Sampling(),
    interventions: Sequence[Intervention] = (),
    own_hooks: Sequence[tuple[Any, HookFunction]] = (),
    batch_size: int | None = None,
    wanted: Collection[PromptId] | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
    spooling: Spooling | None = None,
) -> Iterator[Outcome]:
    """Run prompts and yield an outcome for each, in the order in which they finish.

    Prompts whose responses are `given` are read with them, and nothing is generated. Responses that are `forced` are
    run token by token, in the batches in which they would be generated.

    Args:
        hooks: names of the activations to capture; those of one shape are kept in one buffer, in
            this order.
        interventions: changes to the model's activations, each at the tokens that its `where` says.
        own_hooks: TransformerLens's hook functions with the names of their points, which every pass calls.
        batch_size: how many prompts run together; `None` takes as many as fit in memory. Out of memory, it is halved;
            prompts that were being answered keep their tokens and activations, and go on from there.
        wanted: names of the prompts whose outcomes are yielded; `None` means all. Each of them runs in the batch in
            which it would run if all were wanted, so its outcome is bit-identical; batches without any do not run.
        on_tokens: called with the number of new tokens of wanted prompts after every step, and with a negative
            number for the tokens of a prompt that runs again, or fails, because memory ran out while it was alone.
        spooling: where to keep attention patterns that are too large for memory; `None` keeps all in memory.

    Raises:
        InputError: the activations of a hook are not stored token by token, or the batch size is below 1.
        ValueError: an intervention changes rows differently; prompts are sorted into batches here. Or responses are
            given to some prompts only, or forced on some, or forced ones are empty or longer than `max_new_tokens`.
    """
    check_hooks(hooks)
    batch_size = _checked_size(batch_size)
    _check_forced(prompts, max_new_tokens)
    max_new_tokens = 0 if _are_given(prompts) else max_new_tokens
    if any(each.is_by_row for each in interventions):
        raise ValueError("interventions by row need continue_from, which runs prompts as one batch, in order")
    names = frozenset(prompt.name for prompt in prompts) if wanted is None else frozenset(wanted)
    checked = [(prompt, _unfit(model, prompt, max_new_tokens)) for prompt in prompts]
    fitting = [prompt for prompt, reason in checked if reason is None]
    yield from (Failure(each, reason, InputError) for each, reason in checked if reason and each.name in names)
    longest = max((len(prompt.read_ids) for prompt in fitting), default=0)
    if batch_size is None:
        model.release()
        above = None if spooling is None else spooling.above
        batch_size = fitting_batch_size(
            model, longest + max_new_tokens, len(fitting), hooks, longest, spooled_above=above
        )
    changes = [each.to(model.device) for each in interventions]
    settings = Settings(hooks, max_new_tokens, sampling, changes, own_hooks, spooling)
    yield from _in_batches(model, _Queue(fitting, batch_size), settings, names, on_tokens)


def _in_batches(
    model: Model, queue: _Queue, settings: Settings, wanted: Collection[PromptId], on_tokens: Callable[[int], None]
) -> Iterator[Outcome]:
    """The outcomes of the wanted prompts of a queue; where memory runs out, they go on in smaller batches."""
    paused: list[_InFlight] = []  # the next one last
    while paused or queue:
        in_flight = paused.pop() if paused else _InFlight.of(model, queue.next_batch(), settings, wanted)
        with suppress(OutOfMemoryError), within_memory("out of memory"):
            yield from in_flight.run(on_tokens)
            continue
        # Outside the context: the error's traceback refers to the batch, whose memory is to be released.
        in_flight.batch.pause()
        model.release()
        release_memory()
        queue.halve_batches(in_flight.n_rows)
        if in_flight.n_rows > 1 and in_flight.batch.were_read:
            paused += reversed(in_flight.parts(queue.batch_size))
            continue
        on_tokens(-in_flight.n_tokens)
        if in_flight.n_rows == 1 and not in_flight.is_resumed:
            yield _out_of_memory(in_flight.prompts[0])
        else:
            queue.put_back(in_flight.prompts)


def prefill(model: Model, prompts: Sequence[TokenizedPrompt]) -> Any:
    """A state of all tokens of the prompts except the last, one row per prompt, for `continue_from`."""
    tokens, mask = left_pad([prompt.token_ids[:-1] for prompt in prompts])
    state = model.start(len(prompts))
    if tokens.shape[1]:
        model.step(tokens, mask, state, frozenset(), want_logits=False)
    return state


def continue_from(
    model: Model,
    state: Any,
    prompts: Sequence[TokenizedPrompt],
    *,
    max_new_tokens: int = 50,
    sampling: Sampling = Sampling(),
    interventions: Sequence[Intervention] = (),
) -> list[Outcome]:
    """Generate from a state that `prefill` made of the prompts, or a branch of it, which is extended.

    All prompts run in one batch, without capture. Returns their outcomes in the order of the prompts.
    """
    settings = Settings((), max_new_tokens, sampling, [each.to(model.device) for each in interventions])
    outcomes = dict(Batch(model, prompts, settings).continue_from(state, lambda indices: None))
    return [outcomes[index] for index in range(len(prompts))]


def teacher_force(model: Model, token_ids: Sequence[int], hooks: Sequence[str]) -> Cache:
    """The activations of given tokens from a single forward pass: `[n_tokens, ...]` by hook name."""
    tokens = torch.tensor([list(token_ids)])
    step = model.step(tokens, torch.ones_like(tokens), model.start(1), frozenset(hooks), want_logits=False)
    return {name: step.cache[name][0].cpu() for name in hooks}


class _Queue:
    """Prompts that have not run yet, longest first, taken in batches.

    Prompts of similar length run together, which needs less padding, as do samples of a prompt, which is read once.
    """

    def __init__(self, prompts: Sequence[TokenizedPrompt], batch_size: int):
        self.batch_size = batch_size
        self._prompts = sorted(prompts, key=lambda prompt: len(prompt.read_ids), reverse=True)
        self._next = 0

    def __bool__(self) -> bool:
        return self._next < len(self._prompts)

    def next_batch(self) -> list[TokenizedPrompt]:
        start = self._next
        self._next += n_together(self._prompts, self.batch_size, start)
        return self._prompts[start : self._next]

    def put_back(self, prompts: Sequence[TokenizedPrompt]) -> None:
        self._prompts = [*prompts, *self._prompts[self._next :]]
        self._next = 0

    def halve_batches(self, ran_out_with: int) -> None:
        """Halve the batch size after a batch of `ran_out_with` prompts ran out of memory."""
        self.batch_size = max(1, min(self.batch_size, ran_out_with) // 2)
        _log.warning("out of memory: going on with batches of %d", self.batch_size)


class _InFlight:
    """Prompts of a batch that run together, and the wanted ones among them that have no outcome yet."""

    def __init__(self, batch: Batch, unfinished: Iterable[int], n_rows: int, *, is_resumed: bool):
        self.batch = batch
        self.n_rows = n_rows
        self.is_resumed = is_resumed
        self._unfinished = dict.fromkeys(unfinished)  # in order

    @classmethod
    def of(
        cls, model: Model, prompts: Sequence[TokenizedPrompt], settings: Settings, wanted: Collection[PromptId]
    ) -> _InFlight:
        """A new batch."""
        unfinished = [index for index, prompt in enumerate(prompts) if prompt.name in wanted]
        return cls(Batch(model, prompts, settings), unfinished, len(prompts), is_resumed=False)

    def parts(self, n_rows: int) -> list[_InFlight]:
        """The unfinished prompts, up to `n_rows` together, to be resumed."""
        indices = list(self._unfinished)
        chunks = [indices[start : start + n_rows] for start in range(0, len(indices), n_rows)]
        return [_InFlight(self.batch, chunk, len(chunk), is_resumed=True) for chunk in chunks]

    @property
    def prompts(self) -> list[TokenizedPrompt]:
        """The unfinished prompts."""
        return [self.batch.prompts[index] for index in self._unfinished]

    @property
    def n_tokens(self) -> int:
        """The tokens that were reported for the unfinished prompts."""
        return sum(self.batch.n_new_tokens(index) for index in self._unfinished)

    def run(self, on_tokens: Callable[[int], None]) -> Iterator[Outcome]:
        """Yield the wanted outcomes; ends with the last of them. Reports tokens of wanted prompts."""
        if not self._unfinished:
            return

        def count_tokens(indices: Sequence[int]) -> None:
            on_tokens(sum(index in self._unfinished for index in indices))

        batch = self.batch
        _log.debug("a batch of %d prompts, up to %d tokens each", self.n_rows, len(self.prompts[0].token_ids))
        outcomes = batch.resume(list(self._unfinished), count_tokens) if self.is_resumed else batch.run(count_tokens)
        for index, outcome in outcomes:
            if index in self._unfinished:
                del self._unfinished[index]
                yield outcome
            if not self._unfinished:
                return


def _checked_size(batch_size: Any) -> int | None:
    """A batch size as an `int`, or `None`; raises `InputError` for anything else."""
    size = operator.index(batch_size) if isinstance(batch_size, SupportsIndex) else 0
    if batch_size is not None and size < 1:
        raise InputError(f"batch_size {batch_size!r}: expected a whole number of at least 1, or None")
    return None if batch_size is None else size


def _are_given(prompts: Sequence[TokenizedPrompt]) -> bool:
    """Whether the prompts have given responses; raises `ValueError` if only some have."""
    are_given = {prompt.given is not None for prompt in prompts}
    if len(are_given) > 1:
        raise ValueError("expected a given response for each prompt, or for none")
    return True in are_given


def _check_forced(prompts: Sequence[TokenizedPrompt], max_new_tokens: int) -> None:
    """Raise `ValueError` for forced responses that cannot run together."""
    lengths = [len(prompt.forced) for prompt in prompts if prompt.forced is not None]
    if lengths and (len(lengths) < len(prompts) or not 0 < min(lengths) <= max(lengths) <= max_new_tokens):
        raise ValueError("expected a forced response of 1 to max_new_tokens tokens for each prompt, or for none")


def _unfit(model: Model, prompt: TokenizedPrompt, max_new_tokens: int) -> str | None:
    """Why a model cannot run a prompt; `None` if it can."""
    length, forced = len(prompt.read_ids), prompt.forced or ()
    max_new_tokens = max_new_tokens if prompt.forced is None else len(forced)
    if length + max_new_tokens <= model.n_ctx:
        return unknown_token(model.tokenizer, (*prompt.read_ids, *forced), model.d_vocab)
    return (
        f"does not fit: {length} prompt tokens and {max_new_tokens} new ones are more than the model's context of "
        f"{model.n_ctx}; shorten the prompt or lower --max-new-tokens"
    )


def _out_of_memory(prompt: TokenizedPrompt) -> Failure:
    reason = f"out of memory with {len(prompt.read_ids)} prompt tokens, alone in its batch"
    return Failure(prompt, reason, OutOfMemoryError)
