"""Generation with capture: one loop of forward passes over a batch, token by token, each a call of TransformerLens's
`run_with_cache`, of whose dict the captures are slices.

    for outcome in generate(model, prompts, hooks=hooks, max_new_tokens=50):
        ...  # a Generation for each prompt, handed on as soon as its row has stopped

What a prompt yields depends on nothing that ran beside it: padding is masked and cut off, rows that
have stopped leave the batch, and sampling noise comes from a generator of the prompt's own. The last
generated token gets one more forward, so that every token has its activations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlcapture.errors import InputError, NumericalError, OutOfMemoryError, TlcaptureError
from tlcapture.logger import get_logger
from tlcapture.models.loading import Model
from tlcapture.models.memory import fitting_batch_size, is_out_of_memory, release_memory
from tlcapture.prompts.chat_template import stop_ids
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.shapes import LastLogits
from tlcapture.views.cache import Cache
from tlcapture.views.hooks import is_pattern

_log = get_logger(__name__)

STOP_TOKEN = "stop_token"
MAX_NEW_TOKENS = "max_new_tokens"

Kind = tuple[int | str, ...]
PATTERN: Kind = ("pattern",)


@dataclass(frozen=True)
class Sampling:
    """How next tokens are chosen. Temperature 0 is greedy; the seed is combined with each prompt's name."""

    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature {self.temperature}: expected a number of at least 0; 0 is greedy")


@dataclass(frozen=True)
class Generation:
    """One prompt's run: its response and its activations over prompt and response in one line."""

    prompt: TokenizedPrompt
    response_ids: tuple[int, ...]
    stop_reason: str
    cache: Cache

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt.token_ids + self.response_ids


@dataclass(frozen=True)
class Failure:
    """A prompt without an outcome: the reason, and the kind of error that a caller raises for it.

    `InputError`: the prompt does not fit the model's context. `OutOfMemoryError`: it does not fit in memory, even as
    a batch of its own. `NumericalError`: its logits are NaN or inf.
    """

    prompt: TokenizedPrompt
    reason: str
    error: type[TlcaptureError]


