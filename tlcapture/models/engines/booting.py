"""What TransformerLens may not do while it puts its hooks around a model.

For a checkpoint of images or audio it loads the processor of those, and where that fails it runs `pip install
torchvision`. Text alone is captured here: no processor is loaded, and whatever would start a process is refused.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

_PROCESSORS = ("AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor")
# The audit events of everything in Python that starts a process.
_STARTS = frozenset(
    [
        "subprocess.Popen",
        "os.system",
        "os.fork",
        "os.forkpty",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "pty.spawn",
    ]
)
_one_at_a_time = threading.Lock()
_guarded = threading.local()


class ProcessRefusedError(PermissionError):
    """A process that a model's loading would have started."""


@contextmanager
def text_only() -> Iterator[None]:
    """Within the context this thread starts no process and is given no processor; other threads are not disturbed."""
    _watch()
    with _one_at_a_time, ExitStack() as stack:
        for name in _PROCESSORS:
            stack.enter_context(_withheld(name))
        _guarded.here = True
        try:
            yield
        finally:
            _guarded.here = False


@cache
def _watch() -> None:
    """Have this process refuse, once and for all, what a guarded thread would start."""

    def refuse(event: str, args: tuple[Any, ...], starts: frozenset[str] = _STARTS, guarded: Any = _guarded) -> None:
        if event in starts and getattr(guarded, "here", False):
            raise ProcessRefusedError(f"loading a model starts no process, and it would start {_command(event, args)}")

    sys.addaudithook(refuse)


def _command(event: str, args: tuple[Any, ...]) -> str:
    words = args[1] if event in ("subprocess.Popen", "os.posix_spawn", "os.exec") and len(args) > 1 else args[:1]
    return " ".join(map(str, words)) if isinstance(words, list | tuple) and words else str(words or event)


@contextmanager
def _withheld(name: str) -> Iterator[None]:
    """Within the context `from_pretrained` of one of transformers' classes gives a guarded thread `None`."""
    import transformers

    try:
        kind = getattr(transformers, name)
        original = vars(kind)["from_pretrained"]
    except Exception:  # what it needs is missing or broken, so that nobody is given one
        yield
        return

    def from_pretrained(*args: Any, **options: Any) -> Any:
        return None if getattr(_guarded, "here", False) else original.__get__(None, kind)(*args, **options)

    kind.from_pretrained = staticmethod(from_pretrained)
    try:
        yield
    finally:
        kind.from_pretrained = original
