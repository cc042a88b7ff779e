"""The page in a real browser on conversations of which only some tokens were kept: gaps, and no error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.browser import Watched, browser, server
from tests.test_chat_templates import AGAIN, ANSWER, SYSTEM, USER

Run = Callable[..., Result]
TALKS = ("--experiment", "exp", "--prompt-set", "talks")
HERE = "experiment=exp&set=talks&prompt=1&trait=tone/loud"
VIEWS = ("dynamics", "layers", "lens", "attention", "compare")
FIRST, NONE = r"tokens \d+ to \d+ of \d+ were kept", r"none of \d+ tokens was kept"


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with browser() as launched:
        yield launched.new_context(viewport={"width": 1366, "height": 900})


@pytest.fixture
def talks(data: Path) -> None:
    """The prompt set `talks` of a conversation and a text."""
    prompts = [{"id": 1, "messages": [SYSTEM, USER, ANSWER, AGAIN]}, {"id": 2, "text": "what?"}]
    (data / "datasets/inference/talks.json").write_text(json.dumps(prompts))


def test_views_leave_gaps_for_tokens_that_were_not_kept(
    extract: Run, capture: Run, tlcapture: Run, data: Path, talks: None, context: Any, tmp_path: Path
) -> None:
    extract()
    kept = ("--attention", "--logit-lens", "--tokens", "first:3")
    assert capture(*kept, prompts=TALKS[2:]).exit_code == 0
    with server(data, "exp") as (base, _):
        page = Watched(context, base)
        look(page, FIRST)
        assert tlcapture("project", *TALKS).exit_code == 0  # dynamics are null then, and means of spans
        page.page.reload()
        look(page, FIRST, ("dynamics", "layers", "compare"))
    assert tlcapture("project", *TALKS, "--dynamics-only").exit_code == 0
    file = tmp_path / "page.html"
    assert tlcapture("view", "--experiment", "exp", "--export", file).exit_code == 0
    look(Watched(context, file.as_uri()), FIRST)


def test_views_of_a_capture_without_activations_say_so(
    extract: Run, capture: Run, tlcapture: Run, data: Path, talks: None, context: Any, tmp_path: Path
) -> None:
    extract()
    assert capture("--attention", "--logit-lens", "--tokens", "100:", prompts=TALKS[2:]).exit_code == 0
    file = tmp_path / "page.html"
    assert tlcapture("view", "--experiment", "exp", "--export", file).exit_code == 0
    look(Watched(context, file.as_uri()), NONE)


def look(page: Watched, kept: str, views: tuple[str, ...] = VIEWS) -> None:
    """Go through views, and from the first token kept to one that was not."""
    for view in views:
        page.open(f"view={view}&{HERE}")
        if view != "lens":
            page.page.focus("#strip .token[tabindex='0']")
            page.press("ArrowRight", "ArrowLeft")
        assert page.page.locator("#strip .token.of-user").count() > 0
        shown = page.text("main")
        assert "NaN" not in shown
        assert view == "compare" or (view == "lens" and kept == FIRST) or re.search(kept, shown), shown
    assert page.wrong == []
