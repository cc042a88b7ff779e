"""How far captures of tiny checkpoints of many families deviate from Hugging Face, or why a family is refused.

    python -m tests.model_families measure    # with the installed TransformerLens, into docs/models.json
    python -m tests.model_families write      # docs/models.md from docs/models.json

Each family is a random checkpoint in a folder (`tests/families.py`), loaded as `tlcapture capture --model FOLDER` loads
it. Two prompts of different length run greedily in one batch, with attention and logit lens. The oracle is the
Hugging Face model alone, run without a cache on each whole sequence: the inputs of its layers, its attention patterns
and its next-token distribution.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.families import FAMILIES, build, class_of
from tlcapture.errors import ModelError
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure, Generation
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.checkpoints.checkpoint import cast, quiet_loading
from tlcapture.models.loading import Model, load_model
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.views.attention import attention_hooks, attention_view
from tlcapture.views.logit_lens import logit_lens_view
from tlcapture.views.residual import residual_hooks, residual_view

DOCS = Path(__file__).parent.parent / "docs"
DTYPES = ("float32", "bfloat16")
N_NEW = 4
NOT_WITH_NEWER = "CodeGen"  # TransformerLens (4.3) does not run it with transformers 5.24
LENGTHS = (21, 10)  # both are longer than a sliding window


@dataclass(frozen=True)
class Outcome:
    """The engine that runs a family and the largest deviations of its captures, or the reason of refusal.

    A deviation is the largest absolute difference as a share of the largest absolute value, that of `attention` is
    `None` for a model without attention. `tokens` counts the greedy tokens that Hugging Face chooses too.
    """

    architecture: str
    engine: str | None = None
    refusal: str | None = None
    hidden: float | None = None
    attention: float | None = None
    lens: float | None = None
    tokens: int | None = None
    n_tokens: int | None = None


def measure(name: str, dtype: str = "float32") -> Outcome:
    """Capture a family, and compare with Hugging Face in the same dtype."""
    with tempfile.TemporaryDirectory() as folder, quiet_loading():
        source = build(name)
        architecture = type(source).__name__
        source.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        try:
            model = load_model(folder, device="cpu", dtype=dtype)
        except ModelError as error:
            reason = str(error).removeprefix(f"{folder}: ").replace(f"model {folder!r}", "it")
            return Outcome(architecture, refusal=reason.partition("; found TransformerLens")[0])  # the same for both
        theirs = class_of(source.config).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        cast(theirs, getattr(torch, dtype))
        return _compared(architecture, model, theirs.eval())


def _compared(architecture: str, model: Model, hf_model: Any) -> Outcome:
    hidden, attention, lens, tokens, n_tokens = [], [], [], 0, 0
    for generation in _generations(model):
        theirs = _reference(hf_model, generation.token_ids)
        greedy = theirs.logits[len(generation.prompt.token_ids) - 1 : -1].argmax(dim=-1).tolist()
        tokens += sum(ours == other for ours, other in zip(generation.response_ids, greedy, strict=True))
        n_tokens += len(greedy)
        stream = residual_view(generation.cache, model.n_layers)
        hidden += [_relative(stream.at(layer, "residual_in"), each) for layer, each in enumerate(theirs.hidden)]
        if model.attention_layers:
            patterns = attention_view(generation.cache, model.n_layers).patterns
            attention += [_relative(*both) for both in zip(patterns, theirs.patterns, strict=True)]
        last = stream.at(model.n_layers - 1, "residual_out")
        view = logit_lens_view(lambda layer, last=last: last, 1, generation.token_ids, model.unembed)  # type: ignore[misc]
        lens.append(_relative(view.top_probs[0], theirs.logits[:-1].softmax(dim=-1).gather(1, view.top_ids[0])))
    return Outcome(
        architecture,
        model.engine,
        hidden=max(hidden),
        attention=max(attention) if attention else None,
        lens=max(lens),
        tokens=tokens,
        n_tokens=n_tokens,
    )


def _generations(model: Model) -> list[Generation]:
    generator = torch.Generator().manual_seed(0)
    prompts = [
        TokenizedPrompt("set", str(number), "", "", tuple(ids.tolist()), None, False)
        for number, length in enumerate(LENGTHS)
        for ids in [torch.randint(4, tiny.VOCABULARY, (length,), generator=generator)]
    ]
    hooks = residual_hooks(model.n_layers, model.hook_names)
    hooks += attention_hooks(model.n_layers, model.hook_names) if model.attention_layers else []
    made = []
    for outcome in generate(model, prompts, hooks=hooks, max_new_tokens=N_NEW, sampling=Sampling(temperature=0)):
        assert not isinstance(outcome, Failure), outcome.reason
        made.append(outcome)
    return made


@dataclass(frozen=True)
class _Reference:
    """One sequence through Hugging Face: inputs of all layers, patterns of those with attention, and logits."""

    hidden: list[Tensor]
    patterns: list[Tensor]
    logits: Tensor


@torch.no_grad()
def _reference(hf_model: Any, token_ids: tuple[int, ...]) -> _Reference:
    hidden: list[Tensor] = []
    n_layers = hf_model.config.num_hidden_layers
    (layers,) = (each for each in hf_model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == n_layers)
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0][0].float())) for layer in layers
    ]
    out = hf_model(torch.tensor([token_ids]), use_cache=False, output_attentions=True)
    for handle in handles:
        handle.remove()
    patterns = [pattern[0].float() for pattern in out.get("attentions") or () if pattern is not None]
    return _Reference(hidden, patterns, out.logits[0].float())


def _relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.float() - theirs.float()).abs().max() / theirs.abs().max())


# -- the page ------------------------------------------------------------------------------------------------------


def recorded() -> dict[str, Any]:
    """The outcomes of `docs/models.json`, by version of TransformerLens, family and dtype."""
    path = DOCS / "models.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def measure_all() -> None:
    """Measure all families in all dtypes, and record them under the installed version of TransformerLens."""
    made = {name: {dtype: asdict(measure(name, dtype)) for dtype in DTYPES} for name in FAMILIES}
    versions = {package: version(package) for package in ("transformers", "torch")}
    found = {**recorded(), version("transformer_lens"): {"versions": versions, "families": made}}
    text = json.dumps(dict(sorted(found.items())), indent=1)
    (DOCS / "models.json").write_text(text + "\n", encoding="utf-8")


def page() -> str:
    """The content of `docs/models.md`."""
    found = recorded()
    parts = [_INTRODUCTION.format(n_families=len(FAMILIES), summary=_summary(found), newer=NOT_WITH_NEWER)]
    for tl_version, measured in found.items():
        parts.append(_table(tl_version, measured))
    return "\n".join(parts)


def _summary(found: dict[str, Any]) -> str:
    lines = []
    for tl_version, measured in found.items():
        outcomes = [by_dtype["float32"] for by_dtype in measured["families"].values()]
        n_running = sum(outcome["engine"] is not None for outcome in outcomes)
        versions = ", ".join(f"{package} {number}" for package, number in measured["versions"].items())
        lines.append(f"- TransformerLens {tl_version} ({versions}): {n_running} of {len(outcomes)} run.")
    return "\n".join(lines)


def _table(tl_version: str, measured: dict[str, Any]) -> str:
    running, refused = [], []
    for name, by_dtype in sorted(measured["families"].items(), key=lambda pair: pair[0].lower()):
        outcome = by_dtype["float32"]
        if outcome["engine"] is None:
            refused.append(f"| {name} | {outcome['refusal']} |")
            continue
        cells = [cell for dtype in DTYPES for cell in _cells(by_dtype[dtype])]
        running.append(f"| {name} | {outcome['architecture']} | {outcome['engine']} | {' | '.join(cells)} |")
    return _TABLE.format(version=tl_version, running="\n".join(running), refused="\n".join(refused))


def _cells(outcome: dict[str, Any]) -> list[str]:
    if outcome["engine"] is None:
        return [f"refused: {outcome['refusal']}", "", "", ""]
    numbers = [outcome[name] for name in ("hidden", "attention", "lens")]
    return [
        *("none" if number is None else f"{number:.0e}" if number else "0" for number in numbers),
        f"{outcome['tokens']}/{outcome['n_tokens']}",
    ]


_INTRODUCTION = """\
# Families of models

