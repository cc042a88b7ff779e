"""Chat templates, BOS, stop tokens and the texts of tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tlcapture.errors import InputError
from tlcapture.prompts.chat_template import render_chat, stop_ids
from tlcapture.prompts.tokenization import bos_policy, decode, token_texts, tokenize

BOS, EOS, TURN, END_OF_TURN = range(4)
GEMMA_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}</turn>\n{% endfor %}"
)


def ids_of(text: str, tokenizer: object, **options: object) -> tuple[int, ...]:
    return tokenize(tokenizer, text, prompt_set="set", prompt_id="1", **options).token_ids


def test_no_bos_is_added_to_a_rendered_chat_template() -> None:
    ids = ids_of("hi", tiny.tokenizer())
    assert ids[:2] == (BOS, TURN)
    assert ids.count(BOS) == 1


def test_a_base_model_gets_exactly_one_bos() -> None:
    tokenizer = tiny.tokenizer(chat_template=None)
    assert ids_of("hi", tokenizer)[0] == BOS
    assert ids_of("hi", tokenizer).count(BOS) == 1
    assert ids_of("<bos>hi", tokenizer) == ids_of("hi", tokenizer)


def test_no_bos_is_added_if_the_tokenizer_has_none() -> None:
    assert BOS not in ids_of("hi", tiny.tokenizer(chat_template=None, bos=False))


@pytest.mark.parametrize(
    ("ids", "template", "expected"),
    [
        ([BOS, 9, BOS], True, {"count": 1, "by": "chat template"}),
        ([BOS, BOS, 9], True, {"count": 2, "by": "chat template"}),
        ([BOS, 9], False, {"count": 1, "by": "tlcapture"}),
        ([9, BOS], True, {"count": 0, "by": None}),
        ([BOS], False, {"count": 1, "by": "tlcapture"}),
    ],
)
def test_the_bos_policy_records_how_many_bos_tokens_a_prompt_starts_with_and_what_added_them(
    ids: list[int], template: bool, expected: dict[str, object]
) -> None:
    assert bos_policy(tiny.tokenizer(), ids, chat_template=template) == expected
    none = bos_policy(tiny.tokenizer(chat_template=None, bos=False), ids, chat_template=template)
    assert none == {"count": 0, "by": None}


def test_the_chat_template_can_be_disabled_and_is_required_if_requested() -> None:
    assert TURN not in ids_of("hi", tiny.tokenizer(), chat_template=False)
    with pytest.raises(InputError, match="the model's tokenizer has none"):
        ids_of("hi", tiny.tokenizer(chat_template=None), chat_template=True)


def test_the_system_prompt_comes_before_the_user_text() -> None:
    prompt = tokenize(tiny.tokenizer(), "hi", prompt_set="s", prompt_id="1", system_prompt="be kind")
    assert prompt.text.index("system\nbe kind") < prompt.text.index("user\nhi")
    base = tokenize(tiny.tokenizer(chat_template=None), "hi", prompt_set="s", prompt_id="1", system_prompt="be kind")
    assert base.text == "be kind\n\nhi"


def test_the_system_prompt_is_merged_into_the_user_message_if_the_template_has_no_system_role() -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert "user\nbe kind\n\nhi" in render_chat(tiny.tokenizer(chat_template=GEMMA_LIKE), messages).text


def test_stop_ids_come_from_tokenizer_generation_config_and_chat_template() -> None:
    assert stop_ids(tiny.tokenizer(), None) == {EOS, END_OF_TURN}
    assert stop_ids(tiny.tokenizer(chat_template=None), None) == {EOS}
    assert stop_ids(tiny.tokenizer(), SimpleNamespace(eos_token_id=[EOS, 9])) == {EOS, END_OF_TURN, 9}


def test_parts_of_a_character_show_as_replacement_characters_and_decode_together() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    assert token_texts(tokenizer, ids) == ["\ufffd", "\ufffd"]
    assert decode(tokenizer, ids) == "é"


def test_every_space_of_a_sentencepiece_token_is_in_its_text() -> None:
    """Decoders of Llama 2 and others drop the first space of a token that is decoded on its own."""
    pieces = ["▁", "▁a", "▁▁▁▁", "▁▁b", "a", "▁▁\n"]
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    for steps in ([decoders.Strip(" ", 1, 0)], []):
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), *steps])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        assert token_texts(tokenizer, range(len(pieces))) == [piece.replace("▁", " ") for piece in pieces]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_decoding_the_ids_of_a_text_gives_the_text(text: str) -> None:
    if any(special in text for special in tiny.SPECIAL):
        return
    tokenizer = tiny.tokenizer(chat_template=None)
    assert decode(tokenizer, ids_of(text, tokenizer)) == text
