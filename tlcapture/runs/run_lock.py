"""The lock of a run: if two runs would write the same files, the second waits, and says so.

Runs of different shares of a prompt set (`--shard`) write different files and can run at the same time. Each thing to
write, such as the captures of a prompt set, has one lock file for all of it (its gate) and one for each share:

1. A run of all of it holds the gate until it ends, and starts when no run of a share is active.
2. A run of a share holds the lock of the share until it ends, and the gate only while it starts.
3. It starts when no run of another division is active, since that may have the same prompts: 1/3 waits for 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tlcapture.runs.prompt_shares import PromptShare
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.locks import holder, locked


@contextmanager
def run_lock(run: Run, what: str, share: PromptShare | None = None, division: str = "shard") -> Iterator[bool]:
    """Hold the lock for writing `what`, or a share of it; yields whether another run held it first.

    Args:
        what: the files to write, for example `captures of single_trait`.
        share: the share of the prompts that is written; `None` for all of it.
        division: the kind of division into shares; runs of different divisions wait for each other.
    """
    waits: list[bool] = []
    layout = run.layout

    def on_wait(lock: Path) -> None:
        if not waits:
            by = f" ({found})" if (found := holder(lock)) is not None else ""
            run.line(f"another run is writing {what} in {layout.experiment}{by}: waiting for it to end")
        waits.append(True)

    name = what.replace(" ", "-")
    if share is None:
        gate = layout.lock(name)
        with locked(gate, partial(on_wait, gate)):
            _wait_for_shares(layout, name, "", on_wait)
            yield bool(waits)
        return
    prefix = f"{division}-of-{share.count}-"
    with ExitStack() as own:
        gate, own_lock = layout.lock(name), layout.share_lock(name, f"{prefix}{share.number}")
        with locked(gate, partial(on_wait, gate)):
            _wait_for_shares(layout, name, prefix, on_wait)
            own.enter_context(locked(own_lock, partial(on_wait, own_lock)))
        yield bool(waits)


def _wait_for_shares(layout: Layout, name: str, prefix: str, on_wait: Callable[[Path], object]) -> None:
    """Wait until no share of `name` is being written, except those whose lock name begins with a given `prefix`."""
    for path in layout.share_locks(name):
        if not (prefix and path.stem.startswith(prefix)):
            with locked(path, partial(on_wait, path)):
                pass
