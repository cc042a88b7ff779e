"""The page's internals of a capture that kept no token."""

from __future__ import annotations

from pathlib import Path

import torch

from tlcapture.page.internals import internals_of_layer
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_tensors


def test_internals_without_tokens_have_no_norms(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    values = {"blocks.1.hook_resid_pre": torch.zeros(0, 4), "blocks.1.attn.hook_q": torch.zeros(0, 2, 3)}
    write_tensors(layout.internals("odd", "1", 1), {"tokens": ["a"], "token_ids": [1], "positions": [], **values})
    found = internals_of_layer(layout, "odd", "1", 1)
    assert found["hooks"]["attn.hook_q"] == {"shape": [0, 2, 3], "norms": []}
    assert found["tokens"] == []
