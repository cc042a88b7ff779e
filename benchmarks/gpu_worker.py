"""A child process of gpu.py: workloads of Hugging Face or of one tree of the project, by name from standard input.

    python gpu_worker.py "hugging face"|TREE WORK DEVICE
    python gpu_worker.py prepare WORK ROOT N    # a prompt set of N prompts and the vectors of ten traits

TREE is a label; the package is imported from PYTHONPATH. WORK is a folder that holds the model.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from earlier_names import accept_earlier_names

NEW_TOKENS, PROMPT_TOKENS, LONG = 50, 100, 4096
N_TRAITS = 10
BRIDGE = "bridge: "
RESULT = "result "
_SENTENCE = "The keeper of the lock writes down every boat that comes by, its name, its length and its load. {:03d}"
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def texts(count: int) -> list[str]:
    """Texts of 99 characters; with the first token of all sequences they make prompts of 100 tokens."""
    return [_SENTENCE.format(number)[: PROMPT_TOKENS - 1] for number in range(count)]


def shape_of(work: Path) -> dict[str, Any]:
    """The dimensions of Gemma-2-2B (its config.json on the Hugging Face Hub), or small ones.

    Activations of a `wide` model are as large as those of Gemma-2-2B, and its weights are few.
    """
    shape = (work / "shape").read_text()
    if shape == "wide":
        return {
            "hidden_size": 2304,
            "intermediate_size": 64,
            "num_hidden_layers": 26,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 512,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 16,
        }
    if shape == "tiny":
        return {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 4096,
            "max_position_embeddings": 8192,
            "sliding_window": 64,
            "query_pre_attn_scalar": 16,
        }
    return {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    }


def byte_tokenizer() -> Any:
    """A tokenizer with a token per byte and Gemma's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    vocabulary |= {symbol: 4 + n for n, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


class Workloads:
    """What both kinds of process do: time a call and report tokens, seconds and peak memory."""

    def __init__(self, work: Path, device: str):
        import torch

        self.work, self.device, self.cuda = work, device, device.startswith("cuda")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32

    def synchronize(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], int]) -> dict[str, Any]:
        """Seconds of a call that returns a number of tokens."""
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.synchronize()
        start = time.perf_counter()
        tokens = call()
        self.synchronize()
        found: dict[str, Any] = {"tokens": tokens, "seconds": time.perf_counter() - start}
        if self.cuda:
            found["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        return found


class HuggingFace(Workloads):
    """`generate` of transformers, with eager calls unless said otherwise."""

    def run(self, workload: str) -> dict[str, Any]:
        if workload == "make the model":
            return self.make()
        name, batch = workload.rsplit(" ", 1)
        if name == "long":
            return self.timed(lambda: self.generate(int(batch), n_tokens=LONG - NEW_TOKENS))
        if name == "compiled":
            self.generate(int(batch), cache_implementation="static")  # compiles
            self.generate(int(batch), cache_implementation="static")
            return self.timed(lambda: self.generate(int(batch), cache_implementation="static"))
        options: dict[str, dict[str, Any]] = {
            "plain": {},
            "hidden states": {"output_hidden_states": True},
            "temperature 0.7": {"do_sample": True, "temperature": 0.7, "top_k": 0},
        }
        return self.timed(lambda: self.generate(int(batch), **options[name]))

    def make(self) -> dict[str, Any]:
        """Make a model of random weights in the folder; returns facts of the machine and the model."""
        import platform

        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.Gemma2Config(
            **shape_of(self.work), bos_token_id=2, eos_token_id=1, pad_token_id=0, architectures=["Gemma2ForCausalLM"]
        )
        with torch.device(self.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval().requires_grad_(False)
            for weight in model.parameters():
                weight.normal_(0, 0.02)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
        model.save_pretrained(self.work / "model")
        byte_tokenizer().save_pretrained(self.work / "model")
        self.model = model
        facts = {
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model_GB": sum(weight.numel() * weight.itemsize for weight in model.parameters()) / 1e9,
        }
        if self.cuda:
            facts |= {"device": torch.cuda.get_device_name(), "copy_GB_per_s": _copy_speed()}
        return facts

    def generate(self, batch: int, n_tokens: int = PROMPT_TOKENS, **options: Any) -> int:
        import torch

        tokens = torch.randint(5, 250, (batch, n_tokens), generator=torch.Generator().manual_seed(0)).to(self.device)
        chosen: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, **options}
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            **chosen,
        )
        return batch * (out.sequences.shape[1] - n_tokens)


