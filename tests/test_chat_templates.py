"""Chat templates of published models, and templates with one odd trait each: no text is lost, and responses are read
where the template puts them."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from tests import tiny
from tlcapture.captures.capture import Capture
from tlcapture.doctor.checks import check_bos, probe_prompts
from tlcapture.errors import InputError
from tlcapture.extraction.examples import Example, read_examples
from tlcapture.extraction.prepared_examples import NEW_TOKENS, prepare_examples
from tlcapture.extraction.readout import tokenize_example
from tlcapture.extraction.steering import SteeringScorer
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure
from tlcapture.models.loading import load_model, outline_model
from tlcapture.names import Trait
from tlcapture.prompts.chat_template import render_chat, stop_ids
from tlcapture.prompts.tokenization import TokenizedPrompt, place_response, tokenize
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout

BOS, EOS = 0, 1
PUBLISHED = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
SYSTEM = {"role": "system", "content": "You are a user."}  # words that templates write themselves
USER = {"role": "user", "content": "  Why is the sea salty?\n"}
ANSWER = {"role": "assistant", "content": "Rivers carry salt."}
THOUGHT = {"role": "assistant", "content": "<think>\nrivers, perhaps\n</think>\n\nRivers carry salt."}
AGAIN = {"role": "user", "content": "And lakes?"}

TURNS = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>{% endfor %}"
NO_SYSTEM_BRANCH = (
    "{{ bos_token }}{% for m in messages %}{% if m.role != 'system' %}<turn>{{ m.role }}\n{{ m.content }}</turn>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
RAISES_ON_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS
MISTRAL_V1 = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
SYSTEM_BEFORE_THE_LAST_USER = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.last and system is defined %}{{ system }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
FIRST_USER_MESSAGE = (
    "{% if messages[0].role == 'system' %}{% set prefix = messages[0].content + '\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<turn>{{ m.role }}\n{{ (prefix if loop.first else '') + m.content | trim }}</turn>{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<turn>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}</turn>{% endfor %}"
)
PARTS_WITHOUT_SYSTEM = RAISES_ON_SYSTEM.replace(TURNS, PARTS)
FIRST_PART = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content[0]['text'] }}</turn>{% endfor %}"
OPENS_THINKING = TURNS + "{% if add_generation_prompt %}<turn>assistant\n<think>\n{% endif %}"
EMPTY_THINKING = (
    "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}</turn>{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def tokenizer_with(template: Any, **options: Any) -> Any:
    return tiny.tokenizer(chat_template=template, **options)


def with_tokenizer(tokenizer: Any, engine: str = tiny.ENGINES[0]) -> Any:
    """The tiny Llama with another tokenizer."""
    model = copy.copy(tiny.model("llama", engine))
    model.tokenizer = tokenizer
    return model


def rendered(template: Any, *messages: dict[str, str], generation_prompt: bool = False) -> Any:
    return render_chat(tokenizer_with(template), messages, add_generation_prompt=generation_prompt)


def appending_eos(**options: Any) -> Any:
    """A tokenizer that puts BOS in front of what it encodes and appends EOS."""
    tokenizer = tiny.tokenizer(**options)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    assert tokenizer("a")["input_ids"][::2] == [BOS, EOS]
    return tokenizer


def metaspace(template: str | None = tiny.CHAT_TEMPLATE) -> Any:
    """A tokenizer with tokens for characters, and for letters after the `▁` that it also puts in front."""
    letters = [chr(code) for code in range(97, 123)]
    merged = [f"▁{letter}" for letter in letters]
    others = [chr(code) for code in range(33, 127) if chr(code) not in letters]
    vocabulary = {token: n for n, token in enumerate([*tiny.SPECIAL, "▁", "\n", *letters, *merged, *others])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", letter) for letter in letters]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(tiny.SPECIAL)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_render_every_message_where_its_span_says(name: str) -> None:
    tokenizer = tokenizer_with(PUBLISHED[name])
    for messages in ([USER], [SYSTEM, USER], [USER, ANSWER, AGAIN], [SYSTEM, USER, ANSWER]):
        found = render_chat(tokenizer, messages, add_generation_prompt=messages[-1]["role"] == "user")
        for message, span in zip(messages, found.spans, strict=True):
            assert found.text[span.start : span.stop].strip() == message["content"].strip()
        assert found.spans == tuple(sorted(found.spans))
        assert found.dropped == ()
        assert found.merged == (("system",) if name.startswith("gemma") and SYSTEM in messages else ())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_place_a_response_where_the_whole_conversation_has_it(name: str) -> None:
    tokenizer = tokenizer_with(PUBLISHED[name])
    contents: list[Any] = [USER["content"], ANSWER["content"]]
    if name in ("smolvlm", "llava_next"):
        contents = [[{"type": "text", "text": content}] for content in contents]
    messages = [{"role": role, "content": each} for role, each in zip(("user", "assistant"), contents, strict=True)]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    start = whole.rindex(ANSWER["content"])
    cut = whole[: start + len(ANSWER["content"])]
    expected = tokenizer(cut, add_special_tokens=False, return_offsets_mapping=True)
    placed = place_response(tokenizer, USER["content"], ANSWER["content"])
    assert list(placed.token_ids) == expected["input_ids"]
    assert placed.start == next(n for n, (first, _) in enumerate(expected["offset_mapping"]) if first >= start)


def test_thinking_of_earlier_turns_that_a_template_drops_is_listed() -> None:
    for name in ("qwen3", "deepseek_r1_distill", "glm4moe", "nemotron_3_nano"):
        found = rendered(PUBLISHED[name], SYSTEM, USER, THOUGHT, AGAIN, generation_prompt=True)
        assert "perhaps" not in found.text
        assert found.dropped == ("thinking of message 3",)
    kept = rendered(PUBLISHED["qwen3"], USER, THOUGHT)
    assert (kept.dropped, "rivers, perhaps" in kept.text) == ((), True)
    with pytest.raises(InputError, match="leaves out or alters the text of the assistant message"):
        rendered(PUBLISHED["deepseek_r1_distill"], USER, THOUGHT)


@pytest.mark.parametrize(
    "template", [NO_SYSTEM_BRANCH, RAISES_ON_SYSTEM, PARTS_WITHOUT_SYSTEM, FIRST_USER_MESSAGE, MISTRAL_V1]
)
def test_a_system_prompt_that_has_no_place_of_its_own_is_merged_and_said_so(template: str) -> None:
    found = rendered(template, SYSTEM, USER)
    assert found.merged == ("system",)
    assert found.text.index(SYSTEM["content"]) < found.text.index(USER["content"].strip())
    assert rendered(template, USER).merged == ()


def test_a_system_prompt_may_be_put_in_front_of_the_last_user_message() -> None:
    found = rendered(SYSTEM_BEFORE_THE_LAST_USER, SYSTEM, USER, ANSWER, AGAIN)
    texts = [found.text[span.start : span.stop] for span in found.spans]
    assert texts == [message["content"] for message in (SYSTEM, USER, ANSWER, AGAIN)]
    assert found.merged == ("system",)


@pytest.mark.parametrize("template", [PARTS, FIRST_PART, PARTS_WITHOUT_SYSTEM])
def test_a_template_of_content_parts_gets_them(template: str) -> None:
    found = rendered(template, USER, ANSWER)
    assert found.text == f"<turn>user\n{USER['content']}</turn><turn>assistant\n{ANSWER['content']}</turn>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content | lower }}{% endfor %}", "leaves out or alters the text of the user"),
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", "leaves out or alters the text of the user"),
        ("{% for m in messages[:1] %}{{ m.content }}{% endfor %}", "leaves out or alters the text of the user"),
        ("user assistant", "leaves out or alters the text of the user message"),
        ("{{ messages[1].content }}{{ messages[0].content }}", "leaves out or alters the text of the user message"),
        ("{{ 1 + 'a' }}", r"fails \(TypeError: unsupported operand"),
        ("{{ 1 // 0 }}", r"fails \(ZeroDivisionError: "),
        ("{{ nothing.at.all }}", r"fails \(UndefinedError: 'nothing' is undefined"),
        ("{% for m in messages %}", r"fails \(TemplateSyntaxError: "),
        ("{{ messages.append(1) }}", r"fails \(SecurityError: "),
        ("{% for i in range(10 ** 9) %}{% endfor %}", r"fails \(OverflowError: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"fails \(RecursionError: "),
        ("{{ raise_exception('only\non sundays') }}", r"refuses the prompt \(only\)"),
        (r"{{ '\ud800' }}", r"fails \(UnicodeEncodeError: "),
    ],
)
def test_a_template_that_fails_or_loses_text_is_refused_with_the_reason(template: str, reason: str) -> None:
    messages = [{"role": "user", "content": "Why IS the sea salty?"}, {"role": "user", "content": "And lakes?"}]
    with pytest.raises(InputError, match=f"the model's chat template {reason}.*: use --no-chat-template") as caught:
        rendered(template, *messages)
    assert "\n" not in str(caught.value)
    plain = tokenize(tokenizer_with(template), "hi", prompt_set="s", prompt_id="1", chat_template=False)
    assert plain.token_ids == (BOS, *tiny.tokenizer()("hi", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{{ range(99999) | map('string') | join }}" * 99,
    ],
)
def test_a_template_that_does_not_end_is_refused_and_stops_nothing_else(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcapture.prompts.chat_template.MAX_STEPS", 400_000)
    seen = []
    before = sys.gettrace()
    sys.settrace(trace := lambda frame, event, argument: seen.append(frame))
    try:
        with pytest.raises(InputError, match=r"template does not end within [\d,]+ steps: use --no-chat-template"):
            rendered(template + TURNS, USER)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert rendered(TURNS, *[USER, ANSWER] * 500).text.count("<turn>") == 1000


def test_a_text_that_the_template_itself_writes_does_not_stand_for_a_lost_message() -> None:
    template = "<turn>system\nYou are a helpful user.</turn>" + NO_SYSTEM_BRANCH
    found = rendered(template, {"role": "system", "content": "helpful"}, {"role": "user", "content": "user"})
    assert found.merged == ("system",)
    assert found.text.endswith("<turn>user\nhelpful\n\nuser</turn>")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | upper }}</turn>{% endfor %}",
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | list }}</turn>{% endfor %}",
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | reverse }}</turn>{% endfor %}",
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content[:2] }} {{ m.content | length }}</turn>{% endfor %}",
    ],
)
def test_a_text_that_is_altered_is_not_found_in_what_the_template_itself_writes(template: str) -> None:
    """The words of both messages are also the name of a role: each would be found there, and both at one place."""
    messages = [{"role": "system", "content": "user"}, {"role": "user", "content": "user"}]
    with pytest.raises(InputError, match=r"leaves out or alters the text of the (user|system) message"):
        rendered(template, *messages)


def test_a_text_that_the_template_writes_again_after_it_is_found_where_it_stands() -> None:
    chat = rendered(
        "{% for m in messages %}{{ m.content }}</{{ m.role }}>{% endfor %}", {"role": "user", "content": "user"}
    )
    assert (chat.text, chat.spans) == ("user</user>", ((0, 4),))


@pytest.mark.parametrize(
    "template",
    [
        "Topic: {{ messages[-1].content }}\n{{ turns }}",
        "Topic: {{ messages[0].content }}\n{{ turns }}",
        "{{ turns }}Reminder: {{ messages[-1].content }}\n",
        "{{ turns }}(Answer {{ messages[-1].content }} and {{ messages[-1].content }})",
        "{{ turns_with_echo }}",
        "Topic: {{ messages[0].content }}\n{{ turns_with_echo }}Reminder: {{ messages[-1].content }}\n",
        "{{ messages | length }} messages\n{{ turns_with_echo }}Reminder: {{ messages[0].content }}\n",
        "Topic: {{ messages[-1].content[:9] }}\n{{ turns }}",
    ],
)
@pytest.mark.parametrize("n_messages", [1, 2, 3])
def test_a_text_that_a_title_or_a_reminder_repeats_is_found_in_its_turn(template: str, n_messages: int) -> None:
    messages = [USER, ANSWER, AGAIN][:n_messages]
    turns = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>{% endfor %}"
    echo = turns.replace("{{ m.content }}", "{{ m.content }} ({{ m.content }})")
    chat = rendered(template.replace("{{ turns }}", turns).replace("{{ turns_with_echo }}", echo), *messages)
    for message, span in zip(messages, chat.spans, strict=True):
        assert span is not None
        assert chat.text[: span.start].endswith(f"<turn>{message['role']}\n")
        assert chat.text[slice(*span)] == message["content"]


def test_a_reminder_is_not_taken_for_the_turn_where_turns_have_no_header() -> None:
    turns = "{% for m in messages %}{{ m.content }}{{ '\\n' }}{% endfor %}"
    chat = rendered(turns + "Reminder: {{ messages[-1].content }}\n", USER)
    assert chat.spans == ((0, len(USER["content"])),)


def test_a_text_is_not_taken_from_a_title_where_its_turn_encodes_it() -> None:
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}"
    with pytest.raises(InputError, match="leaves out or alters the text of the user message"):
        rendered("Topic: {{ messages[-1].content }}\n" + turns, {"role": "user", "content": 'a "six"'})


def test_a_text_in_several_places_of_which_none_is_clearly_its_turn_is_refused() -> None:
    """The thinking of the last message alone is rendered: no longer conversation shows where it is in its turn."""
    thinking = "{{ m.content if loop.last else m.content.split('</think>') | last }}"
    template = f"{{% for m in messages %}}<turn>{thinking}</turn>{{% endfor %}}{{{{ messages[-1].content }}}}"
    answer = {"role": "assistant", "content": "<think>so</think>yes"}
    with pytest.raises(
        InputError, match="text of the assistant message in several places, any of which may be its turn"
    ):
        rendered(template, USER, answer)


def test_a_system_message_in_several_places_has_no_span() -> None:
    template = "{{ messages[0].content }}\n{% for m in messages %}<turn>{{ m.content }}</turn>{% endfor %}"
    messages = [{"role": "system", "content": "Be brief."}, USER]
    prompt = tokenize(tokenizer_with(template), "", prompt_set="s", prompt_id="1", messages=messages)
    assert [(span.role, span.reason) for span in prompt.spans if span.kind == "turn"] == [
        ("user", None),
        ("system", "the chat template writes its text in several places"),
    ]


@pytest.mark.parametrize("beginning", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_a_response_may_begin_with_a_thinking_tag_alone(beginning: str) -> None:
    messages = [USER, {"role": "assistant", "content": beginning}]
    prompt = tokenize(tiny.tokenizer(), "", prompt_set="set", prompt_id=1, messages=messages)
    assert prompt.text.endswith(f"<turn>assistant\n{beginning}")
    assert prompt.thinks == (beginning == "<think>\n")


def test_a_result_of_a_tool_that_is_encoded_is_where_the_rendering_changes_with_it() -> None:
    call, result = {"role": "user", "content": "roll"}, {"role": "tool", "content": 'a "six"'}
    turns = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson if m.role == 'tool' else m.content }}{% endfor %}"
    )
    chat = rendered(turns, call, result)
    (start, stop) = chat.spans[1]
    assert chat.text[start - 1 : stop + 1] == json.dumps('a "six"')
    with pytest.raises(
        InputError, match="leaves out or alters the text of the tool message"
    ):  # what is before it changes, too
        rendered(turns.replace("<{{ m.role }}>", "<{{ m.content | length }}>"), call, result)


def test_two_messages_of_one_text_are_not_found_at_one_place() -> None:
    template = "{% for m in messages | unique(attribute='content') %}<turn>{{ m.content }}</turn>{% endfor %}"
    found = rendered(template, {"role": "system", "content": "user"}, {"role": "user", "content": "user"})
    assert (found.text, found.merged) == ("<turn>user\n\nuser</turn>", ("system",))


def test_a_template_that_reads_the_start_and_end_of_a_text_is_checked_as_well() -> None:
    condition = "m.content.startswith('(') and m.content.endswith(')') and m.content | length == 6"
    template = f"{{% for m in messages %}}{{% if {condition} %}}<tool>{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
    assert rendered(template, {"role": "user", "content": "(tool)"}).text == "<tool>(tool)"


def test_of_several_templates_the_default_is_taken_and_its_absence_is_explained() -> None:
    several = {"default": TURNS, "tool_use": "{{ raise_exception('no') }}"}
    assert rendered(several, USER).text.startswith("<turn>user")
    tokenizer = tokenizer_with({"tool_use": TURNS, "rag": TURNS})
    with pytest.raises(InputError, match=r"several chat templates \(rag, tool_use\) and none is called default"):
        tokenize(tokenizer, "hi", prompt_set="s", prompt_id="1")
    assert tokenize(tokenizer, "hi", prompt_set="s", prompt_id="1", chat_template=False).token_ids[0] == BOS


def test_a_token_that_also_ends_the_thinking_does_not_end_a_response() -> None:
    """Copies of gpt-oss's template end a message with `<|end|>`, as the channel before the answer ends."""
    for end, expected in (("<|return|>", ["<eos>", "<|return|>"]), ("<|end|>", ["<eos>"])):
        tokenizer = tokenizer_with(PUBLISHED["gptoss"].replace("<|return|>", end))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|return|>"]})
        assert tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer, None))) == expected


