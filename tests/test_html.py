"""HTML and terminal display: tokens are escaped, colours follow the scores, nothing is loaded from other hosts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browser
from tests.samples import HOSTILE, N_PROMPT, TOKENS, heads, predictions
from tlcapture.coloured_tokens import ColouredTokens, scale_of
from tlcapture.errors import InputError, StorageError

SCORES = [900.0, 1.0, -2.0, 4.0, -4.0, 0.0, 2.0, 1.0]


class Page(HTMLParser):
    """HTML as a browser parses it: elements, text and attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, name: str) -> list[str]:
        return [str(attrs[name]) for _, attrs in self.elements if name in attrs]


def shown() -> ColouredTokens:
    return ColouredTokens(TOKENS, N_PROMPT, SCORES, "tone/loud")


@pytest.mark.parametrize("html", [shown()._repr_html_(), ColouredTokens(TOKENS, N_PROMPT)._repr_html_()])
def test_hostile_tokens_are_escaped(html: str) -> None:
    page = Page(html)
    assert {tag for tag, _ in page.elements} == {"div", "span"}
    assert not page.attributes("onerror") + page.attributes("onmouseover") + page.attributes("src")
    assert HOSTILE in page.text
    assert TOKENS[6] in page.text
    assert TOKENS[7] in page.text
    assert "\x1b" not in html


def test_every_token_has_a_tooltip_with_its_index_and_score() -> None:
    titles = Page(shown()._repr_html_()).attributes("title")
    assert len(titles) == len(TOKENS)
    assert titles[3].startswith("3 response")
    assert "tone/loud +4" in titles[3]
    assert "attention sink" in titles[0]
    assert "+900" in titles[0]


def test_the_scale_is_symmetric_and_excludes_the_first_token() -> None:
    assert scale_of(SCORES) == 4
    assert scale_of([7.0]) == scale_of([1.0, 0.0]) == 1
    styles = Page(shown()._repr_html_()).attributes("style")[-len(TOKENS) :]
    colours = [re.search(r"rgba\((\d+),\d+,(\d+),([\d.]+)\)", style) for style in styles]
    red = [match and (int(match[1]) > int(match[2])) for match in colours]
    opacity = [match and float(match[3]) for match in colours]
    assert red[3] and not red[4]
    assert opacity[3] == opacity[4]  # equally far above and below 0
    assert opacity[6] == pytest.approx(opacity[3] / 2, abs=1e-3)
    assert opacity[5] == 0
    assert "dashed" in styles[0]


def test_a_newline_is_shown_as_a_symbol_and_breaks_the_line() -> None:
    assert "\u23ce\n" in Page(shown()._repr_html_()).text
    assert "\u23ce\n" in shown().ansi()
    assert "\n" not in repr(shown())


def test_without_a_trait_prompt_and_response_have_different_colours() -> None:
    styles = Page(ColouredTokens(TOKENS, N_PROMPT)._repr_html_()).attributes("style")[-len(TOKENS) :]
    assert len(set(styles[:N_PROMPT])) == len(set(styles[N_PROMPT:])) == 1
    assert styles[0] != styles[-1]


def test_terminal_output_has_colours_and_no_control_characters_of_the_text() -> None:
    ansi = shown().ansi()
    assert "\x1b[2J" not in ansi
    assert set(re.findall("\x1b\\[[^m]*m", ansi)) >= {"\x1b[0m"}
    assert re.sub("\x1b\\[[0-9;]*m", "", ansi).count("\x1b") == 0


def test_scores_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="2 scores for 1 tokens"):
        ColouredTokens(["a"], 1, [1.0, 2.0])
    with pytest.raises(ValueError, match="NaN"):
        ColouredTokens(["a"], 1, [float("nan")])


def test_attention_heads_embed_circuitsvis_and_load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **options: pytest.fail("network access"))
    html = heads()._repr_html_()
    page = Page(html)
    assert [tag for tag, _ in page.elements] == ["div", "script"]
    assert not page.attributes("src")
    assert "unpkg" not in html
    assert "AttentionHeads" in html
    data = html[html.rindex("CircuitsVis.render(") :]
    assert "<img" not in data
    assert data.count("</script") == 1  # the end of the element itself
    assert HOSTILE.replace("<", "\\u003c") in data


def test_attention_heads_without_circuitsvis_name_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcapture.explore.figures.attention_heads._circuitsvis", lambda: None)
    page = Page(heads()._repr_html_())
    assert "2 heads" in page.text
    assert "run 'pip install circuitsvis'" in page.text


def test_attention_heads_refuse_a_missing_head() -> None:
    assert heads().pattern(1).trace() == len(TOKENS)
    with pytest.raises(InputError, match=r"no head 2: layer 1 has heads 0 to 1"):
        heads().pattern(2)
    with pytest.raises(InputError, match="no head -1"):
        heads().pattern(-1)


def test_the_logit_lens_table_escapes_its_texts() -> None:
    page = Page(predictions()._repr_html_())
    assert {tag for tag, _ in page.elements} == {"div", "table", "tr", "th", "td"}
    assert page.text.count(HOSTILE) == 4 * 7 + 1  # each cell's most likely token, and one column header
    assert all("rank 3" in title for title in page.attributes("title"))
    assert "4 layers" in repr(predictions())


def test_a_logit_lens_table_of_another_length_is_refused() -> None:
    from dataclasses import replace

    with pytest.raises(StorageError, match="for 7 tokens"):
        replace(predictions(), tokens=TOKENS[:-1])


def test_a_browser_executes_no_token(tmp_path: Path) -> None:
    """In a real browser, if installed: no dialog, no request and no element from a token."""
    from tests.samples import projected
    from tlcapture.explore.figures.drawing import attention_figure, layers_figure, lens_figure, trajectory_figure

    figures = [
        trajectory_figure([projected()]), layers_figure(projected()), lens_figure(predictions()),
        attention_figure(heads(), 0),
    ]  # fmt: skip
    pieces: list[Any] = [shown(), predictions(), heads()]
    drawn = [
        figures[0].to_html(full_html=False),
        *(each.to_html(full_html=False, include_plotlyjs=False) for each in figures[1:]),
    ]
    page_file = tmp_path / "page.html"
    page_file.write_text("<meta charset=utf-8>" + "".join([piece._repr_html_() for piece in pieces] + drawn))
    with browser() as launched:
        page = launched.new_page()
        requests: list[str] = []
        dialogs: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        page.wait_for_selector("canvas")
        page.wait_for_selector(".js-plotly-plot .xtick")
        ticks = page.locator(".js-plotly-plot").first.locator(".xtick").all_text_contents()
        assert page.locator("img[src=x]").count() == 0
    assert not dialogs + errors
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert HOSTILE in ticks
    assert " $5$".strip() in [tick.strip() for tick in ticks]