class Ours(Workloads):
    """Generation of the package that PYTHONPATH names."""

    def __init__(self, work: Path, device: str):
        import transformer_lens  # noqa: F401  while the model is being made

        super().__init__(work, device)
        self.bridge: Any = None

    def run(self, workload: str) -> dict[str, Any]:
        if workload == "load":
            return self.load()
        if workload == "profile":
            return self.profile()
        if workload == "profile of the lens":
            return self.profile_of_lens()
        if workload.startswith(BRIDGE):
            return self.on_bridge(workload.removeprefix(BRIDGE))
        name, batch = workload.rsplit(" ", 1)
        if name == "long":
            prompts = self.tokenized(int(batch), LONG - NEW_TOKENS)
            return self.timed(lambda: self.generate(prompts, "residual"))
        prompts = self.tokenized(int(batch), PROMPT_TOKENS)
        if name == "temperature 0.7":
            return self.timed(lambda: self.generate(prompts, "residual", temperature=0.7))
        if name == "residual and lens":
            return self.timed(lambda: self.capture_with_lens(int(batch)))
        return self.timed(lambda: self.generate(prompts, name))

    def load(self) -> dict[str, Any]:
        start = time.perf_counter()
        self.model = self._loaded("auto")
        return {"seconds": time.perf_counter() - start, "engine": self.model.engine}

    def _loaded(self, engine: str) -> Any:
        from tlcapture import load_model

        dtype = "bfloat16" if self.cuda else "float32"
        return load_model(str(self.work / "model"), engine=engine, device=self.device, dtype=dtype, check=False)

    def on_bridge(self, workload: str) -> dict[str, Any]:
        """A workload on the engine `bridge`, the only one of TransformerLens 4."""
        if self.bridge is None:
            self.bridge = self._loaded("bridge")
        hooked, self.model = self.model, self.bridge
        try:
            return self.run(workload)
        finally:
            self.model = hooked

    def tokenized(self, batch: int, n_tokens: int) -> list[Any]:
        import torch

        from tlcapture.prompts.tokenization import TokenizedPrompt

        tokens = torch.randint(5, 250, (batch, n_tokens), generator=torch.Generator().manual_seed(0)).tolist()
        return [
            TokenizedPrompt("bench", str(number), "", "", tuple(ids), None, False) for number, ids in enumerate(tokens)
        ]

    def hooks(self, name: str) -> list[str]:
        from tlcapture.views.attention import attention_hooks
        from tlcapture.views.residual import residual_hooks

        if name == "nothing":
            return []
        hooks = list(residual_hooks(self.model.n_layers, self.model.hook_names))
        if name == "residual and attention":
            hooks += attention_hooks(self.model.n_layers, self.model.hook_names)
        return hooks

    def generate(self, prompts: list[Any], name: str, temperature: float = 0.0, new_tokens: int = NEW_TOKENS) -> int:
        from tlcapture.generation.loop import generate
        from tlcapture.generation.outcomes import Generation
        from tlcapture.generation.sampling.next_token import Sampling

        outcomes = generate(
            self.model,
            prompts,
            hooks=self.hooks(name),
            max_new_tokens=new_tokens,
            sampling=Sampling(temperature),
            batch_size=len(prompts),
        )
        n_tokens = 0
        for outcome in outcomes:
            if not isinstance(outcome, Generation):
                raise outcome.error(outcome.reason)
            n_tokens += len(outcome.response_ids)
        return n_tokens

    def capture_with_lens(self, batch: int) -> int:
        from inspect import signature

        from tlcapture import capture
        from tlcapture.views.logit_lens import logit_lens_view

        has_device = "device" in signature(logit_lens_view).parameters  # earlier trees go through the host
        place = {"device": self.model.last_device} if has_device else {}
        n_tokens = 0
        for captured in capture(self.model, texts(batch), max_new_tokens=NEW_TOKENS, batch_size=batch, temperature=0.0):
            logit_lens_view(captured.residual, self.model.n_layers, captured.token_ids, self.model.unembed, **place)
            n_tokens += len(captured.response.token_ids)
        return n_tokens

    def profile(self) -> dict[str, Any]:
        """Launches, waits and busy time of a step of ten prompts: the difference of 24 and 4 new tokens, by steps.

        `kernels` are the slowest, by shortened name: milliseconds and launches a step.
        """
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.cuda else [])
        prompts, found, steps = self.tokenized(10, PROMPT_TOKENS), [], (4, 24)
        kernels: list[dict[str, tuple[float, int]]] = []
        self.generate(prompts, "residual", new_tokens=max(steps))
        for new_tokens in steps:
            self.generate(prompts, "residual", new_tokens=new_tokens)  # what is recorded once for a length
            with profile(activities=activities) as seen:
                start = time.perf_counter()
                self.generate(prompts, "residual", new_tokens=new_tokens)
                self.synchronize()
                seconds = time.perf_counter() - start
            events = seen.key_averages()
            count = {event.key: event.count for event in events}
            # What runs on the device has no time of its own on the host; operators stand for the same kernels again.
            kernels.append(
                {
                    event.key: (event.self_device_time_total / 1e3, event.count)
                    for event in events
                    if event.self_device_time_total and not event.self_cpu_time_total
                }
            )
            found.append(
                {
                    "launches": sum(count.get(name, 0) for name in _LAUNCHES),
                    "graph launches": count.get("cudaGraphLaunch", 0),
                    "waits": sum(count.get(name, 0) for name in _WAITS),
                    "copies": count.get("cudaMemcpyAsync", 0),
                    "single numbers read": count.get("aten::_local_scalar_dense", 0),
                    "busy ms": sum(ms for ms, _ in kernels[-1].values()),
                    "ms": seconds * 1e3,
                }
            )
        n_steps = steps[1] - steps[0]
        of_step: dict[str, Any] = {name: (found[1][name] - found[0][name]) / n_steps for name in found[0]}
        few, many = kernels
        each = {
            name: tuple((b - a) / n_steps for a, b in zip(few.get(name, (0, 0)), both, strict=True))
            for name, both in many.items()
        }
        slowest = sorted(each, key=lambda name: each[name][0], reverse=True)[:20]
        of_step["kernels"] = {name[:100]: each[name] for name in slowest}
        return of_step

    def profile_of_lens(self) -> dict[str, Any]:
        """Milliseconds of the logit lens of one prompt, those of its slowest kernels, and their shortened names."""
        from torch.profiler import ProfilerActivity, profile

        from tlcapture import capture
        from tlcapture.views.logit_lens import logit_lens_view

        (captured,) = capture(self.model, texts(1), max_new_tokens=NEW_TOKENS, temperature=0.0)

        def lens() -> float:
            start = time.perf_counter()
            device = self.model.last_device
            logit_lens_view(
                captured.residual, self.model.n_layers, captured.token_ids, self.model.unembed, device=device
            )
            return 1e3 * (time.perf_counter() - start)

        def reading() -> float:
            start = time.perf_counter()
            for layer in range(self.model.n_layers):
                captured.residual(layer)
            return 1e3 * (time.perf_counter() - start)

        lens()
        without_profiler = lens()
        with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.cuda else [])) as seen:
            lens()
        times = {
            event.key: (event.self_device_time_total if self.cuda else event.self_cpu_time_total) / 1e3
            for event in seen.key_averages()
            if not (self.cuda and event.self_cpu_time_total)
        }
        slowest = sorted(times, key=times.__getitem__, reverse=True)[:12]
        rows = {"all, without the profiler": without_profiler, "reading residuals in main memory": reading()}
        rows["busy"] = sum(times.values())
        return {**rows, **{name[:90]: times[name] for name in slowest}}


