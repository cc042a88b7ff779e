"""Checks of a loaded model, one function per check; each reports what it measured.

    check_raw_basis(model, runs)        # Check(name="raw basis", verdict="ok", detail="the largest deviation ...")

A deviation is the norm of the difference at a token as a share of the token's norm, the largest over all tokens, so
that massive activations at one token do not hide deviations at others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlcapture.doctor.reference import ReferenceRun
from tlcapture.errors import InputError, NumericalError, TlcaptureError
from tlcapture.generation.loop import generate, teacher_force
from tlcapture.generation.outcomes import Failure, Generation
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.checkpoints.finite_weights import not_finite, not_finite_message, remedy
from tlcapture.models.deviation import BOUNDS, allowed, deviation
from tlcapture.models.loading import Model
from tlcapture.prompts.chat_template import stop_ids
from tlcapture.prompts.tokenization import TokenizedPrompt, bos_policy, tokenize
from tlcapture.text import dtype_name, layers_named, n_shared
from tlcapture.traits.massive_dimensions import massive_dimensions, norm_share
from tlcapture.views.attention import attention_hooks
from tlcapture.views.hooks import hook
from tlcapture.views.residual import residual_hooks, residual_view

OK, WARNING, FAILED, NOT_APPLICABLE = "ok", "warning", "failed", "not applicable"
TEXTS = (
    "Hi.",
    "A lighthouse keeper writes down the weather every evening: wind, clouds and the height of the waves. "
    "What would a sailor who reads the book a hundred years later learn from it?",
)
NEW_TOKENS = 4
_MOST_NAMED = 6  # massive dimensions


@dataclass(frozen=True)
class Check:
    """The result of a check: `verdict` is `ok`, `warning`, `failed` or `not applicable`."""

    name: str
    verdict: str
    detail: str


def guarded(name: str, check: Callable[..., Check], *args: Any) -> Check:
    """Run a check; one that raises a `TlcaptureError` has failed, with the error as its detail."""
    try:
        return check(*args)
    except TlcaptureError as error:
        return Check(name, FAILED, str(error))


def probe_prompts(tokenizer: Any) -> list[TokenizedPrompt]:
    """A short and a long prompt, tokenised as in a capture; without the chat template if it cannot render them."""
    try:
        return _probe_prompts(tokenizer, None)
    except InputError:
        return _probe_prompts(tokenizer, False)


def _probe_prompts(tokenizer: Any, chat_template: bool | None) -> list[TokenizedPrompt]:
    return [
        tokenize(tokenizer, text, prompt_set="doctor", prompt_id=str(number), chat_template=chat_template)
        for number, text in enumerate(TEXTS, 1)
    ]


def check_bos(tokenizer: Any) -> Check:
    """Check that a prompt begins with one BOS, with and without the chat template, if the tokenizer has a BOS.

    It fails with the reason if the chat template cannot render a prompt.
    """
    prompts = [_probe_prompts(tokenizer, None)[0]]
    if prompts[0].chat_template:
        prompts.append(tokenize(tokenizer, TEXTS[0], prompt_set="doctor", prompt_id="plain", chat_template=False))
    found = []
    for prompt in prompts:
        policy = bos_policy(tokenizer, prompt.token_ids, chat_template=prompt.chat_template)
        by = f" by the {policy['by']}" if policy["by"] == "chat template" else ""
        found.append((policy["count"], f"{policy['count']}{by} in front of a {_kind_of(prompt)}"))
    detail = ", ".join(text for _, text in found)
    if any(count > 1 for count, _ in found):
        return Check("BOS", FAILED, f"{detail}: expected 1; fix the tokenizer's chat template")
    if tokenizer.bos_token_id is None:
        return Check("BOS", OK, "none: the tokenizer has no BOS")
    if any(count == 0 for count, _ in found):
        return Check("BOS", WARNING, f"{detail}: the tokenizer has a BOS that the chat template leaves out")
    return Check("BOS", OK, detail)


def check_stop_ids(tokenizer: Any, generation_config: Any) -> Check:
    """Check that there are stop ids; the detail lists them, and those that only the chat template defines."""
    stops = sorted(stop_ids(tokenizer, generation_config))
    if not stops:
        return Check("stop ids", FAILED, "none: expected an EOS of the tokenizer or of the generation config")
    detail = ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in stops)
    beyond = sorted({*stops} - stop_ids(tokenizer, generation_config, chat_template=False))
    if beyond:
        detail += f"; {', '.join(map(str, beyond))} only from the chat template"
    return Check("stop ids", OK, detail)


def check_padding(model: Model, prompts: Sequence[TokenizedPrompt]) -> Check:
    """Check that the ids at padded positions, which are on the left and masked, change no activation."""
    short, long = (min(prompts, key=_length), max(prompts, key=_length))
    n_pad = _length(long) - _length(short)
    last = hook("residual_out", model.n_layers - 1)
    mask = torch.ones(2, _length(long), dtype=torch.long)
    mask[0, :n_pad] = 0
    rows = []
    for filler in (0, 7 % model.d_vocab):
        tokens = torch.tensor([[filler] * n_pad + list(short.token_ids), list(long.token_ids)])
        step = model.step(tokens, mask, model.start(2), {last}, want_logits=False)
        rows.append(step.cache[last][0, n_pad:].float().cpu())
    found = deviation(*rows)
    side = getattr(model.tokenizer, "padding_side", None)
    detail = (
        f"{n_pad} masked positions on the left change later activations by {found:.1e} (tokenizer's own side: {side})"
    )
    return Check("padding", _within(found, 1e-6), detail)


def check_raw_basis(model: Model, runs: Sequence[ReferenceRun]) -> Check:
    """Check that prompt and decode steps give Hugging Face's hidden states at every layer, and its logits.

    In 16 bits, where both are rounded, the bound is four times Hugging Face's own deviation from float32, and 0.001
    more.
    """
    worst, detail = -1.0, ""
    for run in runs:
        cache = _forced(model, run, residual_hooks(model.n_layers, model.hook_names))
        stream = residual_view(cache, model.n_layers)
        ours = [stream.at(layer, "residual_in") for layer in range(model.n_layers)]
        ours.append(model.unembed(stream.at(model.n_layers - 1, "residual_out")))
        for index, (one, other) in enumerate(zip(ours, [*run.hidden, run.logits], strict=True)):
            found, bound = deviation(one, other), _bound(model, run, index)
            if not found / bound <= worst:  # NaN too
                worst = found / bound
                where = f"residual_in of layer {index}" if index < model.n_layers else "the logits"
                detail = f"deviation from Hugging Face {found:.1e} at {where}, {bound:.1e} allowed"
    return Check("raw basis", _within(worst, 1), f"{detail}, over {sum(map(_n_tokens, runs))} tokens")


def check_attention(model: Model, runs: Sequence[ReferenceRun]) -> Check:
    """Check that the patterns of prompt and decode steps equal Hugging Face's in the layers that have attention."""
    layers, run = model.attention_layers, max(runs, key=_n_tokens)
    if not layers:
        return Check("attention", NOT_APPLICABLE, "no layer has attention: there are no patterns and no attn_out")
    if run.patterns is None or len(run.patterns) != len(layers):
        return Check("attention", NOT_APPLICABLE, "Hugging Face does not return the patterns of each of these layers")
    names = attention_hooks(model.n_layers, model.hook_names)
    cache = _forced(model, run, names)
    found = deviation(torch.stack([cache[name].float() for name in names]), run.patterns)
    where = "" if model.with_attention is None else f" at {layers_named(layers)}, the others have no attention"
    bound = allowed(model.dtype, run.pattern_rounding)
    detail = f"deviation of patterns from Hugging Face {found:.1e}, {bound:.1e} allowed{where}"
    return Check("attention", _within(found, bound), detail)


