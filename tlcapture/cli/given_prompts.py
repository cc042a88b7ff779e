"""Prompts given to `capture` itself: as text, on standard input, or in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.grouping import together
from tlcapture.errors import InputError

if TYPE_CHECKING:
    from tlcapture.prompts.prompt_sets import PromptSet

given_prompt_options = together(
    click.option(
        "--prompt",
        metavar="TEXT",
        multiple=True,
        help="A prompt, captured as the next one of the prompt set adhoc; repeatable. -: standard input.",
    ),
    click.option(
        "--prompt-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        multiple=True,
        help="A prompt from a text file, or a conversation from a .json file of messages; repeatable.",
    ),
)


def given_prompts(texts: Sequence[str], files: Sequence[Path]) -> PromptSet:
    """The prompts of `--prompt` and then those of `--prompt-file`, numbered from 1 as prompts of the set `adhoc`.

    Raises `InputError` for text that is not UTF-8 or not valid as a prompt.
    """
    from tlcapture.prompts.prompt_sets import adhoc

    if texts.count("-") > 1:
        raise InputError("--prompt -: standard input can be read once")
    read: list[Any] = [_standard_input() if text == "-" else text for text in texts]
    return adhoc([*read, *(_read(path) for path in files)])


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode().rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt -: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _read(path: Path) -> Any:
    """The text of a file, or the messages of a `.json` file."""
    try:
        text = path.read_bytes().decode()
        content = json.loads(text) if path.suffix == ".json" else text.rstrip("\n")
    except OSError as error:
        raise InputError(f"--prompt-file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--prompt-file {path}: not JSON ({error})") from None
    if isinstance(content, dict):
        content = content.get("messages")
    if not isinstance(content, str | list):
        raise InputError(f'--prompt-file {path}: expected a list of messages, or an object with "messages"')
    return content
