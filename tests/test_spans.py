"""Spans of prompts and responses, next to what Hugging Face's renderings and parser say, for published templates."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests import tiny
from tests.test_chat_templates import (
    AGAIN,
    ANSWER,
    PUBLISHED,
    SYSTEM,
    THOUGHT,
    TURNS,
    USER,
    metaspace,
    tokenizer_with,
    with_tokenizer,
)
from tlcapture import capture
from tlcapture.errors import InputError
from tlcapture.prompts.conversations import check_messages
from tlcapture.prompts.prompt_sets import Prompt
from tlcapture.prompts.spans import NO_OFFSETS, TextSpan, TokenSpan, check_spans, labels_of, spans_of_text
from tlcapture.prompts.template_args import has_switch, template_args
from tlcapture.prompts.thinking import RESPONSE_TEMPLATE, is_thinking, response_spans, thinks
from tlcapture.prompts.tokenization import TokenizedPrompt, token_texts, tokenize

CONVERSATIONS = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "three turns": [USER, ANSWER, AGAIN],
    "system and three turns": [SYSTEM, USER, ANSWER, AGAIN],
    "to be continued": [SYSTEM, USER, ANSWER],
}
IN_PARTS = ("smolvlm", "llava_next")  # these templates take contents as lists of parts
REASONING = ("glm4moe", "gptoss", "lfm2_2_5", "nemotron_3_nano", "qwen3", "qwen3_5_think")
TOOL_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo"}}}],
}
RESPONSE = {
    "start_anchor": "<turn>assistant\n",
    "fields": {"thinking": {"open": "<hm>", "close": "</hm>"}, "content": {"close": "</turn>"}},
}


def prompt_of(tokenizer: Any, messages: list[Any], **options: Any) -> TokenizedPrompt:
    found = messages[0]["content"] if messages[0]["role"] == "system" else None
    return tokenize(
        tokenizer, "", prompt_set="s", prompt_id="1", messages=messages, **{"system_prompt": found, **options}
    )


def texts_of(tokenizer: Any, token_ids: Any, spans: Any, kind: str = "turn") -> list[tuple[str | None, str]]:
    texts = token_texts(tokenizer, list(token_ids))
    return [(span.role, "".join(texts[slice(*span.found)])) for span in spans if span.kind == kind and span.found]


def rendering(tokenizer: Any, name: str, messages: list[Any], **options: Any) -> str:
    """What Hugging Face renders."""
    if name == "gemma" and messages[0]["role"] == "system":  # refuses one: it is merged with the user's message
        system, user, *others = messages
        messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]
    if name in IN_PARTS:
        messages = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def where_it_changes(render: Any, messages: list[Any], index: int) -> tuple[int, int]:
    """Where a rendering differs if the text of a message is replaced by a mark."""
    whole = render(messages)
    mark = "\U000f0000" * 3
    before, _, after = render(
        [{**each, "content": mark} if n == index else each for n, each in enumerate(messages)]
    ).partition(mark)
    assert whole.startswith(before)
    assert whole.endswith(after)
    return len(before), len(whole) - len(after)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_turn_has_the_tokens_that_change_with_its_text(name: str, conversation: str) -> None:
    tokenizer, messages = tokenizer_with(PUBLISHED[name]), CONVERSATIONS[conversation]
    found = prompt_of(tokenizer, messages)
    turns = [(span.role, span.found) for span in found.spans if span.kind == "turn"]
    assert [role for role, _ in turns] == [message["role"] for message in messages]
    is_open = messages[-1]["role"] == "assistant"

    def render(given: list[Any]) -> str:
        return rendering(tokenizer, name, given, add_generation_prompt=not is_open)

    offsets = tokenizer(found.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for index, (_, tokens) in enumerate(turns):
        start, stop = where_it_changes(render, messages, index)
        assert tokens is not None
        found_at = offsets[tokens[0]][0], offsets[tokens[1] - 1][1]
        # White space at the ends of a text that the template strips is no part of the rendering.
        assert found.text[slice(*found_at)] == found.text[start:stop]
        assert found_at == (start, stop)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_spans_of_published_templates_hold_the_texts_and_cover_every_token(name: str, conversation: str) -> None:
    tokenizer, messages = tokenizer_with(PUBLISHED[name]), CONVERSATIONS[conversation]
    found = prompt_of(tokenizer, messages)
    texts = [(role, text.strip()) for role, text in texts_of(tokenizer, found.token_ids, found.spans)]
    assert texts == [(message["role"], message["content"].strip()) for message in messages]
    assert all(kind is not None for kind, _ in labels_of(found.spans, len(found.token_ids)))
    check_spans(found.spans, len(found.token_ids))
    assert {span.role for span in found.spans if span.kind == "template"} == {None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_last_assistant_message_is_continued_as_hugging_face_does(name: str) -> None:
    tokenizer = tokenizer_with(PUBLISHED[name])
    for messages in ([USER, ANSWER], [USER, ANSWER, AGAIN, {"role": "assistant", "content": "Some are:"}]):
        expected = rendering(tokenizer, name, messages, continue_final_message=True)
        found = prompt_of(tokenizer, messages)
        assert found.text == expected
        assert list(found.token_ids) == tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert found.spans[-1].role == "assistant"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_result_of_a_tool_is_found_or_its_absence_is_refused(name: str) -> None:
    tokenizer, result = tokenizer_with(PUBLISHED[name]), 'sunny,\n"very" warm'
    messages = check_messages([USER, TOOL_CALL, {"role": "tool", "content": result}])
    if name in ("cohere2", "gemma", "gemma3", "llava_next", "phi3", "phi3_5"):
        with pytest.raises(InputError, match=r"leaves out or alters the text of the tool|refuses|fails"):
            prompt_of(tokenizer, list(messages))
        return
    found = prompt_of(tokenizer, list(messages))
    (text,) = [text for role, text in texts_of(tokenizer, found.token_ids, found.spans) if role == "tool"]
    encoded = 'sunny,\\n\\"very\\" warm'
    assert text in (result, encoded, f'"{encoded}"')
    (call,) = [span for span in found.spans if span.role == "assistant"]
    assert (call.found, call.reason) == (None, "it has no text")


def test_a_key_of_a_message_that_the_template_does_not_read_is_listed_as_dropped() -> None:
    found = prompt_of(tiny.tokenizer(), [USER, TOOL_CALL, {"role": "tool", "content": "sunny", "name": "weather"}])
    assert found.dropped == ("tool_calls of message 2", "name of message 3")


def test_a_text_and_a_conversation_of_that_text_are_the_same_prompt() -> None:
    for template in (tiny.CHAT_TEMPLATE, None):
        tokenizer = tiny.tokenizer(chat_template=template)
        options: dict[str, Any] = {"prompt_set": "s", "prompt_id": "1"}
        for system in (None, "be kind"):
            messages = [{"role": "user", "content": "hi"}]
            whole = [{"role": "system", "content": "x"}, *messages] if system else messages
            text = tokenize(tokenizer, "hi", system_prompt=system, **options)
            for given_messages in (messages, whole):
                found = tokenize(tokenizer, "", messages=given_messages, system_prompt=system, **options)
                assert (found.token_ids, found.spans, found.text) == (text.token_ids, text.spans, text.text)


def test_a_prompt_with_spans_can_be_sent_to_another_process() -> None:
    tokenizer = tokenizer_with(PUBLISHED["qwen3"])
    found = prompt_of(tokenizer, [SYSTEM, USER], template_args=template_args(tokenizer, "off", {}))
    assert pickle.loads(pickle.dumps(found)) == found


def test_without_a_template_the_texts_are_turns_and_a_conversation_is_refused() -> None:
    tokenizer = tiny.tokenizer(chat_template=None)
    found = tokenize(tokenizer, "hi", prompt_set="s", prompt_id="1", system_prompt="be")
    assert [(span.kind, span.role, span.found) for span in found.spans] == [
        ("template", None, (0, 1)),  # BOS
        ("turn", "system", (1, 3)),
        ("template", None, (3, 5)),
        ("turn", "user", (5, 7)),
    ]
    with pytest.raises(InputError, match="prompt s/1: a conversation needs a chat template"):
        prompt_of(tokenizer, [USER, ANSWER])


def test_a_tokenizer_without_offsets_has_spans_where_its_tokens_make_up_the_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages = [SYSTEM, {"role": "user", "content": "why so"}, ANSWER, AGAIN]
    tokenizer, of_words = tiny.tokenizer(), metaspace(TURNS)
    with_offsets = prompt_of(tokenizer, messages).spans
    assert [text for _, text in texts_of(of_words, *ids_and_spans(of_words, messages))] == [
        each["content"] for each in messages
    ]
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert prompt_of(tokenizer, messages).spans == with_offsets
    lost = [{"role": "user", "content": "caf\u00e9"}]  # its bytes are no characters of their own
    assert prompt_of(tokenizer, lost).spans == (
        TokenSpan(kind="turn", role="user", start=None, stop=None, reason=NO_OFFSETS),
    )


def ids_and_spans(tokenizer: Any, messages: list[Any]) -> tuple[Any, Any]:
    found = prompt_of(tokenizer, messages)
    return found.token_ids, found.spans


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.data())
def test_a_token_belongs_to_the_span_with_most_of_its_characters(lengths: list[int], data: st.DataObject) -> None:
    edges = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    length = edges[-1]
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=5))})
    pieces = [
        TextSpan(start, stop, "turn", "user")
        for number, (start, stop) in enumerate(pairwise(cuts))
        if number % 2 == 0 and start < stop
    ]
    found = labels_of(spans_of_text(pieces, length, list(pairwise(edges))), len(lengths))
    owner = ["template"] * length
    for piece in pieces:
        owner[piece.start : piece.stop] = ["turn"] * (piece.stop - piece.start)
    segment = [sum(cut <= at for cut in cuts) for at in range(length)]
    for (kind, _), start, stop in zip(found, edges, edges[1:], strict=False):
        counts = {number: segment[start:stop].count(number) for number in segment[start:stop]}
        best = max(counts, key=lambda number: (counts[number], -number))
        assert kind == owner[segment.index(best)]


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        ({"kind": "turn", "role": "user", "start": 2, "stop": 2}, "tokens 2 to 2: expected at least one token"),
        ({"kind": "turn", "role": "user", "start": None, "stop": 3}, "start and stop: expected two numbers, or null"),
        ({"kind": "turn", "role": "user", "start": None, "stop": None}, "or null for both and a reason"),
        ({"kind": "turn", "role": "<b>", "start": 0, "stop": 3}, "role"),
        ({"kind": "verse", "role": None, "start": 0, "stop": 3}, "kind"),
    ],
)
def test_a_span_has_tokens_or_a_reason(span: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TokenSpan.model_validate(span)


# -- responses ------------------------------------------------------------------------------------


def of_response(tokenizer: Any, opening: str, response: str, *, stopped: bool = False) -> tuple[Any, Any]:
    """The texts of thinking and answer, and the markers."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    spans, markers = response_spans(tokenizer, opening, ids, token_texts(tokenizer, ids), 10, stopped=stopped)
    shifted = [span.model_copy(update={"start": span.start - 10, "stop": span.stop - 10}) for span in spans]
    assert all(kind is not None for kind, _ in labels_of(shifted, len(ids)))
    found = {}
    for kind in ("thinking", "answer"):
        of_kind = [ids[slice(*span.found)] for span in shifted if span.kind == kind]
        assert len(of_kind) <= 1
        found[kind] = tokenizer.decode(of_kind[0]) if of_kind else None
    return (found["thinking"], found["answer"]), markers


