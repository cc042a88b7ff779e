"""Tokenizers that TransformerLens may change, and one as its checkpoint has it."""

from __future__ import annotations

import copy
from typing import Any


def for_transformer_lens(tokenizer: Any, name: str) -> Any:
    """A tokenizer that TransformerLens may keep.

    It fills in missing special tokens, which ours must not have; and it would load the tokenizer once
    more, from wherever it came, were it not told that this one adds BOS.
    """
    own = copy.deepcopy(tokenizer)
    own.init_kwargs.setdefault("name_or_path", name)
    own.init_kwargs["add_bos_token"] = True
    return own


def without_filled_in_bos(tokenizer: Any) -> Any:
    """A tokenizer as its checkpoint has it: TransformerLens fills in EOS where there is no BOS."""
    if tokenizer.bos_token != tokenizer.eos_token or tokenizer.init_kwargs.get("bos_token") is not None:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.bos_token = None
    return own
