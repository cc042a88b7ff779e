"""Asking the hub for the commit of a revision, with an answer or a refusal within a few seconds.

The hub's own client retries for up to a minute where there is no network.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import quote

from tlcapture.errors import ModelError

_PATIENCE = 2.5  # seconds; HF_HUB_ETAG_TIMEOUT, the hub client's own option, overrides it


def is_offline() -> bool:
    """Whether the user has switched the network off, with `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


@dataclass(frozen=True)
class Revision:
    """The hub's answer about a repository's revision: its commit, and the names of its files."""

    commit: str
    files: tuple[str, ...]


def ask(repository: str, revision: str) -> Revision:
    """Ask the hub about a repository's revision.

    Raises `ModelError` with the reason, to continue a sentence, if the hub does not answer or does not have it.
    """
    from huggingface_hub.constants import ENDPOINT

    if is_offline():
        raise ModelError("and HF_HUB_OFFLINE is set")
    answers: list[Revision | ModelError] = []
    # In another thread, since neither the resolver nor a slow trickle of bytes keeps to a timeout.
    thread = threading.Thread(target=lambda: answers.append(_answer(repository, revision)), daemon=True)
    thread.start()
    thread.join(_patience())
    found = answers[0] if answers else ModelError(f"and {ENDPOINT} does not answer within {_patience():g} s")
    if isinstance(found, ModelError):
        raise found
    return found


def _patience() -> float:
    try:
        return float(os.environ["HF_HUB_ETAG_TIMEOUT"])
    except (KeyError, ValueError):
        return _PATIENCE


def _answer(repository: str, revision: str) -> Revision | ModelError:
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT

    token = get_token()
    request = urllib.request.Request(
        f"{ENDPOINT}/api/models/{repository}/revision/{quote(revision, safe='')}",
        headers={"User-Agent": "tlcapture", **({"Authorization": f"Bearer {token}"} if token else {})},
    )
    try:
        with urllib.request.urlopen(request, timeout=_patience()) as response:
            found = json.load(response)
        return Revision(str(found["sha"]), tuple(str(file["rfilename"]) for file in found["siblings"]))
    except urllib.error.HTTPError as error:
        return ModelError(_refusal(error.code, ENDPOINT))
    except OSError as error:
        reason = getattr(error, "reason", error)
        return ModelError(f"and {ENDPOINT} cannot be reached ({getattr(reason, 'strerror', None) or reason})")
    except (ValueError, KeyError, TypeError):
        return ModelError(f"and {ENDPOINT} does not answer like a hub")


def _refusal(code: int, endpoint: str) -> str:
    if code in (401, 403):
        return (
            f"and {endpoint} has no such model, or it is gated or private: accept its terms there, then log in with "
            "'hf auth login' or set HF_TOKEN"
        )
    return f"and {endpoint} has no such model or revision" if code == 404 else f"and {endpoint} answered HTTP {code}"