def check_soft_caps(model: Model, runs: Sequence[ReferenceRun]) -> Check:
    """Check that logits and attention patterns equal Hugging Face's under the soft caps that the config sets."""
    config = model.hf_config.get_text_config()
    final, scores = (getattr(config, f"{kind}_logit_softcapping", None) for kind in ("final", "attn"))
    if not final and not scores:
        return Check("soft caps", NOT_APPLICABLE, "the config sets none")
    verdicts, details = [], []
    run = max(runs, key=_n_tokens)
    last = hook("residual_out", model.n_layers - 1)
    cache = _forced(model, run, [last, *attention_hooks(model.n_layers, model.hook_names)])
    if final:
        logits = model.unembed(cache[last]).float().cpu()
        found, largest = deviation(logits, run.logits), float(logits.abs().max())
        verdicts.append(_within(found, _bound(model, run, model.n_layers)) if largest <= final else FAILED)
        details.append(f"logits up to {largest:.3g} under a cap of {final:g}, deviation {found:.1e}")
    if scores and run.patterns is not None and len(run.patterns) == len(model.attention_layers):
        ours = torch.stack([cache[name].float() for name in attention_hooks(model.n_layers, model.hook_names)])
        found = deviation(ours, run.patterns)
        verdicts.append(_within(found, BOUNDS[model.dtype]))
        details.append(f"attention under a cap of {scores:g}, deviation {found:.1e}")
    return Check("soft caps", FAILED if FAILED in verdicts else OK, "; ".join(details))


