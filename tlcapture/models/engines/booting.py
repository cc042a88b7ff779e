"""Restrictions on TransformerLens while it wraps a model.

For an image or audio checkpoint, TransformerLens loads the processor and, if that fails, runs `pip install
torchvision`. tlcapture captures only text: no processor is loaded, and any attempt to start a process raises an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tlcapture.models.processes import is_guarded, no_processes

_PROCESSORS = ("AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor")
_lock = threading.Lock()


@contextmanager
def text_only() -> Iterator[None]:
    """Block processes and processors in this thread while the context is active; other threads are not affected."""
    with _lock, ExitStack() as stack:
        for name in _PROCESSORS:
            stack.enter_context(_without_processor(name))
        with no_processes():
            yield


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
        return None if is_guarded() else original.__get__(None, kind)(*args, **options)

    kind.from_pretrained = staticmethod(from_pretrained)
    try:
        yield
    finally:
        kind.from_pretrained = original
