"""A GGUF file is the model that it was written from, or refused: transformers leaves out much of what it states."""

from __future__ import annotations

from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import tiny
from tests.gguf_writer import write_gguf
from tlcapture.errors import ModelError
from tlcapture.models.checkpoints import quiet_loading
from tlcapture.models.gguf_files import load_gguf
from tlcapture.models.gguf_tokenizers import _PATTERNS, _splitting, gguf_tokenizer

SMALL = {**tiny._GROUPED, "num_hidden_layers": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = [1.0, 1.3, 1.7, 2.0]
LONGROPE = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": [4 * factor for factor in FACTORS]}


def llama3_factors() -> np.ndarray:
    """What llama.cpp divides frequencies by: as `convert_hf_to_gguf` computes it, by wavelength."""
    found = []
    for pair in range(4):
        wavelength = 2 * pi * 50_000.0 ** (pair / 4)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        middle = 1 / ((1 - smooth) / 8.0 + smooth)
        found.append(1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else middle)
    return np.array(found, np.float32)


def rope(base: float = 10_000.0, original: int = 64, **parameters: Any) -> dict[str, Any]:
    return {"rope_theta": base, "original_max_position_embeddings": original, **parameters}


SCALED = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
# The config, and what a file states of it.
STATED: dict[str, tuple[Any, dict[str, Any], dict[str, np.ndarray]]] = {
    "llama3": (
        lambda: transformers.LlamaConfig(**SMALL, rope_parameters=rope(50_000.0, 8192, **LLAMA3)),
        {"rope.freq_base": 50_000.0},
        {"rope_freqs.weight": llama3_factors()},
    ),
    "yarn": (
        lambda: transformers.Qwen2Config(**SMALL, rope_parameters=rope(rope_type="yarn", factor=4.0)),
        {"rope.freq_base": 10_000.0, "rope.scaling.type": "yarn", **SCALED},
        {},
    ),
    "longrope": (
        lambda: transformers.Phi3Config(**SMALL, original_max_position_embeddings=64, rope_parameters=rope(**LONGROPE)),
        {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 64},
        {
            "rope_factors_short.weight": np.array(FACTORS, np.float32),
            "rope_factors_long.weight": np.array([4 * factor for factor in FACTORS], np.float32),
        },
    ),
    "biases": (lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True), {}, {}),
    "window": (lambda: transformers.Phi3Config(**SMALL, sliding_window=8), {"attention.sliding_window": 8}, {}),
    "gemma2": (
        lambda: transformers.Gemma2Config(
            **SMALL,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attention.sliding_window": 8},
        {},
    ),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(
            **{**SMALL, "num_hidden_layers": 6},
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        {
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "attention.sliding_window": 8,
        },
        {},
    ),
}


def model_of(config: Any) -> Any:
    """A random model, whose norms and biases matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


@pytest.mark.parametrize("stated", STATED)
def test_a_file_is_the_model_that_it_was_written_from(stated: str, tmp_path: Path) -> None:
    config, metadata, tensors = STATED[stated]
    model, ids = model_of(config()), torch.tensor([[0, *range(40, 70)]])
    path = write_gguf(tmp_path / "tiny.gguf", model, metadata=metadata, tensors=tensors)
    with quiet_loading(), torch.no_grad():
        torch.testing.assert_close(load_gguf(path)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"without": ["blk.1.ffn_up.weight"]},
            r"it has no model\.layers\.1\.mlp\.up_proj\.weight, which would be random",
        ),
        (
            {"tensors": {"blk.0.attn_norm.bias": np.ones(32, np.float32)}},
            r"biases that .* does not load: blk\.0\.attn_norm",
        ),
        ({"tensors": {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}}, "other than those of Llama 3"),
        ({"metadata": {"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1}}, "of type 'yarn'"),
        ({"metadata": {"attention.sliding_window": 8}}, "a sliding window of 8 tokens"),
        ({"metadata": {"split.count": 2}}, "one of 2 parts: join them with 'llama-gguf-split --merge' first"),
        ({"metadata": {"final_logit_softcapping": 3.0}}, "final_logit_softcapping 3"),
    ],
)
def test_what_would_be_left_out_is_refused(written: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny.hf_model("llama"), **written)
    with quiet_loading(), pytest.raises(ModelError, match=rf"tiny\.gguf: .*{message}"):
        load_gguf(path)


TEXTS = [
    "a  1 2024 b   33\n\n  x'S don't I'LL  \t\n é½ ² Ⅻ 12345678 don’t(…)—foo!!\n\nbar<|x|>",
    " 你好,世界。 １２３ `code` $3.50 a\r\nb\u00a0c HTTPServer camelCase  ",
]


def known_rules() -> dict[str, Any]:
    """The rules of some names, as others have them: the original tokenizers, and transformers."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.models.cohere import CohereTokenizer

    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2])
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_transformers = {
        name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), in_bytes])
        for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items()
    }
    cohere = CohereTokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer.pre_tokenizer
    return {**of_transformers, "gpt-2": as_gpt2, "smollm": digits, "starcoder": digits, "command-r": cohere}


