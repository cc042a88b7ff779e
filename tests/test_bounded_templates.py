"""Chat templates with one operation that would never end or take all memory; others render as in jinja's sandbox."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from tests.test_chat_templates import ANSWER, PUBLISHED, SYSTEM, TURNS, USER, rendered, tokenizer_with
from tlcapture.errors import InputError
from tlcapture.prompts.bounded_templates import bound_templates
from tlcapture.prompts.step_limit import step_limit

DOUBLED = "{% set n = namespace(x='a') %}{% for i in range(60) %}BODY{% endfor %}{{ n.x }}"
ENORMOUS = [
    "{{ 10 ** (10 ** 9) }}", "{{ (2 ** 31) ** (2 ** 31) }}", "{{ 'a' * 10 ** 12 }}", "{{ 10 ** 12 * 'a' }}",
    "{{ [0] * 10 ** 11 }}", "{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    DOUBLED.replace("BODY", "{% set n.x = n.x ~ n.x %}"), DOUBLED.replace("BODY", "{% set n.x = n.x + n.x %}"),
    DOUBLED.replace("BODY", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"), "{{ '%99999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 11, 1) }}", "{{ '%.99999999999f' % 1 }}", "{{ '%99999999999d' | format(1) }}",
    "{{ '{:99999999999d}'.format(1) }}", "{{ '{:{w}d}'.format(1, w=10 ** 11) }}",
    "{{ '{x:{w}d}'.format_map({'x': 1, 'w': 10 ** 11}) }}", "{{ 'x'.ljust(10 ** 11) }}", "{{ 'x'.zfill(10 ** 11) }}",
    "{{ '\t'.expandtabs(10 ** 9) }}", "{{ 'x'.encode().rjust(10 ** 11) }}", "{{ (5).to_bytes(10 ** 11, 'big') }}",
    "{{ 'x' | center(10 ** 11) }}", "{{ 'x' | center(width=99999999999) }}", "{{ 'x' | indent(10 ** 11) }}",
    "{% filter center(10 ** 11) %}x{% endfilter %}", "{{ ['x'] | map('center', 10 ** 11) | list }}",
    "{{ ['x'] | batch(10 ** 11, 'y') | list }}", "{{ 1.5 | round(10 ** 9, 'floor') }}",
    "{{ [1] | tojson(indent=10 ** 11) }}",
    "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}", "{{ ('a' * 10 ** 6).replace('', 'b' * 10 ** 6) }}",
    "{{ ('a' * 10 ** 6) | join('b' * 10 ** 6) }}", "{{ ('b' * 10 ** 6).join('a' * 10 ** 6) }}",
]  # fmt: skip


@pytest.mark.parametrize("template", ENORMOUS)
def test_a_template_with_one_operation_that_is_too_large_is_refused_at_once(template: str) -> None:
    begun = time.process_time()
    with pytest.raises(InputError, match=r"template makes more than 100,000,000 characters, items or digits in one op"):
        rendered("{% set n = namespace(x=9) %}" + template + TURNS, USER)
    assert time.process_time() - begun < 5


def test_a_template_whose_steps_take_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcapture.prompts.chat_template.step_limit", partial(step_limit, seconds=0.5))
    with pytest.raises(InputError, match=r"template does not end within 0\.5 s: use --no-chat-template"):
        rendered("{% for i in range(99999) %}{% set x = 'a' * 99999999 %}{% endfor %}" + TURNS, USER)


def rendered_or_refused(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        return repr(error)


HARMLESS = (
    "{{ 2 ** 10 * 3 + 1 }} {{ 'ab' * 3 }} {{ 3 * [1] }} {{ [1] + [2] }} {{ 'a' ~ 1 ~ none ~ 'b' }} {{ 7 % 4 }}"
    "{{ '%5.1f|%s|20240726000123' % (1.25, 'x') }}{{ 'call 20240726000123 {:>4}'.format(5) }}{{ '%3d' | format(4) }}"
    "{{ 'x'.ljust(3) }}{{ 'a,b'.split(',', 10 ** 12) }}{{ 'ab'.replace('a', 'cc') | center(9) | indent(2) }}"
    "{{ [1, 2] | join(', ') }}{{ {'a': 12345678901} | tojson(indent=2) }}{{ none | default(12345678901) }}"
    "{{ 12345678901 | string }}{{ 2.345 | round(2) }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ ', '.join(['a', 'b']) }}"
    "{% set t %}{{ 1 }}-{{ 2 }}{% endset %}{{ t }}{{ strftime_now('%Y') | length }}{{ missing ~ 'x' }}{{ -1 * 'x' }}"
    "{% macro tool(function, context) %}{{ function }}{{ context }}{% endmacro %}{{ tool(function='f', context=2) }}"
)


@pytest.mark.parametrize("template", [HARMLESS, *PUBLISHED.values()], ids=["harmless", *PUBLISHED])
def test_the_bounds_change_no_rendering(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to jinja's own sandbox, which transformers uses."""
    tokenizer = tokenizer_with(template)
    bound_templates()
    assert chat_template_utils.ImmutableSandboxedEnvironment is not ImmutableSandboxedEnvironment
    found = []
    for environment in (chat_template_utils.ImmutableSandboxedEnvironment, ImmutableSandboxedEnvironment):
        monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", environment)
        chat_template_utils._compile_jinja_template.cache_clear()
        for messages in (
            [USER],
            [SYSTEM, USER, ANSWER, USER],
            [{"role": "user", "content": [{"text": "hi", "type": "text"}]}],
        ):
            found.append(rendered_or_refused(tokenizer, messages))
    chat_template_utils._compile_jinja_template.cache_clear()
    assert found[:3] == found[3:]
