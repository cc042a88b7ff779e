"""A model distributed over several devices: captures equal those of one device."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from tests import tiny
from tests.test_parity import random_ids, relative
from tlcapture.errors import ModelError
from tlcapture.models.engines import hooked
from tlcapture.models.loading import Model, from_hugging_face, load_model
from tlcapture.models.streams import own_stream
from tlcapture.views.attention import attention_hooks
from tlcapture.views.logit_lens import logit_lens_view
from tlcapture.views.residual import residual_hooks

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@tiny.needs_hooked
def test_every_module_is_on_the_device_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` stands in for a second device."""

    from transformer_lens.utilities import multi_gpu

    tl = copy.deepcopy(tiny.model("gpt2", "hooked").tl)
    devices = [torch.device("cpu"), torch.device("cpu"), torch.device("meta")]
    monkeypatch.setattr(multi_gpu, "get_device_for_block_index", lambda layer, cfg: devices[layer])
    hooked.spread(tl)
    for name, value in [*tl.named_parameters(), *tl.named_buffers()]:
        on_second = name.startswith(("blocks.2.", "ln_final.", "unembed."))
        assert value.device.type == ("meta" if on_second else "cpu"), name


@tiny.needs_hooked
def test_blocks_are_distributed_evenly_starting_at_the_first_device() -> None:
    from types import SimpleNamespace

    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    cfg = SimpleNamespace(n_layers=26, n_devices=2, device="cuda:1")
    indices = [get_device_for_block_index(layer, cfg).index for layer in range(26)]
    assert indices == [1] * 13 + [2] * 13


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_too_few_devices_are_an_error(tiny_folder: Any, engine: str) -> None:
    count = torch.cuda.device_count() + 2
    with pytest.raises(ModelError, match=f"--n-devices {count}: requires that many CUDA devices, found"):
        load_model(str(tiny_folder), engine="bridge" if engine == "bridge" else "auto", n_devices=count)


def captured(model: Model) -> tuple[dict[str, Any], Any]:
    from tests.test_parity import run

    hooks = residual_hooks(model.n_layers, model.hook_names, attn_out=True)
    hooks += attention_hooks(model.n_layers, model.hook_names)
    first, second = run(model, [random_ids(9), random_ids(5, seed=1)], max_new_tokens=4)
    assert set(hooks) == set(first.cache)
    lens = logit_lens_view(
        lambda layer: first.cache[f"blocks.{layer}.hook_resid_post"], model.n_layers, first.token_ids, model.unembed
    )
    return {**first.cache, **{f"second {name}": value for name, value in second.cache.items()}}, lens.top_probs


@two_devices
@pytest.mark.parametrize("engine", ["hooked", "bridge"])
def test_captures_on_two_devices_equal_those_on_one(tiny_folder: Any, engine: str) -> None:
    one, two = (load_model(str(tiny_folder), engine=engine, device="cuda", n_devices=n) for n in (1, 2))
    assert len({parameter.device for parameter in two.tl.parameters()}) == 2
    (expected, expected_lens), (found, found_lens) = captured(one), captured(two)
    for name, value in expected.items():
        assert relative(found[name], value) < 1e-4, name
    assert relative(found_lens, expected_lens) < 1e-4


def test_the_option_is_passed_to_the_loader(tlcapture: Any, root: Any, tiny_folder: Any) -> None:
    result = tlcapture("capture", "--experiment", "exp", "--prompt", "x", "--model", tiny_folder, "--n-devices", 64)
    assert result.exit_code == 2
    assert "--n-devices 64: requires that many CUDA devices" in result.stderr
    assert not (root / "experiments").exists()


def test_a_model_in_memory_stays_on_one_device_by_default() -> None:
    model = from_hugging_face(copy.deepcopy(tiny.hf_model("gpt2")), tiny.tokenizer(), name="x")
    assert model.last_device.type == "cpu"


def test_threads_take_the_streams_of_those_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def make(device: torch.device) -> object:
        made.append(object())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(stream))
    device, taken, both = torch.device("cuda", 7), [], Barrier(2)

    def work() -> None:
        for _ in range(2):
            with own_stream(device) as stream:
                taken.append(stream)
        both.wait()  # two threads at a time have two streams

    for _ in range(3):
        threads = [Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(taken) == 12
    assert {id(each) for each in taken} == {id(each) for each in made}
    assert len(made) == 2
