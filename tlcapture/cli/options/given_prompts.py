"""Prompts given to `capture` itself: as text, on standard input, or in files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcapture.cli.options.grouping import option
from tlcapture.cli.options.types import LocalPath, Text
from tlcapture.errors import InputError, StorageError
from tlcapture.text import decoded

if TYPE_CHECKING:
    from tlcapture.prompts.prompt_sets import PromptSet


@dataclass(frozen=True)
class GivenPrompts:
    """Prompts as texts and in files."""

    prompt: tuple[str, ...] = option(
        "--prompt",
        type=Text(),
        metavar="TEXT",
        multiple=True,
        help="A prompt, added to the prompt set adhoc; repeatable. -: read it from standard input.",
    )
    prompt_file: tuple[Path, ...] = option(
        "--prompt-file",
        type=LocalPath(exists=True, dir_okay=False),
        metavar="FILE",
        multiple=True,
        help="A prompt from a text file, a conversation from a .json file of messages, or one from each line of a "
        ".jsonl file; repeatable.",
    )

    @property
    def are_given(self) -> bool:
        """Whether there are any."""
        return bool(self.prompt or self.prompt_file)

    def read(self) -> PromptSet:
        """The prompts of `--prompt` and then those of `--prompt-file`, numbered from 1 as prompts of the set `adhoc`.

        Raises `InputError` for text that is not UTF-8 or not valid as a prompt.
        """
        from tlcapture.prompts.prompt_sets import adhoc

        if self.prompt.count("-") > 1:
            raise InputError("--prompt -: standard input can be read once")
        texts = [("--prompt -", _standard_input()) if text == "-" else ("--prompt", text) for text in self.prompt]
        return adhoc([*texts, *(each for path in self.prompt_file for each in _read(path))])


def _standard_input() -> str:
    name = "--prompt -"
    if sys.stdin is None:
        raise InputError(f"{name}: standard input is closed")
    try:
        return _text(sys.stdin.buffer.read(), name)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None


def _read(path: Path) -> list[tuple[str, Any]]:
    """The text of a file, the messages of a `.json` file, or those of each line of a `.jsonl` file.

    Each is after the option that names it.
    """
    name, kind = f"--prompt-file {path}", path.suffix.lower()
    try:
        if kind == ".json":
            from tlcapture.storage.files import read_json

            return [(name, _messages(read_json(path, exact=True), name))]
        data = path.read_bytes()
        if kind != ".jsonl":
            return [(name, _text(data, name))]
        return [(f"{name}:{number}", content) for number, content in _lines(data, path)]
    except StorageError as error:
        raise InputError(f"--prompt-file {error}") from None
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None


def _lines(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the prompt, a text or messages, of each line that is not empty."""
    from tlcapture.storage.json_text import parsed

    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            place = Path(f"{path}:{number}")
            yield number, _messages(parsed(line, place, exact=True), f"--prompt-file {place}")


def _messages(content: Any, name: str) -> Any:
    if isinstance(content, dict) and content.keys() == {"messages"}:
        content = content["messages"]
    if not isinstance(content, str | list):
        keys = f", found {', '.join(sorted(content))}" if isinstance(content, dict) else ""
        raise InputError(f'{name}: expected a list of messages, or an object with "messages" alone{keys}')
    return content


def _text(data: bytes, name: str) -> str:
    """A text without byte order mark and last newlines; the line endings of Windows are newlines."""
    try:
        return decoded(data).replace("\r\n", "\n").rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