@pytest.mark.parametrize("name", REASONING)
def test_thinking_and_answer_are_found_where_the_template_renders_them(name: str) -> None:
    tokenizer = tokenizer_with(PUBLISHED[name])
    answered = {**ANSWER, "reasoning_content": "Rivers,\nperhaps?"}
    whole = rendering(tokenizer, name, [USER, answered])
    prompt = prompt_of(tokenizer, [USER])
    start = len(os.path.commonprefix([whole, prompt.text]))  # noqa: RUF071  characters are meant
    response = whole[start:]
    opening = prompt.opening[: len(prompt.opening) - (len(prompt.text) - start)]
    found, markers = of_response(tokenizer, opening, response[: response.index("salt.") + 5])
    assert found == (answered["reasoning_content"], ANSWER["content"])
    assert markers["markers"] == "reasoning_content"
    assert prompt.thinks
    cut = response[: response.index("perhaps")]
    assert of_response(tokenizer, opening, cut)[0] == ("Rivers,\n", None)
    ended = response[: response.index(ANSWER["content"])]
    assert of_response(tokenizer, opening, ended)[0] == (answered["reasoning_content"], None)


@pytest.mark.parametrize("name", ["glm4moe", "nemotron_3_nano", "qwen3", "qwen3_5_think"])
def test_with_thinking_off_the_response_is_the_answer(name: str) -> None:
    tokenizer = tokenizer_with(PUBLISHED[name])
    off = template_args(tokenizer, "off", {})
    prompt = prompt_of(tokenizer, [USER], template_args=off)
    assert prompt.text == rendering(tokenizer, name, [USER], add_generation_prompt=True, enable_thinking=False)
    assert not prompt.thinks
    assert prompt_of(tokenizer, [USER], template_args=template_args(tokenizer, "on", {})).thinks
    assert of_response(tokenizer, prompt.opening, "Rivers carry salt.")[0] == (None, "Rivers carry salt.")


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"glm4moe", "nemotron_3_nano", "qwen3", "qwen3_5_think"}))
def test_a_template_without_a_switch_for_thinking_says_so(name: str) -> None:
    with pytest.raises(InputError, match="the model's chat template has no switch for thinking"):
        template_args(tokenizer_with(PUBLISHED[name]), "off", {})


