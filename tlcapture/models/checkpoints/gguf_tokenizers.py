"""The tokenizer of a GGUF file, as llama.cpp reads it.

A file names the rule by which text is split into words before tokens are merged (`tokenizer.ggml.pre`). transformers
knows some names, and splits as GPT-2 does for all others, so that numbers, spaces and punctuation become other tokens
than those that the model was trained on. It also merges words that are tokens, puts a space in front of texts whatever
a file says, and cuts added tokens with other characters than those of its byte alphabet, such as DeepSeek's
`<｜User｜>`, into pieces. The rules are those of llama.cpp's `llama-vocab.cpp`, in the form of the original tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tlcapture.errors import ModelError

_KEY = "tokenizer.ggml."
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
        "a.x-4.0", "exaone4", "gigachat", "gpt-2", "granite-docling", "jais", "jina-de", "jina-es", "jina-v2-de",
        "jina-v2-es", "mellum", "modern-bert", "mpt", "olmo", "phi-2", "trillion",
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
_COMPOSED = ("command-r", "olmo", "qwen2", "qwen35")  # with accents joined to their letters first
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_CONTROL, _USER_DEFINED = 3, 4  # types of added tokens
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def note_on_splitting(source: Path) -> str | None:
    """What to know before relying on the tokens of a GGUF file; `None` if it names the rule that it needs."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    model, rule = ((field := reader.get_field(_KEY + name)) and field.contents() for name in ("model", "pre"))
    if model != "gpt2" or rule not in _BY_DEFAULT:
        return None
    return (
        f"{source}: it names no rule by which text is split into words (tokenizer.ggml.pre), so that it is split as "
        "GPT-2 does: a model of another kind gets other tokens: use a file that names it, or the original weights"
    )


def load_gguf_tokenizer(source: Path) -> Any:
    """The Hugging Face tokenizer of a GGUF file.

    Raises:
        ModelError: the file splits text into words by a rule that is not known here.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    reader = GGUFReader(source)
    stated = {
        name: field.contents()
        for name in ("model", "pre", "tokens", "token_type", "add_space_prefix", *_SPECIAL.values())
        if (field := reader.get_field(_KEY + name)) is not None
    }
    is_byte_level = stated.get("model") == "gpt2"
    rule = stated.get("pre") if is_byte_level and stated.get("pre") not in _BY_DEFAULT else None
    if rule is not None and rule not in _PATTERNS:
        raise ModelError(
            f"{source}: its text is split into words by the rule {rule!r}, which is not known here: use the "
            "original weights"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    before = json.dumps(state)
    if is_byte_level:
        _spell_added_tokens(state, stated)
        if (state["decoder"] or {}).get("type") != _BYTES["type"]:  # of an earlier transformers
            state["decoder"] = _BYTES
    if rule is not None:
        state["pre_tokenizer"] = _split(_PATTERNS[rule])
        state["model"]["ignore_merges"] = rule in _WORDS_FIRST
        if rule in _COMPOSED:
            state["normalizer"] = {"type": "NFC"}
    elif stated.get("model") == "llama" and stated.get("add_space_prefix") is False:
        _put_no_space_in_front(state)
    special = _special_tokens(stated)
    has_special = all(getattr(tokenizer, name) == token for name, token in special.items())
    return tokenizer if has_special and json.dumps(state) == before else _made_of(state, tokenizer, special)


def _special_tokens(stated: dict[str, Any]) -> dict[str, str]:
    """The special tokens of a file by their names in a tokenizer, without ids that it has no token for."""
    tokens = stated.get("tokens", ())
    ids = {name: stated[key] for name, key in _SPECIAL.items() if key in stated}
    return {name: tokens[number] for name, number in ids.items() if number < len(tokens)}


def _split(patterns: tuple[str, ...]) -> dict[str, Any]:
    """Splitting text by patterns, one after the other, and then spelling it in bytes: as `tokenizer.json` has it."""
    splits = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False} for each in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, {**_BYTES, "use_regex": False}]}


def _spell_added_tokens(state: dict[str, Any], stated: dict[str, Any]) -> None:
    """Give added tokens the spelling and number that they have in the file."""
    tokens, vocabulary = stated["tokens"], state["model"]["vocab"]
    spelled = {number: token for token, number in vocabulary.items()}
    added = {each["id"]: each for each in state["added_tokens"] if each["id"] < len(tokens)}
    for number, (token, kind) in enumerate(zip(tokens, stated.get("token_type", ()), strict=False)):
        if kind in (_CONTROL, _USER_DEFINED) and not (number in added and spelled.get(number, token) == token):
            vocabulary.pop(spelled.get(number), None)
            vocabulary[token] = number
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added[number] = {"id": number, "content": token, **flags, "special": kind == _CONTROL}
    state["added_tokens"] = [added[number] for number in sorted(added)]


def _put_no_space_in_front(state: dict[str, Any]) -> None:
    if (state["pre_tokenizer"] or {}).get("type") == "Metaspace":
        state["pre_tokenizer"]["prepend_scheme"] = "never"
        steps = (state["decoder"] or {}).get("decoders", [])
        steps[:] = [step for step in steps if step["type"] != "Strip"]


def _made_of(state: dict[str, Any], tokenizer: Any, special: dict[str, str]) -> Any:
    """A tokenizer like another one, with the parts of `state` and other special tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    options = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "chat_template")}
    backend = Tokenizer.from_str(json.dumps({**state, "post_processor": None}))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options, **special)
