"""Weights in a checkpoint's files that no module of the model takes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# What checkpoints hold beside the weights of the text model, and what does not change what it computes.
_KNOWN = re.compile(
    "|".join(
        (
            r"(^|[._])(mtp|nextn)([._]|$)",  # heads that predict tokens further on
            r"\.(eh_proj|enorm|hnorm|shared_head)\.",
            r"rotary_(pos_)?emb\.",  # buffers that are computed from the config
            r"(^|\.)(inv_freq|freqs_cis|position_ids)$",
            r"\.(attn|attention|self_attention)\.(bias|masked_bias)$",  # causal masks of GPT-2 and its descendants
            r"\.(k|v)_scale$",  # of quantised keys and values
            r"(^|\.)(v_head|value_head|score|classifier)\.",  # heads of reward and value models
            r"(^|\.)(vision|visual|image|audio|speech)(_\w+)?\.",  # other parts of a multimodal checkpoint
            r"(^|\.)(multi_modal_projector|mm_projector|embed_vision|embed_audio)\.",
        )
    )
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_SHOWN = 3


def untaken(keys: Iterable[str], config: Any) -> list[str]:
    """The names of weights that no module takes, without those that are well known to be left over.

    Args:
        keys: names of weights in the files, as in `unexpected_keys` of transformers.
        config: the Hugging Face config of the model.
    """
    names = sorted(map(str, keys))
    n_layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0))
    # A layer that predicts tokens further on has the weights of an ordinary layer too.
    heads = {_layer_of(name) for name in names if _KNOWN.search(name)}
    return [
        name
        for name in names
        if not _KNOWN.search(name) and not ((layer := _layer_of(name)) >= n_layers and layer in heads)
    ]


def is_known(name: str) -> bool:
    """Whether a name is well known to be left over in checkpoints."""
    return _KNOWN.search(name) is not None


def listed(names: list[str]) -> str:
    """The first names, and the number of others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _layer_of(name: str) -> int:
    found = _LAYER.search(name)
    return int(found[1]) if found else -1