def test_text_is_split_into_words_as_a_file_says(tmp_path: Path) -> None:
    model, known = model_of(transformers.LlamaConfig(**SMALL)), known_rules()
    for rule in ("gpt-2", "smollm", "starcoder", "command-r", "llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35"):
        path = write_gguf(tmp_path / f"{rule}.gguf", model, tokenizer={"pre": rule})
        with quiet_loading():
            found = gguf_tokenizer(path).backend_tokenizer
        for text in TEXTS:
            split, expected = (each.pre_tokenize_str(text) for each in (found.pre_tokenizer, known[rule]))
            assert split == expected, rule
        # As in the CohereTokenizer and Qwen2Tokenizer of transformers.
        composed = found.normalizer is not None and found.normalizer.normalize_str("e\u0301") == "\u00e9"
        assert composed == (rule in ("command-r", "qwen2", "qwen35"))
        assert found.model.ignore_merges == (rule in ("llama-bpe", "tekken"))


def test_every_rule_that_transformers_knows_is_known(tmp_path: Path) -> None:
    for rule, expected in known_rules().items():
        for text in TEXTS:
            assert _splitting(_PATTERNS[rule]).pre_tokenize_str(text) == expected.pre_tokenize_str(text), rule


def test_a_file_whose_rule_is_not_known_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "k.gguf", model_of(transformers.LlamaConfig(**SMALL)), tokenizer={"pre": "kimi-k2"})
    with (
        quiet_loading(),
        pytest.raises(ModelError, match=r"split into words by the rule 'kimi-k2'"),
    ):
        gguf_tokenizer(path)


@pytest.mark.parametrize(("prefix", "expected"), [({}, "▁a▁b"), ({"add_space_prefix": False}, "a▁b")])
def test_a_sentencepiece_tokenizer_begins_with_a_space_unless_its_file_says_no(
    prefix: dict[str, bool], expected: str, tmp_path: Path
) -> None:
    words = {"model": "llama", **prefix}
    path = write_gguf(tmp_path / "s.gguf", model_of(transformers.LlamaConfig(**SMALL)), tokenizer=words)
    with quiet_loading():
        backend = gguf_tokenizer(path).backend_tokenizer
    ((found, _),) = backend.pre_tokenizer.pre_tokenize_str("a b")
    assert found == expected
    assert backend.decoder.decode([expected]) == "a b"
    assert backend.decoder.decode(["▁a"]) == ("a" if not prefix else " a")


def test_added_tokens_of_any_characters_are_whole_and_have_the_number_of_the_file(tmp_path: Path) -> None:
    added = ["<｜User｜>", "<｜end▁of▁sentence｜>"]
    path = write_gguf(tmp_path / "a.gguf", model_of(transformers.LlamaConfig(**SMALL)), added=added)
    with quiet_loading():
        gguf_tokenizer(path).save_pretrained(tmp_path / "saved")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = tokenizer("<｜User｜>ab<｜end▁of▁sentence｜>", add_special_tokens=False)["input_ids"]
    n = tiny.VOCABULARY
    assert ids == [n - 2, n - 4, n - 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (n, 1, 2)


def test_the_embedded_model_reads_digits_one_by_one_and_the_spaces_before_them_together(smollm2: Any) -> None:
    """As SmolLM2's own tokenizer does, by digits and then as GPT-2."""
    ids = smollm2.tokenizer.encode("a  1 2024", add_special_tokens=False)
    assert smollm2.tokenizer.convert_ids_to_tokens(ids) == ["a", "ĠĠ", "1", "Ġ", "2", "0", "2", "4"]