def generate(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    *,
    hooks: Sequence[str],
    max_new_tokens: int = 50,
    sampling: Sampling = Sampling(),
    batch_size: int | None = None,
    wanted: Collection[str] | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[Generation | Failure]:
    """Run prompts and yield an outcome for each, in the order in which they finish.

    Args:
        wanted: ids of the prompts whose outcomes are wanted, if not all. Each runs in the batch in which it would
            run if all were, and so yields the same to the last bit; batches without any do not run.
        hooks: names of the activations to capture; those of one shape are kept in one buffer, in
            this order.
        batch_size: how many prompts run together; `None` takes what fits in free memory. Out of
            memory, it is halved and the rest of the batch goes on.
        on_tokens: called with the number of new tokens of wanted prompts after every step; with a negative one
            for those of prompts that begin anew, as memory ran out.

    Raises:
        InputError: a hook is none whose activations lie token by token.
    """
    _check_hooks(hooks)
    ids = {prompt.id for prompt in prompts} if wanted is None else frozenset(wanted)
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) + max_new_tokens <= model.n_ctx]
    for prompt in prompts:
        if prompt.id in ids and len(prompt.token_ids) + max_new_tokens > model.n_ctx:
            yield Failure(prompt, _too_long(prompt, max_new_tokens, model.n_ctx), InputError)
    # Like lengths run together: less padding, and no prompt's outcome depends on its neighbours.
    waiting = sorted(fitting, key=lambda prompt: len(prompt.token_ids), reverse=True)
    longest = max((len(prompt.token_ids) for prompt in waiting), default=0) + max_new_tokens
    size = batch_size or fitting_batch_size(model, longest, len(waiting), hooks)
    while waiting:
        batch, finished = waiting[:size], {id(prompt) for prompt in waiting[:size] if prompt.id not in ids}
        if len(finished) == len(batch):
            waiting = waiting[size:]
            continue
        _log.debug("a batch of %d prompts, up to %d tokens each", len(batch), len(batch[0].token_ids))
        ran_out, in_hand = False, 0

        def told(count: int) -> None:
            nonlocal in_hand
            in_hand += count
            on_tokens(count)

        try:
            for outcome in _run_batch(model, batch, hooks, max_new_tokens, sampling, ids, told):
                if outcome.prompt.id in ids:
                    finished.add(id(outcome.prompt))
                    in_hand -= len(outcome.response_ids) if isinstance(outcome, Generation) else 0
                    yield outcome
                if len(finished) == len(batch):
                    break
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        if ran_out:  # and the error, which held on to the batch, is gone
            release_memory()
            on_tokens(-in_hand)
            if size == 1:
                finished.add(id(batch[0]))
                reason = f"out of memory with {len(batch[0].token_ids)} prompt tokens, alone in its batch"
                yield Failure(batch[0], reason, OutOfMemoryError)
            size = max(1, min(size, len(batch)) // 2)
            _log.warning("out of memory: going on with batches of %d", size)
        waiting = [prompt for prompt in waiting if id(prompt) not in finished]


def teacher_force(model: Model, token_ids: Sequence[int], hooks: Sequence[str]) -> Cache:
    """The activations of given tokens from a single forward pass, in the form of `Generation.cache`."""
    tokens = torch.tensor([list(token_ids)])
    step = model.step(tokens, torch.ones_like(tokens), model.start(1), frozenset(hooks), want_logits=False)
    return {name: step.cache[name][0].cpu() for name in hooks}


def _run_batch(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    hooks: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    wanted: Collection[str],
    on_tokens: Callable[[int], None],
) -> Iterator[Generation | Failure]:
    stops = stop_ids(model.tokenizer, model.generation_config)
    recorder = _Recorder(hooks, [len(prompt.token_ids) for prompt in prompts], max_new_tokens)
    generators = [_generator(sampling.seed, prompt) for prompt in prompts]
    responses: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch is
    state = model.start(len(prompts))
    tokens, mask = _left_pad([prompt.token_ids for prompt in prompts])
    last_logits = []
    for part, step in model.prompt_steps(tokens, mask, state, recorder.names):
        recorder.record(rows[part], step.cache)
        last_logits.append(step.logits)
    logits = torch.cat([each for each in last_logits if each is not None])
    while rows:
        ended = [_stop_reason(responses[row], stops, max_new_tokens) for row in rows]
        going = torch.tensor([reason is None for reason in ended])
        if any(responses):
            step = model.step(tokens, mask, state, recorder.names, want_logits=bool(going.any()))
            recorder.record(rows, step.cache)
            logits = logits if step.logits is None else step.logits
        for row, reason in zip(rows, ended, strict=True):
            if reason is not None:
                yield Generation(prompts[row], tuple(responses[row]), reason, recorder.take(row))
        if not going.any():
            return
        logits = logits[going.to(logits.device)]
        rows = [row for row, goes in zip(rows, going.tolist(), strict=True) if goes]
        sound = logits.amax(dim=-1).isfinite().cpu()  # NaN and +inf; -inf only means never
        for row, is_sound in zip(rows, sound.tolist(), strict=True):
            if not is_sound:
                position = len(prompts[row].token_ids) + len(responses[row])
                reason = f"the model's logits are NaN or inf at token {position}: try --dtype float32"
                yield Failure(prompts[row], reason, NumericalError)
        if not (going.all() and sound.all()):
            stays = going.clone()
            stays[going] = sound
            model.keep(state, stays)
            rows = [row for row, is_sound in zip(rows, sound.tolist(), strict=True) if is_sound]
            logits = logits[sound.to(logits.device)]
        chosen = _choose(logits, sampling.temperature, [generators[row] for row in rows])
        for row, token in zip(rows, chosen, strict=True):
            responses[row].append(token)
        tokens, mask = torch.tensor(chosen)[:, None], torch.ones(len(rows), 1, dtype=torch.long)
        on_tokens(sum(prompts[row].id in wanted for row in rows))


class _Recorder:
    """Gathers activations step by step and hands them out prompt by prompt.

    Each prompt's activations of like shape share a buffer `[name, token, ...]` in main memory, which is
    written to in place, without padding; a step's are stacked first where they have to leave an accelerator.
    Patterns, whose last axis grows, are kept step by step.
    """

    def __init__(self, names: Sequence[str], prompt_lengths: Sequence[int], max_new_tokens: int):
        self.names = frozenset(names)
        self._order = list(dict.fromkeys(names))
        self._lengths = prompt_lengths
        self._max_new_tokens = max_new_tokens
        self._filled = [0] * len(prompt_lengths)
        self._groups: dict[Kind, list[str]] = {}
        self._lines: dict[tuple[Kind, int], Tensor] = {}
        self._patterns: list[tuple[list[int], Tensor]] = []

    def record(self, rows: Sequence[int], cache: Cache) -> None:
        """Keep a step of some rows: their prompts, left-padded to one width, or the next token of each."""
        if not self._groups:
            for name in self._order:
                self._groups.setdefault(_kind(name, cache[name]), []).append(name)
        n_new = [1 if self._filled[row] else self._lengths[row] for row in rows]
        for kind, names in self._groups.items():
            activations = [cache[name] for name in names]
            if len({activation.device for activation in activations}) > 1:
                activations = [activation.to("cpu") for activation in activations]
            if kind == PATTERN:
                self._patterns.append((list(rows), torch.stack(activations).to("cpu")))
                continue
            # Long prompts go from where they are to where they stay; all else leaves in one piece.
            apart = activations[0].device.type == "cpu" and max(n_new) > 1
            together = None if apart else torch.stack(activations).to("cpu")
            for number, (row, count) in enumerate(zip(rows, n_new, strict=True)):
                place = self._line(kind, row, activations)[:, self._filled[row] : self._filled[row] + count]
                if together is None:
                    torch.stack([activation[number, -count:] for activation in activations], out=place)
                else:
                    place.copy_(together[:, number, -count:])
        for row, count in zip(rows, n_new, strict=True):
            self._filled[row] += count

    def _line(self, kind: Kind, row: int, activations: list[Tensor]) -> Tensor:
        if (kind, row) not in self._lines:
            shape = (len(activations), self._lengths[row] + self._max_new_tokens, *activations[0].shape[2:])
            self._lines[kind, row] = torch.empty(shape, dtype=activations[0].dtype)
        return self._lines[kind, row]

    def take(self, row: int) -> Cache:
        """All activations of a prompt: `[n_tokens, ...]` by name, in the prompt's own buffers."""
        cache: dict[str, Tensor] = {}
        for kind, names in self._groups.items():
            whole = self._pattern(row) if kind == PATTERN else self._lines.pop((kind, row))[:, : self._filled[row]]
            cache.update(zip(names, whole.unbind(), strict=True))
        return {name: cache[name] for name in self._order}

    def _pattern(self, row: int) -> Tensor:
        """`[n, head, pos, key]` pieces, the keys growing, into `[n, head, n_tokens, n_tokens]`."""
        pieces = [stacked[:, rows.index(row)] for rows, stacked in self._patterns if row in rows]
        length = self._lengths[row]
        n_tokens = length + len(pieces) - 1
        whole = pieces[0].new_zeros(*pieces[0].shape[:2], n_tokens, n_tokens)
        whole[:, :, :length, :length] = pieces[0][:, :, -length:, -length:]
        for token, piece in enumerate(pieces[1:], start=length):
            whole[:, :, token, : token + 1] = piece[:, :, 0, -(token + 1) :]
        return whole


def _check_hooks(hooks: Sequence[str]) -> None:
    for name in hooks:
        if name.endswith("hook_attn_scores") or name.startswith(("ln_final", "unembed")):
            raise InputError(
                f"{name} is not captured: expected hook points of the embedding and of blocks, attention scores apart "
                "(hook_pattern has their softmax)"
            )


def _kind(name: str, activation: Tensor) -> Kind:
    """What has to be alike for activations to share a buffer."""
    return PATTERN if is_pattern(name) else (*activation.shape[2:], str(activation.dtype))


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask `[batch, pos]`; padding is masked, so that its id does not matter."""
    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return tokens, mask


def _stop_reason(response: Sequence[int], stops: frozenset[int], max_new_tokens: int) -> str | None:
    if response and response[-1] in stops:
        return STOP_TOKEN
    return MAX_NEW_TOKENS if len(response) >= max_new_tokens else None


def _choose(logits: LastLogits, temperature: float, generators: Sequence[torch.Generator]) -> list[int]:
    """Next tokens: the likeliest, or a draw by inverting the distribution function at one uniform number.

    One number a token from the prompt's own generator, and the sum in float64: neighbours in the
    batch change neither.
    """
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    heights = logits.cpu().double()
    heights = heights - heights.amax(dim=-1, keepdim=True)  # so that no temperature makes an infinity of the largest
    heights = (heights / temperature).softmax(dim=-1).cumsum(dim=-1)
    draws = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    tokens = torch.searchsorted(heights, draws * heights[:, -1:], right=True)
    return tokens[:, 0].clamp(max=logits.shape[-1] - 1).tolist()


def _generator(seed: int, prompt: TokenizedPrompt) -> torch.Generator:
    name = f"{seed}\0{prompt.prompt_set}\0{prompt.id}".encode()
    number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
    return torch.Generator().manual_seed(number)


def _too_long(prompt: TokenizedPrompt, max_new_tokens: int, n_ctx: int) -> str:
    length = len(prompt.token_ids)
    return (
        f"does not fit: {length} prompt tokens and {max_new_tokens} new ones are more than the model's context of "
        f"{n_ctx}; shorten the prompt or lower --max-new-tokens"
    )