def test_stop_ids_come_from_a_template_only_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.tokenizer()
    assert stop_ids(tokenizer, None) == {1, 3}
    assert stop_ids(tokenizer_with("{{ 1 // 0 }}"), None) == {1}
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *args, **options: pytest.fail("rendered"))
    assert stop_ids(tokenizer, None, chat_template=False) == {1}
    prompt = tokenize(tokenizer, "hi", prompt_set="s", prompt_id="1", chat_template=False)
    model = tiny.model("llama")
    (outcome,) = generate(model, [prompt], hooks=[], max_new_tokens=2)
    assert outcome.prompt is prompt


@pytest.mark.parametrize("position", ["auto", "last_prompt_token", "all_mean"])
@pytest.mark.parametrize("template", [OPENS_THINKING, EMPTY_THINKING, tiny.CHAT_TEMPLATE, PARTS])
def test_an_example_is_read_as_the_whole_conversation_cut_at_its_response(template: str, position: str) -> None:
    tokenizer = tokenizer_with(template)
    found = tokenize_example(tokenizer, Example(prompt="why?", response="because"), position=position)
    block = "<think>\n\n</think>\n\n" if template == EMPTY_THINKING else ""
    bos = "<bos>" if template == tiny.CHAT_TEMPLATE else ""
    newline = "\n" if template == tiny.CHAT_TEMPLATE else ""
    before = f"{bos}<turn>user\nwhy?</turn>{newline}<turn>assistant\n{block}"
    prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, "because"))
    if position == "last_prompt_token":
        assert (list(found.token_ids), found.start, found.stop) == (prompt, len(prompt) - 1, len(prompt))
    else:
        start = 1 if position == "all_mean" else len(prompt)
        assert (list(found.token_ids), found.start) == ([*prompt, *response], start)


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, MISTRAL_V1, None])
def test_prompt_and_response_are_tokenised_in_one_piece(template: str | None) -> None:
    """The ids are those of the whole text; `▁` stands in front of words that a space precedes, and of no others."""
    tokenizer = metaspace(template)
    found = tokenize_example(tokenizer, Example(prompt="why so", response="because of it"))
    texts = {
        tiny.CHAT_TEMPLATE: "<bos><turn>user\nwhy so</turn>\n<turn>assistant\nbecause of it",
        MISTRAL_V1: "<bos>[INST] why so [/INST]because of it",
        None: "<bos>why so\nbecause of it",
    }
    whole = tokenizer(texts[template], add_special_tokens=False)["input_ids"]
    assert list(found.token_ids) == whole
    pieces = tokenizer.convert_ids_to_tokens(found.token_ids[found.start :])
    assert pieces == [*"because", "▁o", "f", "▁i", "t"]
    prompt = tokenize(tokenizer, "why so", prompt_set="s", prompt_id="1")
    scorer = SteeringScorer(with_tokenizer(tokenizer), [prompt], [("because of it", "no")], new_tokens=2)
    assert tokenizer.convert_ids_to_tokens(scorer._positive.rows[0][1:]) == pieces


