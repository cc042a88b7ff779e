"""Workloads W5 to W11: projection, logit lens, files, start-up, memory."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from generation_speed import Bench
from measure import Row, command, in_turn, medians, peak_memory, ratios

from tlcapture.captures.capture import Capture
from tlcapture.captures.from_generation import capture_of
from tlcapture.commands.capture import CaptureOptions, run_capture
from tlcapture.commands.project import ProjectOptions, run_project
from tlcapture.commands.projecting.projections import ChanceLevels
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.names import Trait
from tlcapture.prompts.prompt_sets import read_prompt_set
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_bytes, write_json
from tlcapture.traits.projections.projection import project as project_stream
from tlcapture.traits.selection import Selection
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import read_vector, write_vector
from tlcapture.views.attention import attention_hooks, attention_view
from tlcapture.views.logit_lens import CHUNK, logit_lens_view
from tlcapture.views.residual import residual_hooks


def _generation(bench: Bench) -> Generation:
    model = bench.model
    hooks = [*residual_hooks(model.n_layers, model.hook_names), *attention_hooks(model.n_layers, model.hook_names)]
    (found,) = generate(
        model, bench.prompts[:1], hooks=hooks, max_new_tokens=bench.new_tokens, sampling=Sampling(temperature=0)
    )
    assert isinstance(found, Generation)
    return found


def _capture(bench: Bench, generation: Generation) -> Capture:
    return capture_of(
        generation,
        bench.model,
        experiment="bench",
        sampling=Sampling(temperature=0),
        max_new_tokens=bench.new_tokens,
        attn_out=False,
        save_dtype="auto",
    )


def w5(bench: Bench) -> Iterator[Row]:
    """Project captures onto traits, compared with reading the captures."""
    n_captures, n_traits = (20, 20) if bench.quick else (100, 20)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as root:
        layout = Layout(Path(root), "bench")
        capture = _capture(bench, _generation(bench))
        for number in range(n_captures):
            named = Capture(capture.prompt, capture.response, {**capture.metadata, "prompt_id": str(number)})
            named.save(layout.residual(named.prompt_set, named.prompt_id))
        for number in range(n_traits):
            folder = VectorFiles(layout, Trait("bench", f"trait{number}"))
            write_vector(folder, "residual", "probe", 16, torch.randn(bench.model.d_model, generator=generator))
            origin = {"extraction_model": bench.model.name, "model_fingerprint": bench.model.fingerprint}
            folder.write_metadata("residual", {**origin, "extraction_experiment": "bench"})
        files = [layout.residual(capture.prompt_set, str(number)) for number in range(n_captures)]
        vectors = [read_vector(VectorFiles(layout, trait), "residual", "probe", 16) for trait in layout.traits()]
        chosen = [(vector, Selection(16, "probe", "override")) for vector in vectors]
        size = sum(path.stat().st_size for path in files)
        memory = memoryview(bytearray(size))
        stream = capture.prompt.residual.points.float(), capture.response.residual.points.float()
        directions = torch.randn(bench.model.d_model, n_traits)

        def read() -> None:
            at = 0
            for path in files:
                with path.open("rb", buffering=0) as file:
                    at += file.readinto(memory[at:])
            assert at == size

        def without_files() -> None:
            for path in files:
                opened = Capture.open(path)
                project_stream(opened.prompt.residual, opened.response.residual, chosen)

        def products() -> None:
            for _ in files:
                for points in stream:
                    torch.mm(points.flatten(0, 1), directions)

        def empty_files() -> None:
            for trait in layout.traits():
                for number in range(n_captures):
                    write_bytes(layout.projection(trait, "residual", "empty", str(number)), b"")

        def project() -> None:
            report = run_project(layout, [capture.prompt_set], ProjectOptions())
            assert report.n_files == n_captures * n_traits and not report.failures

        def without_chance() -> None:
            with patch.object(ChanceLevels, "of", lambda self, capture, chosen: None):
                project()

        works = {
            "ours": project,
            "without chance": without_chance,
            "reading": read,
            "without files": without_files,
            "products": products,
            "empty files": empty_files,
        }
        times = in_turn(works, bench.rounds)
    note = f"{n_captures} captures, {size / 1e6:.0f} MB, {n_captures * n_traits} files written: {medians(times)}"
    yield Row("W5", "projecting / reading the bytes once", ratios(times, "ours", "reading"), 3, 1.5, note=note)
    yield Row("W5", "projecting without writing files / reading", ratios(times, "without files", "reading"))
    yield Row(
        "W5", "projecting / without the chance levels of dynamics", ratios(times, "ours", "without chance"), 1.2, 1.1
    )
    yield Row("W5", "only its matrix products, of float32 in memory / reading", ratios(times, "products", "reading"))
    yield Row("W5", "writing as many empty files / reading", ratios(times, "empty files", "reading"))


def w6(bench: Bench) -> Iterator[Row]:
    """The logit lens, compared with `torch.mm` of the same size."""
    model, generation = bench.model, _generation(bench)
    token_ids = generation.token_ids
    rows = min(CHUNK, len(token_ids) - 1)
    residual, weight = torch.randn(rows, model.d_model), torch.randn(model.d_model, model.d_vocab)

    def lens() -> None:
        logit_lens_view(
            lambda layer: generation.cache[f"blocks.{layer}.hook_resid_post"], model.n_layers, token_ids, model.unembed
        )

    def products() -> None:
        for _ in range(model.n_layers):
            torch.mm(residual, weight)

    times = in_turn({"logit lens": lens, "torch.mm": products}, bench.rounds)
    figures = [1 / ratio for ratio in ratios(times, "logit lens", "torch.mm")]
    flop = 2 * rows * model.d_model * model.d_vocab * model.n_layers
    note = f"{rows} tokens, top 50: {medians(times)}; {flop / 1e9:.0f} GFLOP"
    yield Row("W6", "FLOP/s of the logit lens / of torch.mm", figures, 0.6, 0.85, at_least=True, note=note)


def w7(bench: Bench) -> Iterator[Row]:
    """Write attention and logit-lens files, compared with `json.dump`."""
    model, generation = bench.model, _generation(bench)
    tokens = [str(token) for token in generation.token_ids]
    names: dict[str, Any] = {"prompt_id": "1", "prompt_set": "bench", "tokens": tokens, "n_prompt_tokens": 10}
    attention = attention_view(generation.cache, model.n_layers)
    lens = logit_lens_view(
        lambda layer: generation.cache[f"blocks.{layer}.hook_resid_post"],
        model.n_layers,
        generation.token_ids,
        model.unembed,
    )

    def texts(ids: Any) -> list[str]:
        from tlcapture.prompts.tokenization import token_texts

        return token_texts(model.tokenizer, ids)

    kinds = {
        "attention": lambda: attention.to_json(**names),
        "logit lens": lambda: lens.to_json(**names, token_texts=texts),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.json"
        for kind, make in kinds.items():
            write_json(path, make())
            lists = json.loads(path.read_bytes())

            def write(make: Callable[[], Any]) -> None:
                write_json(path, make())

            def dump(lists: Any = lists) -> None:
                with path.open("w") as file:
                    json.dump(lists, file)

            times = in_turn({"ours": partial(write, make), "json.dump": dump}, bench.rounds)
            figures = ratios(times, "ours", "json.dump")
            yield Row("W7", f"{kind} file / json.dump", figures, 0.15, 0.08, note=medians(times, milli=True))


def w8(bench: Bench) -> Iterator[Row]:
    """`tlcapture --help`, compared with importing Click."""
    works = {"--help": command("-m", "tlcapture", "--help"), "import click": command("-c", "import click")}
    times = in_turn(works, 2 * bench.rounds)
    figures = ratios(times, "--help", "import click")
    yield Row("W8", "tlcapture --help / import click", figures, 2.5, 1.5, note=medians(times, milli=True))


_THROUGH_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(
    **inputs, max_new_tokens=1, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
)
torch.save(output.hidden_states, sys.argv[2])
"""


