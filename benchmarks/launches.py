"""Kernel launches and blocking points of a decode step on a GPU, counted without one.

    python benchmarks/launches.py --json
    python benchmarks/launches.py --json --baseline DIR     # the package in another checkout, counted by this file

A model in the shape of Gemma-2-2B and a left-padded batch of 10 prompts, in bfloat16, are fake tensors on a fake GPU:
nothing is computed, but every call of a step is seen. A launch is a call of an aten operator that is not a view and
makes something; a norm, an SDPA and a flex attention are one each. A blocking point is a read of a value by Python, a
shape that depends on values, or a copy between the GPU and main memory, unless it is asked for without waiting.

With --lens, the same of the logit lens of one chunk of predictions, with the bytes that its kernels read and write for
each logit: each tensor that a kernel is given or makes counts once, and what a softmax reads three times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "detach",
)
READS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "is_nonzero", "unique")
COPIES = ("copy_", "_to_copy")
WHOLE = ("rms_norm", "layer_norm", "scaled_dot_product_attention", "flex_attention")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
SHAPE = {
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
ROWS, WIDTH, LENS_ROWS = 10, 100, 512
BEFORE, MUST = 1003, 0.7  # launches of commit ba751499, counted by this file, and the largest ratio to them


class Seen:
    """What was called: launches and blocking points by the name of the operator."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.blocking: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.is_on = False


