"""Tokenizers for TransformerLens, which modifies them, and the removal of its modifications."""

from __future__ import annotations

import copy
from typing import Any


def for_transformer_lens(tokenizer: Any, name: str) -> Any:
    """A copy of a tokenizer that TransformerLens can modify.

    TransformerLens fills in missing special tokens, which the original must not have. The copy claims to add BOS, since
    TransformerLens would otherwise load the tokenizer again from `name`.
    """
    own = copy.deepcopy(tokenizer)
    own.init_kwargs.setdefault("name_or_path", name)
    own.init_kwargs["add_bos_token"] = True
    return own


def without_filled_in_bos(tokenizer: Any) -> Any:
    """A tokenizer without the BOS token that TransformerLens filled in: it uses EOS if a checkpoint has no BOS."""
    if tokenizer.bos_token != tokenizer.eos_token or tokenizer.init_kwargs.get("bos_token") is not None:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.bos_token = None
    return own