def w9(bench: Bench) -> Iterator[Row]:
    """The time of a command until its first captured token, compared with transformers."""
    from tlcapture.models.checkpoints.embedded import embedded_folder

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        arguments = ("--experiment", "bench", "--prompt", "Hello!", "--max-new-tokens", "1", "--temperature", "0")
        works = {
            "ours": command("-m", "tlcapture", "capture", *arguments, root=root),
            "transformers": command("-c", _THROUGH_TRANSFORMERS, str(embedded_folder()), str(root / "states.pt")),
        }
        times = in_turn(works, bench.rounds)
    figures = ratios(times, "ours", "transformers")
    yield Row("W9", "command to the first captured token", figures, 1.5, 1.0, note=medians(times))


def w10(bench: Bench) -> Iterator[Row]:
    """Peak memory of capturing 64 prompts, compared with 8."""
    prompts = read_prompt_set(Datasets(Path()), "single_trait").prompts
    many = [{"id": str(number), "text": prompts[number % len(prompts)].text} for number in range(64)]
    figures, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_json(root / "datasets/inference/many.json", {"name": "many", "description": "", "prompts": many})
        for _ in range(1 if bench.quick else bench.rounds):
            peak = {}
            for count in (8, 64):
                arguments = ("--experiment", f"bench{count}", "--prompt-set", "many", "--limit", str(count))
                rest = ("--batch-size", "8", "--max-new-tokens", "10", "--temperature", "0")
                peak[count] = peak_memory(("-m", "tlcapture", "capture", *arguments, *rest), root)
            figures.append(peak[64] / peak[8])
            peaks.append(peak)
    note = f"{peaks[0][64] / 2**20:.0f} MiB, {peaks[0][8] / 2**20:.0f} MiB"
    yield Row("W10", "peak memory of 64 prompts / of 8, batch 8", figures, 1.1, 1.0, note=note)