def test_a_tokenizer_without_offsets_gives_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    for tokenizer in (metaspace(), metaspace(None), tiny.tokenizer()):
        with_offsets = place_response(tokenizer, "why so", " because of it ")
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        assert place_response(tokenizer, "why so", " because of it ") == with_offsets
        monkeypatch.undo()


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, None])
def test_an_eos_that_the_tokenizer_appends_is_nowhere_and_bos_is_there_once(template: str | None) -> None:
    tokenizer = appending_eos(chat_template=template)
    prompt = tokenize(tokenizer, "hi", prompt_set="s", prompt_id="1")
    reading = tokenize_example(tokenizer, Example(prompt="hi", response="there"))
    bare = tokenize_example(tokenizer, Example(text="hi there"))
    for ids in (prompt.token_ids, reading.token_ids, bare.token_ids):
        assert (ids.count(BOS), ids.count(EOS), ids[0]) == (1, 0, BOS)
    assert tokenizer.decode(reading.token_ids[reading.start :]) == "there"
    assert tokenize(tokenizer, "<bos>hi", prompt_set="s", prompt_id="1", chat_template=False).token_ids.count(BOS) == 1


def beyond_the_embedding() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<image>"])
    assert tokenizer("<image>", add_special_tokens=False)["input_ids"] == [tiny.VOCABULARY]
    return tokenizer


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_a_token_beyond_the_embedding_fails_its_own_prompt(engine: str) -> None:
    tokenizer = beyond_the_embedding()
    prompts = [
        tokenize(tokenizer, text, prompt_set="s", prompt_id=name)
        for name, text in (("bad", "an <image>"), ("good", "no image"))
    ]
    model = with_tokenizer(tokenizer, engine)
    found = {outcome.prompt.id: outcome for outcome in generate(model, prompts, hooks=[], max_new_tokens=2)}
    assert isinstance(found["bad"], Failure)
    expected = f"token '<image>' has the id {tiny.VOCABULARY}, but the model's embedding has {tiny.VOCABULARY} rows"
    assert expected in found["bad"].reason
    assert not isinstance(found["good"], Failure)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma"])