def test_values_for_a_template_have_to_be_read_by_it() -> None:
    tokenizer = tokenizer_with(PUBLISHED["gptoss"])
    assert template_args(tokenizer, None, {"reasoning_effort": "low"}) == {"reasoning_effort": "low"}
    assert "Reasoning: low" in prompt_of(tokenizer, [USER], template_args={"reasoning_effort": "low"}).text
    # The template has `message.thinking`, the words "analysis" and "Knowledge", and sets `message` itself.
    for name in ("reasoning_efort", "thinking", "analysis", "Knowledge", "message", "raise_exception"):
        with pytest.raises(InputError, match=f"--template-arg {name}: the model's chat template reads no value"):
            template_args(tokenizer, None, {name: "x"})
    for name in ("tokenize", "messages", "add_generation_prompt", "return_dict", "conversation"):
        with pytest.raises(InputError, match=f"--template-arg {name}: tlcapture sets it itself: leave it out"):
            template_args(tokenizer, None, {name: "x"})
    with pytest.raises(InputError, match="--thinking is for a chat template"):
        template_args(tiny.tokenizer(chat_template=None), "off", {})
    with pytest.raises(InputError, match="are one switch"):
        template_args(tokenizer_with(PUBLISHED["qwen3"]), "off", {"enable_thinking": True})


