"""A GGUF file is the model that it was written from, or refused: transformers leaves out much of what it states."""

from __future__ import annotations

import json
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from tests import tiny
from tests.gguf_writer import Vocabulary, write_gguf
from tlcapture.errors import ModelError
from tlcapture.models.checkpoints.checkpoint import quiet_loading
from tlcapture.models.checkpoints.gguf_files import load_gguf
from tlcapture.models.checkpoints.gguf_tokenizers import _PATTERNS, _split, load_gguf_tokenizer
from tlcapture.models.loading import load_model

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
    "width of heads": (lambda: transformers.LlamaConfig(**SMALL, head_dim=16), {}, {}),  # Mistral NeMo
    "width": (lambda: transformers.Qwen3Config(**SMALL, head_dim=16), {}, {}),
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
            r"weights that transformers does not load: blk\.0\.attn_norm\.bias$",
        ),
        ({"tensors": {"blk.0.ffn_up.scale": np.ones(1, np.float32)}}, r"does not load: blk\.0\.ffn_up\.scale$"),
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


def test_a_layer_that_predicts_tokens_further_on_is_left_out(tmp_path: Path) -> None:
    hf, ones = tiny.hf_model("llama"), np.ones((32, 64), np.float32)
    extra = {f"blk.{hf.config.num_hidden_layers}.{name}.weight": ones for name in ("nextn.eh_proj", "ffn_up")}
    with quiet_loading():
        load_gguf(write_gguf(tmp_path / "tiny.gguf", hf, tensors=extra))


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ Ġ", "1 2", "a b", "b c", "a bc"]
ADDED = ["<｜User｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<think>"]
BYTE_LEVEL = Vocabulary(
    [*ADDED, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)], MERGES, [3, 3, 3, 4, *[1] * (256 + len(MERGES))]
)
PIECES = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"]
SENTENCEPIECE = Vocabulary(PIECES, [], [2, 3, 3, *[1] * 6], "llama")


@pytest.mark.parametrize(
    ("vocabulary", "stated", "text", "tokens"),
    [
        (BYTE_LEVEL, {"pre": "default"}, "  12", ["Ġ", "Ġ", "12"]),
        (BYTE_LEVEL, {"pre": "smollm"}, "  12", ["ĠĠ", "1", "2"]),
        (BYTE_LEVEL, {"pre": "default"}, "abc", ["ab", "c"]),
        (BYTE_LEVEL, {"pre": "llama-bpe"}, "abc", ["abc"]),
        (BYTE_LEVEL, {"pre": "deepseek-v3"}, "a12", ["a", "12"]),
        (BYTE_LEVEL, {}, "<｜User｜><think>a<｜end▁of▁sentence｜>", [*ADDED[::3], "a", ADDED[2]]),
        (SENTENCEPIECE, {}, "ab", ["▁ab"]),
        (SENTENCEPIECE, {"add_space_prefix": False}, "ab", ["ab"]),
    ],
)
def test_a_text_is_cut_into_the_tokens_of_the_file_as_it_says(
    vocabulary: Vocabulary, stated: dict[str, Any], text: str, tokens: list[str], tmp_path: Path
) -> None:
    metadata = {f"tokenizer.ggml.{name}": value for name, value in stated.items()}
    path = write_gguf(tmp_path / "tiny.gguf", tiny.hf_model("llama"), metadata=metadata, vocabulary=vocabulary)
    with quiet_loading():
        load_gguf_tokenizer(path).save_pretrained(tmp_path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [vocabulary.tokens[number] for number in ids] == tokens
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert len(tokenizer) == len(vocabulary.tokens)


TEXTS = [
    "a  1 2024 b   33\n\n  x'S don't I'LL  \t\n é½ ² Ⅻ 12345678 don’t(…)—foo!!\n\nbar<|x|>",
    " 你好,世界。 １２３ `code` $3.50 a\r\nb\u00a0c HTTPServer camelCase  ",
]


def known_rules() -> dict[str, Any]:
    """The rules of some names, as others have them: the original tokenizers, and transformers."""
    from tokenizers import Regex
    from transformers.integrations.gguf import gguf_tokenizer_mapping
    from transformers.models.cohere import CohereTokenizer

    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2])
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_transformers = {
        name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), in_bytes])
        for name, pattern in getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {}).items()  # none in 5.17
    }
    cohere = CohereTokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer.pre_tokenizer
    return {**of_transformers, "gpt-2": as_gpt2, "smollm": digits, "starcoder": digits, "command-r": cohere}


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_split_into_words_as_others_do_by_that_rule(text: str) -> None:
    for rule, expected in known_rules().items():
        state = {**json.loads(Tokenizer(BPE()).to_str()), "pre_tokenizer": _split(_PATTERNS[rule])}
        splitting = Tokenizer.from_str(json.dumps(state)).pre_tokenizer
        assert splitting.pre_tokenize_str(text) == expected.pre_tokenize_str(text), rule


def test_a_file_whose_rule_is_not_known_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "k.gguf", tiny.hf_model("llama"), metadata={"tokenizer.ggml.pre": "kimi-k2"})
    with (
        quiet_loading(),
        pytest.raises(ModelError, match=r"split into words by the rule 'kimi-k2'"),
    ):
        load_gguf_tokenizer(path)


@pytest.mark.parametrize(("rule", "n_notes"), [(None, 1), ("default", 1), ("gpt-2", 0)])
def test_a_file_that_names_no_rule_says_so_on_every_load(rule: str | None, n_notes: int, tmp_path: Path) -> None:
    metadata = {} if rule is None else {"tokenizer.ggml.pre": rule}
    path = write_gguf(tmp_path / "x.gguf", tiny.hf_model("llama"), metadata=metadata, vocabulary=BYTE_LEVEL)
    notes: list[str] = []
    for _ in range(2):
        load_model(str(path), check=False, warn=notes.append)
    assert len(notes) == 2 * n_notes
    assert all("it names no rule by which text is split into words (tokenizer.ggml.pre)" in note for note in notes)


def test_the_embedded_model_reads_digits_one_by_one_and_the_spaces_before_them_together(smollm2: Any) -> None:
    """As SmolLM2's own tokenizer does, by digits and then as GPT-2."""
    ids = smollm2.tokenizer.encode("a  1 2024", add_special_tokens=False)
    assert smollm2.tokenizer.convert_ids_to_tokens(ids) == ["a", "ĠĠ", "1", "Ġ", "2", "0", "2", "4"]


@pytest.mark.parametrize("rule", ["command-r", "qwen2", "llama-bpe"])
def test_accents_are_joined_with_their_letters_where_the_original_tokenizer_does(rule: str, tmp_path: Path) -> None:
    """As CohereTokenizer and Qwen2Tokenizer of transformers do; Llama 3's has no normaliser."""
    metadata = {"tokenizer.ggml.pre": rule}
    path = write_gguf(tmp_path / "x.gguf", tiny.hf_model("llama"), metadata=metadata, vocabulary=BYTE_LEVEL)
    with quiet_loading():
        tokenizer = load_gguf_tokenizer(path)
    assert tokenizer.decode(tokenizer("e\u0301")["input_ids"]) == ("e\u0301" if rule == "llama-bpe" else "\u00e9")
