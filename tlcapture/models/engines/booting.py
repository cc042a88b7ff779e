"""Restrictions on TransformerLens while it wraps a model.

For an image or audio checkpoint, TransformerLens loads the processor and, if that fails, runs `pip install
torchvision`. tlcapture captures only text: no processor is loaded, and any attempt to start a process raises an error.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

_PROCESSORS = ("AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor")
# Python's audit events for starting a process.
_PROCESS_EVENTS = frozenset(
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
_lock = threading.Lock()
_guarded = threading.local()


class ProcessRefusedError(PermissionError):
    """Loading a model tried to start a process."""


@contextmanager
def text_only() -> Iterator[None]:
    """Block processes and processors in this thread while the context is active; other threads are not affected."""
    _install_audit_hook()
    with _lock, ExitStack() as stack:
        for name in _PROCESSORS:
            stack.enter_context(_without_processor(name))
        _guarded.active = True
        try:
            yield
        finally:
            _guarded.active = False


@cache
def _install_audit_hook() -> None:
    """Refuse to start processes from guarded threads; the hook stays installed until this process ends."""

    # The defaults keep these names available to calls at interpreter shutdown, when module globals may be gone.
    def refuse(
        event: str, args: tuple[Any, ...], starts: frozenset[str] = _PROCESS_EVENTS, guarded: Any = _guarded
    ) -> None:
        if event in starts and getattr(guarded, "active", False):
            raise ProcessRefusedError(f"loading a model must not start a process: {_command(event, args)}")

    sys.addaudithook(refuse)


def _command(event: str, args: tuple[Any, ...]) -> str:
    words = args[1] if event in ("subprocess.Popen", "os.posix_spawn", "os.exec") and len(args) > 1 else args[:1]
    return " ".join(map(str, words)) if isinstance(words, list | tuple) and words else str(words or event)


@contextmanager
def _without_processor(name: str) -> Iterator[None]:
    """Make `from_pretrained` of a transformers class return `None` in guarded threads while the context is active."""
    import transformers

    try:
        kind = getattr(transformers, name)
        original = vars(kind)["from_pretrained"]
    except Exception:  # a dependency is missing or broken, so the class cannot load a processor
        yield
        return

    def from_pretrained(*args: Any, **options: Any) -> Any:
        return None if getattr(_guarded, "active", False) else original.__get__(None, kind)(*args, **options)

    kind.from_pretrained = staticmethod(from_pretrained)
    try:
        yield
    finally:
        kind.from_pretrained = original