def test_a_content_of_parts_of_text_is_their_text_and_a_developer_the_system() -> None:
    parts = [{"type": "text", "text": "Why is "}, {"type": "input_text", "text": "the sea salty?"}]
    developer = {"role": "developer", "content": "Be brief."}
    assert check_messages([developer, {"role": "user", "content": parts}]) == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why is the sea salty?"},
    )
    for part in ({"type": "image_url", "image_url": {}}, {"type": "text"}, "text"):
        with pytest.raises(ValueError, match=r"message 1: content: part 2 is .*: expected {'type': 'text'"):
            check_messages([{"role": "user", "content": [parts[0], part]}])


@pytest.mark.parametrize("value", [float("nan"), {1}, lambda: None, "\ud800", {1: "x"}])
def test_what_metadata_cannot_record_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="message 1: 'x': expected a JSON value"):
        check_messages([{**USER, "x": value}])
    with pytest.raises(InputError, match="--template-arg tools: expected a JSON value"):
        template_args(tokenizer_with(PUBLISHED["qwen3"]), None, {"tools": [value]})


TAGGED = (  # each part between tags that occur elsewhere, too, as in Kimi K3
    "{% for m in messages %}<open>{{ m.role }}<sep>{% if m.role == 'assistant' %}{% if thinking is not false %}"
    "<open>think<sep>{{ m.reasoning_content }}<close>think<sep>{% endif %}<open>response<sep>{{ m.content }}"
    "<close>response<sep>{% else %}{{ m.content }}{% endif %}<close>{{ m.role }}<sep>{% endfor %}"
    "{% if add_generation_prompt %}<open>assistant<sep><open>{{ 'think' if thinking is not false else 'response' }}"
    "<sep>{% endif %}"
)
IN_WORDS = (  # without tags, as in Apriel 1.6
    "{% for m in messages %}<turn>{{ m.role }}\n{% if m.reasoning_content %}My reasoning steps:\n"
    "{{ m.reasoning_content }}\n[BEGIN FINAL RESPONSE]\n{% endif %}{{ m.content }}</turn>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\nMy reasoning steps:\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "thinking", "response", "expected"),
    [
        (TAGGED, True, "So.<close>think<sep><open>response<sep>Yes.<close>response<sep>", ("So.", "Yes.")),
        (TAGGED, False, "Yes.<close>response<sep><close>assistant<sep>", (None, "Yes.")),
        (IN_WORDS, True, "So.\n[BEGIN FINAL RESPONSE]\nYes.", ("So.", "Yes.")),
    ],
)
def test_markers_may_be_several_tags_or_words(
    template: str, thinking: bool, response: str, expected: tuple[str | None, str | None]
) -> None:
    tokenizer = tokenizer_with(template)
    prompt = prompt_of(tokenizer, [USER], template_args={} if thinking else {"thinking": False})
    found, markers = of_response(tokenizer, prompt.opening, response)
    assert (found, markers["markers"], prompt.thinks) == (expected, "reasoning_content", thinking)
    assert not is_thinking(tokenizer, prompt.opening, response)
    opened = {TAGGED: "<open>think<sep>", IN_WORDS: "My reasoning steps:"}  # no more than what opens the thinking
    assert markers["open"] == opened[template]


