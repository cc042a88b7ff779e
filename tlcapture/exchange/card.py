"""The card of an exported dataset, its README.md: how to open it, what the columns are, where it comes from."""

from __future__ import annotations

from collections.abc import Sequence

from tlcapture.exchange.manifest import Manifest
from tlcapture.text import counted, layers_named

_COLUMNS = (
    (
        "prompt_set, file",
        "where the capture lies in the experiment; `file` is the prompt's id, or `id.sN` for a sample",
    ),
    ("token_idx", "index over prompt and response together"),
    ("part", "`prompt` or `response`"),
    ("token, token_id", "text and id of the token"),
    ("span, role", "the span of the token (`turn`, `thinking`, `answer`, `template`) and whose turn it is"),
)


def card(manifest: Manifest, scores: Sequence[str], provenance: Sequence[tuple[str, str]]) -> str:
    """The text of the card, with the settings by which `datasets` finds the tables.

    Args:
        scores: the names of the columns that hold scores.
        provenance: names and values that tell how the captures were made.
    """
    lines = ["---", "configs:", "- config_name: tokens", "  default: true"]
    lines += ["  data_files: tokens/*.parquet", "- config_name: captures", "  data_files: captures/*.parquet"]
    lines += ["tags:", "- interpretability", "- activations", "---", "", f"# {manifest.experiment}", ""]
    lines += [
        f"Captures of {manifest.model or 'a model'}, token by token: {manifest.n_captures} responses, "
        f"{manifest.n_tokens} tokens, projected onto {counted(len({name.split()[0] for name in scores}), 'trait')}.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'tokens = load_dataset("PATH", split="train")                # a row for each token',
        'captures = load_dataset("PATH", "captures", split="train")  # a row for each response',
        "```",
        "",
        "## Columns of `tokens`",
        "",
        "| column | meaning |",
        "| --- | --- |",
        *(f"| `{name}` | {meaning} |" for name, meaning in _COLUMNS),
        *(f"| `{name}` | projection, `[n_layers][n_points]`; null where nothing was kept |" for name in scores),
    ]
    if manifest.layers:
        lines += [
            f"| `{point}_L...` | activations `[d_model]` of {layers_named(manifest.layers)}, stored as "
            f"{'uint16, the bits of bfloat16' if manifest.dtype == 'bfloat16' else manifest.dtype} |"
            for point in manifest.points
        ]
    if manifest.layers and manifest.dtype == "bfloat16":
        lines += ["", "Arrow has no bfloat16. The numbers of such a column are", "", "```python"]
        lines += ["torch.tensor(row, dtype=torch.uint16).view(torch.bfloat16)", "```"]
    lines += ["", "## Where it comes from", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in provenance]
    lines += [f"| not exported | {each} |" for each in manifest.left_out]
    lines += ["", "`tlcapture import PATH --experiment NAME` makes an experiment of it again.", ""]
    return "\n".join(lines)
