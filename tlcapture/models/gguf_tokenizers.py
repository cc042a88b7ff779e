"""Tokenizers of GGUF files, as llama.cpp reads them.

transformers splits texts in front of byte-level merges as GPT-2 does where it does not know the way that a file names,
merges pieces that are tokens, puts a space in front of texts whatever a file says, and cuts added tokens with other
characters than those of its byte alphabet, such as DeepSeek's `<｜User｜>`, into pieces. Here these are put right, and
other ways of splitting refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tlcapture.errors import ModelError

_KEY = "tokenizer.ggml."
# Names in `tokenizer.ggml.pre` of the two ways that are made here; the others are those of transformers.
_LIKE_GPT2 = (
    "a.x-4.0", "default", "exaone4", "gigachat", "gpt-2", "granite-docling", "jais", "jina-de", "jina-es",
    "jina-v2-de", "jina-v2-es", "mellum", "modern-bert", "mpt", "olmo", "phi-2", "trillion",
)  # fmt: skip
_DIGIT_BY_DIGIT = ("codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder")
# Names of those that take a whole piece that is a token before they merge.
_WHOLE_FIRST = (
    "falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0", "pixtral", "tekken",
)  # fmt: skip
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLIT_INTO_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]}
_CONTROL, _USER_DEFINED = 3, 4  # types of added tokens
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def load_gguf_tokenizer(source: Path) -> Any:
    """The tokenizer of a GGUF file.

    Raises:
        ModelError: the file splits texts in a way that transformers does not know.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    reader = GGUFReader(source)
    found = {
        name: field.contents()
        for name in ("model", "pre", "tokens", "token_type", "add_space_prefix", *_SPECIAL.values())
        if (field := reader.get_field(_KEY + name)) is not None
    }
    _check_split(source, found)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    before = json.dumps(state)
    if found.get("model") == "gpt2":
        _spell_added_tokens(state, found)
        if (state["decoder"] or {}).get("type") != _BYTES["type"]:  # of an earlier transformers
            state["decoder"] = _BYTES
        if found.get("pre") in _DIGIT_BY_DIGIT:
            state["pre_tokenizer"] = _SPLIT_INTO_DIGITS
        if found.get("pre") in _WHOLE_FIRST:
            state["model"]["ignore_merges"] = True
    elif found.get("model") == "llama" and found.get("add_space_prefix") is False:
        _put_no_space_in_front(state)
    tokens = found.get("tokens", ())
    special = {name: tokens[found[key]] for name, key in _SPECIAL.items() if found.get(key, len(tokens)) < len(tokens)}
    is_right = all(getattr(tokenizer, name) == token for name, token in special.items())
    return tokenizer if is_right and json.dumps(state) == before else _made_of(state, tokenizer, special)


def _check_split(source: Path, found: dict[str, Any]) -> None:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # an earlier transformers
        return
    name = found.get("pre", "default")
    if found.get("model") == "gpt2" and name not in (*GGUF_PRE_TOKENIZER_SPLITS, *_LIKE_GPT2, *_DIGIT_BY_DIGIT):
        raise ModelError(
            f"{source}: it splits texts into pieces as {name!r}, which transformers does not read from GGUF files: use "
            "the original weights"
        )


def _spell_added_tokens(state: dict[str, Any], found: dict[str, Any]) -> None:
    """Give added tokens the spelling and number that they have in the file."""
    tokens, vocabulary = found["tokens"], state["model"]["vocab"]
    spelled = {number: token for token, number in vocabulary.items()}
    added = {each["id"]: each for each in state["added_tokens"] if each["id"] < len(tokens)}
    for number, (token, kind) in enumerate(zip(tokens, found.get("token_type", ()), strict=False)):
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