How far captures of {n_families} families of language models deviate from Hugging Face. `make models-page` measures it
with both versions of TransformerLens and writes this page; the tests check that each family still runs on the same
engine, or is refused for the same reason, and that no deviation in float32 exceeds 1e-4.

{summary}

With newer versions of transformers (5.24), which `make test-fresh` tries, the same families run, except {newer}.

Each family is a tiny checkpoint (mostly two layers of width 32) with random weights, norms and biases, saved to a
folder and loaded with `--engine auto`. Two prompts of 21 and 10 tokens run greedily in one batch, up to 4 tokens each,
with attention and logit lens. The reference is the Hugging Face model alone, on each whole sequence, in the same dtype.

- **hidden**: the input of every layer. **attention**: the patterns of every layer that has attention (`none`: no layer
  has). **lens**: the probabilities of the 50 likeliest next tokens after the last layer. Each is the largest absolute
  deviation as a share of the largest absolute value.
- **tokens**: how many of the greedy tokens Hugging Face chooses too. In bfloat16 rounding may decide between two.

A checkpoint with features of its own (scaled rotary positions, quantised weights) may be refused, or run on the other
engine, where its family runs here: `tlcapture doctor --model NAME` checks the checkpoint itself.

How some families differ:

- **Hybrids** (Qwen3-Next, Qwen3.5, LFM2, Jamba, Bamba, Granite MoE Hybrid, OLMo Hybrid): residual stream, logit lens
  and projections are there at every layer. Attention and `attn_out` are there where a layer has attention; elsewhere
  JSON files have `null` and `.pt` files no key. `after_attn` is `residual_in` plus the output of the layer's mixer, be
  it attention, a recurrence or a convolution. Models without attention (Mamba) have neither.
- **Attention and a recurrence side by side** (Falcon-H1): `after_attn` is `residual_in` plus both; `attn_out` is
  attention's part.
- **Experts** (Mixtral, Qwen3 MoE, gpt-oss, ...): an expert's neurons have no hooks. `--layer-internals` keeps the
  block's input `mlp.hook_in`, its output `mlp.hook_out` and the logits of the router for all experts,
  `mlp.hook_router_scores` `[n_tokens, n_experts]`.
- **Attention sinks** (gpt-oss): each head gives a learned share of its attention to no token, so that rows of the
  patterns sum to less than 1. It is the model's own computation, not a defect of the capture.
- **Latent attention** (DeepSeek): queries and keys in `--layer-internals` are those that are compared, after rotation,
  and keys and values have as many heads as queries; all are `[n_tokens, n_heads, d]`.
- **Gated queries** (Qwen3-Next, Qwen3.5): `attn.hook_q` is the query alone, without the gate that its weights also
  compute.
"""

_TABLE = """
## TransformerLens {version}

| family | architecture | engine | float32: hidden | attention | lens | tokens | bfloat16: hidden | attention | lens \
| tokens |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{running}

| refused | reason |
| --- | --- |
{refused}
"""

if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure_all()
    elif sys.argv[1:] == ["write"]:
        (DOCS / "models.md").write_text(page(), encoding="utf-8")
    else:
        raise SystemExit(__doc__)
