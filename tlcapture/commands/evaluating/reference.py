"""Running the packaged prompt sets, as a reference for rises and random directions."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch

from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.extraction.readout import component_layers
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.sampling.next_token import GREEDY
from tlcapture.models.loading import Model
from tlcapture.prompts.prompt_sets import read_prompt_file
from tlcapture.prompts.tokenization import TokenizedPrompt, tokenize
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.datasets import shipped_datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.statistics.critical_values import REFERENCE_TOKENS as NEW_TOKENS
from tlcapture.traits.statistics.reference import FEWEST_PROMPTS, Reference, read_reference
from tlcapture.views.hooks import component_hooks


def keep_reference(run: Run, model: Model, components: Sequence[str], batch_size: int | None = None) -> None:
    """Make the reference of each component that lacks one of this model and of these prompts.

    Prompts longer than the model's context are left out. With fewer than eight left, there is no reference.
    """
    prompts = _prompts(run.layout, model)
    made_from = blake2b(repr([each.token_ids for each in prompts]).encode(), digest_size=8).hexdigest()
    with run_lock(run, "the reference"):
        missing = [each for each in components if not _is_current(run.layout, each, model, made_from)]
        if not missing:
            return
        for component, reference in _references(run, model, prompts, missing, made_from, batch_size).items():
            run.wrote(reference.write(run.layout, component))


def has_reference(layout: Layout, component: str, fingerprint: str) -> bool:
    """Whether a component has a valid reference of the model with this fingerprint, whatever its prompts are."""
    found = _readable_reference(layout, component)
    return found is not None and found.model_fingerprint == fingerprint


def _prompts(layout: Layout, model: Model) -> list[TokenizedPrompt]:
    config, prompts = read_config(layout), []
    for path in sorted((shipped_datasets() / "inference").glob("*.json")):
        prompt_set = read_prompt_file(path)
        for prompt in prompt_set.prompts:
            name = f"{prompt_set.name}/{prompt.id}"
            try:
                prompts.append(
                    tokenize(
                        model.tokenizer,
                        prompt.text,
                        prompt_set="reference",
                        prompt_id=name,
                        system_prompt=prompt_set.system_prompt_of(prompt, config.system_prompt),
                        chat_template=config.use_chat_template,
                    )
                )
            except TlcaptureError:  # a template may refuse a system prompt
                continue
    return [each for each in prompts if 2 <= len(each.token_ids) <= model.n_ctx - NEW_TOKENS]


def _readable_reference(layout: Layout, component: str) -> Reference | None:
    try:
        return read_reference(layout, component)
    except StorageError:
        return None


def _is_current(layout: Layout, component: str, model: Model, made_from: str) -> bool:
    found = _readable_reference(layout, component)
    return found is not None and (found.model_fingerprint, found.made_from) == (model.fingerprint, made_from)


def _references(
    run: Run,
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    components: Sequence[str],
    made_from: str,
    batch_size: int | None,
) -> dict[str, Reference]:
    layers = {each: list(component_layers(model, each)) for each in components}
    hooks = {each: component_hooks(each, layers[each]) for each in components}
    every = [name for names in hooks.values() for name in names]
    found: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {each: {} for each in components}
    with run.progress(len(prompts) * NEW_TOKENS, "reference prompts", "token") as progress:
        for outcome in generate(
            model,
            prompts,
            hooks=every,
            max_new_tokens=NEW_TOKENS,
            sampling=GREEDY,
            batch_size=batch_size,
            on_tokens=progress.advance,
        ):
            if not isinstance(outcome, Generation) or not outcome.response_ids:
                continue
            begin = len(outcome.prompt.token_ids)
            for component, names in hooks.items():
                tokens = torch.stack([outcome.cache[name] for name in names]).float().cpu()
                means = [tokens[:, 1:begin].mean(dim=1), tokens[:, begin:].mean(dim=1)]
                if all(each.isfinite().all() for each in means):
                    prompt, response = (_at_layers(each, layers[component], model.n_layers) for each in means)
                    found[component][str(outcome.prompt.id)] = prompt, response
    return {
        component: Reference(
            model.fingerprint,
            made_from,
            names := sorted(means),
            torch.stack([means[name][0] for name in names], dim=1),
            torch.stack([means[name][1] for name in names], dim=1),
        )
        for component, means in found.items()
        if len(means) >= FEWEST_PROMPTS
    }


def _at_layers(means: torch.Tensor, layers: Sequence[int], n_layers: int) -> torch.Tensor:
    """Means `[n_layers, d_model]`, 0 at the layers without the component."""
    whole = means.new_zeros(n_layers, means.shape[1])
    whole[list(layers)] = means
    return whole