def check_batch(model: Model, prompts: Sequence[TokenizedPrompt]) -> Check:
    """Check that a prompt gives the same activations and tokens alone and in a padded batch."""
    together, alone = (_generated(model, prompts, size) for size in (len(prompts), 1))
    worst, split = 0.0, 0
    for batched, single in zip(together, alone, strict=True):
        same = n_shared(batched.token_ids, single.token_ids)
        split += same < len(single.token_ids)
        for name, activation in single.cache.items():
            worst = _larger(worst, deviation(batched.cache[name][:same], activation[:same]))
    detail = f"largest deviation of a batch of {len(prompts)} from single runs {worst:.1e}"
    if split:
        detail += f"; greedy tokens differ in {split} of {len(prompts)}, which rounding can cause"
    bound = BOUNDS[model.dtype]
    exact = model.dtype == torch.float32
    return Check("batch", FAILED if split and exact else _within(worst, bound), _with_bound(detail, worst, bound))


def check_recomputed(model: Model, prompts: Sequence[TokenizedPrompt]) -> Check:
    """Check that activations captured token by token equal those of one pass over the same tokens."""
    worst = 0.0
    for generation in _generated(model, prompts, len(prompts)):
        recomputed = teacher_force(model, generation.token_ids, list(generation.cache))
        for name, activation in generation.cache.items():
            worst = _larger(worst, deviation(activation, recomputed[name]))
    detail = f"largest deviation of captured activations from one pass over their tokens {worst:.1e}"
    return Check("captured", _within(worst, BOUNDS[model.dtype]), _with_bound(detail, worst, BOUNDS[model.dtype]))


def check_range(model: Model, prompts: Sequence[TokenizedPrompt]) -> Check:
    """Check that every activation is within the range of the dtype, and of the dtype in which captures are stored."""
    name = dtype_name(model.dtype)
    hooks = residual_hooks(model.n_layers, model.hook_names)
    caches = [teacher_force(model, prompt.token_ids, hooks) for prompt in prompts]
    for point in hooks:
        if not all(cache[point].isfinite().all() for cache in caches):
            return Check("range", FAILED, f"{point} is NaN or inf in {name}: {_cause(model)}")
    largest = max(float(cache[point].float().abs().max()) for cache in caches for point in hooks)
    stored = torch.float16 if model.dtype == torch.float32 else model.dtype  # what --save-dtype auto prefers
    share = largest / torch.finfo(stored).max
    shown = f"{share:.2g}" if share > 0.01 else "less than 0.01"
    detail = f"largest residual {largest:.3g}, {shown} of the {dtype_name(stored)} maximum"
    if share > 1:
        return Check("range", WARNING, f"{detail}: captures are stored as bfloat16")
    if share > 0.5:
        return Check("range", WARNING, f"{detail}: other prompts may exceed it")
    return Check("range", OK, detail)


