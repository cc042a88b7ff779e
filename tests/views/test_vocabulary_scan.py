"""The scan of logits equals what torch computes in several passes, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch

from tlcapture import views
from tlcapture.views import logit_lens, vocabulary_scan
from tlcapture.views.vocabulary_scan import GROUP, scan_with, scanned

DEVICE = os.environ.get("TLCAPTURE_TEST_DEVICE", "cpu")
if not DEVICE.startswith("cuda"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def kernel() -> Any:
    """The kernel, which is interpreted where there is no GPU (and where nothing has imported Triton before)."""
    pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
    return importlib.import_module("tlcapture.views.vocabulary_kernel")


def logits_of(n_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Random logits, one row of which allows a single token."""
    logits = 4 * torch.randn(n_rows, width, generator=torch.Generator().manual_seed(width))
    logits[1] = -torch.inf
    logits[1, 5] = 2.0
    return logits.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [50, 64, 4096, 9001])
def test_a_scan_equals_several_passes(kernel: Any, dtype: torch.dtype, width: int) -> None:
    logits = logits_of(3, width, dtype)
    actual = logits[:, 7]
    found = scan_with(kernel, logits, actual)
    whole = logits[:, : width // GROUP * GROUP].unflatten(-1, (-1, GROUP)) if width >= GROUP else logits[:, :0, None]
    assert torch.equal(found.maxima, whole.amax(-1) if width >= GROUP else whole[..., 0])
    assert torch.equal(found.n_above, (logits > actual[:, None]).sum(-1))
    wide = logits.double()
    assert torch.equal(found.largest, wide.amax(-1).float())
    assert torch.allclose(found.total.double(), (wide - wide.amax(-1, keepdim=True)).exp().sum(-1), rtol=1e-5)


def test_predictions_by_a_scan_are_those_without_it(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(4, 9001, torch.float32)
    next_ids = torch.tensor([7, 5, 9000, 0], device=logits.device)
    expected = logit_lens._predictions(logits.cpu().clone(), next_ids.cpu(), 50)
    monkeypatch.setattr(logit_lens, "scanned", lambda rows, actual: scan_with(kernel, rows, actual))
    found = logit_lens._predictions(logits, next_ids, 50)
    # A row that allows one token has no order among the others.
    assert torch.equal(found[0][[0, 2, 3]].cpu(), expected[0][[0, 2, 3]])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.allclose(ours.cpu().double(), theirs.double(), rtol=1e-5, atol=0)


def test_logits_in_main_memory_are_not_scanned() -> None:
    assert scanned(torch.zeros(2, 100), torch.zeros(2)) is None


def test_a_kernel_that_cannot_be_compiled_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        """A kernel that needs a compiler."""

        tries = 0

        @property
        def BLOCK(self) -> int:  # noqa: N802
            self.tries += 1
            raise RuntimeError("Failed to find C compiler.\nSet CC.")

    class OnGpu(torch.Tensor):
        """A tensor that says that it is on a GPU."""

        is_cuda = True

    broken = Broken()
    monkeypatch.setattr(vocabulary_scan, "_without", [])
    monkeypatch.setattr(views, "vocabulary_kernel", broken, raising=False)
    logits = torch.zeros(2, 100).as_subclass(OnGpu)
    assert scanned(logits, torch.zeros(2)) is None
    assert scanned(logits, torch.zeros(2)) is None
    assert broken.tries == 1
    assert vocabulary_scan._without == ["Failed to find C compiler."]