def test_a_response_after_a_closing_marker_alone_is_the_answer() -> None:
    """GLM-4.7 closes thinking in the prompt without opening it, where it is off."""
    template = (
        "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}"
        "</think>{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{{ '</think>' if enable_thinking is false else '<think>' }}"
        "{% endif %}"
    )
    for switch in (True, False):
        prompt = prompt_of(tokenizer_with(template), [USER], template_args={"enable_thinking": switch})
        assert prompt.thinks is switch


def test_a_template_that_closes_thinking_only_where_it_is_off_makes_the_model_think() -> None:
    """SmolLM3's renders no `reasoning_content`, and leaves opening the thinking to the model."""
    template = TURNS + (
        "{% if add_generation_prompt %}<turn>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n"
        "{% endif %}{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    assert prompt_of(tokenizer, [USER]).thinks
    assert not prompt_of(tokenizer, [USER], template_args={"enable_thinking": False}).thinks
    assert not prompt_of(tokenizer_with(TURNS), [USER]).thinks


def test_instructions_to_think_make_a_model_think() -> None:
    """Granite 3.3's template writes them where thinking is on and there is no other system prompt."""
    asks = "Write your thoughts between <think></think> and your response between <response></response>."
    template = (
        "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}{% set rest = messages[1:] %}"
        f"{{% else %}}{{% set said = 'You help.' + (' {asks}' if thinking else '') %}}{{% set rest = messages %}}"
        "{% endif %}<turn>system\n{{ said }}</turn>" + TURNS.replace("in messages", "in rest")
    )
    tokenizer = tokenizer_with(template)
    on = {"template_args": template_args(tokenizer, "on", {})}
    assert prompt_of(tokenizer, [USER], **on).thinks
    assert not prompt_of(tokenizer, [USER]).thinks
    assert not prompt_of(tokenizer, [{**USER, "content": asks}]).thinks
    assert not prompt_of(tokenizer, [SYSTEM, USER], **on).thinks
    assert prompt_of(tokenizer, [{**SYSTEM, "content": asks}, USER]).thinks


@pytest.mark.parametrize("tags", [("<|channel>thought\n", "<channel|>"), ("<thought>", "</thought>")])
def test_thinking_of_an_earlier_message_that_its_template_takes_out_is_dropped(tags: tuple[str, str]) -> None:
    template = TURNS.replace("m.content", f"(m.content.split({tags[1]!r}) | last)")
    answer = {"role": "assistant", "content": f"{tags[0]}so{tags[1]}yes"}
    assert prompt_of(tokenizer_with(template), [USER, answer, AGAIN]).dropped == ("thinking of message 2",)


def test_channels_other_than_analysis_are_the_answer() -> None:
    tokenizer, opening = tokenizer_with(PUBLISHED["gptoss"]), "<|end|><|start|>assistant"
    response = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"x": 1}<|call|>'
    )
    assert of_response(tokenizer, opening, response)[0] == ("Hm.", '{"x": 1}')
    assert of_response(tokenizer, opening, "<|channel|>final<|message|>Yes<|return|>")[0] == (None, "Yes")
    # Some copies of the template begin the answer in the prompt.
    end = "<|channel|>final<|message|>"
    final = f"{PUBLISHED['gptoss'].rstrip().removesuffix('{%- endif -%}').rstrip()}{end}{{%- endif -%}}"
    prompt = prompt_of(tokenizer_with(final), [USER])
    assert (prompt.opening.endswith(end), prompt.thinks) == (True, False)
    assert of_response(tokenizer_with(final), prompt.opening, "Yes<|return|>")[0] == (None, "Yes")