@contextmanager
def watching(seen: Seen) -> Iterator[None]:
    """Count the calls on fake tensors while `seen.is_on`; a value that Python reads is 0."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    by_hand = {
        torch.Tensor.__getitem__: item_of,
        torch.Tensor.__setitem__: set_item,
        torch.Tensor.__invert__: torch.ops.aten.bitwise_not.default,
        torch.Tensor.copy_: torch.ops.aten.copy_.default,
        torch.Tensor.contiguous: lambda x: x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format),
    }

    class Whole(TorchFunctionMode):
        """Counts a norm or an attention as one call."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in by_hand and args[0].is_cuda:
                return by_hand[func](*args)
            if func is torch.Tensor.to and isinstance(args[1], torch.device) and args[1].type != args[0].device.type:
                return torch.ops.aten._to_copy.default(args[0], device=args[1], **(kwargs or {}))
            if func is torch.empty and (kwargs or {}).pop("pin_memory", False):
                return func(*args, **kwargs)
            if getattr(func, "__name__", "") not in WHOLE or not seen.is_on:
                return func(*args, **(kwargs or {}))
            seen.launches[func.__name__] += 1
            seen.is_on = False
            try:
                return func(*args, **(kwargs or {}))
            finally:
                seen.is_on = True

    class Calls(TorchDispatchMode):
        """Counts every other operator."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            is_read = any(each.is_cuda for each in tensors) and (
                name in READS
                or (name in ("index", "index_put", "index_put_") and torch.bool in {each.dtype for each in tensors[1:]})
            )
            found = 0 if name == "_local_scalar_dense" else func(*args, **(kwargs or {}))
            made = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
            if seen.is_on:
                # Numbers of Python are tensors without axes on the CPU, which need no copy.
                devices = {each.device.type for each in (*tensors, *made) if each.ndim or name in COPIES}
                if is_read or (len(devices) > 1 and not waits_for_nothing(args, kwargs)):
                    seen.blocking[name] += 1
                if not func.is_view and name not in FREE and any(each.is_cuda and each.numel() for each in made):
                    seen.launches[name] += 1
                    seen.bytes[name] += bytes_of(name, args, made)
            return found

    with Whole(), Calls():
        yield


@contextmanager
def without_streams() -> Iterator[None]:
    """Let streams do nothing, which torch without CUDA cannot make."""
    import torch

    idle = SimpleNamespace(wait_stream=lambda other: None)
    stubs: dict[str, Any] = {
        "Stream": lambda *_: idle,
        "current_stream": lambda *_: idle,
        "stream": lambda _: nullcontext(),
    }
    with patch.multiple(torch.cuda, **stubs):
        yield


def waits_for_nothing(args: Any, kwargs: Any) -> bool:
    """Whether a copy is asked for without waiting."""
    return bool((kwargs or {}).get("non_blocking")) or any(each is True for each in args[2:3])


def bytes_of(name: str, args: Any, made: Any) -> int:
    """The bytes that a kernel reads and writes on the GPU; of the weights of a product only what it writes."""
    import torch
    from torch.utils._pytree import tree_leaves

    read = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor) and each.is_cuda]
    if name in ("copy_", "fill_", "zero_", *PRODUCTS):
        read = read[1:] if name == "copy_" else []
    if name == "gather":  # of the whole tensor, what its index names
        read = [read[1], *made]
    times = 3 if name in ("softmax", "_softmax") else 1
    return times * sum(map(held, read)) + sum(held(each) for each in made if each.is_cuda)


def held(x: Any) -> int:
    """The bytes of a tensor in memory, in which an expanded axis counts once."""
    n_numbers = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        n_numbers *= size if stride else min(size, 1)
    return int(n_numbers * x.itemsize)


def item_of(x: Any, index: Any) -> Any:
    """`x[index]`: torch without CUDA refuses to index a tensor on a GPU, even a fake one."""
    import torch

    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        given = sum(part is not None and part is not Ellipsis for part in parts)
        place = next(place for place, part in enumerate(parts) if part is Ellipsis)
        parts[place : place + 1] = [slice(None)] * (x.ndim - given)
    axis, indices = 0, {}
    for part in parts:
        if isinstance(part, int):
            x = torch.ops.aten.select.int(x, axis, part)
            continue
        if part is None:
            x = x.unsqueeze(axis)
        elif isinstance(part, torch.Tensor):
            indices[axis] = part
        elif part != slice(None):
            x = torch.ops.aten.slice.Tensor(x, axis, part.start, part.stop, part.step or 1)
        axis += 1
    return torch.ops.aten.index.Tensor(x, [indices.get(each) for each in range(axis)]) if indices else x


def set_item(x: Any, index: Any, value: Any) -> None:
    """`x[index] = value` for an index that makes a view."""
    import torch

    part = item_of(x, index)
    torch.ops.aten.copy_.default(part, value) if isinstance(value, torch.Tensor) else part.fill_(value)


def fake_model() -> Any:
    """A model on a fake GPU; call it within a FakeTensorMode."""
    import torch
    import transformers
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from tlcapture.models.engines import hooked, weight_layout
    from tlcapture.models.engines.hooked_config import hooked_fields

    config = transformers.Gemma2Config(**SHAPE, architectures=["Gemma2ForCausalLM"])
    cfg = HookedTransformerConfig(**hooked_fields(config), model_name="gemma", device="cpu", dtype=torch.bfloat16)
    tl = HookedTransformer(cfg, move_to_device=False).requires_grad_(False)
    for prefix, module in tl.named_modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                order = weight_layout.memory_order(f"{prefix}.{name}", weight, gated_mlp=True)
                laid_out = torch.empty([weight.shape[axis] for axis in order], dtype=weight.dtype, device="cuda")
                shaped = laid_out.permute(sorted(range(len(order)), key=order.__getitem__))
                module._parameters[name] = torch.nn.Parameter(shaped, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    if hasattr(weight_layout, "join_in_place"):
        weight_layout.join_in_place(tl)
    hooked.make_fast(tl)
    return hooked.HookedModel(tl, None, config, None, "gemma", "fake")


def counted(hooks: Callable[[str], bool]) -> Seen:
    """What one decode step of the padded batch calls, with the activations of all residual points kept."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen = Seen()
    with FakeTensorMode(), watching(seen), torch.no_grad():
        model = fake_model()
        names = frozenset(filter(hooks, model.hook_names))
        tokens = torch.zeros(ROWS, WIDTH, dtype=torch.long, device="cuda")
        state = model.start(ROWS)
        if hasattr(model, "reserve"):
            model.reserve(state, WIDTH + 50)
        model.step(tokens, torch.ones_like(tokens), state, names, want_logits=True)
        new = torch.zeros(ROWS, 1, dtype=torch.long, device="cuda")
        mask = torch.ones_like(new)
        model.step(new, mask, state, names, want_logits=True)
        seen.is_on = True
        model.step(new, mask, state, names, want_logits=True)
        seen.is_on = False
    return seen


