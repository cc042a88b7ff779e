"""Checkpoints of images and text: their text is captured, and loading them starts no process.

TransformerLens runs `pip install torchvision` where a checkpoint's processor cannot be loaded.
"""

from __future__ import annotations

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
from tlcapture.models.engines.booting import ProcessRefusedError, text_only
from tlcapture.models.loading import from_hugging_face, load_model
from tlcapture.views.residual import residual_hooks, residual_view

NAME = "gemma3_multimodal"
IDS = [0, *range(40, 70)]  # longer than the window of attention


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint whose processor cannot be loaded."""
    folder = tmp_path_factory.mktemp("models") / NAME
    tiny.hf_model(NAME).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    said = {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(AttributeError, match="boi_token"):
        transformers.AutoProcessor.from_pretrained(folder)
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been started; nothing is."""
    found: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        def start(*args: Any, **options: Any) -> Any:
            found.append(name)
            raise RuntimeError("a test starts nothing")

        return start

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "execv", "execve"):
        monkeypatch.setattr(os, name, recorded(f"os.{name}"))
    monkeypatch.setattr(subprocess.Popen, "__init__", recorded("subprocess.Popen"))
    return found


def test_a_checkpoint_whose_processor_cannot_be_loaded_starts_nothing_and_equals_hugging_face(
    folder: Path, started: list[str]
) -> None:
    model = load_model(str(folder))
    assert started == []
    assert (model.engine, model.n_layers, model.d_model) == ("bridge", tiny.N_LAYERS, tiny.D_MODEL)
    with torch.no_grad():
        theirs = tiny.hf_model(NAME)(torch.tensor([IDS]), output_hidden_states=True)
    stream = residual_view(teacher_force(model, IDS, residual_hooks(model.n_layers, model.hook_names)), model.n_layers)
    for layer in range(model.n_layers):
        torch.testing.assert_close(stream.at(layer, "residual_in"), theirs.hidden_states[layer][0], rtol=0, atol=1e-4)
    last = stream.at(model.n_layers - 1, "residual_out")
    torch.testing.assert_close(model.unembed(last), theirs.logits[0], rtol=1e-4, atol=1e-4)


def test_no_processor_is_loaded_even_where_one_could_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    for name in ("AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor"):
        loads = staticmethod(lambda *args, **options: asked.append(args))
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loads)
    before = transformers.AutoProcessor.from_pretrained
    assert load_model(str(folder)).tl.processor is None
    assert asked == []
    assert transformers.AutoProcessor.from_pretrained is before


STARTS: dict[str, Callable[[], Any]] = {
    "run": lambda: subprocess.run([sys.executable, "-c", ""]),
    "check_call": lambda: subprocess.check_call([sys.executable, "-c", ""]),
    "popen": lambda: os.popen("true").close(),
    "system": lambda: os.system("true"),
    "posix_spawn": lambda: os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}), 0),
    "fork": lambda: os.fork() or os._exit(0),
    "exec": lambda: os.execv("/nonexistent", ["/nonexistent"]),
}


@pytest.mark.parametrize("way", list(STARTS))
def test_whatever_starts_a_process_within_transformerlens_refuses_the_model_in_one_line(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    monkeypatch.setattr(TransformerBridge, "boot_transformers", lambda *args, **options: STARTS[way]())
    with pytest.raises(ModelError) as caught:
        from_hugging_face(tiny.hf_model("llama"), tiny.tokenizer(), name="tiny", engine="bridge")
    said = str(caught.value)
    assert said.startswith("tiny: TransformerBridge does not run LlamaForCausalLM: loading a model starts no process")
    assert "\n" not in said


def test_processes_and_processors_of_others_are_not_disturbed(folder: Path) -> None:
    seen: list[object] = []

    def elsewhere() -> None:
        seen.append(subprocess.run([sys.executable, "-c", ""]).returncode)
        try:
            seen.append(transformers.AutoProcessor.from_pretrained(folder))
        except AttributeError:
            seen.append("asked")

    with text_only():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with pytest.raises(ProcessRefusedError):
            subprocess.run([sys.executable, "-c", ""])
        assert transformers.AutoProcessor.from_pretrained(folder) is None
    assert seen == [0, "asked"]
    assert subprocess.run([sys.executable, "-c", ""]).returncode == 0