def prepare(work: Path, root: Path, n_prompts: int) -> None:
    """Write a prompt set and random vectors of ten traits at every layer."""
    import torch

    shape = shape_of(work)
    layers, width = shape["num_hidden_layers"], shape["hidden_size"]
    (root / "datasets/inference").mkdir(parents=True)
    prompts = [{"id": str(number + 1), "text": text} for number, text in enumerate(texts(n_prompts))]
    (root / "datasets/inference/bench.json").write_text(json.dumps({"name": "bench", "prompts": prompts}))
    for number in range(N_TRAITS):
        trait = f"bench/trait{number}"
        vectors = root / "experiments/bench/extraction" / trait / "vectors"
        vectors.mkdir(parents=True)
        for layer in range(layers):
            torch.save(torch.randn(width), vectors / f"probe_layer{layer}.pt")
        metadata = {
            "extraction_model": str(work / "model"),
            "extraction_experiment": "bench",
            "trait": trait,
            "component": "residual",
            "methods": ["probe"],
            "layers": list(range(layers)),
            "num_layers": layers,
            "hidden_dim": width,
            "timestamp": "2026-01-01T00:00:00",
        }
        (vectors / "metadata.json").write_text(json.dumps(metadata))


def _copy_speed() -> float:
    """GB/s of a copy within the device's memory, read and written bytes together."""
    import torch

    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    return 10 * 2 * source.numel() / (time.perf_counter() - start) / 1e9


def main() -> None:
    name, work, last = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if name == "prepare":
        return prepare(work, Path(last), int(sys.argv[4]))
    if name != "hugging face":
        accept_earlier_names()
    workloads = (HuggingFace if name == "hugging face" else Ours)(work, last)
    for line in sys.stdin:
        try:
            found = workloads.run(line.strip())
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(f"{RESULT}{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