def check_massive_dimensions(model: Model, prompts: Sequence[TokenizedPrompt]) -> Check:
    """Name the massive dimensions of the residual stream after each layer; having some is not a fault."""
    hooks = [hook("residual_out", layer) for layer in range(model.n_layers)]
    cache = teacher_force(model, max(prompts, key=_length).token_ids, hooks)
    tokens = [cache[name].float().cpu() for name in hooks]
    layers_of: dict[int, list[int]] = {}
    for layer, activations in enumerate(tokens):
        for dimension in massive_dimensions(activations):
            layers_of.setdefault(dimension, []).append(layer)
    if not layers_of:
        return Check("massive", OK, "none")
    common = sorted(layers_of, key=lambda dimension: (-len(layers_of[dimension]), dimension))
    named = ", ".join(f"{each} ({layers_named(layers_of[each])})" for each in common[:_MOST_NAMED])
    more = f" and {len(common) - _MOST_NAMED} more" if len(common) > _MOST_NAMED else ""
    middle = model.n_layers // 2
    share = norm_share(tokens[middle], massive_dimensions(tokens[middle]))
    detail = f"{named}{more}; after layer {middle} they carry {share:.0%} of the squared norm"
    return Check("massive", OK, f"{detail}: see project --centered")


def _forced(model: Model, run: ReferenceRun, hooks: Sequence[str]) -> dict[str, Tensor]:
    """Activations of a run's tokens `[n_tokens, ...]` by hook name: the prompt in one step, then token by token."""
    ids, spans = torch.tensor([run.token_ids]), [(0, run.n_prompt_tokens)]
    spans += [(index, index + 1) for index in range(run.n_prompt_tokens, len(run.token_ids))]
    state, parts = model.start(1), []
    for start, stop in spans:
        tokens = ids[:, start:stop]
        step = model.step(tokens, torch.ones_like(tokens), state, frozenset(hooks), want_logits=False)
        parts.append({name: step.cache[name][0].cpu() for name in hooks})
    return {name: _joined([part[name] for part in parts]) for name in hooks}


def _joined(pieces: list[Tensor]) -> Tensor:
    """Steps as one sequence; those of patterns `[head, pos, key]` are padded to the keys of the last step."""
    if pieces[0].shape[-1] == pieces[-1].shape[-1]:
        return torch.cat(pieces)
    width = pieces[-1].shape[-1]
    return torch.cat([torch.nn.functional.pad(piece, (0, width - piece.shape[-1])) for piece in pieces], dim=1)


def _generated(model: Model, prompts: Sequence[TokenizedPrompt], batch_size: int) -> list[Generation]:
    hooks = residual_hooks(model.n_layers, model.hook_names)
    greedy = Sampling(temperature=0)
    found = []
    for outcome in generate(
        model, prompts, hooks=hooks, max_new_tokens=NEW_TOKENS, sampling=greedy, batch_size=batch_size
    ):
        if isinstance(outcome, Failure):
            reason = outcome.reason.removesuffix(f": {remedy(model.dtype, model.name)}")  # which is this check
            raise NumericalError(f"the {_kind_of(outcome.prompt)} gave no response: {reason}")
        found.append(outcome)
    return sorted(found, key=lambda outcome: outcome.prompt.id)


def _bound(model: Model, run: ReferenceRun, index: int) -> float:
    """The largest deviation allowed at a layer's `residual_in`, or at index `n_layers` of the logits."""
    return allowed(model.dtype, None if run.rounding is None else run.rounding[index])


def _within(found: float, bound: float) -> str:
    return OK if found <= bound else FAILED  # NaN is not


def _with_bound(detail: str, found: float, bound: float) -> str:
    return detail if found <= bound else f"{detail}: expected at most {bound:g}"


def _larger(worst: float, value: float) -> float:
    return worst if value <= worst else value  # NaN stays


def _cause(model: Model) -> str:
    """Why activations are not finite: weights that are not, or the range of the dtype."""
    names = not_finite(model.tl.named_parameters())
    unusable = [name.replace("._original_component", "") for name in names]
    if unusable:
        return not_finite_message(unusable)
    return remedy(model.dtype) if model.dtype.itemsize == 2 else "its weights are finite, and its activations overflow"


def _kind_of(prompt: TokenizedPrompt) -> str:
    return "chat prompt" if prompt.chat_template else "plain text"


def _length(prompt: TokenizedPrompt) -> int:
    return len(prompt.token_ids)


def _n_tokens(run: ReferenceRun) -> int:
    return len(run.token_ids)