@pytest.mark.parametrize(
    ("opening", "response", "expected"),
    [
        ("<turn>assistant\n<think>\n", "so\n</think>\n\nyes", ("so", "yes")),  # opened by the prompt
        ("<turn>assistant\n<think>\n\n</think>\n\n", "yes", (None, "yes")),  # closed by it
        ("<turn>assistant\n", "\n<think>so</think>yes", ("so", "yes")),
        ("<turn>assistant\n", "<think>\n\n</think>\n\nyes", (None, "yes")),  # empty
        ("<turn>assistant\n", "write <think> for it", (None, "write <think> for it")),  # mentioned in an answer
        ("<turn>assistant\n", "[THINK]so[/THINK]yes", ("so", "yes")),
        (
            "<turn>assistant\n",
            "<|START_THINKING|>so<|END_THINKING|><|START_RESPONSE|>yes<|END_RESPONSE|>",
            ("so", "yes"),
        ),
        ("<turn>assistant\n", "<seed:think>so</seed:think>yes", ("so", "yes")),
        ("<turn>assistant\n", "◁think▷so◁/think▷yes", ("so", "yes")),
        ("<turn>assistant\n<thought>\n", "so\n</thought>\n\nyes", ("so", "yes")),  # EXAONE Deep
        ("<turn>assistant\n", "<|inner_prefix|>so<|inner_suffix|>yes", ("so", "yes")),  # Apertus
        ("<turn>assistant\n", "Here is my thought process: so\nHere's my response:\nyes", ("so", "yes")),  # Granite 3.2
        ("<turn>assistant\n", "yes. Here is my response: b", (None, "yes. Here is my response: b")),
        ("<turn>assistant\n", "<think>so</think>\n<response>yes</response>", ("so", "yes")),  # Granite 3.3
        ("<turn>assistant\n", "<think>so</think><response>ye", ("so", "ye")),
        ("<turn>assistant\n", "<think>so</think>a <response> is a tag", ("so", "a <response> is a tag")),
        ("<turn>assistant\n", "<response>yes</response>", (None, "<response>yes</response>")),  # without thinking
        ("<turn>assistant\n", "<thi", (None, "<thi")),
        ("<turn>assistant\n<think>\n", "\u6d77\u6c34\U0001f30a</think>\u76d0", ("\u6d77\u6c34\U0001f30a", "\u76d0")),
        ("", "yes", (None, "yes")),
        ("", "", (None, None)),
    ],
)
def test_markers_that_no_template_tells_of_are_those_of_the_table(
    opening: str, response: str, expected: tuple[str | None, str | None]
) -> None:
    found, markers = of_response(tiny.tokenizer(), opening, response)
    assert found == expected
    assert markers is None or markers["markers"] == "table"


def test_a_stop_token_is_part_of_no_text() -> None:
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer("yes", add_special_tokens=False)["input_ids"], 3]
    spans, _ = response_spans(tokenizer, "", ids, token_texts(tokenizer, ids), 5, stopped=True)
    assert [(span.kind, span.found) for span in spans] == [("answer", (5, 8)), ("template", (8, 9))]
    only = response_spans(tokenizer, "", [3], ["</turn>"], 5, stopped=True)[0]
    assert [(span.kind, span.found) for span in only] == [("template", (5, 6))]