def counted_lens(n_rows: int) -> Seen:
    """What the logit lens of that many predictions of two layers calls, from residuals in main memory."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tlcapture.views import vocabulary_scan
    from tlcapture.views.logit_lens import logit_lens_view

    seen = Seen()
    # Triton, where it is installed, fails on fake tensors, and would not be tried again for the rest of the process.
    without_kernel = patch.object(vocabulary_scan, "_without", ["tensors are fake"])
    with without_kernel, FakeTensorMode(), watching(seen), torch.no_grad():
        model = fake_model()
        residual = torch.zeros(n_rows // 2, SHAPE["hidden_size"], dtype=torch.bfloat16)
        seen.is_on = True
        ids = [1] * (n_rows // 2 + 1)
        with without_streams():
            logit_lens_view(lambda layer: residual, 2, ids, model.unembed, device=torch.device("cuda"))
        seen.is_on = False
    return seen


def is_residual(name: str) -> bool:
    """Whether a hook point is one of the residual stream."""
    return name.endswith(("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"))


def of_checkout(folder: Path) -> dict[str, Any]:
    """The counts of the package in another checkout, by this file."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, __file__, "--json"], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def w13(bench: Any) -> Iterator[Any]:
    """Kernel launches of a decode step, counted in another process, where nothing is recorded."""
    from measure import Row

    found = of_checkout(Path(__file__).resolve().parent.parent)
    note = f"{found['launches']} launches, before {BEFORE}; {found['blocking']} blocking points"
    yield Row("W13", "launches of a decode step on a GPU / before", [found["ratio"]], MUST, MUST, note=note)


def print_lens(seen: Seen) -> None:
    """Print what a chunk of the lens calls."""
    n_logits = LENS_ROWS * SHAPE["vocab_size"]
    print(
        f"{seen.launches.total()} launches, {seen.blocking.total()} blocking points "
        f"and {seen.bytes.total() / n_logits:.1f} bytes for each logit in a chunk of the lens"
    )
    for name, count in seen.bytes.most_common(15):
        print(f"{count / n_logits:6.2f} {name} ({seen.launches[name]} launches)")


def main() -> None:
    """Print the counts as a table or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="another checkout to compare with")
    parser.add_argument("--lens", action="store_true", help="count the logit lens of one chunk")
    options = parser.parse_args()
    os.environ["TLCAPTURE_CUDA_GRAPH"] = "0"  # a replay is one launch; what is recorded is counted
    if options.lens:
        print_lens(counted_lens(LENS_ROWS))
        return
    seen = counted(is_residual)
    found: dict[str, Any] = {
        "launches": seen.launches.total(),
        "blocking": seen.blocking.total(),
        "ratio": round(seen.launches.total() / BEFORE, 3),
        "launches_by_name": dict(seen.launches.most_common()),
        "blocking_by_name": dict(seen.blocking.most_common()),
    }
    if options.baseline is not None:
        before = of_checkout(options.baseline.resolve())
        found["before"] = before
        found["ratio"] = round(found["launches"] / before["launches"], 3)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{found['launches']} launches ({found['ratio']} of before) and {found['blocking']} blocking points in a step"
    )
    for name, count in seen.launches.most_common():
        print(f"{count:6d} {name}")
    if options.baseline is not None:
        print(f"before: {before['launches']} launches, {before['blocking']} blocking points")


if __name__ == "__main__":
    main()
