"""The tokenizer of a GGUF file, which splits text into words as the file says, before any tokens are merged.

A file names the rule (`tokenizer.ggml.pre`). transformers knows some names, and splits as GPT-2 does for all others, so
that numbers, spaces and punctuation become other tokens than those that the model was trained on. The rules are those
of llama.cpp's `llama-vocab.cpp`, in the form of the original tokenizers. transformers also cuts added tokens with other
characters than those of its byte alphabet, such as DeepSeek's `<｜User｜>`, into pieces, and gives others of them new
numbers: they get the spelling and number of the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tlcapture.errors import ModelError

_BY_DEFAULT = (None, "", "default")  # these files name no rule
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_NO_SENTENCE_MARKS = r" ?[^(\s|.,!?…。，、।۔،)]+"
# Patterns that split text one after the other, and the names of the rules. What a pattern does not match is split too.
_RULES: dict[tuple[str, ...], tuple[str, ...]] = {
    (_GPT2,): (
        "a.x-4.0", "exaone4", "gigachat", "gpt-2", "granite-docling", "jais", "mellum", "mpt", "olmo", "phi-2",
        "trillion",
    ),
    (r"\p{N}", _GPT2): ("codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"),
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_LINES_AND_SPACES}",): (
        "chatglm-bpe", "dbrx", "falcon-h1", "falcon3", "glm4", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3",
        "llama3", "midm-2.0", "pixtral", "smaug-bpe",
    ),
    (rf"{_WORDS}|\p{{N}}|{_PUNCTUATION}|{_LINES_AND_SPACES}",): (
        "deepseek-r1-qwen", "f2llmv2", "hunyuan", "kormo", "megrez", "qwen2", "stablelm2",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
        + _LINES_AND_SPACES,
    ): ("qwen35",),
    (rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES_AND_SPACES}",): ("seed-coder",),
    (rf"{_CASED % ('', '')}|\p{{N}}|{_SLASHES}|{_LINES_AND_SPACES}",): ("tekken",),
    (rf"{_CASED % (_ENDING, _ENDING)}|\p{{N}}{{1,3}}|{_SLASHES}|{_LINES_AND_SPACES}",): (
        "gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie",
    ),
    (r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]"): ("falcon",),
    (_NO_SENTENCE_MARKS,): ("bloom", "gpt3-finnish", "poro-chat"),
    (_NO_SENTENCE_MARKS, r"\p{N}"): ("viking",),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"): ("deepseek-coder",),
    (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|" + _LINES_AND_SPACES,
    ): ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
}  # fmt: skip
_PATTERNS = {name: patterns for patterns, names in _RULES.items() for name in names}
# A word that is a token is one, whatever the merges.
_WORDS_FIRST = (
    "falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0", "pixtral", "tekken",
)  # fmt: skip
_CONTROL, _USER_DEFINED = 3, 4  # types of added tokens
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_COMPOSED = ("command-r", "olmo", "qwen2", "qwen35")  # an accent of its own is first joined with its letter


def gguf_tokenizer(source: Path) -> Any:
    """The Hugging Face tokenizer of a GGUF file.

    Raises:
        ModelError: the file splits text by a rule that is not known here.
    """
    from gguf import GGUFReader
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import Metaspace
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    reader, backend = GGUFReader(source), tokenizer.backend_tokenizer

    def stated(name: str) -> Any:
        field = reader.get_field(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    kind, rule = stated("model"), stated("pre")
    if kind == "gpt2" and rule not in _BY_DEFAULT:
        if rule not in _PATTERNS:
            raise ModelError(
                f"{source}: its text is split into words by the rule {rule!r}, which is not known here: use the "
                "checkpoint that it was made from"
            )
        backend.pre_tokenizer = _splitting(_PATTERNS[rule])
        if rule in _COMPOSED:
            backend.normalizer = NFC()
        backend.model.ignore_merges = rule in _WORDS_FIRST
    starts_with_space = not (kind == "llama" and stated("add_space_prefix") is False)
    if not starts_with_space and isinstance(backend.pre_tokenizer, Metaspace):
        backend.pre_tokenizer.prepend_scheme = "never"
    tokens, state = stated("tokens") or [], json.loads(backend.to_str())
    before = json.dumps(state)
    if kind == "gpt2":
        _spell_added_tokens(state, tokens, stated("token_type") or [])
    if not starts_with_space:
        steps = (state["decoder"] or {}).get("decoders", [])
        steps[:] = [step for step in steps if step["type"] != "Strip"]  # of the space in front
    numbers = {name: stated(key) for name, key in _SPECIAL.items()}
    special = {name: tokens[n] for name, n in numbers.items() if n is not None and n < len(tokens)}
    is_right = all(getattr(tokenizer, name) == token for name, token in special.items())
    return tokenizer if is_right and json.dumps(state) == before else _made_of(state, tokenizer, special)


def _spell_added_tokens(state: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    """Give added tokens the spelling and number that they have in the file."""
    vocabulary = state["model"]["vocab"]
    spelled = {number: token for token, number in vocabulary.items()}
    added = {each["id"]: each for each in state["added_tokens"] if each["id"] < len(tokens)}
    for number, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind in (_CONTROL, _USER_DEFINED) and not (number in added and spelled.get(number, token) == token):
            vocabulary.pop(spelled.get(number), None)
            vocabulary[token] = number
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added[number] = {"id": number, "content": token, **flags, "special": kind == _CONTROL}
    state["added_tokens"] = [added[number] for number in sorted(added)]


def _made_of(state: dict[str, Any], tokenizer: Any, special: dict[str, str]) -> Any:
    """A tokenizer like another one, with the parts of `state` and other special tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    options = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "chat_template")}
    backend = Tokenizer.from_str(json.dumps({**state, "post_processor": None}))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options, **special)


def _splitting(patterns: tuple[str, ...]) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits = [Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
