"""A headless Chromium for tests of the page, and the page's own server, both as users run them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def chromium() -> str:
    """Where Chromium is; the test is skipped where there is none, unless TLCAPTURE_NEEDS_BROWSER is set."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        if os.environ.get("TLCAPTURE_NEEDS_BROWSER"):
            pytest.fail("no Chromium on the path")
        pytest.skip("no Chromium on the path: install Debian's 'chromium' to test the page")
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright."""
    executable = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=_FLAGS)
        yield launched
        launched.close()


@contextmanager
def server(root: Path, experiment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`tlcapture view` as a command; its address without the state, and its process."""
    words = ["view", "--experiment", experiment, "--root", str(root), "--no-browser"]
    code = "from tlcapture.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        yield said.split(" at ")[1].split("#")[0], process
    finally:
        process.terminate()
        process.wait(timeout=10)


class Watched:
    """A page of which everything is noted that must not happen: errors, and requests to elsewhere."""

    def __init__(self, context: Any, base: str):
        self.base = base
        self.page = context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.extend([message.text] * (message.type == "error")))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("dialog", lambda dialog: self.wrong.append(f"dialog {dialog.message}"))

    def _note(self, url: str) -> None:
        if not url.startswith((self.base, "data:", "blob:", "about:")):
            self.wrong.append(f"request to {url}")

    def violations(self) -> list[dict[str, Any]]:
        """What axe-core, with its default rules, finds on the page: each with `id`, `impact` and `nodes`."""
        found = importlib.util.find_spec("axe_playwright_python")
        if found is None or found.origin is None:
            pytest.skip("axe-playwright-python is not installed")
        self.page.evaluate((Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8"))
        return list(self.page.evaluate("axe.run(document).then((result) => result.violations)"))

    def open(self, state: str) -> None:
        self.page.goto(f"{self.base}#{state}")
        self.settled()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
            self.settled()

    def settled(self) -> None:
        """Wait until the view shows what the state says, and is drawn."""
        shown = "document.documentElement.dataset.shown === location.hash"
        for _ in range(100):
            self.page.wait_for_selector("html[data-ready=yes]", timeout=20_000)
            if self.page.evaluate(shown):
                break
            self.page.wait_for_timeout(20)
        self.page.wait_for_selector(".plot[data-drawn=no]", state="detached", timeout=20_000)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def traces(self, number: int = 0) -> list[dict[str, Any]]:
        """The data of a figure, as Plotly has them, once it is drawn: what stands out may let a view be drawn anew."""
        code = "number => document.querySelectorAll('.plot')[number]?.data?.map(t => JSON.parse(JSON.stringify(t)))"
        return list(self.page.wait_for_function(code, arg=number, timeout=20_000).json_value())
