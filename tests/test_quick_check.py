"""The quick check on loading: what an engine computes differently from Hugging Face is refused, once per checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import Result

from tests import tiny
from tlcapture.errors import ModelError
from tlcapture.models import loading
from tlcapture.models.checkpoints.checkpoint import cast
from tlcapture.models.deviation import deviation
from tlcapture.models.engines import bridge
from tlcapture.models.engines.base import Model
from tlcapture.models.loading import from_hugging_face, load_model
from tlcapture.models.quick_check import N_TOKENS, QuickReference, quick_check


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which nothing has been checked."""
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checked"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each run of the reference, as they are made."""
    found: list[torch.dtype] = []
    original = QuickReference.of

    def recorded(hf_model: Any) -> QuickReference:
        found.append(next(hf_model.parameters()).dtype)
        return original(hf_model)

    monkeypatch.setattr(QuickReference, "of", staticmethod(recorded))
    return found


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def hunyuan(folder: Path) -> str:
    """A checkpoint whose query and key norms TransformerLens 3 applies at another place than Hugging Face."""
    torch.manual_seed(0)
    config = transformers.HunYuanDenseV1Config(**tiny._GROUPED, head_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return saved(model, folder)


@pytest.fixture
def without_own_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerBridge with the adapters of TransformerLens alone, as released."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.supported_architectures.hunyuan_v1_dense import (
        HunYuanDenseV1ArchitectureAdapter,
    )

    bridge.register_adapters()
    adapters = {**ArchitectureAdapterFactory._adapters, "HunYuanDenseV1ForCausalLM": HunYuanDenseV1ArchitectureAdapter}
    monkeypatch.setattr(ArchitectureAdapterFactory, "_adapters", adapters)


@tiny.needs_hooked
@pytest.mark.usefixtures("without_own_adapters")
def test_an_architecture_that_transformerlens_computes_differently_is_refused_by_layer(tmp_path: Path) -> None:
    folder = hunyuan(tmp_path / "hunyuan")
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "on engine bridge computes something other than Hugging Face: the input of layer 1 deviates by" in message
    assert "tlcapture doctor" in message and "--no-check" in message and "\n" not in message
    assert load_model(folder, check=False).engine == "bridge"


def test_what_is_computed_as_hugging_face_does_passes(tmp_path: Path) -> None:
    assert load_model(hunyuan(tmp_path / "hunyuan")).engine == "bridge"


@tiny.needs_hooked
@pytest.mark.usefixtures("without_own_adapters")
def test_the_command_line_refuses_it_and_no_check_skips(tlcapture: Callable[..., Result], tmp_path: Path) -> None:
    folder = hunyuan(tmp_path / "hunyuan")
    sets = tmp_path / "datasets" / "inference"
    sets.mkdir(parents=True)
    (sets / "one.json").write_text(json.dumps({"name": "one", "prompts": [{"id": "a", "text": "Hi"}]}))
    words = ["capture", "--experiment", "e", "--prompt-set", "one", "--model", folder, "--max-new-tokens", "2"]
    refused = tlcapture(*words, "--no-project")
    assert refused.exit_code == 2 and "computes something other than Hugging Face" in refused.stderr
    assert tlcapture(*words, "--no-project", "--no-check").exit_code == 0


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_sound_model_passes_in_every_dtype(name: str, dtype: str, engine: str, tmp_path: Path) -> None:
    folder = saved(tiny.hf_model(name), tmp_path / name)
    assert load_model(folder, engine=engine, dtype=dtype).dtype == getattr(torch, dtype)


def test_a_passed_check_is_remembered_by_weights_config_engine_and_dtype(
    runs: list[torch.dtype], empty_cache: Path, tmp_path: Path
) -> None:
    folder = saved(tiny.hf_model("llama"), tmp_path / "llama")
    load_model(folder)
    load_model(folder)
    assert len(runs) == len(list(empty_cache.iterdir())) == 1
    load_model(folder, dtype="bfloat16")
    assert len(runs) == 2
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3  # the same weights, which another config computes with
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    load_model(folder)
    assert len(runs) == 3
    other = copy.deepcopy(tiny.hf_model("llama"))
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    load_model(saved(other, tmp_path / "other"))
    assert len(runs) == len(list(empty_cache.iterdir())) == 4