def w11(bench: Bench) -> Iterator[Row]:
    """The share of a capture outside forward passes and unembedding, which include those of the logit lens."""
    model, spent = bench.model, [0.0]

    def timed(work: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                if not nested[0]:
                    spent[0] += time.perf_counter() - start

        return run

    nested = [False]
    step = model.step

    def whole_step(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        nested[0] = True
        try:
            return step(*args, **options)
        finally:
            nested[0] = False
            spent[0] += time.perf_counter() - start

    class Load:
        name = model.name

        def __call__(self) -> Any:
            return model

    prompt_set = read_prompt_set(Datasets(Path()), "single_trait")
    figures, wholes = [], []
    unembed = model.unembed
    model.step, model.unembed = whole_step, timed(unembed)  # type: ignore[method-assign]
    try:
        for number in range(bench.rounds + 1):
            with tempfile.TemporaryDirectory() as root:
                options = CaptureOptions(
                    attention=True,
                    logit_lens=True,
                    project=False,  # as when it was first measured: W12 and W14 have projections
                    max_new_tokens=bench.new_tokens,
                    sampling=Sampling(temperature=0),
                )
                spent[0], start = 0.0, time.perf_counter()
                report = run_capture(Layout(Path(root), "bench"), [prompt_set], options, Load())  # type: ignore[arg-type]
                whole = time.perf_counter() - start
                assert not report.failures
                if number:  # the first round is not measured
                    figures.append(1 - spent[0] / whole)
                    wholes.append(whole)
    finally:
        model.step, model.unembed = step, unembed  # type: ignore[method-assign]
    files = f"{report.n_files} files, {report.files.size / 1e6:.0f} MB, {sorted(wholes)[len(wholes) // 2]:.1f} s"
    yield Row("W11", "share of a capture that is not model time", figures, 0.25, 0.1, note=files)