def test_a_checkpoint_without_a_tokenizer_is_refused_before_its_weights_are_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.hf_model(kind).save_pretrained(tmp_path)
    monkeypatch.setattr("tlcapture.models.loading.fetch_weights", lambda *args, **options: pytest.fail("read"))
    for load in (load_model, outline_model):
        with pytest.raises(InputError, match=r"has no tokenizer (files|vocabulary): copy tokenizer\.json") as caught:
            load(str(tmp_path))
        assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(InputError, match="has no tokenizer vocabulary"):
        load_model(str(tmp_path))


def test_doctor_reports_a_template_that_cannot_render_and_goes_on_without_it() -> None:
    tokenizer = tokenizer_with("{{ 1 // 0 }}")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        check_bos(tokenizer)
    assert [prompt.chat_template for prompt in probe_prompts(tokenizer)] == [False, False]


def folder_with(template: str, tmp_path: Path, tiny_folder: Path, tokenizer: Any = None) -> Path:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def template_files(**content: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        for name, text in content.items():
            path = folder / {"json": "chat_template.json", "own": "chat_template.jinja"}.get(
                name, f"additional_chat_templates/{name}.jinja"
            )
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"chat_template": text}) if name == "json" else text)

    return write


TEMPLATE_FILES: dict[str, tuple[Any, Callable[[Path], object], str]] = {
    "named": ([{"name": "default", "template": TURNS}, {"name": "rag", "template": "x"}], template_files(), "<turn>"),
    "named, without a default": ([{"name": "rag", "template": TURNS}], template_files(), "(rag) and none is called"),
    "named null": ([{"name": None, "template": TURNS}], template_files(), "(None) and none is called default"),
    "a file": (None, template_files(own=TURNS), "<turn>"),
    "a file beside another": ("x", template_files(own=TURNS), "<turn>"),
    "further files": (None, template_files(own=TURNS, tool_use="x"), "<turn>"),
    "further files alone": (
        None,
        template_files(tool_use=TURNS, rag="x"),
        "(rag, tool_use) and none is called default",
    ),
    "a default among further files": (None, template_files(default=TURNS, rag="x"), "<turn>"),
    "a processor's": (None, template_files(json=TURNS), "<turn>"),
    "a processor's, of parts": (None, template_files(json=PARTS), "<turn>"),
    "a processor's beside the tokenizer's": (TURNS, template_files(json="x"), "<turn>"),
    "a file with a byte order mark": (None, template_files(own=f"\ufeff{TURNS}"), "<turn>"),
    "a default with one": (None, template_files(default=f"\ufeff{TURNS}", rag="x"), "<turn>"),
    "a processor's with one": (None, template_files(json=f"\ufeff{TURNS}"), "<turn>"),
    "named, with one": ([{"name": "default", "template": f"\ufeff{TURNS}"}], template_files(), "<turn>"),
    "null": ([{"name": "default", "template": None}], template_files(), "chat template fails (TypeError: "),
    "a number": (3, template_files(), "chat template fails (TypeError: "),
    "broken": ([{"name": "default", "template": "{% if %}"}], template_files(), "fails (TemplateSyntaxError: "),
}


