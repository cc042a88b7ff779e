"""Multimodal checkpoints: only text is captured, and loading them starts no process.

TransformerLens runs `pip install torchvision` if a checkpoint's processor cannot be loaded.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tlcapture.errors import ModelError
from tlcapture.generation.loop import teacher_force
from tlcapture.models.engines.booting import text_only
from tlcapture.models.loading import from_hugging_face, load_model
from tlcapture.models.processes import ProcessRefusedError
from tlcapture.views.residual import residual_hooks, residual_view

NAME = "gemma3_multimodal"
IDS = [0, *range(40, 70)]  # longer than the sliding window of attention


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint whose processor cannot be loaded."""
    folder = tmp_path_factory.mktemp("models") / NAME
    tiny.hf_model(NAME).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    config = {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(AttributeError, match="boi_token"):
        transformers.AutoProcessor.from_pretrained(folder)
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions through which the test tried to start a process; none is started."""
    found: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        def start(*args: Any, **options: Any) -> Any:
            found.append(name)
            raise RuntimeError("processes are blocked in this test")

        return start

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "execv", "execve"):
        monkeypatch.setattr(os, name, recorded(f"os.{name}"))
    monkeypatch.setattr(subprocess.Popen, "__init__", recorded("subprocess.Popen"))
    return found


def test_a_checkpoint_without_a_loadable_processor_equals_hugging_face_and_starts_no_process(
    folder: Path, started: list[str]
) -> None:
    model = load_model(str(folder))
    assert started == []
    assert (model.engine, model.n_layers, model.d_model) == (tiny.ENGINES[0], tiny.N_LAYERS, tiny.D_MODEL)
    with torch.no_grad():
        theirs = tiny.hf_model(NAME)(torch.tensor([IDS]), output_hidden_states=True)
    stream = residual_view(teacher_force(model, IDS, residual_hooks(model.n_layers, model.hook_names)), model.n_layers)
    for layer in range(model.n_layers):
        torch.testing.assert_close(stream.at(layer, "residual_in"), theirs.hidden_states[layer][0], rtol=0, atol=1e-4)
    last = stream.at(model.n_layers - 1, "residual_out")
    torch.testing.assert_close(model.unembed(last), theirs.logits[0], rtol=1e-4, atol=1e-4)


_WIDTHS = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16)
OTHERS: dict[str, Callable[[], Any]] = {
    "Gemma4": lambda: transformers.Gemma4Config(
        text_config={
            **tiny._GROUPED,
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 12,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        vision_config=tiny.VISION,
        image_token_id=10,
        boi_token_id=11,
        eoi_token_id=12,
    ),
    "Llama4": lambda: transformers.Llama4Config(
        text_config={**tiny._GROUPED, "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2},
        vision_config={**tiny.VISION, **_WIDTHS},
    ),
}


@pytest.mark.parametrize("family", list(OTHERS))
def test_checkpoints_of_other_families_start_no_process_and_equal_hugging_face(
    family: str, tmp_path: Path, started: list[str]
) -> None:
    torch.manual_seed(0)
    whole = getattr(transformers, f"{family}ForConditionalGeneration")(OTHERS[family]()).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.2)
    whole.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    kinds = {"image_processor_type": f"{family}ImageProcessor", "processor_class": f"{family}Processor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kinds))
    model = load_model(str(tmp_path))
    assert started == []
    ids = IDS[:8]
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        theirs = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
    stream = residual_view(teacher_force(model, ids, residual_hooks(model.n_layers, model.hook_names)), model.n_layers)
    for layer in range(model.n_layers):
        torch.testing.assert_close(stream.at(layer, "residual_in"), theirs[layer][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"])
def test_transformers_may_not_start_a_process_either(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = staticmethod(lambda *args, **options: subprocess.check_call(["pip", "install", "torchvision"]))
    monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", install)
    with pytest.raises(ModelError, match="loading a model must not start a process: pip install torchvision"):
        load_model(str(folder))


def test_a_loadable_processor_is_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    for name in ("AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor"):
        loads = staticmethod(lambda *args, **options: loaded.append(args))
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loads)
    before = transformers.AutoProcessor.from_pretrained
    whole = copy.deepcopy(tiny.hf_model(NAME))
    assert from_hugging_face(whole, tiny.tokenizer(), name=str(folder), engine="bridge").tl.processor is None
    assert loaded == []
    assert transformers.AutoProcessor.from_pretrained is before


PROCESS_STARTERS: dict[str, Callable[[], Any]] = {
    "run": lambda: subprocess.run([sys.executable, "-c", ""]),
    "check_call": lambda: subprocess.check_call([sys.executable, "-c", ""]),
    "popen": lambda: os.popen("true").close(),
    "system": lambda: os.system("true"),
    "posix_spawn": lambda: os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}), 0),
    "fork": lambda: os.fork() or os._exit(0),
    "exec": lambda: os.execv("/nonexistent", ["/nonexistent"]),
}


@pytest.mark.parametrize("starter", list(PROCESS_STARTERS))
def test_a_model_that_starts_a_process_when_it_is_loaded_is_refused_with_a_one_line_error(
    starter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    monkeypatch.setattr(TransformerBridge, "boot_transformers", lambda *args, **options: PROCESS_STARTERS[starter]())
    with pytest.raises(ModelError) as caught:
        from_hugging_face(tiny.hf_model("llama"), tiny.tokenizer(), name="tiny", engine="bridge")
    message = str(caught.value)
    expected = "tiny: TransformerBridge does not run LlamaForCausalLM: loading a model must not start a process: "
    assert message.startswith(expected)
    assert "\n" not in message


def test_other_threads_may_start_processes_and_load_processors(folder: Path) -> None:
    seen: list[object] = []

    def in_another_thread() -> None:
        seen.append(subprocess.run([sys.executable, "-c", ""]).returncode)
        try:
            seen.append(transformers.AutoProcessor.from_pretrained(folder))
        except AttributeError:
            seen.append("not blocked")

    with text_only():
        thread = threading.Thread(target=in_another_thread)
        thread.start()
        thread.join()
        with pytest.raises(ProcessRefusedError):
            subprocess.run([sys.executable, "-c", ""])
        assert transformers.AutoProcessor.from_pretrained(folder) is None
    assert seen == [0, "not blocked"]
    assert subprocess.run([sys.executable, "-c", ""]).returncode == 0
