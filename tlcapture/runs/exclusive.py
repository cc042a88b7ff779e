"""One run at a time: of two that would write the same files, the second waits and says so.

Shards of one prompt set write different files and run side by side. Three rules do it, with one lock file
for the set (its gate) and one for each shard:

1. A whole run holds the gate to its end, and begins when no shard is running.
2. A shard holds its own lock to its end, and the gate only while it begins.
3. It begins when no shard of another division is running, whose prompts may be the same: 1/3 waits for 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tlcapture.runs.run import Run
from tlcapture.runs.shards import Shard
from tlcapture.storage.layout import Layout
from tlcapture.storage.locks import locked


@contextmanager
def alone(run: Run, what: str, shard: Shard | None = None, division: str = "shard") -> Iterator[bool]:
    """Be the only run that writes `what` (say, `captures of single_trait`), or a shard of it; yields whether it had
    to wait. `division` tells apart what is divided in different ways."""
    said: list[bool] = []
    layout = run.layout

    def say() -> None:
        if not said:
            run.line(f"another run is writing {what} in {layout.experiment}: waiting for its end")
        said.append(True)

    name = what.replace(" ", "-")
    if shard is None:
        with locked(layout.lock(name), say):
            _wait_for_shards(layout, name, "", say)
            yield bool(said)
        return
    same = f"{division}-of-{shard.count}-"
    with ExitStack() as own:
        with locked(layout.lock(name), say):
            _wait_for_shards(layout, name, same, say)
            own.enter_context(locked(layout.shard_lock(name, f"{same}{shard.number}"), say))
        yield bool(said)


def _wait_for_shards(layout: Layout, name: str, same: str, say: Callable[[], object]) -> None:
    """Wait until no shard of `name` runs, but those whose lock's name begins with `same`."""
    for path in layout.shard_locks(name):
        if not (same and path.stem.startswith(same)):
            with locked(path, say):
                pass
