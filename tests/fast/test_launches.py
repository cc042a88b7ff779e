"""A decode step on a GPU has few kernel launches and waits for nothing; counted on fake tensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tlcapture.views import vocabulary_scan

pytestmark = tiny.needs_hooked


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/launches.py`, for a small model; a replay would be one launch, so nothing is recorded."""
    from tlcapture.models.fast import decoder

    path = Path(__file__).parents[2] / "benchmarks" / "launches.py"
    spec = importlib.util.spec_from_file_location("launches", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(decoder.Decoder, "records", False)
    monkeypatch.setitem(module.SHAPE, "vocab_size", 512)
    return module


def test_each_layer_adds_few_launches_and_no_blocking_point(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for n_layers in (2, 4):
        monkeypatch.setitem(launches.SHAPE, "num_hidden_layers", n_layers)
        seen.append(launches.counted(launches.is_residual))
    assert not seen[0].blocking and not seen[1].blocking
    per_layer = (seen[1].launches.total() - seen[0].launches.total()) / 2
    assert per_layer <= launches.MUST * 38  # each layer had 38 of the 1,003


def test_what_is_read_of_a_model_before_it_runs_takes_one_wait(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which biases are zero."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setitem(launches.SHAPE, "num_hidden_layers", 3)
    seen = launches.Seen()
    with FakeTensorMode(), launches.watching(seen), torch.no_grad():
        model = launches.fake_model()
        seen.is_on = True
        model.tl.fast_forward()
        seen.is_on = False
    assert seen.blocking == {"_to_copy": 1}
    assert seen.launches.total() < 15


def test_a_chunk_of_the_lens_waits_for_nothing_and_makes_no_logits_of_32_bits(
    launches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without: list[str] = []
    monkeypatch.setattr(vocabulary_scan, "_without", without)
    monkeypatch.setitem(launches.SHAPE, "vocab_size", 2**16)
    monkeypatch.setitem(launches.SHAPE, "num_hidden_layers", 1)
    seen = launches.counted_lens(512)
    assert seen.blocking == {"_to_copy": 4}, "the predictions of all chunks together"
    assert seen.launches["_to_copy"] == 3, "residuals, tokens and the largest logits"
    assert seen.launches["add_"] == 0, "the bias is a part of the product"
    # In a large vocabulary, exponentials (18) stay in the cache; products write 2, and a soft cap moves 12.
    assert seen.bytes.total() / (512 * 2**16) < 42
    assert not without, "tests after this one use the kernel where there is one"


def test_what_waits_for_the_device_is_seen(launches: Any) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen = launches.Seen()
    with FakeTensorMode(), launches.watching(seen):
        numbers = torch.zeros(4, device="cuda")
        seen.is_on = True
        bool(numbers.any())
        numbers.to("cpu")
        numbers + 1
        seen.is_on = False
    assert seen.blocking == {"_local_scalar_dense": 1, "_to_copy": 1}
    assert seen.launches["add"] == 1