@pytest.mark.parametrize(
    "response", ["<hm>so it is</hm>yes</turn>", "<hm>so it is", "yes</turn>", "<hm>a</hm>yes", "no <hm>b</hm>"]
)
def test_a_response_template_is_read_as_transformers_parses_it(response: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.response_template = RESPONSE
    prompt = prompt_of(tokenizer, [USER])
    parsed = tokenizer.parse_response(response, prefix=prompt.text)
    found, markers = of_response(tokenizer, prompt.opening, response)
    assert [(each or "").strip() for each in found] == [
        (parsed.get(each) or "").strip() for each in ("thinking", "content")
    ]
    assert markers == {"markers": RESPONSE_TEMPLATE, "open": "<hm>", "close": "</hm>"}
    assert thinks(tokenizer, prompt.opening)


# -- captures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_a_capture_of_a_conversation_is_one_of_its_rendering(engine: str) -> None:
    model = tiny.model("llama", engine)
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "Since "}]
    (found,) = capture(model, messages, max_new_tokens=4, temperature=0)
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    hf = tiny.hf_model("llama")
    expected = hf.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))[0].tolist()
    assert found.token_ids == expected
    assert found.metadata["messages"] == messages
    assert [(span.kind, span.role) for span in found.spans if span.kind != "template"] == [
        ("turn", "user"),
        ("turn", "assistant"),
        ("answer", "assistant"),
    ]
    with torch.no_grad():
        hidden = hf(torch.tensor([expected]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.residual(0).float(), hidden[1][0], atol=2e-3, rtol=2e-3)


def test_prompts_in_python_may_be_texts_and_conversations() -> None:
    model = tiny.model("llama")
    prompts = ["why?", [{"role": "user", "content": "why?"}], [SYSTEM, USER, ANSWER, AGAIN]]
    found = list(capture(model, prompts, max_new_tokens=3, temperature=0))
    assert sorted(each.prompt_id for each in found) == ["1", "2", "3"]
    one, other = (next(each for each in found if each.prompt_id == prompt_id) for prompt_id in ("1", "2"))
    assert one.token_ids == other.token_ids
    for alone in ({"role": "user", "content": "why?"}, Prompt(id="1", text="why?")):
        (same,) = capture(model, alone, max_new_tokens=3, temperature=0)
        assert same.token_ids == one.token_ids
    assert "messages" not in one.metadata
    for wrong, reason in (
        ([[{"role": "poet", "content": "x"}]], "role 'poet': expected one of system, user, assistant, tool"),
        ([[{"role": "user", "content": " "}]], "message 1: content is empty"),
        ([[{"role": "user", "content": ["x"]}]], "message 1: content: part 1 is 'str': expected"),
        ([[USER, {"role": "assistant", "content": ""}]], "the last assistant message is empty: leave it out"),
        ([[3.5]], "message 1: expected"),
    ):
        with pytest.raises(InputError, match=reason):
            list(capture(model, wrong))


def test_a_model_whose_template_makes_it_think_gets_more_tokens_by_default(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(PUBLISHED["qwen3"])
    model = with_tokenizer(tokenizer)
    (off,) = capture(model, "hi", temperature=0, thinking="off")
    assert (off.metadata["max_new_tokens"], off.metadata["template_args"]) == (50, {"enable_thinking": False})
    (on,) = capture(model, "hi", temperature=0)
    assert on.metadata["max_new_tokens"] == model.n_ctx - len(on.prompt.tokens)  # 1,024 do not fit
    opened = with_tokenizer(tokenizer_with(PUBLISHED["deepseek_r1_distill"]))
    (cut,) = capture(opened, "hi", temperature=0, max_new_tokens=4)
    assert cut.lacks_answer
    assert "answer" not in [span.kind for span in cut.spans]
    assert "ends within thinking, without an answer: raise --max-new-tokens" in caplog.text


def test_thinking_of_a_last_message_that_a_template_drops_is_refused() -> None:
    with pytest.raises(InputError, match="leaves out or alters the text of the assistant message"):
        prompt_of(tokenizer_with(PUBLISHED["deepseek_r1_distill"]), [USER, THOUGHT])


def test_a_response_of_template_tokens_alone_lacks_no_answer_where_nothing_marks_thinking() -> None:
    tokenizer = tokenizer_with(None)
    (made,) = capture(with_tokenizer(tokenizer), "hi", temperature=0, max_new_tokens=2)
    n_prompt, n_tokens = len(made.prompt.tokens), len(made.tokens)
    spans = (TokenSpan(kind="template", role=None, start=n_prompt, stop=n_tokens),)
    assert not replace(made, spans=spans).lacks_answer
    assert not has_switch(tokenizer, {})