@pytest.mark.parametrize("case", TEMPLATE_FILES)
def test_the_default_of_all_template_files_is_taken_or_its_absence_is_one_line(
    case: str, tlcapture: Callable[..., Result], root: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    template, write, expected = TEMPLATE_FILES[case]
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    write(folder)
    words = ("--experiment", "e", "--prompt", "hi", "--model", folder, "--max-new-tokens", 1, "--no-project")
    done = tlcapture("capture", *words)
    if expected == "<turn>":
        assert done.exit_code == 0, done.output
        raw = root / "experiments/e/inference/raw/residual/adhoc/1.pt"
        assert Capture.open(raw).prompt.text == "<turn>user\nhi</turn>"
    else:
        (line,) = done.stderr.splitlines()
        assert (
            line.startswith("error: ")
            and expected in line
            and line.endswith('"use_chat_template": false in config.json')
        )


def test_a_capture_records_what_the_template_merged(
    tlcapture: Callable[..., Result], root: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    words = ("--experiment", "e", "--prompt", "hi", "--model", folder_with(NO_SYSTEM_BRANCH, tmp_path, tiny_folder))
    assert tlcapture("capture", *words, "--max-new-tokens", 2, "--system-prompt", "be kind").exit_code == 0
    capture = Capture.open(root / "experiments/e/inference/raw/residual/adhoc/1.pt")
    assert (capture.metadata["merged"], capture.metadata["system_prompt"]) == (["system"], "be kind")
    assert "be kind\n\nhi" in capture.prompt.text
    assert "dropped" not in capture.metadata


def test_a_broken_template_does_not_matter_without_it(
    tlcapture: Callable[..., Result], root: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    folder = folder_with("{{ 1 // 0 }}", tmp_path, tiny_folder)
    words = ("--experiment", "e", "--prompt", "hi", "--model", folder, "--max-new-tokens", 3)
    refused = tlcapture("capture", *words)
    assert refused.exit_code == 2
    assert "chat template fails (ZeroDivisionError: " in refused.stderr
    assert tlcapture("capture", *words, "--no-chat-template").exit_code == 0


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_capture_without_the_template_does_not_render_it_for_spans_either(
    tlcapture: Callable[..., Result], root: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(ENDLESS, tmp_path, tiny_folder)
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerFast, "apply_chat_template", lambda *args, **options: pytest.fail("rendered")
    )
    words = ("--experiment", "e", "--prompt", "hi", "--model", folder, "--max-new-tokens", 2, "--no-chat-template")
    result = tlcapture("capture", *words)
    assert result.exit_code == 0, result.output


def test_looking_for_markers_of_thinking_ends_with_a_template_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcapture.prompts.chat_template.MAX_STEPS", 200_000)
    for condition in ("m.reasoning_content is defined", "m.role == 'assistant'"):
        endless = f"{{% for m in messages %}}{{% if {condition} %}}{ENDLESS}{{% endif %}}{{% endfor %}}"
        tokenizer = tokenizer_with(TURNS + endless)
        assert tokenize(tokenizer, "hi", prompt_set="s", prompt_id="1").text == "<turn>user\nhi</turn>"


def test_extraction_names_the_example_with_a_token_beyond_the_embedding(
    tlcapture: Callable[..., Result], root: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    folder = root / "datasets/traits/c/t"
    folder.mkdir(parents=True)
    rows = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(4)]
    (folder / "negative.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows[2]["response"] = "an <image>"
    (folder / "positive.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = folder_with(tiny.CHAT_TEMPLATE, tmp_path, tiny_folder, beyond_the_embedding())
    result = tlcapture("extract", "--experiment", "e", "--traits", "c/t", "--model", model)
    assert result.exit_code != 0
    assert "example 'question 2': token '<image>' has the id" in result.stderr


@pytest.mark.parametrize("template", [OPENS_THINKING, tiny.CHAT_TEMPLATE])
def test_steering_scores_completions_where_the_template_places_them(template: str) -> None:
    """The oracle is Hugging Face's own likelihood of each completion in the whole conversation."""
    tokenizer = tokenizer_with(template)
    pairs = [("fine", "bad day"), ("a thing", "junk")]
    prompts: list[TokenizedPrompt] = [
        tokenize(tokenizer, text, prompt_set="s", prompt_id=text) for text in ("how are you?", "what")
    ]
    found = SteeringScorer(with_tokenizer(tokenizer), prompts, pairs, new_tokens=2).baseline()
    for number, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True)):
        costs = []
        for completion in pair:
            messages = [{"role": "user", "content": prompt.source_text}, {"role": "assistant", "content": completion}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text[: text.rindex(completion) + len(completion)], add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = tiny.hf_model("llama")(torch.tensor([ids])).logits[0].log_softmax(-1)
            n = len(completion)  # the tokenizer has one token per byte
            costs.append(-logs[len(ids) - n - 1 : -1].gather(1, torch.tensor(ids[-n:])[:, None]).mean())
        assert float(found.trait[number]) == pytest.approx(float((costs[1] - costs[0]).sigmoid()), abs=1e-4)


def test_generated_examples_are_read_after_the_generation_prompt(tmp_path: Path) -> None:
    """The tokens are those that Hugging Face's `generate` gives to the prompt."""
    folder = tmp_path / "datasets/traits/c/t"
    folder.mkdir(parents=True)
    for side in ("positive", "negative"):
        rows = [{"prompt": f"{side} question {n}"} for n in range(4)]
        (folder / f"{side}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = tokenizer_with(OPENS_THINKING)
    model = with_tokenizer(tokenizer)
    prepared = prepare_examples(Layout(tmp_path, "e"), model, read_examples(Datasets(tmp_path), Trait("c", "t")))
    for item, reading in zip(prepared.examples.items, prepared.readings, strict=True):
        messages = [{"role": "user", "content": item.example.prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        stops = sorted(stop_ids(tokenizer, model.generation_config))
        made = tiny.hf_model("llama").generate(prompt, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=stops)
        response = [token for token in made[0, prompt.shape[1] :].tolist() if token not in stops]
        assert list(reading.token_ids) == [*prompt[0].tolist(), *response]
        assert (reading.start, reading.position) == (prompt.shape[1], "response_mean")
