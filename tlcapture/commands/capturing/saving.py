"""Saving a capture that was made in Python into an experiment, with the files that `tlcapture capture` writes."""

from __future__ import annotations

from tlcapture.captures.capture import Capture
from tlcapture.commands.capturing.adhoc_prompts import numbered_on
from tlcapture.commands.projecting.projections import ChanceLevels, project_capture, vector_chooser
from tlcapture.commands.prompt_files.known_views import with_facts
from tlcapture.commands.prompt_files.outputs import AddOns, Outputs, computed_add_ons, lens_of, write_capture
from tlcapture.errors import warn_user
from tlcapture.generation.outcomes import Generation
from tlcapture.models.loading import Model
from tlcapture.prompts.prompt_sets import ADHOC, Prompt, PromptSet
from tlcapture.runs.existing_files import check_replaceable, saved_capture
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.config import settle_model, update_config
from tlcapture.storage.experiments.file_index import remember
from tlcapture.storage.experiments.layout import Layout, derived_files
from tlcapture.storage.files import remove, write_bytes
from tlcapture.traits.choice import VectorChoice


def add_ons_of(outcome: Generation, model: Model, wanted: Outputs, save_dtype: str) -> AddOns | None:
    """The add-ons of a generation that are wanted, if any; its residual stream is not kept for them."""
    if not wanted.has_add_ons:
        return None
    ids, n_prompt = outcome.token_ids, len(outcome.prompt.token_ids)
    lens = lens_of(model, ids, n_prompt, outcome.cache, wanted) if wanted.logit_lens else None
    return AddOns(wanted, {name: outcome.cache[name] for name in wanted.pass_hooks(model)}, save_dtype, lens)


def save_into(
    layout: Layout,
    capture: Capture,
    model: Model,
    more: AddOns | None,
    *,
    vectors: VectorChoice = VectorChoice(),
    allow_model_change: bool = False,
) -> Capture:
    """Write the files of a capture: its raw residual, its projections where there are vectors, and its add-ons.

    The experiment is made if it does not exist. A prompt of the set `adhoc` gets the id that the same text has there,
    or the next one. Warns of doubtful vectors, and of traits whose vectors do not fit.

    Returns the capture as it was saved.

    Raises:
        InputError: the experiment uses another model, and that change is not allowed.
        StorageError: a file that would be replaced cannot be read, or a file cannot be written.
    """
    name = settle_model(layout, "inference_model", model.name, model.name, allow_change=allow_model_change)
    run = Run.silent(layout)
    with run_lock(run, f"captures of {capture.capture_set}"):
        saved = _placed(layout, _free_id(layout, capture), capture)
        update_config(layout, inference_model=name)
        _write(run, saved, model, more, vectors)
    for text in (*run.report.warnings, *map(str, run.report.failures)):
        warn_user(text)
    return saved


def _placed(layout: Layout, prompt_id: int | str, capture: Capture) -> Capture:
    metadata = {**capture.metadata, "inference_experiment": layout.experiment, "prompt_id": prompt_id}
    return Capture(capture.prompt, capture.response, metadata, spans=capture.spans)


def _free_id(layout: Layout, capture: Capture) -> int | str:
    """The capture's id: its own, or in `adhoc` the id that its text has already, or the next number."""
    if capture.prompt_set != ADHOC:
        return capture.prompt_id
    messages = capture.metadata.get("messages")
    content = {"messages": list(messages)} if messages else {"text": capture.metadata.get("prompt_text")}
    prompt = Prompt.model_validate({"id": capture.prompt_id, **content})
    return numbered_on(layout, PromptSet(name=ADHOC, prompts=[prompt])).prompts[0].id


def _write(run: Run, capture: Capture, model: Model, more: AddOns | None, choice: VectorChoice) -> None:
    layout, where = run.layout, (capture.capture_set, capture.name)
    saved_capture(layout.residual(*where), overwrite=False, advice="move it")
    for path in derived_files(layout, *where):
        check_replaceable(layout, path, advice="move it")
    marker = layout.unfinished(*where)
    write_bytes(marker, b"")
    run.wrote(write_capture(layout, capture))
    for component in capture.prompt.residual.components:
        vectors = vector_chooser(run, choice).vectors(capture, component)
        if vectors:
            project_capture(run, capture, vectors, ChanceLevels(run))
    if more is not None:
        for write in computed_add_ons(layout, capture, model, more):
            run.wrote(with_facts(layout, write()))
    remove([marker])
    remember(layout, run.report.learned)
