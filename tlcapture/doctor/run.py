"""`tlcapture doctor`: runs all checks of a model against its Hugging Face reference, loaded one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tlcapture.doctor import checks
from tlcapture.doctor.checks import Check, guarded
from tlcapture.doctor.reference import ReferenceRun, load_reference, reference_runs
from tlcapture.models.checkpoints.checkpoint import fetch_config, fetch_tokenizer, quiet_loading
from tlcapture.models.checkpoints.sources import source_of
from tlcapture.models.loading import Model, pick_device, pick_dtype, pick_engine
from tlcapture.models.memory import release_memory
from tlcapture.runs.model_loader import ModelLoader


def run_doctor(load: ModelLoader) -> Iterator[Check]:
    """Check a model on an engine and yield each check as it is done.

    Raises:
        ModelError: the model cannot be loaded, or the engine does not cover it.
    """
    runs = _reference_runs(load)
    yield from check_model(replace(load, check=False)(), runs)  # these checks say more


def check_model(model: Model, runs: Sequence[ReferenceRun]) -> Iterator[Check]:
    """Run all checks of a loaded model against Hugging Face's runs of `probe_prompts`."""
    prompts = checks.probe_prompts(model.tokenizer)
    yield guarded("BOS", checks.check_bos, model.tokenizer)
    yield guarded("padding", checks.check_padding, model, prompts)
    yield guarded("stop ids", checks.check_stop_ids, model.tokenizer, model.generation_config)
    yield guarded("raw basis", checks.check_raw_basis, model, runs)
    yield guarded("attention", checks.check_attention, model, runs)
    yield guarded("batch", checks.check_batch, model, prompts)
    yield guarded("captured", checks.check_recomputed, model, prompts)
    yield guarded("soft caps", checks.check_soft_caps, model, runs)
    yield guarded("range", checks.check_range, model, prompts)
    yield guarded("massive", checks.check_massive_dimensions, model, prompts)


def _reference_runs(load: ModelLoader) -> list[ReferenceRun]:
    device = pick_device(load.device)
    with quiet_loading():
        source = source_of(load.name)
        config = fetch_config(load.name, source)
        pick_engine(load.name, load.engine, config)
        tokenizer = fetch_tokenizer(load.name, source)
    load.display.line(f"loading {load.name} with transformers alone, for comparison ...")
    reference = load_reference(load.name, device, pick_dtype(load.dtype, device, config))
    runs = reference_runs(reference, [prompt.token_ids for prompt in checks.probe_prompts(tokenizer)])
    del reference
    release_memory()
    return runs