def test_other_versions_are_checked_again(
    runs: list[torch.dtype], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny.hf_model("llama"), tmp_path / "llama")
    load_model(folder)
    from tlcapture.models import quick_check as module

    found = module.installed
    newer = {"transformers": "99.0"}
    monkeypatch.setattr(module, "installed", lambda library: newer.get(library) or found(library))
    load_model(folder)
    assert len(runs) == 2


def test_a_failed_check_is_not_remembered(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny.hf_model("llama"), tmp_path / "llama")
    monkeypatch.setattr(loading, "from_hugging_face", _with_another_weight(loading.from_hugging_face))
    for _ in range(2):
        with pytest.raises(ModelError, match="the input of layer 2 deviates by"):
            load_model(folder)
    assert not empty_cache.exists()


def _with_another_weight(load: Callable[..., Model]) -> Callable[..., Model]:
    """`from_hugging_face` of a model of which one weight is changed first."""

    def changed(model: Any, *args: Any, **options: Any) -> Model:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight *= 1.5
        return load(model, *args, **options)

    return changed


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "file"))
    assert load_model(saved(tiny.hf_model("llama"), tmp_path / "llama")).n_layers == tiny.N_LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deviation_of_one_weight_at_one_layer_is_found_there(dtype: torch.dtype) -> None:
    source = copy.deepcopy(tiny.hf_model("llama", dtype))
    reference = QuickReference.of(source)
    with torch.no_grad():
        source.model.layers[1].mlp.down_proj.weight *= 1.5
    model = from_hugging_face(source, tiny.tokenizer(), name="tiny", engine=tiny.ENGINES[0])
    with pytest.raises(ModelError, match="the input of layer 2 deviates by"):
        quick_check(model, reference)


def test_the_reference_in_16_bits_is_exact_and_leaves_the_model_as_it_was() -> None:
    model = copy.deepcopy(tiny.hf_model("gemma2", torch.bfloat16))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    reference = QuickReference.of(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.bfloat16
    cast(model, torch.float32)
    with torch.no_grad():
        exact = model(torch.tensor([reference.token_ids]), output_hidden_states=True)
    torch.testing.assert_close(reference.logits, exact.logits[0])
    assert reference.rounding is not None and len(reference.rounding) == tiny.N_LAYERS + 1
    assert 0 < max(reference.rounding) < 0.1


def test_where_float32_does_not_fit_the_run_in_16_bits_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from tlcapture.models import quick_check as module

    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    reference = QuickReference.of(tiny.hf_model("llama", torch.bfloat16))
    assert reference.rounding is None
    quick_check(tiny.model("llama", tiny.ENGINES[0], torch.bfloat16), reference)


def test_the_prompt_avoids_ids_with_a_meaning() -> None:
    model = copy.deepcopy(tiny.hf_model("llama"))
    first = QuickReference.of(model).token_ids
    assert len(set(first)) == N_TOKENS and max(first) < tiny.VOCABULARY
    model.config.image_token_id = first[3]
    model.config.eos_token_id = [first[4], 1]
    assert not {first[3], first[4]} & set(QuickReference.of(model).token_ids)


def test_a_model_that_hugging_face_cannot_run_is_loaded_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(hf_model: Any) -> QuickReference:
        raise RuntimeError("not implemented for 'Half'\nmore")

    monkeypatch.setattr(QuickReference, "of", staticmethod(fails))
    with pytest.warns(UserWarning, match="is not compared with Hugging Face.*not implemented for 'Half'$"):
        load_model(saved(tiny.hf_model("llama"), tmp_path / "llama"))


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.usefixtures("without_own_adapters")
def test_doctor_reports_what_the_quick_check_refuses(tmp_path: Path) -> None:
    """Its own checks say more, so that a model that fails the quick check is loaded all the same."""
    from tlcapture.doctor.run import run_doctor
    from tlcapture.runs.display import Display
    from tlcapture.runs.model_loader import ModelLoader

    found = list(run_doctor(ModelLoader(hunyuan(tmp_path / "hunyuan"), Display())))
    verdict = {check.name: check.verdict for check in found}["raw basis"]
    assert verdict == ("failed" if "hooked" in tiny.ENGINES else "ok")


def test_the_deviation_is_that_of_the_worst_token() -> None:
    theirs = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert deviation(theirs + torch.tensor([[0.0, 0.0], [0.5, 0.0]]), theirs) == pytest.approx(0.5)
